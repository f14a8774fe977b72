"""Changes of the product: what it does for every backend, no backend can do wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_routing.planning import _check, call, op
from mutants._change import Change, elements_are_shown, no_name_in_front

if TYPE_CHECKING:
    from collections.abc import Callable


def _addresses_are_not_looked_at(_right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *_: None


def _true_is_one(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda name, value, most: right(name, int(value) if value is True else value, most)


def _places_have_no_argument(right: Callable[..., Any]) -> Callable[..., Any]:
    def check_places(*arguments: Any) -> None:
        try:
            right(*arguments)
        except ValueError as error:
            msg = "places: expected fewer, got too many"
            raise ValueError(msg) from error

    return check_places


def _offsets_stay_zero(right: Callable[..., Any]) -> Callable[..., Any]:
    def without_pairs(call: Any, out: Any) -> Any:
        made = right(call, out)
        made.offsets.zero_()
        return made

    return without_pairs


def _blocks_for_every_expert(right: Callable[..., Any]) -> Callable[..., Any]:
    def shapes(problem: Any, num_tokens: int, capacity: int | None) -> Any:
        parts = right(problem, num_tokens, capacity)
        return parts if parts[4] is None else (*parts[:4], (parts[4][0] + 1,), parts[5])

    return shapes


def _a_plain_tuple(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: tuple(right(*arguments))


def _what_is_missing_is_empty(_right: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    from moe_routing.planning import DispatchPlan

    def called(problem: Any, ids: Any, capacity: Any, weights: Any, backend: Any) -> Any:
        return DispatchPlan(
            *torch.ops.moe_routing.plan(
                ids, weights, problem.num_experts, problem.block, capacity or 0, problem.layout,
                problem.drop, backend,
            )
        )  # fmt: skip

    return called


ARGUMENTS = "wrong_arguments_raise_and_are_named"

CHANGES = (
    Change(
        "plan", ARGUMENTS, "^out counts in the offsets, a first call: no error",
        _check, "check_addresses", _addresses_are_not_looked_at,
    ),
    Change(
        "plan", ARGUMENTS, "^num_experts True, a first call: no error",
        _check, "_within", _true_is_one,
    ),
    Change(
        "plan", ARGUMENTS, "does not begin with .*: 'places: ",
        _check, "_check_places", _places_have_no_argument,
    ),
    Change(
        "plan", ARGUMENTS, "^the error shows the elements of a tensor",
        _check, "refusal", elements_are_shown,
    ),
    Change(
        "plan", ARGUMENTS, "^the error does not begin with the argument's name",
        _check, "refusal", no_name_in_front,
    ),
    Change(
        "plan", "no_tokens_give_a_plan_without_pairs", "^offsets: ",
        call, "_without_pairs", _offsets_stay_zero,
    ),
    Change(
        "plan", "fake_tensors_give_fake_plans", "^a first call: block_experts: expected",
        call, "shapes", _blocks_for_every_expert,
    ),
    Change(
        "plan", "compiles_as_one_graph", "^expected a DispatchPlan, got <class 'tuple'>",
        op, "call", _a_plain_tuple,
    ),
    Change(
        "plan", "exports_and_comes_back", "^the loaded program: block_experts: expected None",
        op, "call", _what_is_missing_is_empty,
    ),
)  # fmt: skip
