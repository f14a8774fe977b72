"""Clause 9: compile, export and fake tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import moe_routing
from moe_routing.conformance.exported import saved_and_loaded
from moe_routing.conformance.planning import _sets, cases
from moe_routing.conformance.planning._check import check
from moe_routing.conformance.requirements import require
from moe_routing.planning import DispatchPlan
from moe_routing.python_warnings import not_raised

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.planning.cases import Call, Case
    from moe_routing.conformance.under_test import BackendUnderTest


class _Module(torch.nn.Module):
    """A module that plans, as a model has it."""

    def __init__(self, call: Call, backend: str) -> None:
        super().__init__()
        self.options = {**call.options, "backend": backend}
        self.num_experts = call.num_experts
        del self.options["weights"]

    def forward(self, ids: Tensor, weights: Tensor | None) -> DispatchPlan:
        return moe_routing.plan(ids, self.num_experts, weights=weights, **self.options)


def _with_fewer_tokens(call: Call, tokens: int) -> Call:
    weights = None if call.weights is None else call.weights[:tokens]
    return call.but(ids=call.ids[:tokens], weights=weights)


@check(9, _sets.in_every_form, capability="compile")
def compiles_as_one_graph(under_test: BackendUnderTest, case: Case) -> None:
    """torch.compile(fullgraph=True), with static and dynamic shapes, gives the right plan."""
    call = case.make(under_test.device)
    cases.plan(under_test, call)
    for dynamic in (False, True):
        module = _Module(call, under_test.backend)
        torch.compiler.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for some in (call, _with_fewer_tokens(call, 7)):
            made = compiled(some.ids, some.weights)
            require(isinstance(made, DispatchPlan), f"expected a DispatchPlan, got {type(made)}")
            cases.must_match(some, made, f"dynamic={dynamic}")


@check(9, _sets.in_every_form, capability="compile")
def exports_and_comes_back(under_test: BackendUnderTest, case: Case) -> None:
    """A program that torch.export made, saved and loaded, gives the right plan of other ids."""
    call = case.make(under_test.device)
    cases.plan(under_test, call)
    loaded = saved_and_loaded(_Module(call, under_test.backend), (call.ids, call.weights))
    other = call.but(ids=call.ids.flip(0, 1).contiguous())
    cases.must_match(other, loaded(other.ids, other.weights), "the loaded program")


@check(9, _sets.in_every_form, capability="compile")
def fake_tensors_give_fake_plans(under_test: BackendUnderTest, case: Case) -> None:
    """Fake tensors, and real ones where operators are faked, give a plan of the right shapes.

    Later calls are as before.
    """
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    call = case.make(under_test.device)
    for turn in ("a first call", "a call like an earlier one"):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            weights = None if call.weights is None else mode.from_tensor(call.weights)
            fake = call.but(ids=mode.from_tensor(call.ids), weights=weights)
            with under_test.declining():
                plans = [
                    moe_routing.plan(
                        some.ids, some.num_experts, backend=under_test.backend, **some.options
                    )
                    for some in (fake, call)
                ]
        for made in plans:
            for name, part, shape in zip(made._fields, made, call.shapes, strict=True):
                got = None if part is None else (type(part), tuple(part.shape), part.dtype)
                expected = None if shape is None else (FakeTensor, shape, torch.int32)
                require(got == expected, f"{turn}: {name}: expected {expected}, got {got}")
        cases.checked(under_test, call, "after fake tensors")


def _opchecked(profile: Profile) -> Iterator[Case]:
    for case in _sets.in_every_form(profile):
        yield case.but(ids_dtype="int64", num_tokens=2)
        if profile != "smoke":
            yield case


@check(9, _opchecked, capability="compile")
def the_operator_passes_opcheck(under_test: BackendUnderTest, case: Case) -> None:
    """torch.library.opcheck finds nothing wrong with the operator of traced calls."""
    call = case.make(under_test.device)
    cases.plan(under_test, call)
    problem = call.problem
    arguments = (
        call.ids, call.weights, problem.num_experts, problem.block, call.capacity or 0,
        problem.layout, problem.drop, under_test.backend,
    )  # fmt: skip
    try:
        with not_raised():
            torch.library.opcheck(torch.ops.moe_routing.plan.default, arguments)
    except Exception as error:
        msg = f"opcheck raises {type(error).__name__}: {error}"
        raise AssertionError(msg) from error
