"""Clause 7: gradients of the first order against the oracle, of the second against autograd."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch

from moe_routing.balancing.kernel import BalancesBackward
from moe_routing.balancing.problem import LOGSUMEXP
from moe_routing.conformance.balancing._check import check
from moe_routing.conformance.balancing.cases import DTYPES, KINDS, MEMORY, Case, must_be_near
from moe_routing.conformance.balancing.memory import guarded, must_be_whole
from moe_routing.conformance.permutation import outcomes
from moe_routing.conformance.requirements import require
from moe_routing.conformance.under_test import NotApplicableError
from moe_routing.reference import balance_oracle as oracle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Generator, Tensor

    from moe_routing.conformance.balancing.cases import Call
    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.under_test import BackendUnderTest


def gradient_of(call: Call, generator: Generator) -> Tensor:
    """Return a gradient of the sums."""
    like = call.outputs[0]
    return torch.randn(like.shape, generator=generator).to(call.device, like.dtype)


def _made(under_test: BackendUnderTest, call: Call, grad: Tensor) -> Tensor:
    leaf = call.logits.detach().requires_grad_()
    sums, counts = call.but(logits=leaf).made(under_test)
    require(sums.requires_grad, "the sums do not require gradients, but the logits do")
    require(not counts.requires_grad, "counts require gradients, but have none")
    (made,) = torch.autograd.grad(sums, leaf, grad)
    like = torch.empty(leaf.shape, dtype=leaf.dtype)
    outcomes.must_be_like("the gradient", made.contiguous(), like, call.device)
    return made


def _must_be_right(call: Call, grad: Tensor, made: Tensor, what: str = "") -> None:
    front = f"{what}: " if what else ""
    right = oracle.gradient(call.problem, grad, call.logits, call.weights)
    must_be_near(f"{front}the gradient", made, right)


def _first(profile: Profile) -> Iterator[Case]:
    sizes = ((33, 16, 3), (1, 1, 1), (129, 60, 8), (3, 300, 8), (40, 128, 8))
    for n, (kind, dtype, (tokens, experts, topk)) in enumerate(product(KINDS, DTYPES, sizes)):
        if profile != "smoke" or n % 3 == 0:
            yield Case(
                kind=kind, dtype=dtype, tokens=tokens, num_experts=experts, topk=topk,
                mask=("", "some")[n % 2], logits=("normal", "extreme")[n % 5 == 0],
            )  # fmt: skip


@check(7, _first)
def the_gradient_of_logits_matches_the_oracle(under_test: BackendUnderTest, case: Case) -> None:
    """The gradient of the logits is right, and 0 for tokens that do not count."""
    call = case.make(under_test.device)
    grad = gradient_of(call, case.generator())
    _must_be_right(call, grad, _made(under_test, call, grad))


def _laid(_profile: Profile) -> Iterator[Case]:
    for memory, kind in product(MEMORY, KINDS):
        yield Case(kind=kind, memory=memory, num_experts=40)


@check(7, _laid)
def a_gradient_of_the_sums_may_have_any_strides(under_test: BackendUnderTest, case: Case) -> None:
    """A gradient of the sums is read as it lies, also where all batches have one."""
    call = case.make(under_test.device)
    drawn = gradient_of(call, case.generator())
    one = drawn[:1].expand(drawn.shape)
    second = torch.stack((drawn, torch.full_like(drawn, torch.nan)), -1).flatten(1)[:, ::2]
    for what, grad in (("one row", one), ("every second", second)):
        _must_be_right(call, grad, _made(under_test, call, grad), what)


def _kinds(_profile: Profile) -> Iterator[Case]:
    for kind in KINDS:
        yield Case(kind=kind, dtype="float32", tokens=129, mask="some")


@check(7, _kinds)
def gradients_have_the_same_bits_in_every_run(under_test: BackendUnderTest, case: Case) -> None:
    """Ten runs give the same bits of gradients, with others of the kind between them."""
    call, other = case.make(under_test.device), case.but(turn=1).make(under_test.device)
    grad = gradient_of(call, case.generator())
    first = _made(under_test, call, grad)
    for run in range(2, 11):
        same = outcomes.same_bits(_made(under_test, call, grad), first)
        require(same, f"run {run} of 10: other bits")
        _made(under_test, other, grad)


@check(7, _kinds)
def only_the_logits_are_kept(under_test: BackendUnderTest, case: Case) -> None:
    """No other tensor of the logits' size is kept for the way back."""
    call = case.make(under_test.device)
    leaf = call.logits.detach().requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call.but(logits=leaf).made(under_test)
    large = {t.data_ptr() for t in kept if t.numel() >= leaf.numel()}
    require(large == {leaf.data_ptr()}, f"{len(large)} tensors of the logits' size are kept")


def _second_order(_profile: Profile) -> Iterator[Case]:
    for kind in KINDS:
        if kind != "best":  # whose rounded scores autograd differentiates otherwise
            yield Case(kind=kind, dtype="float64", tokens=7, num_experts=5, mask="some")
            yield Case(kind=kind, dtype="float32", tokens=7, num_experts=5)


@check(7, _second_order)
def gradients_have_gradients(under_test: BackendUnderTest, case: Case) -> None:
    """Gradients of the second order equal those of autograd through the definition in float64."""
    call = case.make(under_test.device)
    generator = case.generator()
    grad = gradient_of(call, generator)
    along = torch.randn(call.logits.shape, generator=generator)
    if call.weights is not None:
        call.logits[~call.weights] = 0.0
    leaf = call.logits.detach().requires_grad_()
    found = _twice(call.but(logits=leaf).made(under_test)[0], leaf, grad, along)
    exact = call.logits.detach().cpu().double().requires_grad_()
    right = _twice(_defined(call, exact), exact, grad.cpu(), along)
    near = 2**-30 if case.dtype == "float64" else 2**-12
    close = torch.allclose(found, right, rtol=near, atol=near * 16)
    require(close, f"the gradient of the gradient: wrong by up to {(found - right).abs().max()}")


def _twice(sums: Tensor, leaf: Tensor, grad: Tensor, along: Tensor) -> Tensor:
    (first,) = torch.autograd.grad(sums, leaf, grad.to(sums.dtype), create_graph=True)
    require(first.requires_grad, "the gradient does not require gradients")
    total = (first * along.to(leaf.device, first.dtype)).sum()
    return torch.autograd.grad(total, leaf)[0].detach().cpu().double()


def _defined(call: Call, logits: Tensor) -> Tensor:
    """Return the sums by their definition, differentiable in float64."""
    score = call.problem.score
    if score == LOGSUMEXP:
        terms = logits.exp().sum(-1, keepdim=True).log().square()
    else:
        scores = {
            "softmax": torch.exp,
            "sigmoid": torch.sigmoid,
            "sqrtsoftplus": lambda x: torch.log1p(x.exp()).sqrt(),
        }[score](logits)
        terms = scores / scores.sum(-1, keepdim=True)
    return terms.sum(1) if call.weights is None else (terms * call.weights.cpu()[..., None]).sum(1)


def _backward(_profile: Profile) -> Iterator[Case]:
    for kind, dtype, experts in product(KINDS, ("bfloat16", "float32"), (16, 37)):
        yield Case(kind=kind, dtype=dtype, num_experts=experts, mask="some")


@check(7, _backward)
def a_backward_writes_its_gradient_and_nothing_else(
    under_test: BackendUnderTest, case: Case
) -> None:
    """A kernel's own backward writes every element of the gradient, and not a byte around it."""
    call = case.make(under_test.device)
    kernel = under_test.kernel(call.problem)
    if not isinstance(kernel, BalancesBackward):
        msg = "the kernel has no backward of its own"
        raise NotApplicableError(msg)
    grad = gradient_of(call, case.generator())
    every, (made,) = guarded([torch.empty(call.logits.shape, dtype=call.logits.dtype)], call.device)
    kernel.backward(grad, call.logits, call.weights, made)
    must_be_whole(["the gradient"], every)
    _must_be_right(call, grad, made)
