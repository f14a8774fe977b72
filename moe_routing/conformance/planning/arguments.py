"""Clause 7: wrong arguments, one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import moe_routing
from moe_routing.conformance.planning import cases
from moe_routing.conformance.planning._check import check
from moe_routing.conformance.planning.cases import POISON, Call, Case
from moe_routing.conformance.requirements import require, require_refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing.planning import DispatchPlan

T, K, E = 5, 8, 60
TELLTALE = 1234567
"""An id that no error may show."""

RIGHT: dict[str, Case] = {
    "sorted": Case(num_tokens=T, topk=K, num_experts=E),
    "blocks": Case(num_tokens=T, topk=K, num_experts=E, block=16),
    "capacity": Case(num_tokens=T, topk=K, num_experts=E, capacity=3),
    "least_weight": Case(num_tokens=T, topk=K, num_experts=E, capacity=3, drop="least_weight"),
    "masked": Case(num_tokens=T, topk=K, num_experts=E, capacity=3, masked=True),
}
"""Right calls by name; each wrong one differs from one of them."""


@dataclass(frozen=True, slots=True)
class Wrong:
    """One wrong argument.

    :ivar argument: its name, which the error must name.
    :ivar what: what is wrong with it.
    :ivar right: the call that it is put into, a key of ``RIGHT``.
    :ivar changed: makes the changed arguments from the right call and a plan for it.
    """

    argument: str
    what: str
    right: str
    changed: Callable[[Call, DispatchPlan], dict[str, Any]]

    @property
    def id(self) -> str:
        """Name for test ids."""
        return f"{self.argument}-{self.what.replace(' ', '_')}-{self.right}"

    @property
    def family(self) -> str:
        """A plan depends on no routing family."""
        return ""


def _set(argument: str, right: str, **values: Any) -> list[Wrong]:  # noqa: ANN401 -- wrong values
    """Return wrong values of an argument, named by what is wrong with them."""
    return [_one(argument, what, right, value) for what, value in values.items()]


def _one(argument: str, what: str, right: str, value: object) -> Wrong:
    return Wrong(argument, what, right, lambda _call, _out: {argument: value})


def _numbers(argument: str, right: str, *more: object) -> list[Wrong]:
    """Return what is no int from 1 on, and numbers too large."""
    wrong = (0, -1, 2.5, 2.0, True, "8", 2**31, 2**70, -(2**70), [8], torch.ones(1), *more)
    return [_one(argument, _named(value), right, value) for value in wrong]


def _named(value: object) -> str:
    return type(value).__name__ if isinstance(value, (list, torch.Tensor)) else repr(value)


def _ids(what: str, changed: Callable[[Tensor], Any], *, argument: str = "ids") -> Wrong:
    return Wrong(argument, what, "sorted", lambda call, _out: {"ids": changed(call.ids)})


def _weights(what: str, changed: Callable[[Tensor], Any]) -> Wrong:
    def change(call: Call, _out: DispatchPlan) -> dict[str, Any]:
        assert call.weights is not None  # noqa: S101 -- for mypy: the call has weights
        return {"weights": changed(call.weights)}

    return Wrong("weights", what, "least_weight", change)


def _out(what: str, changed: Callable[[Call, DispatchPlan], Any], right: str = "blocks") -> Wrong:
    return Wrong("out", what, right, lambda call, out: {"out": changed(call, out)})


def _expanded(ids: Tensor, tokens: int, topk: int) -> Tensor:
    """Return ids of that many tokens, all in one element of memory."""
    return ids[:1, :1].expand(tokens, topk)


def _same_memory(out: DispatchPlan) -> DispatchPlan:
    """Return a plan whose counts lie in its offsets."""
    return out._replace(counts=out.offsets[: len(out.counts)])


def _within_ids(call: Call, out: DispatchPlan) -> DispatchPlan:
    return out._replace(inverse=call.ids)


def _within_weights(call: Call, out: DispatchPlan) -> DispatchPlan:
    assert call.weights is not None  # noqa: S101 -- for mypy: the call has weights
    return out._replace(inverse=call.weights.view(torch.int32))


WRONG = (
    _ids("of rank 1", lambda ids: ids[0]),
    _ids("of rank 3", lambda ids: ids[None]),
    _ids("of floats", lambda ids: ids.float()),
    _ids("of bools", lambda ids: ids > 0),
    *(
        _ids(f"of {dtype}", lambda ids, dtype=dtype: ids.to(dtype))  # type: ignore[misc]  # bound now
        for dtype in (torch.int8, torch.int16, torch.uint8, torch.float64, torch.complex64)
    ),
    _ids("a list", lambda ids: ids.tolist()),
    _ids("missing", lambda _: None),
    _ids("sparse", lambda ids: ids.to_sparse()),
    _ids("without columns", lambda ids: ids[:, :0]),
    _ids("of 65 columns", lambda ids: ids[:, :1].expand(T, 65)),
    _ids("of too many pairs", lambda ids: _expanded(ids, 2**30, 2)),
    _ids("of far too many pairs", lambda ids: _expanded(ids, 2**40, 64)),
    *_numbers("num_experts", "sorted", 4097, None),
    *_numbers("block", "sorted"),
    *_numbers("capacity", "capacity"),
    *_numbers("capacity", "masked"),
    Wrong(
        "block", "places beyond int32", "sorted",
        lambda call, _: {"ids": _expanded(call.ids, 2**20, 8), "block": 2**26},
    ),
    Wrong("block", "as large as int32", "sorted", lambda _call, _out: {"block": 2**31 - 1}),
    Wrong("block", "with masked", "masked", lambda _call, _out: {"block": 16}),
    Wrong("capacity", "missing", "masked", lambda _call, _out: {"capacity": None}),
    Wrong("capacity", "missing", "least_weight", lambda _call, _out: {"capacity": None}),
    Wrong("capacity", "places beyond int32", "masked", lambda _call, _out: {"capacity": 2**30}),
    *(
        _one("drop", _named(value), right, value)
        for value in ("first", "", "nothing", None, True, 0, ["last"], torch.ones(1))
        for right in ("sorted", "capacity")
    ),
    *(_one("masked", _named(value), "masked", value) for value in (1, 0, None, "yes", [True])),
    *_set("backend", "sorted", a_number=3, a_list=["eager"], a_tensor=torch.ones(1)),
    _weights("missing", lambda _: None),
    _weights("a list", lambda weights: weights.tolist()),
    _weights("of float16", lambda weights: weights.half()),
    _weights("of float64", lambda weights: weights.double()),
    _weights("of integers", lambda weights: weights.int()),
    _weights("of one row too few", lambda weights: weights[1:]),
    _weights("of one column too few", lambda weights: weights[:, 1:]),
    _weights("transposed", lambda weights: weights.t()),
    _weights("of rank 1", lambda weights: weights.reshape(-1)),
    _weights("on another device", lambda weights: weights.to("meta")),
    _weights("sparse", lambda weights: weights.to_sparse()),
    *(
        Wrong("weights", "uncalled for", right, lambda call, _: {"weights": call.ids.float()})
        for right in ("sorted", "blocks", "capacity", "masked")
    ),
    _out("a list", lambda _, out: list(out)),
    _out("a tensor", lambda _, out: out.order),
    _out("a plain tuple", lambda _, out: tuple(out)),
    _out("of five", lambda _, out: tuple(out)[:5]),
    _out("of None", lambda _, out: (None,) * len(out)),
    _out("of int64 places", lambda _, out: out._replace(order=out.order.long())),
    _out("without block_experts", lambda _, out: out._replace(block_experts=None)),
    _out("with num_dropped", lambda _, out: out._replace(num_dropped=out.counts[:1].clone())),
    _out(
        "with block_experts", lambda _, out: out._replace(block_experts=out.counts.clone()),
        "sorted",
    ),
    _out("without num_dropped", lambda _, out: out._replace(num_dropped=None), "capacity"),
    _out("of a place too few", lambda _, out: out._replace(order=out.order[1:])),
    _out("of a place too many", lambda _, out: out._replace(order=out.order.repeat(2))),
    _out("of a count too few", lambda _, out: out._replace(counts=out.counts[1:])),
    _out("without the last offset", lambda _, out: out._replace(offsets=out.offsets[1:])),
    _out("of a flat inverse", lambda _, out: out._replace(inverse=out.inverse.reshape(-1))),
    _out("of a flat matrix", lambda _, out: out._replace(order=out.order.reshape(-1)), "masked"),
    _out("not contiguous", lambda _, out: out._replace(counts=out.counts.repeat(2)[::2])),
    _out("one element many times", lambda _, out: out._replace(counts=out.counts[:1].expand(E))),
    _out("on another device", lambda _, out: out._replace(offsets=out.offsets.to("meta"))),
    _out("counts in the offsets", lambda _, out: _same_memory(out)),
    _out("one tensor twice", lambda _, out: out._replace(num_dropped=out.counts[:1]), "capacity"),
    _out("inverse in the ids", _within_ids),
    _out("inverse in the weights", _within_weights, "least_weight"),
)  # fmt: skip


@check(7, lambda _: WRONG)
def wrong_arguments_raise_and_are_named(under_test: BackendUnderTest, case: Wrong) -> None:
    """A wrong argument raises an error that names it, and nothing is written.

    The error is a TypeError or ValueError that says what came and what was expected, and shows no
    elements. It is raised in a first call, and in one like an earlier call too.
    """
    call = RIGHT[case.right].make(under_test.device)
    call.ids[0, 0] = TELLTALE
    for turn in ("a first call", "a call like an earlier one"):
        out = cases.outputs(call)
        arguments = {
            "ids": call.ids, "num_experts": E, "backend": under_test.backend, "out": out,
            **call.options,
        }  # fmt: skip
        if case.argument != "out":
            del arguments["out"]
        arguments |= case.changed(call, out)
        require_refusal(
            lambda given=arguments: moe_routing.plan(**given),  # type: ignore[misc] # bound now
            case.argument, f"{case.argument} {case.what}, {turn}", TELLTALE,
        )  # fmt: skip
        untouched = all(bool((part == POISON).all()) for part in out if part is not None)
        require(untouched, "an error is raised after something was written")
        cases.plan(under_test, call)
        cases.plan(under_test, call, out)
