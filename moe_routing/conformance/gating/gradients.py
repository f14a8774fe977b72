"""Clause 9: gradients against autograd through the oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance.gating import _sets
from moe_routing.conformance.gating._check import check
from moe_routing.conformance.requirements import require
from moe_routing.reference import gate_oracle, oracle
from moe_routing.reference.compare import exact_device, logical_ids

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.gating.calls import Call
    from moe_routing.conformance.gating.cases import Case
    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing.gating import GateOutput

PARTS = ("hidden", "router_weight", "router_bias", "norm_weight", "input_scale")
SCALE = "per_expert_scale"
TOLERANCE = 1e-4
"""Share of a gradient's largest element that it may be off by, besides its dtype's rounding."""


def with_leaves(call: Call) -> tuple[Call, dict[str, Tensor]]:
    """Return the call with leaves that require gradients, and these by name."""
    leaves = {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in call.tensors.items()
        if name in (*PARTS, SCALE)
    }
    parts = {name: leaf for name, leaf in leaves.items() if name != SCALE}
    call = call.with_projection(**parts)
    if SCALE in leaves:
        operands: Any = {**call.operands, SCALE: leaves[SCALE]}
        call = call.but(operands=operands)
    return call, leaves


def _directions(made: GateOutput, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return gradients of the weights and of the logits."""
    weights, logits = (
        torch.randn(part.shape, generator=generator) for part in (made.weights, made.logits)
    )
    device = made.weights.device
    return weights.to(device), (0.1 * logits).to(device, made.logits.dtype)


def must_be_right(
    call: Call, made: GateOutput, directions: tuple[Tensor, Tensor], got: dict[str, Tensor]
) -> None:
    """Hold gradients against autograd through the oracle at the ids that were chosen."""
    home = exact_device(made.weights)
    exact, leaves = with_leaves(_at(call, home))
    projection = exact.projection
    operands = exact.operands
    chosen = made.ids.to(home).long()
    valid = operands.get("num_valid_tokens")
    tokens = torch.arange(len(chosen), device=home)[:, None]
    padding = torch.zeros_like(tokens, dtype=torch.bool) if valid is None else tokens >= valid
    ids = logical_ids(chosen, operands.get("expert_map"))[:, : call.topk]
    padding |= (ids < 0).any(-1, keepdim=True)
    logits = gate_oracle.logits(projection)
    weights = oracle.weights_at(
        call.spec,
        logits,
        ids.masked_fill(padding, 0),
        per_expert_scale=operands.get("per_expert_scale"),
    )
    of_weights = directions[0].to(home).double()[:, : call.topk].masked_fill(padding, 0.0)
    loss = (weights * of_weights).sum() + (logits * directions[1].to(home).double()).sum()
    loss.backward()
    for name, leaf in leaves.items():
        right = leaf.grad
        assert right is not None  # noqa: S101 -- for mypy: each leaf is in the loss
        found = got[name].to(home).double()
        shares = max(TOLERANCE, 2 * torch.finfo(got[name].dtype).eps)
        if made.logits.dtype != torch.float32:  # whose gradient is rounded too
            shares += 4 * torch.finfo(made.logits.dtype).eps
        off = (found - right.double()).abs().max()
        most = right.double().abs().max() * shares + 1e-6
        require(off <= most, f"the gradient of {name} is off by {off:.3g}, allowed {most:.3g}")


def _at(call: Call, device: torch.device) -> Call:
    parts: dict[str, Any] = {}
    for name, value in call.projection._asdict().items():
        parts[name] = _to(value, device)
    operands: Any = {name: _to(value, device) for name, value in call.operands.items()}
    return call.with_projection(**parts).but(operands=operands)


def _to(value: Any, device: torch.device) -> Any:  # noqa: ANN401 -- a tensor or a number
    return value.detach().to(device) if isinstance(value, torch.Tensor) else value


def _trained(profile: Profile) -> Iterator[Case]:
    for case in _sets.in_every_form(profile, columns=96):
        yield case
        yield case.but(num_tokens=1)
    yield from (case.but(columns=96) for case in _sets.of_every_variant(profile))


@check(9, _trained, capability="gradients")
def gradients_are_those_of_autograd(under_test: BackendUnderTest, case: Case) -> None:
    """Gradients of every operand equal autograd through the oracle at the chosen ids."""
    call, leaves = with_leaves(case.make(under_test.device))
    made = call.checked(under_test)
    directions = _directions(made, case.generator())
    require(made.weights.requires_grad and not made.ids.requires_grad, "weights need gradients")
    got = torch.autograd.grad((made.weights, made.logits), list(leaves.values()), directions)
    for (name, leaf), gradient in zip(leaves.items(), got, strict=True):
        like = (leaf.shape, leaf.dtype, leaf.device)
        require(
            (gradient.shape, gradient.dtype, gradient.device) == like,
            f"the gradient of {name} is not like {name}",
        )
    must_be_right(call, made, directions, dict(zip(leaves, got, strict=True)))


def _padded(profile: Profile) -> Iterator[Case]:
    yield from _sets.in_every_form(profile, columns=96, valid="tensor")


@check(9, _padded, capability="gradients")
def garbage_in_padding_reaches_no_gradient(under_test: BackendUnderTest, case: Case) -> None:
    """NaN in rows of padding leaves every gradient of the weights as it is."""
    call, leaves = with_leaves(case.make(under_test.device))
    made = call.made(under_test)
    direction, _ = _directions(made, case.generator())
    right = torch.autograd.grad(made.weights, list(leaves.values()), direction)
    valid = int(call.operands["num_valid_tokens"])  # type: ignore[arg-type] # the cases have one
    spoilt = call.projection.hidden.detach().clone()
    spoilt[valid:] = torch.nan
    other, others = with_leaves(call.with_projection(hidden=spoilt))
    got = torch.autograd.grad(other.made(under_test).weights, list(others.values()), direction)
    for name, one, other_one in zip(leaves, got, right, strict=True):
        require(torch.equal(one, other_one), f"the gradient of {name} changed")


@check(9, _sets.in_every_form, capability="gradients")
def second_gradients_are_those_of_autograd(under_test: BackendUnderTest, case: Case) -> None:
    """Gradients of gradients equal those of autograd through the oracle."""
    case = case.but(columns=24, num_tokens=5, num_experts=16, topk=2, logits_dtype="float32")
    call, leaves = with_leaves(case.but(dtype="float32").make(under_test.device))
    generator = case.generator()
    made = call.made(under_test)
    directions = _directions(made, generator)
    along = [torch.randn(leaf.shape, generator=generator).to(leaf) for leaf in leaves.values()]
    first = torch.autograd.grad(
        (made.weights, made.logits), list(leaves.values()), directions, create_graph=True
    )
    total = sum((g.double() * a.double()).sum() for g, a in zip(first, along, strict=True))
    second = torch.autograd.grad(total, list(leaves.values()))  # type: ignore[arg-type] # a tensor
    exact = _second(call, made, directions, along)
    for name, one in zip(leaves, second, strict=True):
        right = exact[name]
        share = max(1e-3, 2 * torch.finfo(leaves[name].dtype).eps)
        off, most = (one.double() - right).abs().max(), right.abs().max() * share + 1e-5
        require(off <= most, f"the second gradient of {name} is off by {off:.3g}")


def _second(
    call: Call, made: GateOutput, directions: tuple[Tensor, Tensor], along: list[Tensor]
) -> dict[str, Tensor]:
    """Return the second gradients by autograd through the oracle."""
    exact, leaves = with_leaves(call)
    logits = gate_oracle.logits(exact.projection)
    weights = oracle.weights_at(
        call.spec, logits, made.ids.long(), per_expert_scale=exact.operands.get("per_expert_scale")
    )
    loss = (weights * directions[0]).sum() + (logits * directions[1]).sum()
    first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    total = sum((g.double() * a.double()).sum() for g, a in zip(first, along, strict=True))
    second = torch.autograd.grad(total, list(leaves.values()))  # type: ignore[arg-type] # a tensor
    return {name: one.double() for name, one in zip(leaves, second, strict=True)}
