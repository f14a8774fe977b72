"""Sets of cases that several checks share."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from moe_routing.conformance.cases import LAYOUTS, Case
from moe_routing.conformance.pairwise import MANY_TOKENS, everything, pairwise
from moe_routing.conformance.rows import KINDS
from moe_routing.conformance.variants import BUILT_IN, VARIANTS, fits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from moe_routing.conformance.cases import Profile

SIZES = ((64, 8, "float32"), (72, 16, "bfloat16"), (512, 8, "float16"))
"""E, K and dtype that every variant has.

Two group counts divide each E, and the groups of 72 have odd sizes.
"""
FEW = ("topk_softmax", "gemma4", "grouped_sigmoid_bias", "sqrtsoftplus_bias")
"""For what takes long on every family: with operands and without, with groups and without."""
FAMILIES = tuple(variant for variant in VARIANTS if "/" not in variant)
"""Every family as it stands, plug-ins' families too: for what does not depend on a modifier."""


def of_every_variant(
    profile: Profile,
    *,
    kind: str = "ordinary",
    variants: Iterable[str] = VARIANTS,
    tokens: int = 33,
) -> Iterator[Case]:
    """Yield cases of every variant: of one size for smoke, two for quick, more for full."""
    for variant in variants:
        for num_experts, topk, dtype in SIZES[: {"smoke": 1, "quick": 2, "full": 3}[profile]]:
            # Sparsemixer has 2, as in models.
            k = topk if fits(VARIANTS[variant], num_experts, topk) else 2
            yield Case(
                variant=variant,
                num_experts=num_experts,
                topk=k,
                num_tokens=tokens,
                dtype=dtype,
                kind=kind,
            )


def rows_of(*kinds: str) -> Callable[[Profile], Iterator[Case]]:
    """Return the cases of every variant on rows of those kinds."""
    unknown = set(kinds) - set(KINDS)
    if unknown:
        msg = f"kinds: expected some of {sorted(KINDS)}, got {sorted(unknown)}"
        raise ValueError(msg)
    return lambda profile: (case for kind in kinds for case in of_every_variant(profile, kind=kind))


def sizes_and_dtypes(profile: Profile) -> Iterable[Case]:
    """Return the pairwise sample (all of them for full), or one case a variant for smoke."""
    if profile == "smoke":
        return of_every_variant(profile)
    if profile == "full":
        return everything()
    brought = [variant for variant in VARIANTS if variant not in BUILT_IN]
    return [*pairwise(), *of_every_variant("full", variants=brought)]


def of_every_family(profile: Profile, *, tokens: int = 33, dtype: str = "float32") -> list[Case]:
    """Return a case of every family in the smallest size.

    Of two of them for smoke, and of every variant for full.
    """
    names = {"smoke": FEW[:2], "quick": FAMILIES, "full": tuple(VARIANTS)}[profile]
    return [
        case.but(dtype=dtype) for case in of_every_variant("smoke", variants=names, tokens=tokens)
    ]


def many_tokens(profile: Profile) -> list[Case]:
    """Return cases with enough tokens to fill any device, for accelerators; none for smoke."""
    cases = {"smoke": (), "quick": FEW, "full": tuple(VARIANTS)}[profile]
    return [
        case.but(dtype="bfloat16")
        for case in of_every_variant("smoke", variants=cases, tokens=MANY_TOKENS)
    ]


def many_slots(profile: Profile) -> Iterator[Case]:
    """Yield a family with shared experts and one without, with many slots; none for smoke."""
    if profile != "smoke":
        for case in of_every_variant("smoke", variants=("topk_softmax", "gemma4/shared")):
            yield case.but(valid="mask", num_tokens=600)


def in_every_layout(profile: Profile) -> Iterator[Case]:
    """Yield every family in every layout, with one token and with some."""
    for case in of_every_family(profile):
        for layout in LAYOUTS:
            for tokens in (1, 33):
                yield case.but(layout=layout, num_tokens=tokens)


where = partial  # `where(of_every_variant, variants=...)` reads as it is meant
