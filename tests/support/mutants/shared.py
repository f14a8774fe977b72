"""Clause 19: weights of shared experts written wrong by the router."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing import _calls, _shared
from mutants._change import Change

if TYPE_CHECKING:
    from collections.abc import Callable

CHANGES: list[Change] = []
WEIGHED = "shared_experts_have_the_weights_of_the_call"
ANYWHERE = "weights_of_every_dtype_may_lie_anywhere"
PLANNED = "a_plan_drops_by_the_weights_of_the_call"
LEARNED = "gradients_flow_to_the_weights_of_the_call"
TRACED = "traced_calls_weigh_shared_experts"


def _change(
    check: str, saying: str, home: Any = _shared, function: str = "weighed"
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    def enter(made: Callable[[Any], Any]) -> Callable[[Any], Any]:
        CHANGES.append(Change("route", check, saying, home, function, made))
        return made

    return enter


def _weighs(changed: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a change that writes other weights than those of the call."""

    def made(right: Any) -> Any:
        def wrong(output: Any, shared: Any, *others: Any, **options: Any) -> Any:
            return right(output, changed(shared), *others, **options)

        return wrong

    made.__name__ = changed.__name__
    return made


@_change(WEIGHED, r"call 1: row \d+: weights \[")
def padding_has_weights_too(right: Any) -> Any:
    def wrong(output: Any, *others: Any, **options: Any) -> Any:
        weights = output.weights.where(output.weights != 0, 1.0)
        made = right(output._replace(weights=weights), *others, **options)
        columns = made.weights[:, -others[1] :]
        output.weights[:, -others[1] :] = columns
        return output

    return wrong


@_change(WEIGHED, r"call 1: row \d+: weights \[.*nan")
def padding_is_multiplied_away(_right: Any) -> Any:
    def wrong(output: Any, shared: Any, count: int, **_options: Any) -> Any:
        output.weights[:, -count:] = (output.weights[:, -count:] != 0) * shared.float()
        return output

    return wrong


@_change(WEIGHED, r"call 3: not in out")
def out_is_left_behind(right: Any) -> Any:
    def wrong(*given: Any, **_in_place: Any) -> Any:
        return right(*given)

    return wrong


@_change(WEIGHED, r"call 1: row \d+: weights \[")
@_weighs
def the_last_shared_expert_first(shared: Any) -> Any:
    return shared.flip(-1)


@_change(ANYWHERE, r"transposed: row \d+: weights \[")
@_weighs
def weights_are_read_as_contiguous(shared: Any) -> Any:
    return shared.as_strided(shared.shape, (shared.shape[-1], 1))


@_change(ANYWHERE, r"torch.float32, contiguous: row \d+: weights \[")
@_weighs
def weights_are_rounded_to_bfloat16(shared: Any) -> Any:
    return shared.bfloat16()


@_change(LEARNED, r"does not require grad|not the gradient of the shared columns")
@_weighs
def weights_learn_nothing(shared: Any) -> Any:
    return shared.detach() + 0 * shared


@_change(PLANNED, r"call 1 with a plan: row \d+: weights", _calls.Calls, "_first_with_plan")
def a_first_plan_has_the_weights_of_the_spec(right: Any) -> Any:
    def wrong(router: Any, operands: Any, topk: Any, dtype: Any, after: Any, *others: Any) -> Any:
        return right(router, operands, topk, dtype, after, None, *others[1:])

    return wrong


@_change(PLANNED, r"call 2 with a plan: row \d+: weights", _calls.Calls, "routed")
def a_later_plan_has_the_weights_of_the_spec(right: Any) -> Any:
    seen: list[Any] = []

    def wrong(router: Any, operands: Any, *others: Any) -> Any:
        again = any(logits is operands.logits for logits in seen)
        seen.append(operands.logits)
        return right(router, operands, *(others[:3] if again else others))

    return wrong


@_change(TRACED, r"a compiled program: row \d+: weights")
def traced_calls_forget_them(right: Any) -> Any:
    def wrong(output: Any, *others: Any, **options: Any) -> Any:
        traced = torch.compiler.is_dynamo_compiling()
        return output if traced else right(output, *others, **options)

    return wrong
