"""Sets of cases that several checks share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_routing.conformance.permutation.cases import PermuteCase

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.permutation.cases import Case

LAYOUTS: tuple[Mapping[str, Any], ...] = (
    {},
    {"block": 4, "ids": "padding"},
    {"capacity": 7, "masked": True},
    {"capacity": 5, "ids": "other_ranks"},
)
"""Every layout, and in all but the first pairs without a place."""

PERMUTED: tuple[Mapping[str, Any], ...] = ({}, {"quantize": True, "columns": 200})
COMBINED: tuple[Mapping[str, Any], ...] = ({}, {"weights": ""}, {"weights": "bfloat16"})
"""What else can be asked for."""


def in_every_form(
    operation: type[Case],
    profile: Profile,
    **words: Any,  # noqa: ANN401 -- fields of a Case
) -> Iterator[Case]:
    """Yield a case of every layout and of whatever else can be asked for; some for smoke."""
    options = PERMUTED if operation is PermuteCase else COMBINED
    for n, layout in enumerate(LAYOUTS):
        for m, option in enumerate(options):
            if profile != "smoke" or m == n % len(options):
                yield operation(**{**layout, **option, **words})


def of_either_dtype(operation: type[Case], profile: Profile, **words: Any) -> Iterator[Case]:  # noqa: ANN401 -- likewise
    """Yield the same of 16-bit rows and of float32 ones, in turn for smoke."""
    for n, case in enumerate(in_every_form(operation, profile, **words)):
        for m, dtype in enumerate(("bfloat16", "float32")):
            if profile != "smoke" or m == n % 2:
                yield case.but(dtype=dtype)
