"""Cases that are in no list: sizes, dtypes and layouts drawn at random, from one seed for a run.

The seed is new in every run, unless it is given, and it is in the id of every drawn case and in the
report. The same seed draws the same cases with the same values.
"""

from __future__ import annotations

import contextlib
import random
from contextvars import ContextVar
from typing import TYPE_CHECKING

from moe_routing.conformance.cases import LAYOUTS, Case
from moe_routing.conformance.pairwise import DTYPES
from moe_routing.conformance.variants import VARIANTS, fits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile

MOST_EXPERTS, MOST_TOPK, MOST_TOKENS = 2048, 40, 300
_CASES = {"smoke": 1, "quick": 2, "full": 20}
"""How many cases are drawn for each variant."""


def new_seed() -> int:
    """Draw a seed from the operating system's random numbers: the caller's stay as they are."""
    return random.SystemRandom().getrandbits(32)


_OUTSIDE_A_RUN = new_seed()
_seed: ContextVar[int] = ContextVar("moe_routing_conformance_seed", default=_OUTSIDE_A_RUN)


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw the cases inside the block from that seed, or as before where there is none."""
    token = _seed.set(_seed.get() if seed is None else seed)
    try:
        yield
    finally:
        _seed.reset(token)


def current_seed() -> int:
    """Return the seed of the block, or the process's own outside of one."""
    return _seed.get()


def cases(profile: Profile) -> Iterator[Case]:
    """Yield cases of every variant."""
    seed = current_seed()
    numbers = random.Random(seed)  # noqa: S311 -- not a secret
    for variant in VARIANTS:
        for _ in range(_CASES[profile]):
            yield _case(variant, numbers, seed)


def _case(variant: str, numbers: random.Random, seed: int) -> Case:
    spec = VARIANTS[variant]
    possible: list[int] = []
    while not possible:
        num_experts = spec.num_groups * numbers.randint(1, MOST_EXPERTS // spec.num_groups)
        possible = [k for k in range(1, MOST_TOPK + 1) if fits(spec, num_experts, k)]
    return Case(
        variant=variant,
        num_experts=num_experts,
        topk=numbers.choice(possible),
        num_tokens=numbers.randint(1, MOST_TOKENS),
        dtype=numbers.choice(DTYPES),
        layout=numbers.choice(LAYOUTS),
        ids_dtype=numbers.choice(("int32", "int64")),
        valid=numbers.choice(("all", "int", "tensor")),
        mapped=numbers.choice((False, True)),
        out=numbers.choice((False, True)),
        seed=seed,
    )
