"""Clause 6: wrong arguments, one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance.permutation._check import both
from moe_routing.conformance.permutation.cases import Case, PermuteCase
from moe_routing.conformance.requirements import require_refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.permutation.calls import Call
    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing.planning import DispatchPlan

T, K, E, H = 5, 8, 60, 40
TELLTALE = 1234567
"""A number in a plan and in rows that no error may show."""
_SIZES: dict[str, Any] = {
    "num_tokens": T,
    "topk": K,
    "num_experts": E,
    "columns": H,
    "dtype": "float32",
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "sorted": {}, "blocks": {"block": 16}, "masked": {"capacity": 3, "masked": True},
}  # fmt: skip
"""Right calls by name; each wrong one differs from one of them."""


@dataclass(frozen=True, slots=True)
class Wrong:
    """One wrong argument.

    :ivar argument: its name, which the error must name.
    :ivar what: what is wrong with it.
    :ivar changed: makes the changed arguments from the right call.
    :ivar right: the call that it is put into, a key of ``LAYOUTS``.
    :ivar operation: the class of that call.
    """

    argument: str
    what: str
    changed: Callable[[Call], dict[str, Any]]
    right: str = "sorted"
    operation: type[Case] = Case

    @property
    def id(self) -> str:
        """Name for test ids."""
        return f"{self.argument}-{self.what.replace(' ', '_')}-{self.right}"

    @property
    def family(self) -> str:
        """Moving and adding rows depends on no routing family."""
        return ""


def _plan(what: str, changed: Callable[[DispatchPlan], Any], right: str = "sorted") -> Wrong:
    return Wrong("plan", what, lambda call: {"plan": changed(call.plan)}, right)


def _part(what: str, name: str, changed: Callable[[Tensor], Any], right: str = "sorted") -> Wrong:
    """Return a plan of which one part is wrong."""
    return _plan(
        f"{name} {what}", lambda plan: plan._replace(**{name: changed(getattr(plan, name))}), right
    )


def _one(
    argument: str, what: str, changed: Callable[[Any], object], right: str = "sorted"
) -> Wrong:
    return Wrong(argument, what, lambda call: {argument: changed(call.arguments[argument])}, right)


def _each(argument: str, values: dict[str, object]) -> list[Wrong]:
    """Return wrong values of an argument, by what is wrong with them."""
    return [_set(argument, what, value) for what, value in values.items()]


def _set(argument: str, what: str, value: object) -> Wrong:
    return Wrong(argument, what, lambda _: {argument: value})


PARTS = ("order", "inverse", "counts", "offsets")

OF_BOTH = (
    _plan("missing", lambda _: None),
    _plan("a list", list),
    _plan("a plain tuple", tuple),
    _plan("a tensor", lambda plan: plan.order),
    *(
        wrong
        for name in PARTS
        for wrong in (
            _part("missing", name, lambda _: None),
            _part("a list", name, lambda part: part.tolist()),
            _part("of int64", name, lambda part: part.long()),
            _part("of float32", name, lambda part: part.float()),
            _part("of rank 3", name, lambda part: part.reshape(1, 1, -1)),
            _part("not contiguous", name, lambda part: part.repeat_interleave(2, -1)[..., ::2]),
            _part("on another device", name, lambda part: part.to("meta")),
            _part("sparse", name, lambda part: part.to_sparse()),
        )
    ),
    _part("of a place less", "order", lambda part: part[1:]),
    _part("of a place more", "order", lambda part: part.repeat(2)[: T * K + 1]),
    _part("of fewer places than pairs", "order", lambda part: part[: T * K - 1], "blocks"),
    _part("of another E", "order", lambda part: part[1:].contiguous(), "masked"),
    _part("of rank 1", "inverse", lambda part: part.reshape(-1)),
    _part("of 65 columns", "inverse", lambda part: part.new_zeros(T, 65)),
    _part("without columns", "inverse", lambda part: part[:, :0].contiguous()),
    _part("of no expert", "counts", lambda part: part[:0]),
    _part("of one less", "counts", lambda part: part[1:]),
    _part("of one less", "offsets", lambda part: part[1:]),
    _part("of rank 2", "offsets", lambda part: part[:, None]),
    _part("of floats", "block_experts", lambda part: part.float(), "blocks"),
    _part("on another device", "block_experts", lambda part: part.to("meta"), "blocks"),
    *_each("backend", {"a number": 3, "a list": ["eager"], "a tensor": torch.ones(1)}),
)  # fmt: skip


def _of_tokens(plan: DispatchPlan, tokens: int) -> DispatchPlan:
    """Return a plan of another number of tokens, whose parts fit each other."""
    topk = plan.inverse.shape[1]
    order = plan.order
    if plan.block_experts is None:
        order = torch.zeros(tokens * topk, dtype=torch.int32, device=order.device)
    return plan._replace(inverse=plan.inverse.new_zeros(tokens, topk), order=order)


def _for_another_plan(argument: str, tokens: int, right: str = "sorted") -> Wrong:
    return Wrong(
        argument, "for another plan", lambda call: {"plan": _of_tokens(call.plan, tokens)}, right
    )


FLOAT8 = "float8_e4m3fn"


def _hidden(call: Call) -> Tensor:
    hidden: Tensor = call.arguments["hidden"]
    return hidden


def _scales(what: str, changed: Callable[[Tensor], object]) -> Wrong:
    return Wrong("scales", what, lambda call: {"scales": changed(_hidden(call))})


def _numbers(tensor: Tensor) -> object:
    return tensor.tolist()


OF_PERMUTE = (
    _for_another_plan("hidden", T + 1),
    _for_another_plan("hidden", T - 1, "blocks"),
    _one("hidden", "missing", lambda _: None),
    _one("hidden", "a list", _numbers),
    _one("hidden", "of rank 1", lambda rows: rows[0]),
    _one("hidden", "of rank 3", lambda rows: rows[None]),
    _one("hidden", "sparse", lambda rows: rows.to_sparse()),
    _one("hidden", "of a token less", lambda rows: rows[1:]),
    Wrong("plan", "elsewhere than hidden", lambda call: {"hidden": _hidden(call).to("meta")}),
    *_each(
        "quantize",
        {
            "another dtype": "float8_e5m2", "an empty word": "", "True": True, "a number": 8,
            "a dtype": torch.float8_e4m3fn, "a list": [FLOAT8], "a tensor": torch.ones(1),
        },
    ),
    *(
        Wrong("hidden", f"of {dtype} to quantize", lambda call, dtype=dtype: {  # type: ignore[misc]  # bound now
            "hidden": _hidden(call).to(dtype), "quantize": FLOAT8,
        })
        for dtype in (torch.float64, torch.int32, torch.float8_e4m3fn, torch.bool, torch.complex64)
    ),
    Wrong("quantize", "of rows with gradients", lambda call: {
        "hidden": _hidden(call).clone().requires_grad_(), "quantize": FLOAT8,
    }),
    _scales("a list", _numbers),
    _scales("a number", lambda _: 1.0),
    _scales("of rank 1", lambda rows: rows[:, 0]),
    _scales("of rank 3", lambda rows: rows[None]),
    _scales("of a token less", lambda rows: rows[1:]),
    _scales("of a token more", lambda rows: rows.repeat(2, 1)[: T + 1]),
    _scales("on another device", lambda rows: rows.to("meta")),
    _scales("sparse", lambda rows: rows.to_sparse()),
    Wrong("scales", "of rows to quantize", lambda call: {
        "scales": _hidden(call), "quantize": FLOAT8,
    }),
)  # fmt: skip

OF_COMBINE = (
    _one("rows", "missing", lambda _: None),
    _one("rows", "a list", _numbers),
    *(
        _one("rows", f"of {dtype}", lambda rows, dtype=dtype: rows.to(dtype))  # type: ignore[misc]  # bound now
        for dtype in (torch.float64, torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64)
    ),
    _one("rows", "of rank 1", lambda rows: rows[0]),
    _one("rows", "of rank 4", lambda rows: rows[None, None]),
    _one("rows", "sparse", lambda rows: rows.to_sparse()),
    _one("rows", "of a place less", lambda rows: rows[1:]),
    _one("rows", "of a place more", lambda rows: rows.repeat(2, 1)[: T * K + 1]),
    _one("rows", "of a place less", lambda rows: rows[1:], "blocks"),
    _one("rows", "of another E", lambda rows: rows[1:], "masked"),
    _one("rows", "of another capacity", lambda rows: rows[:, 1:], "masked"),
    _one("rows", "of matrices", lambda rows: rows.view(T, K, H)),
    Wrong("plan", "elsewhere than rows", lambda call: {"rows": call.arguments["rows"].to("meta")}),
    _for_another_plan("rows", T + 1),
    _for_another_plan("weights", T - 1, "blocks"),
    _one("weights", "a list", _numbers),
    _one("weights", "a number", lambda _: 1.0),
    *(
        _one("weights", f"of {dtype}", lambda some, dtype=dtype: some.to(dtype))  # type: ignore[misc]  # bound now
        for dtype in (torch.float64, torch.int64, torch.bool, torch.float8_e5m2)
    ),
    _one("weights", "of a token less", lambda weights: weights[1:]),
    _one("weights", "of a slot less", lambda weights: weights[:, 1:]),
    _one("weights", "of rank 1", lambda weights: weights.reshape(-1)),
    _one("weights", "of rank 3", lambda weights: weights[None]),
    _one("weights", "transposed", lambda weights: weights.t()),
    _one("weights", "on another device", lambda weights: weights.to("meta")),
    _one("weights", "sparse", lambda weights: weights.to_sparse()),
)  # fmt: skip


def _wrong(operation: type[Case], _profile: Profile) -> Iterator[Wrong]:
    own = OF_PERMUTE if operation is PermuteCase else OF_COMBINE
    for wrong in (*OF_BOTH, *own):
        yield Wrong(wrong.argument, wrong.what, wrong.changed, wrong.right, operation)


@both(6, _wrong)
def wrong_arguments_raise_and_are_named(under_test: BackendUnderTest, case: Wrong) -> None:
    """A wrong argument raises an error that names it.

    The error is a TypeError or ValueError that says what came and what was expected, and shows no
    elements. It is raised in a first call, and in one like an earlier call too.
    """
    call = case.operation(**_SIZES, **LAYOUTS[case.right]).make(under_test.device)
    call.plan.order.view(-1)[0] = TELLTALE
    call.arguments["hidden" if case.operation is PermuteCase else "rows"].view(-1)[0] = TELLTALE
    for turn in ("a first call", "a call like an earlier one"):
        arguments = {**call.arguments, "backend": under_test.backend, **case.changed(call)}
        require_refusal(
            lambda given=arguments: call.function(**given),  # type: ignore[misc] # bound now
            case.argument, f"{case.argument} {case.what}, {turn}", TELLTALE,
        )  # fmt: skip
        call.made(under_test)
