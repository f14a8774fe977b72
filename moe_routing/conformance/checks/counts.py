"""Clause 17: counts of what each expert got."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance import streams
from moe_routing.conformance.checks import _sets
from moe_routing.conformance.checks._check import check
from moe_routing.conformance.requirements import require
from moe_routing.conformance.under_test import NotApplicableError, must_match, outputs, same_bits
from moe_routing.reference.counts_oracle import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from moe_routing import RoutingOutput
    from moe_routing.conformance.cases import Call, Case, Profile
    from moe_routing.conformance.under_test import BackendUnderTest

DTYPES = (torch.int32, torch.int64)


def _lengths(call: Call) -> tuple[int, ...]:
    """Return how many elements counts may have."""
    experts, shared = call.logits.shape[1], call.spec.shared_experts
    return (experts, experts + shared) if shared else (experts,)


def _some(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return counts that earlier calls left, of either sign."""
    return torch.arange(length, dtype=dtype, device=device) * 3 - 7


def _plain(under_test: BackendUnderTest, call: Call) -> tuple[RoutingOutput, Tensor]:
    """Return what the call gives without counts, and its logical ids."""
    logical = under_test.check(call.but(expert_map=None))
    output = under_test.route(call)
    must_match(call, output)
    return output, logical.ids


def _require_counts(counts: Tensor, before: Tensor, ids: Tensor, times: int, what: str) -> None:
    """Require what ``times`` calls add."""
    expected = before + times * counted(ids, len(before)).to(before.dtype)
    wrong = (counts != expected).nonzero().flatten()
    if len(wrong):
        expert = int(wrong[0])
        msg = (
            f"{what}: expert {expert} counts {int(counts[expert])}, "
            f"it has {int(expected[expert])} ({int(before[expert])} before)"
        )
        raise AssertionError(msg)


def _require_output(output: Any, plain: RoutingOutput, what: str) -> None:  # noqa: ANN401 -- of a call or a plan
    same = same_bits(output.ids, plain.ids) and same_bits(output.weights, plain.weights)
    require(same, f"{what}: not the outputs of the call without counts")


def _routed(profile: Profile) -> Iterator[Case]:
    for case in _sets.of_every_variant(profile):
        yield case.but(mapped=True, valid="tensor")
    for case in _sets.of_every_family(profile):
        yield case.but(num_tokens=1)
        yield case.but(valid="mask", ids_dtype="int64")
        yield case.but(recorded=True, mapped=True, num_tokens=98)
        if profile != "smoke":
            yield case.but(valid="int", layout="transposed")
            yield case.but(num_tokens=0)
    yield from _sets.many_slots(profile)


@check(17, _routed)
def slots_of_logical_experts_are_counted(under_test: BackendUnderTest, case: Case) -> None:
    """Each call adds the slots of logical experts, with ``out`` too, and routes as without.

    Padding adds nothing, shared experts where there are elements for them.
    """
    call = case.make(under_test.device)
    plain, logical = _plain(under_test, call)
    for length, dtype in product(_lengths(call), DTYPES):
        counts = _some(length, dtype, under_test.device)
        before, tokens = counts.clone(), len(call.logits)
        given = outputs(tokens, plain.ids.shape[1], call.ids_dtype, under_test.device)
        for times, out in enumerate((None, None, given), 1):
            what = f"[{length}] {dtype}, call {times}"
            _require_output(under_test.route(call.but(counts=counts), out), plain, what)
            _require_counts(counts, before, logical, times, what)


def _lying(profile: Profile) -> Iterator[Case]:
    yield from _sets.of_every_family(profile)
    yield from _sets.of_every_variant("smoke", variants=("gemma4/shared",))


@check(17, _lying)
def counts_may_lie_anywhere(under_test: BackendUnderTest, case: Case) -> None:
    """Counts of any stride and offset are added to where they lie; what is around stays."""
    call = case.make(under_test.device)
    _, logical = _plain(under_test, call)
    for length in _lengths(call):
        for what, shape, view in (
            ("every second", (2 * length,), (slice(None, None, 2),)),
            ("a slice", (length + 9,), (slice(4, 4 + length),)),
            ("a column", (length, 5), (slice(None), 3)),
        ):
            memory = torch.full(shape, -5, dtype=torch.int64, device=under_test.device)
            counts = memory[view]
            before = counts.clone()
            under_test.route(call.but(counts=counts))
            _require_counts(counts, before, logical, 1, what)
            counts.fill_(-5)
            require((memory == -5).all(), f"{what}: what is around the counts was changed")  # noqa: PLR2004 -- filled above


def _mapped(profile: Profile) -> Iterator[Case]:
    for case in _sets.of_every_family(profile):
        yield case.but(valid="tensor")
        yield case.but(valid="tensor", mapped=True)


@check(17, _mapped)
def a_call_with_a_plan_counts_once(under_test: BackendUnderTest, case: Case) -> None:
    """A first call with a plan and later ones add once each, and plan physical ids."""
    if "plan" not in under_test.spec.factories:
        msg = "it does not plan"
        raise NotApplicableError(msg)
    call = case.make(under_test.device)
    plain, logical = _plain(under_test, call)
    length = _lengths(call)[-1]
    counts = _some(length, torch.int64, under_test.device)
    before = counts.clone()
    for times in (1, 2, 3):
        operands: Any = dict(call.operands)
        made = under_test.router(call.spec).with_plan(
            call.logits, call.topk, ids_dtype=call.ids_dtype, counts=counts,
            num_experts=2 * length, **operands,
        )  # fmt: skip
        _require_output(made, plain, f"call {times} with a plan")
        _require_counts(counts, before, logical, times, f"call {times} with a plan")


@check(17, _mapped, capability="gradients")
def gradients_flow_past_counts(under_test: BackendUnderTest, case: Case) -> None:
    """A call with gradients counts, and has the gradients of the call without counts."""
    gradients = []
    for counting in (False, True):
        call = case.make(under_test.device)
        _, logical = _plain(under_test, call)
        call.logits.requires_grad_()
        counts = _some(case.num_experts, torch.int64, under_test.device)
        before = counts.clone()
        output = under_test.route(call.but(counts=counts) if counting else call)
        output.weights.square().sum().backward()
        gradients.append(call.logits.grad)
        if counting:
            _require_counts(counts, before, logical, 1, "with gradients")
    first, second = gradients
    assert first is not None  # noqa: S101 -- for mypy: backward has filled them
    assert second is not None  # noqa: S101 -- likewise
    require(torch.equal(first, second), "counts change the gradient of the logits")


class _Module(torch.nn.Module):
    """A module that routes and counts, as a model has it."""

    def __init__(self, under_test: BackendUnderTest, call: Call) -> None:
        super().__init__()
        self.route, self.call = under_test.router(call.spec), call

    def forward(
        self, logits: Tensor, counts: Tensor, token_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        operands: Any = {**self.call.operands, "token_ids": token_ids}
        weights, ids = self.route(logits, self.call.topk, counts=counts, **operands)
        return weights * 1.0, ids


@check(17, _sets.of_every_family, capability="compile")
def traced_calls_count(under_test: BackendUnderTest, case: Case) -> None:
    """Compiled and exported programs add what the plain call adds, each time that they run."""
    call = case.but(mapped=True).make(under_test.device)
    module = _Module(under_test, call)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for some in (call, call.rows(slice(7))):
        _, logical = _plain(under_test, some)
        _require_runs(compiled, some, logical, "a compiled program")
    inputs = (call.logits, torch.zeros(case.num_experts, dtype=torch.int64, device=logical.device))
    exported = torch.export.export(module, (*inputs, call.operands.get("token_ids"))).module()
    _, logical = _plain(under_test, call)
    _require_runs(exported, call, logical, "an exported program")


def _require_runs(program: Any, call: Call, logical: Tensor, what: str) -> None:  # noqa: ANN401 -- compiled or exported
    counts = _some(_lengths(call)[0], torch.int64, call.logits.device)
    before = counts.clone()
    for times in (1, 2):
        program(call.logits, counts, call.operands.get("token_ids"))
        _require_counts(counts, before, logical, times, f"{what}, run {times}")


@check(17, _sets.of_every_family, capability="cuda_graphs")
def a_graph_counts_at_each_replay(under_test: BackendUnderTest, case: Case) -> None:
    """A call that counts reads nothing on the host; each replay of its graph adds once."""
    streams.need_cuda(under_test)
    call = case.but(valid="tensor", mapped=True).make(under_test.device)
    counts = _some(case.num_experts, torch.int64, under_test.device)
    counting = call.but(counts=counts)
    under_test.route(counting)
    with streams.without_synchronisation(under_test.device):
        under_test.router(call.spec)(call.logits, call.topk, **counting.operands)
    graph, output = streams.captured(
        under_test.device,
        lambda: under_test.router(call.spec)(call.logits, call.topk, **counting.operands),
    )
    for times in (1, 2):
        call.logits.copy_(call.logits.roll(1, 0).flip(1))
        before = counts.clone()
        streams.replay(graph, under_test.device)
        must_match(call, output)
        logical = under_test.route(call.but(expert_map=None)).ids
        _require_counts(counts, before, logical, 1, f"replay {times}")
