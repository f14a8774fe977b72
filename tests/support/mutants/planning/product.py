"""Changes of the product: what it does for every backend, no backend can do wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_routing.planning import _check, call, op

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Change:
    """A function of the product that is replaced.

    :ivar caught_by: name of the check that must see it.
    :ivar saying: regular expression of what the check must say.
    :ivar home: the module.
    :ivar function: its name there.
    :ivar made: makes the wrong function from the right one.
    """

    caught_by: str
    saying: str
    home: Any
    function: str
    made: Callable[[Callable[..., Any]], Callable[..., Any]]

    @property
    def name(self) -> str:
        """Name for test ids."""
        return self.made.__name__.strip("_")


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


def _elements_are_shown(_right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda name, expected, value: f"{name}: expected {expected}, got {value}"


def _no_name_in_front(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda name, expected, value: right(name, expected, value).partition(": ")[2]


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


CHANGES = (
    Change(
        "wrong_arguments_raise_and_are_named", "^out counts in the offsets, a first call: no error",
        _check, "check_addresses", _addresses_are_not_looked_at,
    ),
    Change(
        "wrong_arguments_raise_and_are_named", "^num_experts True, a first call: no error",
        _check, "_within", _true_is_one,
    ),
    Change(
        "wrong_arguments_raise_and_are_named", "does not begin with .*: 'places: ",
        _check, "_check_places", _places_have_no_argument,
    ),
    Change(
        "wrong_arguments_raise_and_are_named", "^the error shows the elements of a tensor",
        _check, "refusal", _elements_are_shown,
    ),
    Change(
        "wrong_arguments_raise_and_are_named", "^the error does not begin with the argument's name",
        _check, "refusal", _no_name_in_front,
    ),
    Change(
        "no_tokens_give_a_plan_without_pairs", "^offsets: ",
        call, "_without_pairs", _offsets_stay_zero,
    ),
    Change(
        "fake_tensors_give_fake_plans", "^block_experts: expected",
        call, "shapes", _blocks_for_every_expert,
    ),
    Change(
        "compiles_as_one_graph", "^expected a DispatchPlan, got <class 'tuple'>",
        op, "call", _a_plain_tuple,
    ),
    Change(
        "exports_and_comes_back", "^the loaded program: block_experts: expected None",
        op, "call", _what_is_missing_is_empty,
    ),
)  # fmt: skip
