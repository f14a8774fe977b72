"""Clause 19: weights of shared experts that a call brings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance import streams
from moe_routing.conformance.checks import _sets
from moe_routing.conformance.checks._check import check
from moe_routing.conformance.requirements import require
from moe_routing.conformance.under_test import NotApplicableError, outputs, same_bits
from moe_routing.conformance.variants import VARIANTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from moe_routing import RoutingOutput
    from moe_routing.conformance.cases import Call, Case, Profile
    from moe_routing.conformance.under_test import BackendUnderTest

SHARED = 2
"""How many shared experts a family gets that has none of its own."""
WITH_SHARED = tuple(variant for variant, spec in VARIANTS.items() if spec.shared_experts)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _make(case: Case, under_test: BackendUnderTest) -> Call:
    """Make the case's call, of a spec with shared experts."""
    call = case.make(under_test.device)
    if not call.spec.shared_experts:
        call.spec = call.spec.replace(shared_experts=SHARED, shared_weight=-0.25)
    return call


def _weights(call: Call, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return weights of each row and shared expert, all different; 0 and infinities among them."""
    rows, count = len(call.logits), call.spec.shared_experts
    drawn = torch.linspace(-3.0, 5.0, rows * count, dtype=torch.float64).view(rows, count)
    drawn[1::7] = 0.0
    drawn[2::7] = torch.inf
    drawn[3::7] = torch.nan
    return drawn.to(call.logits.device, dtype)


def _expected(call: Call, plain: RoutingOutput, logical: Tensor, shared: Tensor) -> Tensor:
    """Return the weights of the call without them, with these in the shared columns.

    :param logical: the ids of the call without a map: -1 throughout in rows of padding.
    """
    padding = (logical < 0).all(-1, keepdim=True)
    columns = shared.float().expand(len(logical), -1).masked_fill(padding, 0.0)
    return torch.cat([plain.weights[:, : call.topk], columns], dim=1)


def _require(output: Any, plain: RoutingOutput, expected: Tensor, what: str) -> None:  # noqa: ANN401 -- of a call or a plan
    require(same_bits(output.ids, plain.ids), f"{what}: not the ids of the call without them")
    wrong = ~same_or_nan(output.weights, expected)
    if wrong.any():
        row = int(wrong.any(-1).nonzero()[0])
        msg = (
            f"{what}: row {row}: weights {output.weights[row].tolist()}, "
            f"expected {expected[row].tolist()}"
        )
        raise AssertionError(msg)


def same_or_nan(made: Tensor, right: Tensor) -> Tensor:
    """Tell which elements are equal, or NaN in both."""
    return (made == right) | (made.isnan() & right.isnan())


def _plain(under_test: BackendUnderTest, call: Call) -> tuple[RoutingOutput, Tensor]:
    """Return what the call gives without them, and its logical ids."""
    return under_test.check(call), under_test.route(call.but(expert_map=None)).ids


def _routed(profile: Profile) -> Iterator[Case]:
    for case in _sets.of_every_family(profile):
        yield case.but(valid="tensor")
        yield case.but(valid="mask", ids_dtype="int64")
        yield case.but(recorded=True, num_tokens=98)
        if profile != "smoke":
            yield case.but(num_tokens=1, valid="int")
            yield case.but(num_tokens=0)
    for case in _sets.of_every_variant("smoke", variants=WITH_SHARED):
        yield case.but(valid="tensor", mapped=True)


@check(19, _routed)
def shared_experts_have_the_weights_of_the_call(under_test: BackendUnderTest, case: Case) -> None:
    """Shared columns hold the call's weights, with ``out`` too; everything else stays.

    Rows of padding keep the weight 0. Weights of each row, and of each expert alone.
    """
    call = _make(case, under_test)
    plain, logical = _plain(under_test, call)
    for rows in (True, False):
        shared = _weights(call) if rows else torch.rand_like(_weights(call)[:1].sum(0)) + 0.5
        expected = _expected(call, plain, logical, shared)
        tokens, columns = plain.ids.shape
        given = outputs(tokens, columns, call.ids_dtype, under_test.device)
        for times, out in enumerate((None, None, given), 1):
            output = under_test.route(call.but(shared_weights=shared), out)
            require(out is None or output.weights is out.weights, f"call {times}: not in out")
            _require(output, plain, expected, f"{list(shared.shape)}, call {times}")


@check(19, _sets.of_every_family)
def weights_of_every_dtype_may_lie_anywhere(under_test: BackendUnderTest, case: Case) -> None:
    """They may have any float dtype and strides; they are rounded to float32, and not changed."""
    call = _make(case.but(valid="tensor"), under_test)
    plain, logical = _plain(under_test, call)
    for dtype in FLOATS:
        contiguous = _weights(call, dtype)
        for what, shared in (
            ("contiguous", contiguous),
            ("transposed", contiguous.t().contiguous().t()),
            ("every second", contiguous.repeat_interleave(2, dim=1)[:, ::2]),
            ("a row for all", contiguous[:1].expand_as(contiguous)),
        ):
            before = shared.clone()
            output = under_test.route(call.but(shared_weights=shared))
            expected = _expected(call, plain, logical, before)
            _require(output, plain, expected, f"{dtype}, {what}")
            require(same_or_nan(shared, before).all(), f"{dtype}, {what}: they were changed")


@check(19, _sets.of_every_family)
def a_plan_drops_by_the_weights_of_the_call(under_test: BackendUnderTest, case: Case) -> None:
    """A plan that drops the pairs of least weight looks at these weights, in later calls too."""
    if "plan" not in under_test.spec.factories:
        msg = "it does not plan"
        raise NotApplicableError(msg)
    call = _make(case.but(valid="tensor"), under_test)
    plain, logical = _plain(under_test, call)
    shared = _weights(call).nan_to_num(0.0, posinf=100.0)
    expected = _expected(call, plain, logical, shared)
    first = call.logits.shape[1]
    pairs = torch.arange(first, first + call.spec.shared_experts, device=logical.device)
    best = expected[:, call.topk :].max(0).indices
    for times in (1, 2, 3):
        operands: Any = dict(call.operands)
        made = under_test.router(call.spec).with_plan(
            call.logits, call.topk, ids_dtype=call.ids_dtype, shared_weights=shared, capacity=1,
            drop="least_weight", **operands,
        )  # fmt: skip
        _require(made, plain, expected, f"call {times} with a plan")
        kept = made.plan.order[made.plan.offsets[pairs].long()] // made.ids.shape[1]
        require(torch.equal(kept.long(), best), f"call {times}: kept rows {kept.tolist()}")


@check(19, _sets.of_every_family, capability="gradients")
def gradients_flow_to_the_weights_of_the_call(under_test: BackendUnderTest, case: Case) -> None:
    """They get the gradient of their columns, 0 in padding; the logits' stays as it was."""
    call = _make(case.but(valid="tensor"), under_test)
    logical = under_test.route(call).ids
    padding = (logical < 0).all(-1, keepdim=True)
    grad = torch.linspace(-1.0, 2.0, logical.numel(), device=logical.device).view(logical.shape)
    right = grad[:, call.topk :].masked_fill(padding, 0.0)
    gradients = []
    for shape in (None, right.shape, right.shape[1:]):
        logits = call.logits.detach().clone().requires_grad_()
        call.logits = logits
        some = call
        if shape is not None:
            shared = torch.ones(shape, device=logical.device, requires_grad=True)
            some = call.but(shared_weights=shared)
        under_test.route(some).weights.backward(grad)
        gradients.append(logits.grad)
        if shape is not None:
            expected = right if len(shape) > 1 else right.sum(0)
            assert shared.grad is not None  # noqa: S101 -- for mypy: backward has filled it
            near = torch.allclose(shared.grad, expected, rtol=1e-5, atol=1e-5)
            require(near, f"{list(shape)}: not the gradient of the shared columns")
    first, *others = gradients
    assert first is not None  # noqa: S101 -- likewise
    require(
        all(o is not None and torch.equal(first, o) for o in others),
        "they change the gradient of the logits",
    )


class _Module(torch.nn.Module):
    """A module that routes with weights of shared experts, as a model has it."""

    def __init__(self, under_test: BackendUnderTest, call: Call) -> None:
        super().__init__()
        self.route, self.call = under_test.router(call.spec), call

    def forward(
        self, logits: Tensor, shared: Tensor, token_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        operands: Any = {**self.call.operands, "token_ids": token_ids}
        weights, ids = self.route(logits, self.call.topk, shared_weights=shared, **operands)
        return weights * 1.0, ids


@check(19, _sets.of_every_family, capability="compile")
def traced_calls_weigh_shared_experts(under_test: BackendUnderTest, case: Case) -> None:
    """Compiled and exported programs read the weights of each run."""
    call = _make(case, under_test)
    module = _Module(under_test, call)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for some in (call, call.rows(slice(7))):
        _require_run(compiled, under_test, some, "a compiled program")
    inputs = (call.logits, _weights(call), call.operands.get("token_ids"))
    _require_run(torch.export.export(module, inputs).module(), under_test, call, "an exported one")


def _require_run(program: Any, under_test: BackendUnderTest, call: Call, what: str) -> None:  # noqa: ANN401 -- compiled or exported
    plain, logical = _plain(under_test, call)
    shared = _weights(call) + 1.0
    weights, ids = program(call.logits, shared, call.operands.get("token_ids"))
    expected = _expected(call, plain, logical, shared)
    _require(plain._replace(weights=weights, ids=ids), plain, expected, what)


@check(19, _sets.of_every_family, capability="cuda_graphs")
def a_graph_reads_the_weights_at_each_replay(under_test: BackendUnderTest, case: Case) -> None:
    """Nothing is read on the host, and each replay of a graph reads the weights again."""
    streams.need_cuda(under_test)
    call = _make(case.but(valid="tensor"), under_test)
    shared = _weights(call)
    given = call.but(shared_weights=shared)
    router = under_test.router(call.spec)
    under_test.route(given)
    with streams.without_synchronisation(under_test.device):
        router(call.logits, call.topk, **given.operands)
    graph, output = streams.captured(
        under_test.device, lambda: router(call.logits, call.topk, **given.operands)
    )
    for times in (1, 2):
        call.logits.copy_(call.logits.roll(1, 0).flip(1))
        shared.add_(1.0)
        streams.replay(graph, under_test.device)
        plain, logical = _plain(under_test, call)
        _require(output, plain, _expected(call, plain, logical, shared), f"replay {times}")
