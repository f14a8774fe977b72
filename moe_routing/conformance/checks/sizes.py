"""Clauses 1 and 2 at sizes that the pairwise sample does not have.

Between its numbers, past them, and at random.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.conformance import drawn
from moe_routing.conformance.cases import Case
from moe_routing.conformance.checks import _sets
from moe_routing.conformance.checks._check import check
from moe_routing.conformance.checks.values import ids_come_in_exact_order
from moe_routing.conformance.variants import VARIANTS, fits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.under_test import BackendUnderTest

SIZES = ((5, 61, 5), (6, 1031, 7), (5, 1999, 5))
"""T, E and K: K and T that no power of two divides, primes for E, and more than 1,024 experts."""
PAST_16_BITS = (1 << 16) + 1
PAST_A_BLOCK = (1 << 16) + (1 << 12) + 1
"""More rows than a 16-bit number counts: by one, and by one more than any block of rows."""


def _case(variant: str, num_tokens: int, num_experts: int, topk: int) -> Case:
    """Return the case with the next E and K that fit.

    E is the next that the groups divide; K is the next below (or above) that fits.
    """
    spec = VARIANTS[variant]
    experts = -(-num_experts // spec.num_groups) * spec.num_groups
    k = next(k for k in (*range(topk, 0, -1), *range(topk, experts + 1)) if fits(spec, experts, k))
    return Case(variant=variant, num_experts=experts, topk=k, num_tokens=num_tokens)


def _between(profile: Profile) -> Iterator[Case]:
    names = {"smoke": _sets.FEW[:2], "quick": _sets.FAMILIES, "full": tuple(VARIANTS)}[profile]
    for variant in names:
        for sizes in SIZES:
            yield _case(variant, *sizes)


@check(1, _between)
def sizes_between_the_usual_are_routed(under_test: BackendUnderTest, case: Case) -> None:
    """Five tokens, five of the experts, a prime number of experts, and more than 1,024 of them."""
    under_test.check(case.make(under_test.device))


@check(1, drawn.cases)
def drawn_sizes_are_routed(under_test: BackendUnderTest, case: Case) -> None:
    """E, K, T, dtype, layout and operands that the run's seed draws.

    The same seed draws them again.
    """
    ids_come_in_exact_order(under_test, case)


def _many_rows(profile: Profile) -> Iterator[Case]:
    few = _sets.FEW[:1] if profile == "smoke" else _sets.FEW
    every = {"smoke": few, "quick": _sets.FAMILIES, "full": tuple(VARIANTS)}[profile]
    for names, tokens in ((few, PAST_16_BITS), (every, PAST_A_BLOCK)):
        for variant in names:
            yield _case(variant, tokens, 16, 2)


@check(1, _many_rows)
def rows_past_65_535_are_routed(under_test: BackendUnderTest, case: Case) -> None:
    """More rows than a 16-bit number counts, on every device.

    The last block of rows is not full.
    """
    under_test.check(case.make(under_test.device))


BIASED = tuple(variant for variant, spec in VARIANTS.items() if spec.needs_bias)
MASKS = ((-1e4,), (-1e9,), (-torch.inf,), (-1e4, -1e9))


def _biased_rows(profile: Profile) -> Iterator[Case]:
    """Yield every biased variant in the smallest size, with many rows.

    They are more than kernels for few rows take.
    """
    return _sets.of_every_variant(
        "full" if profile == "full" else "smoke", variants=BIASED, tokens=4099
    )


@check(2, _biased_rows)
def masked_experts_come_last(under_test: BackendUnderTest, case: Case) -> None:
    """Biases of -1e4, -1e9 or -inf among small ones leave the order of the others exact.

    This holds for many tokens too.
    """
    call = case.make(under_test.device)
    bias = call.operands["bias"]
    assert bias is not None  # noqa: S101 -- for mypy: the variants have one
    every_second = torch.arange(case.num_experts, device=under_test.device) % 2 == 1
    for mask in MASKS:
        values = (
            torch.tensor(mask, device=under_test.device)
            .repeat_interleave(2)
            .repeat(case.num_experts)[: case.num_experts]
        )
        under_test.check(call.but(bias=torch.where(every_second, values, bias.float())))
