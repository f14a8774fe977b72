"""Clauses 1 to 3: logits within their bound, what is routed, and what is rounded before."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance.gating import _sets
from moe_routing.conformance.gating._check import check
from moe_routing.conformance.gating.calls import bits_of, must_be_same
from moe_routing.conformance.gating.cases import FACTORS, HIDDEN, Case
from moe_routing.conformance.requirements import require
from moe_routing.conformance.variants import VARIANTS
from moe_routing.gating import GateOutput
from moe_routing.gating.problem import FLOATS
from moe_routing.reference import replicas_oracle
from moe_routing.reference.counts_oracle import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.under_test import BackendUnderTest

SIZES = (
    (64, 8, 300, 33), (128, 8, 2816, 17), (256, 8, 7168, 5), (3, 2, 1, 9), (1, 1, 129, 4),
    (1024, 10, 64, 3), (60, 6, 1000, 130), (5, 2, 16384, 2), (32, 4, 2880, 1), (64, 8, 128, 1025),
    (128, 8, 256, 1100),
)  # fmt: skip
"""E, K, H and T."""


def _sized(profile: Profile) -> Iterator[Case]:
    for experts, topk, columns, tokens in SIZES[: 4 if profile == "smoke" else len(SIZES)]:
        for dtype, invariant in product(FLOATS, _sets.ORDERS):
            yield Case(
                variant="softmax_topk", num_experts=experts, topk=topk, columns=columns,
                num_tokens=tokens, dtype=dtype, invariant=invariant,
            )  # fmt: skip


@check(1, _sized)
def logits_of_every_size_are_within_their_bound(under_test: BackendUnderTest, case: Case) -> None:
    """Logits are within their bound, for H of 1 to 16,384 and E of 1 to 1,024."""
    case.make(under_test.device).checked(under_test)


def _factored(profile: Profile) -> Iterator[Case]:
    together = (("norm", "input_scale", "multiplier"), FACTORS)
    for n, factors in enumerate((*((factor,) for factor in FACTORS), *together)):
        for dtype, invariant in product(FLOATS, _sets.ORDERS):
            case = Case(factors=factors, dtype=dtype, invariant=invariant, columns=257 + n)
            yield case
            if profile != "smoke":
                yield case.but(float32_weight=True, columns=2880)


@check(1, _factored)
def every_factor_is_in_the_logits(under_test: BackendUnderTest, case: Case) -> None:
    """Bias, norm, its weight, scale and multiplier are in the logits, alone and together."""
    case.make(under_test.device).checked(under_test)


def _valued(profile: Profile) -> Iterator[Case]:
    for hidden, form in product(HIDDEN, _sets.FORMS[:3] if profile == "smoke" else _sets.FORMS):
        for invariant in _sets.ORDERS:
            yield Case(**{**form, "hidden": hidden, "invariant": invariant, "columns": 1025})


@check(1, _valued)
def values_of_every_kind_are_summed_in_float32(under_test: BackendUnderTest, case: Case) -> None:
    """Outliers, cancelling terms, integers, tiny and large values are summed within the bound."""
    case.make(under_test.device).checked(under_test)


@check(2, _sets.of_every_variant)
def every_family_routes_the_logits(under_test: BackendUnderTest, case: Case) -> None:
    """Weights and ids are those of the returned logits, for every family and modifier."""
    case.make(under_test.device).checked(under_test)


@check(2, lambda profile: [*_sets.in_every_form(profile), *_sets.of_every_variant(profile)])
def without_logits_the_same_is_routed(under_test: BackendUnderTest, case: Case) -> None:
    """A call that does not ask for logits has the bits of one that does."""
    call = case.make(under_test.device)
    right = call.checked(under_test)
    weights, ids = call.gate(under_test)(**call.arguments)
    must_be_same(GateOutput(weights, ids, right.logits), right, "without logits")


@check(2, _sets.of_every_variant)
def what_is_gated_is_counted(under_test: BackendUnderTest, case: Case) -> None:
    """Each call adds the slots of logical experts to ``counts``, and gates as without."""
    call = case.make(under_test.device)
    right = call.checked(under_test)
    operands: Any = {**call.operands, "expert_map": None}
    logical = call.but(operands=operands).checked(under_test, "without a map").ids
    experts = len(call.projection.router_weight) + call.spec.shared_experts
    counts = torch.full((experts,), 5, device=call.device)
    for times in (1, 2, 3):
        made = call.gate(under_test)(**call.arguments, counts=counts, return_logits=True)
        must_be_same(made, right, f"call {times} with counts")
        wrong = (counts != 5 + times * counted(logical, experts)).nonzero()
        require(not len(wrong), f"call {times}: the counts of experts {wrong.tolist()[:3]} are off")


@check(2, _sets.of_every_variant)
def what_is_gated_gets_its_replica(under_test: BackendUnderTest, case: Case) -> None:
    """Row t gets replica ``t % replica_count`` of each expert, in every call and with a plan."""
    call = case.make(under_test.device)
    operands: Any = {**call.operands, "expert_map": None}
    call = call.but(operands=operands)
    logical = call.checked(under_test)
    experts = len(call.projection.router_weight) + call.spec.shared_experts
    replicas = {
        "logical_to_physical": torch.arange(3 * experts, device=call.device).view(experts, 3),
        "replica_count": torch.arange(experts, device=call.device) % 3 + 1,
    }
    ids = replicas_oracle.physical(logical.ids, **replicas).to(logical.ids.dtype)
    right = GateOutput(logical.weights, ids, logical.logits)
    gate: Any = call.gate(under_test)
    for times in (1, 2, 3):
        made = gate(**call.arguments, **replicas, return_logits=True)
        must_be_same(made, right, f"call {times} with replicas")
    if "plan" in under_test.spec.factories:
        planned = gate.with_plan(**call.arguments, **replicas, num_experts=3 * experts)
        must_be_same(
            GateOutput(planned.weights, planned.ids, right.logits), right, "with a plan of replicas"
        )


def _with_shared(profile: Profile) -> Iterator[Case]:
    for case in _sets.of_every_variant(profile):
        if VARIANTS[case.variant].shared_experts:
            yield case


@check(2, _with_shared)
def what_is_gated_has_its_shared_weights(under_test: BackendUnderTest, case: Case) -> None:
    """Shared columns hold the call's weights, in every call and with a plan; padding has 0."""
    call = case.make(under_test.device)
    made = call.checked(under_test)
    count = call.spec.shared_experts
    shared = torch.linspace(-2.0, 3.0, len(made.ids) * count, device=call.device).view(-1, count)
    padding = made.weights[:, -count:] == 0
    columns = shared.masked_fill(padding, 0.0)
    weights = torch.cat([made.weights[:, :-count], columns], dim=1)
    right = GateOutput(weights, made.ids, made.logits)
    gate: Any = call.gate(under_test)
    for times in (1, 2, 3):
        made = gate(**call.arguments, shared_weights=shared, return_logits=True)
        must_be_same(made, right, f"call {times} with shared weights")
    if "plan" in under_test.spec.factories:
        experts = 2 * (len(call.projection.router_weight) + count)
        planned = gate.with_plan(**call.arguments, shared_weights=shared, num_experts=experts)
        made = GateOutput(planned.weights, planned.ids, right.logits)
        must_be_same(made, right, "with a plan and shared weights")


def _equal_rows(profile: Profile) -> Iterator[Case]:
    for case in _sets.in_every_form(profile):
        if case.variant != "grouped_sigmoid_bias":  # whose bias tells equal logits apart
            yield case


@check(2, _equal_rows)
def equal_logits_go_to_the_lower_id(under_test: BackendUnderTest, case: Case) -> None:
    """Of experts with equal logits the lower ids are selected, in their order."""
    call = case.make(under_test.device)
    call = call.with_projection(hidden=torch.zeros_like(call.projection.hidden), router_bias=None)
    made = call.checked(under_test)
    expected = torch.arange(call.topk, device=call.device).expand(len(made.ids), -1)
    require((made.ids == expected).all(), f"expected ids {expected[0].tolist()}")


def _rounded(profile: Profile) -> Iterator[Case]:
    for dtype, hidden in product(("bfloat16", "float16"), HIDDEN):
        too_large = (dtype, hidden) == ("float16", "large")
        if hidden in ("normal", "integers") or too_large or profile != "smoke":
            yield from _sets.in_every_form(profile, hidden=hidden, logits_dtype=dtype)


@check(3, _rounded)
def rounded_logits_are_routed(under_test: BackendUnderTest, case: Case) -> None:
    """Logits are rounded once, before selection; ties among the rounded go to the lower id."""
    call = case.make(under_test.device)
    made = call.checked(under_test)
    if case.invariant:
        exact = call.but(logits_dtype=torch.float32).checked(under_test).logits
        same = (bits_of(exact.to(call.logits_dtype)) == bits_of(made.logits)).all()
        require(same, f"logits are not the float32 logits rounded to {case.logits_dtype}")
