"""Clause 5: strides, and what is written."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance.balancing._check import check
from moe_routing.conformance.balancing.cases import KINDS, MEMORY, Case
from moe_routing.conformance.permutation import outcomes, values
from moe_routing.conformance.requirements import require

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from moe_routing.conformance.balancing.cases import Call
    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.under_test import BackendUnderTest

GUARD = 4096
"""Bytes before and after each result that must stay as they are."""
BEFORE = 85
"""What every byte of them, and of the results, holds before a launch."""


def guarded(likes: Sequence[Tensor], device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Return memory for results between guards, and views of the results."""
    every = [
        torch.full(
            (2 * GUARD + like.numel() * like.itemsize,), BEFORE, dtype=torch.uint8, device=device
        )
        for like in likes
    ]
    made = [
        memory[GUARD : GUARD + like.numel() * like.itemsize].view(like.dtype).view(like.shape)
        for memory, like in zip(every, likes, strict=True)
    ]
    return every, made


def must_be_whole(names: Sequence[str], every: Sequence[Tensor]) -> None:
    """Require that the guards are as they were."""
    for name, memory in zip(names, every, strict=True):
        around = torch.cat((memory[:GUARD], memory[-GUARD:]))
        require(bool((around == BEFORE).all()), f"{name}: bytes before or after it are changed")


def launched_into_guards(kernel: Any, call: Call) -> tuple[Tensor, ...]:  # noqa: ANN401 -- a BalanceKernel
    """Launch a kernel into memory between guards, and require the guards whole."""
    every, made = guarded(call.outputs, call.device)
    call.launch(kernel, tuple(made))
    must_be_whole(("sums", "counts"), every)
    return tuple(made)


def _forms(profile: Profile) -> Iterator[Case]:
    sizes = ((33, 16, 3), (1, 1, 1), (5, 129, 2), (130, 3, 1), (40, 60, 8))
    for n, ((tokens, experts, topk), kind) in enumerate(product(sizes, KINDS)):
        if profile != "smoke" or n % 2 == 0:
            dtype = ("bfloat16", "float32")[n % 3 == 0]
            yield Case(kind=kind, tokens=tokens, num_experts=experts, topk=topk, dtype=dtype)


@check(5, _forms)
def every_output_is_written_and_nothing_else(under_test: BackendUnderTest, case: Case) -> None:
    """Every element of the results is written, and not a byte before or after them."""
    call = case.make(under_test.device)
    call.must_match(launched_into_guards(under_test.kernel(call.problem), call))


def _memories(profile: Profile) -> Iterator[Case]:
    for n, (memory, kind) in enumerate(product(values.MEMORY, KINDS)):
        for experts in (16, 37)[: 1 if profile == "smoke" and n % 2 else 2]:
            if kind != "best" or memory != "one_column":
                yield Case(kind=kind, memory=memory, num_experts=experts)


@check(5, _memories)
def logits_of_any_strides_are_read_as_they_lie(under_test: BackendUnderTest, case: Case) -> None:
    """Logits are read as they lie in memory; they, the ids and the weights are not changed."""
    call = case.make(under_test.device)
    before = {name: tensor.clone() for name, tensor in call.tensors.items()}
    made = call.made(under_test)
    for name, tensor in call.tensors.items():
        require(outcomes.same_bits(tensor, before[name]), f"{name}: the call has changed it")
    call.must_match(made)


def _read(_profile: Profile) -> Iterator[Case]:
    for memory, kind in product(MEMORY, KINDS):
        yield Case(kind=kind, memory=memory, num_experts=40, tokens=17)


@check(5, _read)
def a_kernel_reads_logits_at_any_stride(under_test: BackendUnderTest, case: Case) -> None:
    """A kernel is right for rows of unit stride, at any stride between them and any offset."""
    call = case.make(under_test.device)
    call.must_match(launched_into_guards(under_test.kernel(call.problem), call))
