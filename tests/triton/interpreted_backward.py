"""Run the backward kernel in Triton's interpreter.

It is compared with the closed form in float64 and with the oracle, and the script prints JSON.

A process of its own, because Triton must interpret before the kernels are imported: ``interpreted``
has it do so.
"""

import json
import sys

import torch
from interpreted import DEVICE, SPECS, hostile

from moe_routing.formula import weights_backward
from moe_routing.reference import oracle
from moe_routing_backends.triton.runtime.router import build
from moe_routing_registry import RoutingProblem, RoutingSpec

ALL = {
    **SPECS,
    "floor_reached": RoutingSpec(family="f", renormalize=True, renorm_floor=0.9),
    "floor_and_epsilon": RoutingSpec(
        family="f", score="sigmoid", renormalize=True, renorm_floor=0.5, renorm_epsilon=0.01
    ),
    "capped_row_sum": RoutingSpec(
        family="f", logit_softcap=3.0, logit_multiplier=0.7, per_expert_scale=True
    ),
}
TOKENS = 11


def chosen_by(spec, logits, k, generator):
    """Return ids nearly as the spec would choose them: K of the highest, in order.

    One row is padding.
    """
    tie_broken = torch.nan_to_num(logits.float(), nan=-1e30, posinf=1e30, neginf=-1e30)
    ids = tie_broken.sort(descending=True, stable=True).indices[:, :k]
    if spec.selection == "token_table":
        ids = torch.stack(
            [torch.randperm(logits.shape[1], generator=generator)[:k] for _ in logits]
        )
    ids[4] = -1
    return ids


def off(ours, exact, rtol, atol):
    """Return what is wrong.

    :param rtol: tolerance relative to the element.
    :param atol: tolerance relative to the largest of the element's row.
    """
    allowed = rtol * exact.abs() + atol * exact.abs().amax(-1, keepdim=True) + 1e-30
    wrong = ~((ours.double() - exact).abs() <= allowed)
    return [
        f"at {w.tolist()}: {ours[tuple(w)]!s} for {exact[tuple(w)]!s}" for w in wrong.nonzero()[:3]
    ]


def run(name, dtype, *, awkward):
    """Go back once, and compare with the closed form.

    Where all logits are finite, compare also with autograd through the oracle.
    """
    spec = ALL[name]
    generator = torch.Generator().manual_seed(11)
    experts, k = (24, 4) if dtype is torch.float32 else (40, 3)
    k = 2 if spec.selection == "sparsemixer" else k
    make = hostile if awkward else (lambda t, e, g: torch.randn(t, e, generator=g) * 3)
    storage = torch.empty(TOKENS, experts + 8, dtype=dtype)
    logits = storage[:, :experts]
    logits.copy_(make(TOKENS, experts, generator))
    ids = (
        chosen_by(spec, logits, k, generator)
        .to(torch.int32 if awkward else torch.int64)
        .contiguous()
    )
    grad = torch.randn(TOKENS, k, generator=generator)
    scale = torch.rand(experts, generator=generator) + 0.5 if spec.per_expert_scale else None
    router = build(
        RoutingProblem(spec=spec, num_experts=experts, topk=k, dtype=str(dtype)[6:], training=True),
        DEVICE,
    )
    by_logits, by_scale = router.backward(grad, logits, ids, scale)
    again = router.backward(grad, logits, ids, scale)
    problems = (
        []
        if torch.equal(by_logits, again[0]) and torch.equal(by_scale, again[1])
        else ["differs from run to run"]
    )
    expected, expected_scale = weights_backward(
        spec, grad.double(), logits.double(), ids, None if scale is None else scale.double()
    )
    epsilon = torch.finfo(dtype).eps
    problems += off(by_logits, expected.double(), 2e-5 + epsilon, 2e-6)
    if scale is not None:
        problems += off(by_scale[None], expected_scale.double()[None], 2e-5, 2e-6)
    if not awkward:
        exact = logits.double().requires_grad_()
        exact_scale = None if scale is None else scale.double().requires_grad_()
        weights = oracle.weights_at(
            spec, exact, ids.clamp(min=0), per_expert_scale=exact_scale
        ).masked_fill(ids < 0, 0.0)
        inputs = [exact] if exact_scale is None else [exact, exact_scale]
        by_oracle = torch.autograd.grad(weights, inputs, grad.double())
        problems += off(by_logits, by_oracle[0], 2e-5 + epsilon, 2e-6)
        if scale is not None:
            problems += off(by_scale[None], by_oracle[1][None], 2e-5, 2e-6)
    return problems


def main():
    """Run every spec on ordinary and on awkward rows."""
    torch.set_num_threads(1)
    found = {
        f"{name} {dtype} {'awkward' if awkward else 'ordinary'}": run(name, dtype, awkward=awkward)
        for name in ALL
        for dtype, awkward in (
            (torch.float32, False),
            (torch.bfloat16, False),
            (torch.float32, True),
        )
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
