"""Clause 4: strides, what is written, no tokens at all, and modes of gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance.permutation import _sets, outcomes, values
from moe_routing.conformance.permutation._check import both
from moe_routing.conformance.permutation.cases import PermuteCase
from moe_routing.conformance.requirements import require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.permutation.calls import Call
    from moe_routing.conformance.permutation.cases import Case
    from moe_routing.conformance.under_test import BackendUnderTest

GUARD = 4096
"""Bytes before and after each result that must stay as they are."""
BEFORE = 85
"""What every byte of them, and of the results, holds before a launch."""
UNIT_STRIDE = ("contiguous", "sliced", "between_others", "every_second_row", "one_row")
"""Ways in which rows may lie that a kernel is given."""


def launched(under_test: BackendUnderTest, call: Call) -> tuple[Tensor, ...]:
    """Build the backend's kernel for a call, and launch it into memory between guards."""
    return launched_into_guards(under_test.kernel(call.problem), call)


def launched_into_guards(kernel: Any, call: Call) -> tuple[Tensor, ...]:  # noqa: ANN401 -- of either operation
    """Launch a kernel into memory between guards, and require the guards whole."""
    every, results = [], []
    for like in call.outputs:
        size = like.numel() * like.itemsize
        memory = torch.full((GUARD + size + GUARD,), BEFORE, dtype=torch.uint8, device=call.device)
        every.append(memory)
        results.append(memory[GUARD : GUARD + size].view(like.dtype).view(like.shape))
    call.launch(kernel, tuple(results))
    for name, memory in zip(call.names, every, strict=False):
        around = torch.cat((memory[:GUARD], memory[-GUARD:]))
        require(bool((around == BEFORE).all()), f"{name}: bytes before or after it are changed")
    return tuple(results)


def _forms(operation: type[Case], profile: Profile) -> Iterator[Case]:
    for tokens, topk, columns in ((33, 6, 40), (1, 1, 1), (5, 2, 129), (130, 8, 3)):
        yield from _sets.of_either_dtype(
            operation, profile, num_tokens=tokens, topk=topk, columns=columns
        )


@both(4, _forms)
def every_output_is_written_and_nothing_else(under_test: BackendUnderTest, case: Case) -> None:
    """Every element of the results is written, and not a byte before or after them."""
    call = case.make(under_test.device)
    call.must_match(launched(under_test, call))


def _memories(operation: type[Case], profile: Profile) -> Iterator[Case]:
    for n, memory in enumerate(values.MEMORY):
        for m, case in enumerate(_sets.of_either_dtype(operation, profile, memory=memory)):
            if profile != "smoke" or (n + m) % 2 == 0:
                yield case
        yield operation(memory=memory, columns=7, num_tokens=5, topk=1)
        if operation is PermuteCase:
            yield operation(memory=memory, columns=5, dtype="uint8", rows="bits")


@both(4, _memories)
def rows_of_any_strides_are_read_as_they_lie(under_test: BackendUnderTest, case: Case) -> None:
    """Rows and weights are read as they lie in memory; they and the plan are not changed."""
    call = case.make(under_test.device)
    before = {name: tensor.clone() for name, tensor in call.tensors.items()}
    made = call.made(under_test)
    for name, tensor in call.tensors.items():
        unchanged = outcomes.same_bits(tensor, before[name])
        require(unchanged, f"{name}: the call has changed it")
    call.must_match(made)


def _read(operation: type[Case], profile: Profile) -> Iterator[Case]:
    for memory in UNIT_STRIDE:
        for case in _sets.of_either_dtype(operation, profile, memory=memory):
            yield case.but(columns=37)


@both(4, _read)
def a_kernel_reads_rows_at_any_stride(under_test: BackendUnderTest, case: Case) -> None:
    """A kernel is right for rows of unit stride, of any stride between them and any offset."""
    call = case.make(under_test.device)
    if (weights := call.arguments.get("weights")) is not None:
        call = call.but(weights=weights.contiguous())
    call.must_match(launched(under_test, call))


def _empty(operation: type[Case], profile: Profile) -> Iterator[Case]:
    for case in _sets.in_every_form(operation, profile):
        yield case.but(num_tokens=0)
        yield case.but(num_tokens=0, topk=1, num_experts=1, dtype="float32")


@both(4, _empty)
def no_tokens_give_empty_results(under_test: BackendUnderTest, case: Case) -> None:
    """T = 0 gives results of the right shapes; those of blocks are zero."""
    case.make(under_test.device).checked(under_test)


MODES: dict[str, Callable[[], Any]] = {
    "torch.inference_mode": torch.inference_mode,
    "torch.no_grad": torch.no_grad,
    "torch.enable_grad": torch.enable_grad,
}


@both(4, _sets.in_every_form)
def grad_modes_change_nothing(under_test: BackendUnderTest, case: Case) -> None:
    """Calls with gradients, without them and in inference mode follow each other in any order."""
    call = case.but(topk=7).make(under_test.device)
    differentiable = not (isinstance(case, PermuteCase) and case.quantize)
    before = "nothing"
    for mode in [*MODES, *reversed(MODES)]:
        what = f"in {mode} after {before}"
        for tensor in call.arguments.values():
            if isinstance(tensor, torch.Tensor) and differentiable:
                tensor.requires_grad_()
        try:
            with MODES[mode]():
                made = call.made(under_test)
        except (RuntimeError, ValueError) as error:
            msg = f"{what}: raises {type(error).__name__}: {error}"
            raise AssertionError(msg) from error
        call.must_match(made, what)
        before = mode
