"""Changes of the product: what it does for every backend, no backend can do wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_routing.permutation import _check, call, op
from mutants._change import Change, elements_are_shown, no_name_in_front

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def _not_looked_at(_right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *_: None


def _scales_stay_in_the_order_of_tokens(right: Callable[..., Any]) -> Callable[..., Any]:
    def permuted(rows: Tensor, plan: Any, *rest: Any) -> Any:
        if rows.itemsize == 1 and rows.shape[1] > 100:
            return right(rows, plan, *rest)
        import torch

        places = torch.arange(plan.order.numel()) % len(rows)
        return (rows[places].view(*plan.order.shape, rows.shape[1]), rows)

    return permuted


def _no_tokens_give_no_columns(right: Callable[..., Any]) -> Callable[..., Any]:
    def run(rows: Tensor, plan: Any, *rest: Any) -> Any:
        made = right(rows, plan, *rest)
        if len(plan.inverse):
            return made
        return made[:, :0] if not isinstance(made, tuple) else (made[0][..., :0], made[1])

    return run


def _is_faked(tensor: Any) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def _fakes_have_no_columns(right: Callable[..., Any]) -> Callable[..., Any]:
    def called(rows: Tensor, *rest: Any) -> Any:
        made = right(rows, *rest)
        one = made[0] if isinstance(made, tuple) else made
        if not _is_faked(one):
            return made
        return one[..., :0] if one is made else (one[..., :0], made[1])

    return called


def _traced_in_float32(right: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any) -> Any:
        made = right(*arguments)
        return (made[0].float(), made[1]) if isinstance(made, tuple) else made.float()

    return called


def _every_place_counts(right: Callable[..., Any]) -> Callable[..., Any]:
    def called(rows: Tensor, plan: Any, *rest: Any) -> Any:
        whole = plan.offsets.new_full(tuple(plan.offsets.shape), plan.order.numel())
        return right(rows, plan._replace(offsets=whole), *rest)

    return called


def _without_gradients(right: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any) -> Any:
        made = right(*arguments)
        return tuple(one.detach() for one in made) if isinstance(made, tuple) else made.detach()

    return called


def _absolute_weights(right: Callable[..., Any]) -> Callable[..., Any]:
    def called(rows: Tensor, plan: Any, weights: Tensor | None, backend: str | None) -> Any:
        return right(rows, plan, None if weights is None else weights.abs(), backend)

    return called


ARGUMENTS = "wrong_arguments_raise_and_are_named"

CHANGES = (
    Change(
        "permute", ARGUMENTS, "^hidden for another plan, a first call: no error",
        _check, "check_tokens", _not_looked_at,
    ),
    Change(
        "combine", ARGUMENTS, "^rows of a place (less|more), a first call: no error",
        _check, "check_places", _not_looked_at,
    ),
    *(
        change
        for operation in ("permute", "combine")
        for change in (
            Change(
                operation, ARGUMENTS, "^the error shows the elements of a tensor",
                _check, "refusal", elements_are_shown,
            ),
            Change(
                operation, ARGUMENTS, "^the error does not begin with the argument's name",
                _check, "refusal", no_name_in_front,
            ),
            Change(
                operation, "no_tokens_give_empty_results", "^(rows|out): expected shape",
                call, f"run_{operation}", _no_tokens_give_no_columns,
            ),
            Change(
                operation, "fake_tensors_give_fake_rows", "^a first call: (rows|out): expected",
                op, operation, _fakes_have_no_columns,
            ),
            Change(
                operation, "compiles_as_one_graph", "^dynamic=False: (rows|out): expected shape",
                op, operation, _traced_in_float32,
            ),
            Change(
                operation, "exports_and_comes_back", r"^the loaded program: (rows|out): \d+ of",
                op, operation, _every_place_counts,
            ),
            Change(
                operation, "compiled_calls_have_gradients", "^the result does not require grad",
                op, operation, _without_gradients,
            ),
        )
    ),
    Change(
        "permute", "scales_are_moved_with_their_rows", r"^the scales: rows: \d+ of",
        call, "_permute", _scales_stay_in_the_order_of_tokens,
    ),
    Change(
        "permute", "gradients_have_gradients", "^a gradient does not require gradients$",
        op, "combine", _without_gradients,
    ),
    Change(
        "combine", "gradients_have_gradients", r"^gradient \d of the gradients: wrong by",
        op, "combine", _absolute_weights,
    ),
)  # fmt: skip
