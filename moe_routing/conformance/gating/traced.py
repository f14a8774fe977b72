"""Clause 10: compile, export and fake tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance.exported import saved_and_loaded
from moe_routing.conformance.gating import _sets
from moe_routing.conformance.gating._check import check
from moe_routing.conformance.gating.calls import must_be_same
from moe_routing.conformance.requirements import require
from moe_routing.gating import GateOutput, RMSNorm, op
from moe_routing.gating.call import GateConfig
from moe_routing.kernel import Operands
from moe_routing.python_warnings import not_raised

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.gating.calls import Call
    from moe_routing.conformance.gating.cases import Case
    from moe_routing.conformance.under_test import BackendUnderTest


class _Module(torch.nn.Module):
    """A module that gates, as a model has it: hidden states come in, everything else stays."""

    def __init__(self, call: Call, under_test: BackendUnderTest) -> None:
        super().__init__()
        self.gate = call.gate(under_test)
        self.numbers = {
            name: value
            for name, value in call.arguments.items()
            if not isinstance(value, (torch.Tensor, RMSNorm)) and value is not None
        }
        for name, tensor in call.tensors.items():
            if name not in ("hidden", "token_ids"):
                self.register_buffer(name, tensor)
        self.names = [name for name, _ in self.named_buffers() if name != "norm_weight"]
        self.eps = call.projection.eps

    def forward(self, hidden: torch.Tensor, **per_token: torch.Tensor) -> Any:  # noqa: ANN401 -- a GateOutput
        given = {name: getattr(self, name) for name in self.names}
        norm = None
        if self.eps is not None:
            norm = RMSNorm(self.eps, getattr(self, "norm_weight", None))
        return self.gate(
            hidden, norm=norm, return_logits=True, **given, **self.numbers, **per_token
        )


def _compiled(profile: Profile) -> Iterator[Case]:
    """Yield cases of every form, and for smoke a few: each is compiled, which takes a second."""
    for case in _sets.in_every_form(profile):
        if profile != "smoke" or case.invariant:
            yield case


def _of_families(profile: Profile) -> Iterator[Case]:
    """Yield the same and every family; modifiers, which no graph can tell, only for full."""
    yield from _compiled(profile)
    if profile != "smoke":
        yield from _sets.of_every_variant("smoke" if profile == "quick" else profile)


@check(10, _of_families, capability="compile")
def compiles_as_one_graph(under_test: BackendUnderTest, case: Case) -> None:
    """torch.compile(fullgraph=True), of static and dynamic shapes, gives the plain call's bits."""
    call = case.make(under_test.device)
    call.made(under_test)
    for dynamic in (False, True):
        module = _Module(call, under_test)
        torch.compiler.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for some in (call, call.rows(slice(7))):
            made = compiled(some.projection.hidden, **_per_token(some))
            require(isinstance(made, GateOutput), f"expected a GateOutput, got {type(made)}")
            must_be_same(made, some.checked(under_test), f"dynamic={dynamic}")


def _per_token(call: Call) -> dict[str, Any]:
    given = call.operands.get("token_ids")
    return {} if given is None else {"token_ids": given}


@check(10, _sets.in_every_form, capability="compile")
def exports_and_comes_back(under_test: BackendUnderTest, case: Case) -> None:
    """A program that torch.export made, saved and loaded, gives the plain call's bits."""
    call = case.make(under_test.device)
    call.made(under_test)
    loaded = saved_and_loaded(_Module(call, under_test), (call.projection.hidden,))
    other = call.rows(torch.arange(len(call.projection.hidden), device=call.device).flip(0))
    must_be_same(
        GateOutput(*loaded(other.projection.hidden)), other.made(under_test), "the loaded program"
    )


@check(10, _compiled, capability="compile")
def gradients_are_compiled(under_test: BackendUnderTest, case: Case) -> None:
    """A compiled step of training has the gradients of a plain one."""
    call = case.but(columns=96).make(under_test.device)
    hidden = call.projection.hidden.detach().requires_grad_()
    module = _Module(call, under_test)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    gradients = [
        torch.autograd.grad(some(hidden).weights.square().sum(), hidden)[0]
        for some in (module, compiled)
    ]
    off = (gradients[0] - gradients[1]).abs().max()
    most = gradients[0].abs().max() * 2 * torch.finfo(hidden.dtype).eps
    require(off <= most, f"the gradient of hidden is off by {off:.3g}, allowed {most:.3g}")


@check(10, _sets.in_every_form, capability="compile")
def fake_tensors_give_fake_outputs(under_test: BackendUnderTest, case: Case) -> None:
    """Fake tensors give outputs of the right shapes and dtypes; later calls are as before."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    call = case.make(under_test.device)
    right = call.checked(under_test)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call.with_projection(hidden=mode.from_tensor(call.projection.hidden))
        made = fake.made(under_test)
    for name, one, real in zip(made._fields, made, right, strict=True):
        got = (type(one), tuple(one.shape), one.dtype)
        require(got == (FakeTensor, tuple(real.shape), real.dtype), f"{name}: got {got}")
    must_be_same(call.made(under_test), right, "after fake tensors")


def _checked_by_torch(profile: Profile) -> Iterator[Case]:
    for case in _compiled(profile):
        few = case.but(columns=24, num_tokens=3)
        yield few if case.float32_weight else few.but(ids_dtype="int64", num_tokens=1)


@check(10, _checked_by_torch, capability="compile")
def the_operator_passes_opcheck(under_test: BackendUnderTest, case: Case) -> None:
    """torch.library.opcheck finds nothing wrong with the operator, gradients included."""
    call = case.make(under_test.device)
    call.made(under_test)
    projection = call.projection._replace(
        hidden=call.projection.hidden.detach().requires_grad_(),
        router_weight=call.projection.router_weight.detach().requires_grad_(),
    )
    config = GateConfig(
        call.spec.to_json(), call.topk, call.ids_dtype, call.logits_dtype, call.invariant,
        under_test.backend, None, training=True,
    )  # fmt: skip
    given: dict[str, Any] = dict(call.operands)
    routed = Operands(projection.hidden, **given)
    try:
        with not_raised():
            torch.library.opcheck(
                torch.ops.moe_routing.gate.default, op.arguments(projection, routed, config)
            )
    except Exception as error:
        msg = f"opcheck raises {type(error).__name__}: {error}"
        raise AssertionError(msg) from error
