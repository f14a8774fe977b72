"""Sets of cases that several checks share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_routing.conformance.planning.cases import Case

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moe_routing.conformance.cases import Profile

FORMS: tuple[Mapping[str, Any], ...] = (
    {},
    {"block": 16},
    {"capacity": 5},
    {"capacity": 6, "masked": True},
    {"block": 16, "capacity": 5, "drop": "least_weight"},
    {"capacity": 5, "drop": "least_weight"},
    {"capacity": 6, "drop": "least_weight", "masked": True},
)
"""What can be asked of a plan: every layout, and every policy in one layout at least."""


def in_every_form(profile: Profile, **words: Any) -> Iterator[Case]:  # noqa: ANN401 -- fields of a Case
    """Yield a case of every form; for smoke of a layout each."""
    for form in FORMS[:4] if profile == "smoke" else FORMS:
        yield Case(**{**form, **words})
