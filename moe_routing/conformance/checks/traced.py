"""Clauses 14 and 15: compile, export, fake tensors, and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from moe_routing._operators import CallConfig, arguments
from moe_routing.conformance.cases import on_device
from moe_routing.conformance.checks import _sets
from moe_routing.conformance.checks._check import check
from moe_routing.conformance.requirements import require
from moe_routing.conformance.under_test import must_match, same_bits
from moe_routing.conformance.variants import VARIANTS
from moe_routing.kernel import Operands as KernelOperands
from moe_routing.python_warnings import not_raised
from moe_routing.reference import oracle
from moe_routing.reference.compare import exact_device, logical_ids

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing import Router
    from moe_routing.conformance.cases import Call, Case, Profile
    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing.reference.compare import Operands

GRADIENT_RTOL = 1e-5
GRADIENT_ATOL = 2e-6
"""Of the largest gradient in the row.

A float32 gradient is a difference of terms as large as that.
"""


class _Module(torch.nn.Module):
    """A module that routes, as a model has it."""

    def __init__(self, route: Router, call: Call) -> None:
        super().__init__()
        self.route, self.call = route, call

    def forward(
        self, logits: torch.Tensor, per_token: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        operands: Operands = {**self.call.operands, **per_token}  # type: ignore[typeddict-item] # of these names
        weights, ids = self.route(logits, self.call.topk, **operands)
        return weights * 1.0, ids


@check(14, _sets.of_every_family, capability="compile")
def compiles_as_one_graph(under_test: BackendUnderTest, case: Case) -> None:
    """torch.compile(fullgraph=True) of a module that routes gives the bits of the plain call.

    This holds for any T.
    """
    call = case.make(under_test.device)
    under_test.route(call)
    module = _Module(under_test.router(call.spec), call)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for some in (call, call.rows(slice(7))):
        inputs = (some.logits, _per_token(some))
        _must_equal(compiled(*inputs), module(*inputs))


@check(14, _sets.of_every_family, capability="compile")
def exports(under_test: BackendUnderTest, case: Case) -> None:
    """torch.export of a module that routes gives the bits of the plain call, on other logits."""
    call = case.make(under_test.device)
    under_test.route(call)
    module = _Module(under_test.router(call.spec), call)
    per_token = _per_token(call)
    exported = torch.export.export(module, (call.logits, per_token)).module()
    other = call.logits.flip(1).contiguous()
    _must_equal(exported(other, per_token), module(other, per_token))


def _per_token(call: Call) -> dict[str, torch.Tensor]:
    """Return the operands with a row for each token, which a compiled function takes as inputs."""
    named = {name: call.operands.get(name) for name in ("token_ids", "ids", "valid")}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


def _must_equal(got: Any, expected: Any) -> None:  # noqa: ANN401 -- pairs of tensors
    require(same_bits(got[1], expected[1]), "ids differ from the plain call's")
    require(same_bits(got[0], expected[0]), "weights differ from the plain call's")


@check(14, _sets.of_every_family, capability="compile")
def fake_tensors_give_fake_outputs(under_test: BackendUnderTest, case: Case) -> None:
    """Fake tensors give outputs of the right shape, dtype and device, and nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    call = case.make(under_test.device)
    under_test.route(call)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        operands = {
            k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
            for k, v in call.operands.items()
        }
        logits, route = mode.from_tensor(call.logits), under_test.router(call.spec)
        weights, ids = route(logits, call.topk, **operands)  # type: ignore[arg-type]  # as in make
    shape = (case.num_tokens, case.topk + case.spec.shared_experts)
    for name, tensor, dtype in (("weights", weights, torch.float32), ("ids", ids, torch.int32)):
        got = (tuple(tensor.shape), tensor.dtype, tensor.device)
        require(
            got == (shape, dtype, call.logits.device),
            f"{name}: expected {shape} {dtype} on {call.logits.device}, got {got}",
        )


@check(14, _sets.of_every_family, capability="compile")
def the_operator_passes_opcheck(under_test: BackendUnderTest, case: Case) -> None:
    """torch.library.opcheck finds nothing wrong with the operator of traced calls.

    This holds for ids of either dtype.
    """
    _opcheck(under_test, case.make(under_test.device), torch.ops.moe_routing.route.default)


@check(14, _sets.of_every_family, capability="compile")
def the_operator_of_training_passes_opcheck(under_test: BackendUnderTest, case: Case) -> None:
    """The same for the operator of traced calls with gradients."""
    call = case.make(under_test.device)
    call.logits.requires_grad_()
    _opcheck(under_test, call, torch.ops.moe_routing.route_training.default)


def _opcheck(under_test: BackendUnderTest, call: Call, operator: Any) -> None:  # noqa: ANN401 -- torch's operators have no type
    under_test.route(call)
    for rows, dtype in ((slice(2), torch.int64), (slice(None), torch.int32)):
        part = call.rows(rows)
        logits = part.logits.detach().requires_grad_(call.logits.requires_grad)
        config = CallConfig(part.spec.to_json(), under_test.backend, part.topk, dtype)
        # opcheck looks at the .grad of logits that are no leaf, and torch 2.15 warns of that.
        with not_raised():
            torch.library.opcheck(
                operator, arguments(config, KernelOperands(logits, **part.launched))
            )


def _differentiable(profile: Profile) -> Iterator[Case]:
    yield from _sets.of_every_variant("smoke")
    if profile != "smoke":
        yield from _sets.of_every_family("quick", dtype="bfloat16")
        yield from (
            case.but(valid="tensor", mapped=True) for case in _sets.of_every_family("quick")
        )


@check(15, _differentiable, capability="gradients")
def gradients_match_autograd_through_the_oracle(under_test: BackendUnderTest, case: Case) -> None:
    """Gradients of logits and scale are those of the float64 oracle at the same ids."""
    call = case.make(under_test.device)
    compare_gradients(under_test, case, call)


@check(15, _sets.where(_sets.of_every_variant, tokens=9), capability="gradients")
def gradients_of_nan_and_inf_are_zero(under_test: BackendUnderTest, case: Case) -> None:
    """NaN and infinite logits get gradient 0, and spoil no other."""
    call = case.make(under_test.device)
    call.logits[0] = torch.nan
    call.logits[1, ::3] = torch.nan
    call.logits[2, 0] = torch.inf
    call.logits[3, 1::2] = -torch.inf
    compare_gradients(under_test, case, call)


def _scaled(profile: Profile) -> Iterator[Case]:
    for name in [name for name, spec in VARIANTS.items() if spec.per_expert_scale]:
        for case in _sets.of_every_variant(profile, variants=[name]):
            yield case.but(valid="int")


@check(15, _scaled, capability="gradients")
def scales_that_are_not_finite_spoil_no_other_gradient(
    under_test: BackendUnderTest, case: Case
) -> None:
    """NaN and infinite scales change only the gradients of the logits' rows that they weigh.

    Gradients of the other rows, of padding and of the scale are as with finite scales.
    """
    call = case.make(under_test.device)
    call.operands["num_valid_tokens"] = case.num_tokens - 2
    for zero_experts in (0, case.num_experts // 2):
        call.spec = call.spec.replace(zero_experts=zero_experts)
        finite = torch.linspace(0.5, 2, case.num_experts, device=under_test.device)
        by_logits, by_scale, ids = _gradients(under_test, case, call.but(per_expert_scale=finite))
        for value in (torch.nan, torch.inf):
            spoilt = finite.clone()
            spoilt[0] = spoilt[-3] = spoilt[ids[0, 0]] = value
            again, by_spoilt, _ = _gradients(under_test, case, call.but(per_expert_scale=spoilt))
            weighs = (ids >= 0) & (ids < case.num_experts - zero_experts)
            rows = ~(weighs & ~spoilt.detach()[ids.clamp(min=0)].isfinite()).any(-1)
            require(rows[-2:].all(), "the check itself: padding is weighed by no scale")
            if not same_bits(again[rows], by_logits[rows]):
                row = int((again != by_logits).any(-1).logical_and(rows).nonzero()[0])
                msg = (
                    f"gradient of logits in row {row}, which no scale of {value} weighs: "
                    "not as with finite scales"
                )
                raise AssertionError(msg)
            # The gradient is a sum, in any order.
            alike = torch.allclose(by_spoilt, by_scale, rtol=GRADIENT_RTOL, atol=GRADIENT_ATOL)
            require(
                alike,
                f"gradient of per_expert_scale: not as with finite scales, where some are {value}",
            )


def _gradients(
    under_test: BackendUnderTest, case: Case, call: Call
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of logits and scale, and the ids of the selected."""
    logits, scale = call.logits.detach().requires_grad_(), call.operands["per_expert_scale"]
    assert scale is not None  # noqa: S101 -- for mypy: the variant has one
    output = under_test.route(
        replace(call, logits=logits).but(per_expert_scale=scale.requires_grad_())
    )
    direction = torch.randn(output.weights.shape, generator=case.generator()).to(under_test.device)
    by_logits, by_scale = torch.autograd.grad(output.weights, (logits, scale), direction)
    return by_logits, by_scale, output.ids[:, : call.topk].long()


def compare_gradients(under_test: BackendUnderTest, case: Case, call: Call) -> None:
    """Require that a call's gradients are the oracle's, in a direction that the case draws."""
    scale = call.operands.get("per_expert_scale")
    inputs = {"logits": call.logits} | ({} if scale is None else {"per_expert_scale": scale})
    for tensor in inputs.values():
        tensor.requires_grad_()
    output = under_test.route(call)
    require(not output.ids.requires_grad, "ids: require a gradient")
    direction = torch.randn(output.weights.shape, generator=case.generator()).to(under_test.device)
    got = torch.autograd.grad(output.weights, list(inputs.values()), direction)
    must_match(call, output)
    expected = _exact_gradients(call, output.ids, direction)
    for (name, tensor), ours, exact in zip(inputs.items(), got, expected, strict=True):
        require(
            ours.dtype == tensor.dtype and ours.shape == tensor.shape,
            f"gradient of {name}: {ours.dtype} {tuple(ours.shape)}",
        )
        # Gradients are rounded to this dtype: by half a unit, or half a subnormal's step.
        info = torch.finfo(tensor.dtype)
        largest = exact.abs().amax(-1, keepdim=True)
        # The gradients of sparsemixer's K rounds may cancel, and so may those of recorded experts:
        # one that is recorded in every slot has the same weight whatever its logit.
        may_cancel = call.spec.selection == "sparsemixer" or call.operands.get("ids") is not None
        if may_cancel and name == "logits":
            largest = largest.maximum(
                (direction * output.weights.detach()).abs().amax(-1, keepdim=True).to(exact)
            )
        tolerance = (
            (GRADIENT_RTOL + info.eps) * exact.abs()
            + GRADIENT_ATOL * largest
            + info.tiny * info.eps
            + 1e-30
        )
        off = (ours.to(exact.device).double() - exact).abs()
        wrong = ~(off <= tolerance)
        if wrong.any():
            where = tuple(wrong.nonzero()[0].tolist())
            msg = (
                f"gradient of {name} at {where}: {float(ours[where]):.9g}, "
                f"exactly {float(exact[where]):.9g}"
            )
            raise AssertionError(msg)


def _exact_gradients(
    call: Call, ids: torch.Tensor, direction: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Differentiate the oracle's weights at the backend's ids, in float64."""
    home = exact_device(call.logits)
    expert_map = call.operands.get("expert_map")
    routed = ids.to(home).long()
    padding = (routed < 0).all(-1, keepdim=True)
    logical = logical_ids(routed, expert_map)[:, : call.topk]
    logits = call.logits.detach().to(home).double().requires_grad_()
    scale = call.operands.get("per_expert_scale")
    exact_scale = None if scale is None else scale.detach().to(home).double().requires_grad_()
    if oracle.brought(call.spec.family) is None:
        weights = oracle.weights_at(call.spec, logits, logical, per_expert_scale=exact_scale)
    else:
        operands = on_device({**call.operands, "per_expert_scale": exact_scale}, home)
        weights = oracle.route(call.spec, logits, call.topk, **operands).weights[:, : call.topk]
    weights = weights.masked_fill(padding, 0.0)
    inputs = [logits] if exact_scale is None else [logits, exact_scale]
    return torch.autograd.grad(weights, inputs, direction.to(home).double()[:, : call.topk])
