"""Clause 18: which replica of its expert a slot gets."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance import streams
from moe_routing.conformance.checks import _sets
from moe_routing.conformance.checks._check import check
from moe_routing.conformance.requirements import require
from moe_routing.conformance.under_test import NotApplicableError, outputs, same_bits
from moe_routing.reference import replicas_oracle
from moe_routing.reference.counts_oracle import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from moe_routing import RoutingOutput
    from moe_routing.conformance.cases import Call, Case, Profile
    from moe_routing.conformance.under_test import BackendUnderTest

DTYPES = (torch.int32, torch.int64)
MOST = 5
PHYSICAL = 4096
"""How many ids a plan knows: more than the tables of the smallest cases have."""
UNUSED = -3
"""What stands in the table beyond an expert's replicas."""


def _replicas(
    call: Call,
    most: int = MOST,
    of_table: torch.dtype = DTYPES[1],
    of_count: torch.dtype = DTYPES[1],
) -> dict[str, Tensor]:
    """Return a table of different physical ids, and from 1 to ``most`` replicas of each expert."""
    length = call.logits.shape[1] + call.spec.shared_experts
    expert, replica = torch.arange(length)[:, None], torch.arange(most)
    count = (expert[:, 0] * 7 + 3) % most + 1
    table = torch.where(replica < count[:, None], 1000 + 11 * expert + replica, UNUSED)
    device = call.logits.device
    return {
        "logical_to_physical": table.to(device, of_table),
        "replica_count": count.to(device, of_count),
    }


def _require(output: Any, plain: RoutingOutput, replicas: dict[str, Tensor], what: str) -> None:  # noqa: ANN401 -- of a call or a plan
    """Require the outputs of the call without replicas, renamed.

    :param plain: has the logical ids.
    """
    require(same_bits(output.weights, plain.weights), f"{what}: not the weights without replicas")
    expected = replicas_oracle.physical(plain.ids, **replicas)
    require(output.ids.dtype == plain.ids.dtype, f"{what}: ids of dtype {output.ids.dtype}")
    wrong = (output.ids.long() != expected).any(-1).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        msg = (
            f"{what}: row {row}: ids {output.ids[row].tolist()}, "
            f"by the table {expected[row].tolist()}; logical ids {plain.ids[row].tolist()}"
        )
        raise AssertionError(msg)


def _routed(profile: Profile) -> Iterator[Case]:
    for case in _sets.of_every_variant(profile):
        yield case.but(valid="tensor")
    for case in _sets.of_every_family(profile):
        yield case.but(num_tokens=1)
        yield case.but(valid="mask", ids_dtype="int64")
        yield case.but(recorded=True, num_tokens=98)
        if profile != "smoke":
            yield case.but(valid="int", layout="transposed")
            yield case.but(num_tokens=0)
    yield from _sets.many_slots(profile)


@check(18, _routed)
def each_row_gets_a_replica_of_its_experts(under_test: BackendUnderTest, case: Case) -> None:
    """Row t gets replica ``t % count`` of each expert, with ``out`` too; -1 stays.

    Weights have the bits of the call without replicas.
    """
    call = case.make(under_test.device)
    plain = under_test.check(call)
    for of_table, of_count in product(DTYPES, DTYPES):
        replicas = _replicas(call, MOST, of_table, of_count)
        tokens, columns = plain.ids.shape
        given = outputs(tokens, columns, call.ids_dtype, under_test.device)
        for times, out in enumerate((None, None, given), 1):
            output = under_test.route(call.but(**replicas), out)
            _require(output, plain, replicas, f"{of_table}, {of_count}, call {times}")


@check(18, _sets.of_every_family)
def a_table_of_one_column_is_a_map(under_test: BackendUnderTest, case: Case) -> None:
    """With R = 1 a call has the bits of one with that column as its ``expert_map``."""
    call = case.but(mapped=True, valid="tensor").make(under_test.device)
    mapped = under_test.check(call)
    expert_map: Any = call.operands["expert_map"]
    ones = torch.ones_like(expert_map)
    output = under_test.route(
        call.but(expert_map=None, logical_to_physical=expert_map[:, None], replica_count=ones)
    )
    same = same_bits(output.ids, mapped.ids) and same_bits(output.weights, mapped.weights)
    require(same, "not the outputs of the call with an expert_map")


@check(18, _sets.of_every_family)
def numbers_of_replicas_are_clamped(under_test: BackendUnderTest, case: Case) -> None:
    """A count below 1 is 1 and one above R is R: nothing is read outside the table."""
    call = case.make(under_test.device)
    plain, replicas = under_test.check(call), _replicas(call)
    for dtype in DTYPES:
        for count in (0, -1, MOST + 1, torch.iinfo(dtype).max, torch.iinfo(dtype).min):
            counts = torch.full_like(replicas["replica_count"], count, dtype=dtype)
            replicas = {**replicas, "replica_count": counts}
            output = under_test.route(call.but(**replicas))
            _require(output, plain, replicas, f"counts of {count}")


@check(18, _sets.of_every_family)
def tables_may_lie_anywhere(under_test: BackendUnderTest, case: Case) -> None:
    """Tables and counts of any stride and offset are read where they lie."""
    call = case.make(under_test.device)
    plain, replicas = under_test.check(call), _replicas(call)
    table, count = replicas.values()
    wide = torch.full((len(table), MOST + 4), UNUSED, dtype=table.dtype, device=table.device)
    wide[:, 3:-1] = table
    for what, some, numbers in (
        ("transposed", table.t().contiguous().t(), count),
        ("a slice", wide[:, 3:-1], count),
        ("every second count", table, count.repeat_interleave(2)[::2]),
    ):
        given = {"logical_to_physical": some, "replica_count": numbers}
        _require(under_test.route(call.but(**given)), plain, given, what)


@check(18, _sets.of_every_family)
def a_call_with_a_plan_plans_replicas(under_test: BackendUnderTest, case: Case) -> None:
    """A first call with a plan and later ones plan the physical ids."""
    if "plan" not in under_test.spec.factories:
        msg = "it does not plan"
        raise NotApplicableError(msg)
    call = case.but(valid="tensor").make(under_test.device)
    plain, replicas = under_test.check(call), _replicas(call)
    for times in (1, 2, 3):
        operands: Any = {**call.operands, **replicas}
        made = under_test.router(call.spec).with_plan(
            call.logits, call.topk, ids_dtype=call.ids_dtype, num_experts=PHYSICAL, **operands
        )
        _require(made, plain, replicas, f"call {times} with a plan")
        planned = made.ids.flatten()
        order = planned.where(planned >= 0, PHYSICAL).sort(stable=True).indices
        pairs = int((planned >= 0).sum())
        require(
            torch.equal(made.plan.order[:pairs].long(), order[:pairs]),
            f"call {times} with a plan: the plan is of other ids",
        )


@check(18, _sets.of_every_family)
def logical_experts_are_counted(under_test: BackendUnderTest, case: Case) -> None:
    """``counts`` grows by the slots of logical experts, whatever replicas they get."""
    call = case.but(valid="tensor").make(under_test.device)
    plain, replicas = under_test.check(call), _replicas(call)
    counts = torch.zeros(case.num_experts, dtype=torch.int64, device=under_test.device)
    output = under_test.route(call.but(**replicas, counts=counts))
    _require(output, plain, replicas, "with counts")
    require(torch.equal(counts, counted(plain.ids, len(counts))), "physical experts are counted")


@check(18, _sets.of_every_family, capability="gradients")
def gradients_flow_past_replicas(under_test: BackendUnderTest, case: Case) -> None:
    """A call with gradients has the ids of one without, and the gradients without replicas."""
    gradients = []
    for renamed in (False, True):
        call = case.make(under_test.device)
        plain, replicas = under_test.check(call), _replicas(call)
        call.logits.requires_grad_()
        output = under_test.route(call.but(**replicas) if renamed else call)
        output.weights.square().sum().backward()
        gradients.append(call.logits.grad)
        if renamed:
            _require(output, plain, replicas, "with gradients")
    first, second = gradients
    assert first is not None  # noqa: S101 -- for mypy: backward has filled them
    assert second is not None  # noqa: S101 -- likewise
    require(torch.equal(first, second), "replicas change the gradient of the logits")


class _Module(torch.nn.Module):
    """A module that routes to replicas, as a model has it."""

    def __init__(self, under_test: BackendUnderTest, call: Call) -> None:
        super().__init__()
        self.route, self.call = under_test.router(call.spec), call

    def forward(
        self, logits: Tensor, replicas: dict[str, Tensor], token_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        operands: Any = {**self.call.operands, "token_ids": token_ids, **replicas}
        weights, ids = self.route(logits, self.call.topk, **operands)
        return weights * 1.0, ids


@check(18, _sets.of_every_family, capability="compile")
def traced_calls_choose_the_same_replicas(under_test: BackendUnderTest, case: Case) -> None:
    """Compiled and exported programs give the ids of the plain call, with each table."""
    call = case.make(under_test.device)
    module, replicas = _Module(under_test, call), _replicas(call)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for some in (call, call.rows(slice(7))):
        _require_runs(under_test, compiled, some, replicas, "a compiled program")
    inputs = (call.logits, replicas, call.operands.get("token_ids"))
    exported: Any = torch.export.export(module, inputs).module()
    _require_runs(under_test, exported, call, replicas, "an exported program")


def _require_runs(
    under_test: BackendUnderTest, program: Any, call: Call, replicas: dict[str, Tensor], what: str,  # noqa: ANN401 -- compiled or exported
) -> None:  # fmt: skip
    plain = under_test.route(call)
    for some in (
        replicas,
        {**replicas, "replica_count": torch.ones_like(replicas["replica_count"])},
    ):
        weights, ids = program(call.logits, some, call.operands.get("token_ids"))
        _require(type(plain)(weights, ids), plain, some, what)


@check(18, _sets.of_every_family, capability="cuda_graphs")
def a_graph_reads_the_table_at_each_replay(under_test: BackendUnderTest, case: Case) -> None:
    """Nothing is read on the host; a replay has the table and counts as they are then."""
    streams.need_cuda(under_test)
    call = case.but(valid="tensor").make(under_test.device)
    replicas = _replicas(call)
    operands: Any = {**call.operands, **replicas}

    def routed() -> RoutingOutput:
        return under_test.router(call.spec)(call.logits, call.topk, **operands)

    under_test.route(call.but(**replicas))
    with streams.without_synchronisation(under_test.device):
        routed()
    graph, output = streams.captured(under_test.device, routed)
    for times in (1, 2):
        call.logits.copy_(call.logits.roll(1, 0).flip(1))
        replicas["logical_to_physical"] += 1
        replicas["replica_count"].copy_(replicas["replica_count"].roll(1))
        streams.replay(graph, under_test.device)
        _require(output, under_test.route(call), replicas, f"replay {times}")
