"""Clauses 4, 8, 9 and 10: what the product does for every backend, done wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing.formula import gate as formula
from moe_routing.gating import GateOutput, _check, call, op
from mutants._change import Change, elements_are_shown, no_name_in_front

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


CHANGES: list[Change] = []


def _change(home: ModuleType, function: str, check: str, saying: str) -> Any:
    def enter(made: Callable[[Any], Any]) -> Callable[[Any], Any]:
        CHANGES.append(Change("gate", check, saying, home, function, made))
        return made

    return enter


@_change(call, "empty_output", "no_tokens_give_empty_outputs", r"ids: expected .*int64|weights: ")
def no_tokens_in_another_dtype(right: Any) -> Any:
    def wrong(*arguments: Any) -> Any:
        made = right(*arguments)
        return made._replace(weights=made.weights.double())

    return wrong


@_change(_check, "_vector", "wrong_arguments_raise_and_are_named", r", the first call: ")
def vectors_are_not_checked(_right: Any) -> Any:
    return lambda _name, value, _hidden, _length: value


@_change(_check, "_number", "wrong_arguments_raise_and_are_named", r", the first call: ")
def numbers_are_not_checked(_right: Any) -> Any:
    return lambda _name, value, _least: value


_change(
    _check,
    "refusal",
    "wrong_arguments_raise_and_are_named",
    "^the error shows the elements of a tensor",
)(elements_are_shown)
_change(
    _check,
    "refusal",
    "wrong_arguments_raise_and_are_named",
    "^the error does not begin with the argument's name",
)(no_name_in_front)


@_change(
    formula,
    "logits_backward",
    "gradients_are_those_of_autograd",
    r"the gradient of hidden is off by .*, allowed ",
)
def the_norm_is_a_constant(right: Any) -> Any:
    def wrong(projection: Any, grad: Any) -> Any:
        made = right(projection, grad)
        if projection.eps is None:
            return made
        hidden = projection.hidden.float()
        r = (hidden.square().mean(1, keepdim=True) + projection.eps).rsqrt()
        a = torch.tensor(projection.multiplier)
        for factor in (projection.norm_weight, projection.input_scale):
            a = a if factor is None else a * factor.float()
        of_hidden = (grad.float() @ projection.router_weight.float()) * a * r
        return made._replace(hidden=of_hidden.to(made.hidden.dtype))

    return wrong


@_change(
    formula,
    "logits_backward",
    "gradients_are_those_of_autograd",
    r"the gradient of input_scale is off by ",
)
def the_multiplier_is_forgotten(right: Any) -> Any:
    def wrong(projection: Any, grad: Any) -> Any:
        made = right(projection, grad)
        of_scale = made.input_scale
        if of_scale is None:
            return made
        return made._replace(input_scale=of_scale / projection.multiplier)

    return wrong


@_change(
    formula,
    "logits_backward",
    "garbage_in_padding_reaches_no_gradient",
    r"the gradient of \w+ changed",
)
def padding_reaches_the_weight(right: Any) -> Any:
    def wrong(projection: Any, grad: Any) -> Any:
        made = right(projection, grad)
        weight = made.router_weight + (grad.t() @ projection.hidden.float()).to(
            made.router_weight.dtype
        )
        return made._replace(router_weight=weight)

    return wrong


@_change(
    formula,
    "logits_backward",
    "second_gradients_are_those_of_autograd",
    r"does not require grad|the second gradient of \w+ is off by ",
)
def the_weight_is_a_constant_the_second_time(right: Any) -> Any:
    def wrong(projection: Any, grad: Any) -> Any:
        return right(projection._replace(router_weight=projection.router_weight.detach()), grad)

    return wrong


def _elsewhere(after: Any) -> Any:
    """Count into a tensor that nobody sees."""
    return after._replace(counts=torch.zeros_like(after.counts))


@_change(call.Gate, "_done", "what_is_gated_is_counted", r"^call 1: the counts of experts \[\[\d")
def physical_experts_are_counted(right: Any) -> Any:
    def wrong(gate: Any, after: Any, made: Any, weight: Any, expert_map: Any) -> Any:
        mapped = right(gate, _elsewhere(after), made, weight, expert_map)
        places = mapped.ids.where(mapped.ids < 0, mapped.ids % len(after.counts))
        right(gate, after, made._replace(ids=places), weight, None)
        return mapped

    return wrong


@_change(call.Gate, "_done", "what_is_gated_is_counted", r"^call 2: the counts of experts \[\[\d")
def later_calls_are_not_counted(right: Any) -> Any:
    seen: set[int] = set()

    def wrong(gate: Any, after: Any, *others: Any) -> Any:
        known = after.counts.data_ptr() in seen
        seen.add(after.counts.data_ptr())
        return right(gate, _elsewhere(after) if known else after, *others)

    return wrong


@_change(
    call.Gate, "_done", "what_is_gated_gets_its_replica", r"^call 1 with replicas: ids has other"
)
def what_is_gated_keeps_logical_ids(right: Any) -> Any:
    return lambda gate, after, *others: right(gate, after._replace(replicas=None), *others)


@_change(call, "_after_of", "what_is_gated_gets_its_replica", r"^with a plan of replicas: ids has")
def a_plan_of_a_gate_keeps_logical_ids(_right: Any) -> Any:
    return lambda _options: None


@_change(
    call.Gate, "_weighed", "what_is_gated_has_its_shared_weights",
    r"^call 1 with shared weights: weights has other",
)  # fmt: skip
def what_is_gated_keeps_its_shared_weight(_right: Any) -> Any:
    return lambda _gate, made, _shared_weights: made


@_change(op, "gate", "compiles_as_one_graph", r"dynamic=\w+: \w+ has other bits in \d+ rows")
def traced_calls_have_another_multiplier(right: Any) -> Any:
    def wrong(projection: Any, routed: Any, config: Any) -> GateOutput:
        made: GateOutput = right(projection._replace(multiplier=2.0), routed, config)
        return made

    return wrong


@_change(op, "gate", "exports_and_comes_back", r"the loaded program: \w+ has other bits in ")
def exported_calls_have_another_multiplier(right: Any) -> Any:
    return traced_calls_have_another_multiplier(right)


@_change(op, "gate", "gradients_are_compiled", r"the gradient of hidden is off by ")
def compiled_steps_double_the_gradient(right: Any) -> Any:
    def wrong(projection: Any, routed: Any, config: Any) -> GateOutput:
        made: GateOutput = right(projection, routed, config)
        if torch.compiler.is_dynamo_compiling():
            return made._replace(weights=made.weights * 2)
        return made

    return wrong


@_change(op, "gate", "fake_tensors_give_fake_outputs", r"weights: got ")
def fake_weights_are_double(right: Any) -> Any:
    def wrong(projection: Any, routed: Any, config: Any) -> GateOutput:
        made: GateOutput = right(projection, routed, config)
        return made._replace(weights=made.weights.double())

    return wrong


@_change(call, "run", "the_operator_passes_opcheck", r"opcheck raises ")
def real_outputs_are_others_than_fake_ones(right: Any) -> Any:
    def wrong(*arguments: Any, **options: Any) -> GateOutput:
        made: GateOutput = right(*arguments, **options)
        return made._replace(weights=made.weights.double())

    return wrong
