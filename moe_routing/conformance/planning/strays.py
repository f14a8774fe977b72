"""Clause 2: ids of no expert."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch

import moe_routing
from moe_routing.conformance.planning import _sets, cases, ids
from moe_routing.conformance.planning._check import check
from moe_routing.conformance.planning.cases import Call, Case
from moe_routing.conformance.planning.memory import must_fill_and_keep_to

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.under_test import BackendUnderTest

SIZES = ((33, 8, 64), (257, 6, 60), (1, 2, 257))
"""T, K and E."""


def _outside(profile: Profile) -> Iterator[Case]:
    for tokens, topk, experts in SIZES[: 1 if profile == "smoke" else 3]:
        for kind, dtype in product(ids.OUTSIDE, ("int32", "int64")):
            if dtype == "int32" or kind == "strays":
                for case in _sets.in_every_form(profile, num_tokens=tokens, topk=topk):
                    yield case.but(num_experts=experts, ids=kind, ids_dtype=dtype)


@check(2, _outside)
def ids_of_no_expert_have_no_place(under_test: BackendUnderTest, case: Case) -> None:
    """Ids outside [0, E) have no place, count nowhere, and nothing is written outside a plan."""
    must_fill_and_keep_to(under_test, case.make(under_test.device))


def _wide(profile: Profile) -> Iterator[Case]:
    for case in _sets.in_every_form(profile):
        yield case.but(ids="wide_strays", ids_dtype="int64")


@check(2, _wide)
def wide_ids_are_read_in_64_bits(under_test: BackendUnderTest, case: Case) -> None:
    """An int64 id beyond int32 is of no expert, also where its low 32 bits are one's."""
    must_fill_and_keep_to(under_test, case.make(under_test.device))


@dataclass(frozen=True, slots=True)
class Routed:
    """Ids that come from ``route``, with padding, an expert map and a shared slot.

    :ivar num_experts: of the plan; the router has 64 experts and a shared one.
    """

    num_experts: int
    ids_dtype: str

    @property
    def id(self) -> str:
        """Name for test ids."""
        return f"E{self.num_experts}-{self.ids_dtype}"

    @property
    def family(self) -> str:
        """A plan depends on no routing family."""
        return ""

    def make(self, device: torch.device) -> Call:
        """Route 33 tokens, of which 20 are valid; every second expert is on this rank."""
        experts, tokens = 64, 33
        spec = moe_routing.get_router("softmax_topk").spec.replace(shared_experts=1)
        route = moe_routing.get_router(spec, backend="eager")
        logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0))
        every = torch.arange(experts + 1, dtype=torch.int32)
        here = torch.where(every % 2 == 0, every // 2, -1).to(device)
        routed = route(
            logits.to(device), 8, expert_map=here, num_valid_tokens=20,
            ids_dtype=getattr(torch, self.ids_dtype),
        ).ids  # fmt: skip
        return Call(ids=routed, num_experts=self.num_experts)


def _routed(profile: Profile) -> Iterator[Routed]:
    for experts in (32, 33):  # without and with the shared expert, which is renamed to 32
        for dtype in ("int32", "int64")[: 1 if profile == "smoke" else 2]:
            yield Routed(experts, dtype)


@check(2, _routed)
def ids_of_route_are_planned_as_they_are(under_test: BackendUnderTest, case: Routed) -> None:
    """Padding, other ranks' experts of an expert map and shared slots of ``route`` are planned."""
    call = case.make(under_test.device)
    for form in _sets.FORMS:
        options = {name: value for name, value in form.items() if name != "drop"}
        cases.checked(under_test, call.but(**options))
