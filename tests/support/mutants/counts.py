"""Clause 17: counting done wrong, by the router and by backends that count themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing import _after, _calls, _counts, _router
from mutants._change import Change
from mutants._mutant import EVERY_OPERAND, Reference, caught_by

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing.kernel import RoutingOutput

CHANGES: list[Change] = []
COUNTED = "slots_of_logical_experts_are_counted"


def _change(home: Any, function: str, check: str, saying: str) -> Any:
    def enter(made: Callable[[Any], Any]) -> Callable[[Any], Any]:
        CHANGES.append(Change("route", check, saying, home, function, made))
        return made

    return enter


@_change(_counts, "add", COUNTED, r"call 1: expert 0 counts \d+, it has")
def padding_is_counted(right: Any) -> Any:
    return lambda counts, ids, *sizes: right(counts, ids.clamp(min=0), *sizes)


@_change(_counts, "add", COUNTED, r"torch.int32, call 1: expert 0 counts \d+, it has .*\(-7 before")
def counts_are_set(right: Any) -> Any:
    return lambda counts, *others: right(counts.zero_(), *others)


@_change(_counts, "add", COUNTED, r"^\[64\] torch.int32, call 2: expert")
def later_calls_are_not_counted(right: Any) -> Any:
    seen: set[int] = set()

    def wrong(counts: Any, *others: Any) -> None:
        if counts.data_ptr() not in seen:
            right(counts, *others)
        seen.add(counts.data_ptr())

    return wrong


@_change(_counts, "add", COUNTED, r"^\[66\] torch.int32, call 1: expert 64 counts")
def shared_experts_never_count(right: Any) -> Any:
    def wrong(counts: Any, ids: Any, num_experts: int, shared: int) -> None:
        right(counts[:num_experts], ids, num_experts, shared)

    return wrong


@_change(_counts, "add", COUNTED, r"^\[64\] torch.int32, call 1: expert 63 counts")
def shared_experts_are_the_last_expert(right: Any) -> Any:
    def wrong(counts: Any, ids: Any, num_experts: int, _shared: int) -> None:
        right(counts, ids.clamp(max=len(counts) - 1), num_experts, 0)

    return wrong


@_change(_counts, "add", COUNTED, r"call 1: expert \d+ counts -?\d+, it has")
def equal_ids_of_a_record_count_once(right: Any) -> Any:
    def wrong(counts: Any, ids: Any, *sizes: int) -> None:
        in_order = ids.sort(-1).values
        again = in_order[..., 1:] == in_order[..., :-1]
        in_order[..., 1:].masked_fill_(again, -1)
        right(counts, in_order, *sizes)

    return wrong


@_change(_calls.Calls, "routed", COUNTED, r"call 1: expert \d+ counts -?\d+, it has")
def physical_experts_are_counted(right: Any) -> Any:
    def wrong(router: Any, operands: Any, topk: Any, ids_dtype: Any, after: Any) -> Any:
        output = right(router, operands, topk, ids_dtype, None)
        if after is not None:
            experts = operands.logits.shape[-1]
            places = output.ids.where(output.ids < 0, output.ids % experts)
            _counts.add(after.counts, places, experts, router.spec.shared_experts)
        return output

    return wrong


@_change(_after, "renamed", COUNTED, r"call 1: not the outputs of the call without counts")
def what_is_counted_is_not_renamed(_right: Any) -> Any:
    return lambda ids, *_: ids


@_change(_after, "renamed", COUNTED, r"call 3: not the outputs of the call without counts")
def what_is_given_keeps_logical_ids(right: Any) -> Any:
    return lambda ids, renaming, out: ids if out is not None else right(ids, renaming, None)


@_change(_counts, "add", "counts_may_lie_anywhere", r"^a slice: what is around the counts")
def the_element_before_is_written(right: Any) -> Any:
    def wrong(counts: Any, *others: Any) -> None:
        right(counts, *others)
        if counts.storage_offset():
            counts.as_strided((1,), (1,), counts.storage_offset() - 1).add_(1)

    return wrong


@_change(_counts, "add", "counts_may_lie_anywhere", r"^every second: expert \d+ counts")
def counts_are_added_to_a_copy(right: Any) -> Any:
    return lambda counts, *others: right(counts.contiguous(), *others)


@_change(
    _calls.Calls,
    "_first_with_plan",
    "a_call_with_a_plan_counts_once",
    r"^call 1 with a plan: expert \d+ counts",
)
def a_first_call_with_a_plan_counts_twice(right: Any) -> Any:
    def wrong(router: Any, operands: Any, topk: Any, dtype: Any, after: Any, *others: Any) -> Any:
        if after is not None:
            router.routed(operands, topk, dtype, after)
        return right(router, operands, topk, dtype, after, *others)

    return wrong


@_change(
    _router.Router,
    "with_plan",
    "a_call_with_a_plan_counts_once",
    r"^call 2 with a plan: expert \d+ counts",
)
def a_later_call_with_a_plan_does_not_count(right: Any) -> Any:
    seen: set[int] = set()

    def wrong(*arguments: Any, counts: Any = None, **options: Any) -> Any:
        first = counts is not None and counts.data_ptr() not in seen
        seen.update([counts.data_ptr()] if first else [])
        return right(*arguments, counts=counts if first else None, **options)

    return wrong


@_change(_counts, "add", "gradients_flow_past_counts", r"^with gradients: expert \d+ counts")
def training_does_not_count(right: Any) -> Any:
    def wrong(counts: Any, ids: Any, *sizes: int) -> None:
        if not torch.is_grad_enabled() or counts[0] != -7:
            right(counts, ids, *sizes)

    return wrong


@_change(_counts, "add", "traced_calls_count", r"^a compiled program, run 1: expert \d+ counts")
def compiled_calls_do_not_count(right: Any) -> Any:
    return lambda *arguments: None if torch.compiler.is_dynamo_compiling() else right(*arguments)


@_change(_counts, "check", "wrong_arguments_raise_and_are_named", r"counts in the logits: no error")
def counts_may_lie_in_operands(right: Any) -> Any:
    return lambda *given: right(*given[:-1], {})


SHARED = "gemma4/shared"


@caught_by(COUNTED, saying=r"call 1: expert 0 counts \d+, it has", operands=EVERY_OPERAND)
class PaddingIsCounted(Reference):
    """Counts rows of padding for the first expert."""

    def count(self, counts: Tensor, ids: Tensor, num_experts: int) -> None:
        super().count(counts, ids.clamp(min=0), num_experts)


@caught_by(COUNTED, SHARED, saying=r"^\[66\] .*: expert 64 counts", operands=EVERY_OPERAND)
class SharedExpertsAreNotCounted(Reference):
    """Counts the experts that are selected, whatever the counts have elements for."""

    def count(self, counts: Tensor, ids: Tensor, num_experts: int) -> None:
        super().count(counts[:num_experts], ids, num_experts)


@caught_by(COUNTED, SHARED, saying=r"^\[64\] .*: expert 63 counts", operands=EVERY_OPERAND)
class SharedExpertsAreTheLastExpert(Reference):
    """Counts shared experts that have no element."""

    def count(self, counts: Tensor, ids: Tensor, num_experts: int) -> None:
        super().count(counts, ids.clamp(max=len(counts) - 1), num_experts)


@caught_by(
    "counts_may_lie_anywhere",
    SHARED,
    saying="^a slice: what is around the counts",
    operands=EVERY_OPERAND,
)
class SharedExpertsAreCountedBehindTheLast(Reference):
    """Adds the slots of shared experts to the memory behind the counts that have none for them."""

    def count(self, counts: Tensor, ids: Tensor, num_experts: int) -> None:
        room = counts.untyped_storage().nbytes() // counts.element_size() - counts.storage_offset()
        length = min(int(ids.max()) + 1, room)
        super().count(counts.as_strided((length,), (1,)), ids, num_experts)


@caught_by(COUNTED, saying=r"torch.int32, call 1: .*\(-?\d+ before", operands=EVERY_OPERAND)
class CountsAreSet(Reference):
    """Writes the counts of the call alone."""

    def count(self, counts: Tensor, ids: Tensor, num_experts: int) -> None:
        super().count(counts.zero_(), ids, num_experts)


@caught_by(COUNTED, saying=r"call 1: expert \d+ counts -?\d+, it has", operands=EVERY_OPERAND)
class AnExpertOfARowCountsOnce(Reference):
    """Loses one of two additions to the same count by the slots of a row."""

    def count(self, counts: Tensor, ids: Tensor, num_experts: int) -> None:
        del num_experts
        counts[ids[ids >= 0].unique()] += 1


@caught_by(COUNTED, saying=r"call 1: expert \d+ counts -?\d+, it has", operands=EVERY_OPERAND)
class PhysicalExpertsAreCounted(Reference):
    """Counts what a map made of the experts."""

    def __call__(
        self, logits: Tensor, *, out: RoutingOutput | None = None, **operands: Any
    ) -> RoutingOutput:
        counts = operands.pop("counts", None)
        output = super().__call__(logits, out=out, **operands)
        if counts is not None:
            places = output.ids.where(output.ids < 0, output.ids % len(counts))
            self.count(counts, places, logits.shape[1])
        return output
