"""Clause 9: compile, export and fake tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance.exported import saved_and_loaded
from moe_routing.conformance.permutation import _sets
from moe_routing.conformance.permutation._check import both
from moe_routing.conformance.permutation.calls import CombineCall, PermuteCall
from moe_routing.conformance.permutation.cases import PermuteCase
from moe_routing.conformance.permutation.gradients import (
    gradient_of,
    must_be_right,
    must_require,
    with_leaves,
)
from moe_routing.conformance.requirements import require
from moe_routing.permutation import PermutedRows
from moe_routing.planning import DispatchPlan
from moe_routing.python_warnings import not_raised

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.permutation.calls import Call
    from moe_routing.conformance.permutation.cases import Case
    from moe_routing.conformance.under_test import BackendUnderTest


class _Module(torch.nn.Module):
    """A module that permutes or combines, as a model has it."""

    def __init__(self, call: Call, backend: str) -> None:
        super().__init__()
        self.function = call.function
        self.options = {"backend": backend}
        if isinstance(call, PermuteCall):
            self.options["quantize"] = call.arguments["quantize"]

    def forward(self, parts: tuple[Any, ...], rows: Tensor, *weights: Tensor) -> Any:  # noqa: ANN401 -- a Tensor or PermutedRows
        return self.function(rows, DispatchPlan(*parts), *weights, **self.options)


def _few_forms(operation: type[Case], profile: Profile) -> Iterator[Case]:
    """Yield fewer cases than other checks have: each takes seconds."""
    return _sets.in_every_form(operation, "full" if profile == "full" else "smoke")


def _given(call: Call) -> tuple[Any, ...]:
    """Return what the module of a call is called with."""
    tensors = [t for t in call.arguments.values() if isinstance(t, torch.Tensor)]
    return (tuple(call.plan), *tensors)


def _as_tuple(call: Call, made: object) -> tuple[Tensor, ...]:
    """Require the type that the plain call returns, and return its tensors."""
    wanted = PermutedRows if len(call.outputs) > 1 else torch.Tensor
    require(isinstance(made, wanted), f"expected {wanted.__name__}, got {type(made).__name__}")
    return (made,) if isinstance(made, torch.Tensor) else tuple(made)  # type: ignore[arg-type] # as above


@both(9, _few_forms, capability="compile")
def compiles_as_one_graph(under_test: BackendUnderTest, case: Case) -> None:
    """torch.compile(fullgraph=True), with static and dynamic shapes, gives the right rows."""
    call, shorter = (
        some.make(under_test.device) for some in (case, case.but(num_tokens=7, turn=1))
    )
    call.made(under_test)
    for dynamic in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(
            _Module(call, under_test.backend), fullgraph=True, backend="aot_eager", dynamic=dynamic
        )
        for some in (call, shorter):
            some.must_match(_as_tuple(some, compiled(*_given(some))), f"dynamic={dynamic}")


def _trained(operation: type[Case], profile: Profile) -> Iterator[Case]:
    for case in _few_forms(operation, profile):
        if not (isinstance(case, PermuteCase) and case.quantize):
            yield case


@both(9, _trained, capability="compile")
def compiled_calls_have_gradients(under_test: BackendUnderTest, case: Case) -> None:
    """Gradients through torch.compile(fullgraph=True) are right."""
    call = case.make(under_test.device)
    watched, leaves = with_leaves(call)
    torch.compiler.reset()
    compiled = torch.compile(_Module(call, under_test.backend), fullgraph=True, backend="aot_eager")
    result = compiled(tuple(call.plan), *leaves)
    must_require(result)
    grad = gradient_of(call, case.generator())
    must_be_right(watched, grad, torch.autograd.grad(result, leaves, grad))


@both(9, _sets.in_every_form, capability="compile")
def exports_and_comes_back(under_test: BackendUnderTest, case: Case) -> None:
    """A program that torch.export made, saved and loaded, is right for other rows and plans."""
    call, other = (some.make(under_test.device) for some in (case, case.but(turn=1)))
    call.made(under_test)
    loaded = saved_and_loaded(_Module(call, under_test.backend), _given(call))
    other.must_match(_as_tuple(other, loaded(*_given(other))), "the loaded program")


@both(9, _sets.in_every_form, capability="compile")
def fake_tensors_give_fake_rows(under_test: BackendUnderTest, case: Case) -> None:
    """Fake tensors, and real ones where operators are faked, give rows of the right shapes.

    Later calls are as before.
    """
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    call = case.make(under_test.device)
    for turn in ("a first call", "a call like an earlier one"):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            results = [some.made(under_test) for some in (_faked(call, mode), call)]
        for made in results:
            for name, one, like in zip(call.names, made, call.outputs, strict=False):
                got = (type(one), tuple(one.shape), one.dtype)
                expected = (FakeTensor, tuple(like.shape), like.dtype)
                require(got == expected, f"{turn}: {name}: expected {expected}, got {got}")
        call.checked(under_test, "after fake tensors")


def _faked(call: Call, mode: Any) -> Call:  # noqa: ANN401 -- a FakeTensorMode
    """Return the call of fake tensors."""
    plan = DispatchPlan(
        *(None if part is None else mode.from_tensor(part) for part in call.plan)  # type: ignore[arg-type] # only the last two may be None
    )
    tensors = {
        name: mode.from_tensor(tensor)
        for name, tensor in call.arguments.items()
        if isinstance(tensor, torch.Tensor)
    }
    return call.but(plan=plan, **tensors)


def _opchecked(operation: type[Case], profile: Profile) -> Iterator[Case]:
    for case in _sets.in_every_form(operation, profile, num_tokens=3, columns=5, dtype="float32"):
        # Places that may hold anything are compared as well.
        if not (case.masked and operation is PermuteCase):
            yield case


@both(9, _opchecked, capability="compile")
def the_operators_pass_opcheck(under_test: BackendUnderTest, case: Case) -> None:
    """torch.library.opcheck finds nothing wrong with the operators of traced calls."""
    call = case.make(under_test.device)
    call.made(under_test)
    parts, backend = call.plan[:4], under_test.backend
    if isinstance(call, PermuteCall):
        hidden = call.hidden if call.quantize else call.hidden.requires_grad_()
        _opcheck("permute", (hidden, *parts, call.layout, call.quantize, backend))
        return
    assert isinstance(call, CombineCall)  # noqa: S101 -- for mypy: there are two operations
    rows = call.matrix.nan_to_num(0.0).requires_grad_()  # opcheck finds NaN unequal to itself
    weights = None if call.weights is None else call.weights.requires_grad_()
    _opcheck("combine", (rows, *parts, weights, backend))
    grad = gradient_of(call, case.generator()).requires_grad_()
    _opcheck("combine_backward", (grad, rows, *parts, weights, backend))


def _opcheck(name: str, arguments: tuple[Any, ...]) -> None:
    try:
        with not_raised():
            torch.library.opcheck(getattr(torch.ops.moe_routing, name).default, arguments)
    except Exception as error:
        msg = f"opcheck of {name} raises {type(error).__name__}: {error}"
        raise AssertionError(msg) from error
