"""Clause 8: gradients of the first order against the oracle, of the second against autograd."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance.permutation import _sets, outcomes
from moe_routing.conformance.permutation._check import COMBINE, PERMUTE, both
from moe_routing.conformance.permutation.calls import CombineCall, PermuteCall
from moe_routing.conformance.permutation.cases import CombineCase, PermuteCase
from moe_routing.conformance.permutation.memory import BEFORE, GUARD
from moe_routing.conformance.requirements import require
from moe_routing.conformance.under_test import NotApplicableError
from moe_routing.permutation import CombinesBackward
from moe_routing.permutation.problem import FLOATS
from moe_routing.reference import permutation_oracle as oracle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Generator, Tensor

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.permutation.calls import Call
    from moe_routing.conformance.permutation.cases import Case
    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing.planning import DispatchPlan


def _differentiable(call: Call) -> list[Tensor]:
    """Return the operands that have gradients, as leaves that require them."""
    given = [t for t in call.arguments.values() if isinstance(t, torch.Tensor)]
    return [tensor.detach().requires_grad_() for tensor in given]


def with_leaves(call: Call) -> tuple[Any, list[Tensor]]:
    """Return the call with leaves for operands, and these."""
    leaves = _differentiable(call)
    if isinstance(call, PermuteCall):
        return call.but(hidden=leaves[0]), leaves
    return call.but(rows=leaves[0], weights=leaves[1] if len(leaves) > 1 else None), leaves


def gradient_of(call: Call, generator: Generator) -> Tensor:
    """Return a gradient of the result: NaN at places without a pair, which reaches nothing."""
    like = call.outputs[0]
    drawn = torch.randn(like.shape, generator=generator).to(like.dtype)
    if isinstance(call, PermuteCall):
        drawn.view(-1, like.shape[-1])[oracle.is_empty(call.plan)] = torch.nan
    return drawn.to(call.device)


def must_be_right(call: Call, grad: Tensor, made: tuple[Tensor, ...], what: str = "") -> None:
    """Hold the gradients of the operands of a call against the oracle."""
    front = f"{what}: " if what else ""
    if isinstance(call, PermuteCall):
        outcomes.must_lie_between(
            f"{front}the gradient of hidden", made[0],
            oracle.combine(grad.reshape(-1, grad.shape[-1]), call.plan),
        )  # fmt: skip
        return
    assert isinstance(call, CombineCall)  # noqa: S101 -- for mypy: there are two operations
    outcomes.must_lie_between(
        f"{front}the gradient of rows", made[0],
        oracle.gradient_of_rows(grad, call.plan, call.weights, call.rows.dtype),
    )  # fmt: skip
    if call.weights is not None and len(made) > 1:
        outcomes.must_lie_between(
            f"{front}the gradient of weights", made[1],
            oracle.gradient_of_weights(grad, call.matrix, call.plan, call.weights.dtype),
        )  # fmt: skip


def must_require(result: Tensor) -> None:
    """Require a result that has gradients."""
    require(result.requires_grad, "the result does not require gradients, but an operand does")


def _made(
    under_test: BackendUnderTest, call: Call, grad: Tensor
) -> tuple[tuple[Tensor, ...], Call]:
    watched, leaves = with_leaves(call)
    (result,) = watched.made(under_test)
    must_require(result)
    made = torch.autograd.grad(result, leaves, grad)
    for leaf, one in zip(leaves, made, strict=True):
        outcomes.must_be_like("a gradient", one.contiguous(), leaf.contiguous(), call.device)
    return made, watched


SIZES = ((33, 6, 40), (5, 1, 1), (130, 8, 129), (3, 22, 300))
"""T, K and H."""


def _permuted(profile: Profile) -> Iterator[PermuteCase]:
    for dtype, (tokens, topk, columns) in product(FLOATS, SIZES):
        for layout in _sets.LAYOUTS[:: 2 if profile == "smoke" else 1]:
            yield PermuteCase(dtype=dtype, num_tokens=tokens, topk=topk, columns=columns, **layout)


@PERMUTE.check(8, _permuted)
def the_gradient_of_a_token_is_the_sum_over_its_slots(
    under_test: BackendUnderTest, case: PermuteCase
) -> None:
    """The gradient of a token's row is the float32 sum over its slots, in their order."""
    call = case.make(under_test.device)
    grad = gradient_of(call, case.generator())
    made, _ = _made(under_test, call, grad)
    must_be_right(call, grad, made)


def _combined(profile: Profile) -> Iterator[CombineCase]:
    weights = (*FLOATS, "")
    for n, (dtype, (tokens, topk, columns)) in enumerate(product(FLOATS, SIZES)):
        for m, layout in enumerate(_sets.LAYOUTS[:: 2 if profile == "smoke" else 1]):
            yield CombineCase(
                dtype=dtype, num_tokens=tokens, topk=topk, columns=columns,
                weights=weights[(n + m) % 4], **layout,
            )  # fmt: skip


@COMBINE.check(8, _combined)
def gradients_of_rows_and_weights_match_the_oracle(
    under_test: BackendUnderTest, case: CombineCase
) -> None:
    """Gradients of rows and weights are right, and 0 where a place or a pair has no other."""
    call = case.make(under_test.device)
    grad = gradient_of(call, case.generator())
    made, _ = _made(under_test, call, grad)
    must_be_right(call, grad, made)
    if call.weights is None:
        return
    weights = call.weights.detach().requires_grad_()
    (alone,) = torch.autograd.grad(call.but(weights=weights).made(under_test), [weights], grad)
    same = outcomes.same_bits(alone, made[1])
    require(same, "the gradient of weights: other bits where rows require none")


def _laid(operation: type[Case], profile: Profile) -> Iterator[Case]:
    for memory in ("sliced", "transposed", "every_second_row"):
        for case in _sets.in_every_form(operation, profile, memory=memory):
            if not (isinstance(case, PermuteCase) and case.quantize):
                yield case


@both(8, _laid)
def a_gradient_may_have_any_strides(under_test: BackendUnderTest, case: Case) -> None:
    """A gradient of the result is read as it lies, also where all of it is one number."""
    call = case.make(under_test.device)
    like = call.outputs[0]
    one = torch.full((1,), 0.5, dtype=like.dtype, device=call.device).expand(like.shape)
    columns = like.shape[-1]
    wide = torch.full((*like.shape[:-1], 2 * columns), torch.nan, dtype=like.dtype)
    strided, sliced = wide.to(call.device)[..., ::2], wide.to(call.device)[..., 1 : columns + 1]
    for grad in (strided, sliced):
        grad.copy_(gradient_of(call, case.generator()))
    for what, grad in (("one number", one), ("every second", strided), ("a slice", sliced)):
        made, _ = _made(under_test, call, grad)
        must_be_right(call, grad, made, what)


def _repeated(operation: type[Case], profile: Profile) -> Iterator[Case]:
    for case in _sets.of_either_dtype(operation, profile, num_tokens=129, rows="cancelling"):
        if not (isinstance(case, PermuteCase) and case.quantize):
            yield case


@both(8, _repeated)
def gradients_have_the_same_bits_in_every_run(under_test: BackendUnderTest, case: Case) -> None:
    """Ten runs give the same bits of gradients, with others of the kind between them."""
    call, other = case.make(under_test.device), case.but(turn=1).make(under_test.device)
    grad, another = (gradient_of(some, case.generator()) for some in (call, other))
    first, _ = _made(under_test, call, grad)
    must_be_right(call, grad, first, "the first run")
    for run in range(2, 11):
        made, _ = _made(under_test, call, grad)
        same = all(outcomes.same_bits(a, b) for a, b in zip(made, first, strict=True))
        require(same, f"run {run} of 10: other bits")
        _made(under_test, other, another)


def _of_second_order(operation: type[Case], profile: Profile) -> Iterator[Case]:
    for case in _sets.in_every_form(operation, profile, dtype="float32", columns=9, topk=3):
        if not (isinstance(case, PermuteCase) and case.quantize):
            yield case


@both(8, _of_second_order)
def gradients_have_gradients(under_test: BackendUnderTest, case: Case) -> None:
    """Gradients of the second order equal those of autograd through the definition in float64."""
    call = case.make(under_test.device)
    generator = case.generator()
    grad = gradient_of(call, generator).nan_to_num(0.0)
    watched, leaves = with_leaves(call)
    along = [torch.randn(leaf.shape, generator=generator).to(call.device) for leaf in leaves]
    found = _second(watched.made(under_test)[0], leaves, grad, along)
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    plan = _on_cpu(call.plan)
    defined = _permuted_in_float64 if isinstance(call, PermuteCall) else _combined_in_float64
    right = _second(defined(plan, *exact), exact, grad, along)
    for n, (some, other) in enumerate(zip(found, right, strict=True)):
        # float32 of fewer than 100 terms near 1; bfloat16 weights round once more.
        near = 2**-6 if any(leaf.dtype == torch.bfloat16 for leaf in leaves) else 2**-14
        close = torch.allclose(some.double(), other, rtol=near, atol=near * 16)
        worst = (some.double() - other).abs().max()
        require(close, f"gradient {n} of the gradients: wrong by up to {worst}")


def _on_cpu(plan: DispatchPlan) -> DispatchPlan:
    return plan._replace(
        **{name: part.cpu() for name, part in plan._asdict().items() if part is not None}
    )


def _second(
    result: Tensor, operands: list[Tensor], grad: Tensor, along: list[Tensor]
) -> list[Tensor]:
    """Return the gradients, of operands and ``grad``, of the first gradients along directions."""
    like = operands[0]
    grad = grad.to(like.device, result.dtype).requires_grad_()
    must_require(result)
    first = torch.autograd.grad(result, operands, grad, create_graph=True)
    require(all(one.requires_grad for one in first), "a gradient does not require gradients")
    products = [
        (one * way.to(like.device, one.dtype)).sum() for one, way in zip(first, along, strict=True)
    ]
    total = torch.stack([product.to(result.dtype) for product in products]).sum()
    second = torch.autograd.grad(
        total, [*operands, grad], allow_unused=True, materialize_grads=True
    )
    return [some.detach().cpu() for some in second]


def _permuted_in_float64(plan: DispatchPlan, hidden: Tensor) -> Tensor:
    token = torch.tensor(oracle.tokens(plan))
    rows = hidden[token.clamp(min=0)] * (token >= 0)[:, None]
    return rows.view(*plan.order.shape, hidden.shape[1])


def _combined_in_float64(plan: DispatchPlan, rows: Tensor, weights: Tensor | None = None) -> Tensor:
    place = torch.tensor(oracle.places(plan))
    has = (place >= 0)[..., None]
    matrix = rows.reshape(-1, rows.shape[-1])
    of_pairs = torch.where(has, matrix[place.clamp(min=0)], 0.0)
    weighed = of_pairs if weights is None else of_pairs * weights[..., None]
    return torch.where(has, weighed, 0.0).sum(1)


def _backward(profile: Profile) -> Iterator[CombineCase]:
    for case in _sets.of_either_dtype(CombineCase, profile, columns=37):
        assert isinstance(case, CombineCase)  # noqa: S101 -- for mypy: that was asked for
        yield case.but(flat=True)


@COMBINE.check(8, _backward)
def a_backward_writes_its_gradients_and_nothing_else(
    under_test: BackendUnderTest, case: CombineCase
) -> None:
    """A kernel's own backward writes every element of the gradients, and not a byte around them."""
    call = case.make(under_test.device)
    kernel = under_test.kernel(call.problem)
    if not isinstance(kernel, CombinesBackward):
        msg = "the kernel has no backward of its own"
        raise NotApplicableError(msg)
    grad = gradient_of(call, case.generator())
    likes = [call.rows] if call.weights is None else [call.rows, call.weights.float()]
    every = [
        torch.full(
            (2 * GUARD + like.numel() * like.itemsize,), BEFORE, dtype=torch.uint8,
            device=call.device,
        )
        for like in likes
    ]  # fmt: skip
    made = [
        memory[GUARD:-GUARD].view(like.dtype).view(like.shape)
        for memory, like in zip(every, likes, strict=True)
    ]
    of_weights = made[1] if len(made) > 1 else None
    kernel.backward(grad, call.rows, call.plan, call.weights, made[0], of_weights)
    for memory in every:
        around = torch.cat((memory[:GUARD], memory[-GUARD:]))
        require(bool((around == BEFORE).all()), "bytes before or after a gradient are changed")
    weights = None if call.weights is None else call.weights.float()
    must_be_right(call.but(weights=weights), grad, tuple(made))
