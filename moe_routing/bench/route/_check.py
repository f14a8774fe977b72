"""Whether an implementation computes what it should.

Asked before anything is timed, on the inputs that are timed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import moe_routing
from moe_routing import RoutingOutput
from moe_routing.reference import oracle
from moe_routing.reference.compare import compare

if TYPE_CHECKING:
    from moe_routing.bench._implementation import Implementation
    from moe_routing.bench.route._inputs import Inputs

SAMPLE = 2048
"""Rows looked at, at each end: launches go wrong at the last rows, if anywhere."""
SHOWN = 3


def problems(implementation: Implementation, inputs: Inputs) -> list[str]:
    """Say what is wrong, a sentence each.

    A backend is held to the contract, a comparison to its own arithmetic.
    """
    logits, out = inputs.logits[0], inputs.outs[0]
    if implementation.into is None:
        output = RoutingOutput(*(tensor.clone() for tensor in implementation.call(logits)))
    else:
        out.weights.fill_(torch.nan)  # what stays so was not written
        out.ids.fill_(-7)
        implementation.into(logits, out)
        output = out
    if not bool(output.weights.isfinite().all()) or bool((output.ids < 0).any()):
        rows = ~output.weights.isfinite().all(-1) | (output.ids < 0).any(-1)
        return [f"row {int(rows.nonzero()[0])}: not written, or not finite"]
    for part in _ends(len(logits)):
        found = (
            _of_backend(inputs, output, part)
            if implementation.is_backend
            else _of_comparison(inputs, output, part)
        )
        if found:
            return [f"rows from {part.start}: {sentence}" for sentence in found[:SHOWN]]
    return [] if implementation.into is None else _differences(implementation, logits, output)


def _differences(
    implementation: Implementation, logits: torch.Tensor, output: RoutingOutput
) -> list[str]:
    """Hold the call that allocates its outputs to the one that was compared."""
    weights, ids = implementation.call(logits)
    if torch.equal(weights, output.weights) and torch.equal(ids, output.ids):
        return []
    return ["with outputs that it allocates itself it computes something else"]


def _ends(tokens: int) -> list[slice]:
    if tokens <= 2 * SAMPLE:
        return [slice(0, tokens)]
    return [slice(0, SAMPLE), slice(tokens - SAMPLE, tokens)]


def _operands(inputs: Inputs, part: slice) -> dict[str, Any]:
    return {
        name: value[part] if name == "token_ids" else value
        for name, value in inputs.operands.items()
    }


def _of_backend(inputs: Inputs, output: RoutingOutput, part: slice) -> list[str]:
    """Compare with the float64 oracle.

    Where selection is exact, the eager backend's ids are the only right ones too.
    """
    logits, operands, topk = inputs.logits[0][part], _operands(inputs, part), inputs.case.topk
    mine = RoutingOutput(output.weights[part], output.ids[part])
    found = compare(inputs.spec, logits, topk, mine, **operands)
    eager = moe_routing.get_router(inputs.case.router, backend="eager")(logits, topk, **operands)
    if not found.problems and not found.near_ties and not torch.equal(eager.ids, mine.ids):
        rows = (eager.ids != mine.ids).any(-1)
        if not compare(inputs.spec, logits, topk, eager, **operands).near_ties:
            found.problems.append(f"row {int(rows.nonzero()[0])}: other ids than the backend eager")
    return found.problems


def _of_comparison(inputs: Inputs, output: RoutingOutput, part: slice) -> list[str]:
    """Ties may fall either implementation, and weights may be as coarse as the logits' dtype.

    Model code's are.
    """
    spec, logits, operands = inputs.spec, inputs.logits[0][part], _operands(inputs, part)
    ids, weights = output.ids[part].long(), output.weights[part].double()
    keys = oracle.selection_keys(spec, logits, bias=operands.get("bias"))
    exact = oracle.select(spec, logits, inputs.case.topk, bias=operands.get("bias"))
    far = ~torch.isclose(
        keys.gather(1, ids).sort(-1).values,
        keys.gather(1, exact).sort(-1).values,
        rtol=1e-5,
        atol=1e-6,
    )
    if spec.grouped:
        judged = oracle.judged_by(spec, logits, keys)
        groups = oracle.group_scores(spec, judged).sort(-1, descending=True).values
        far[groups[:, spec.topk_groups - 1] == groups[:, spec.topk_groups]] = (
            False  # either group may be kept
        )
    found = [
        f"row {row}: other experts than the oracle"
        for row in far.any(-1).nonzero().flatten()[:SHOWN].tolist()
    ]
    expected = oracle.weights_at(
        spec, logits, ids, per_expert_scale=operands.get("per_expert_scale")
    )
    coarse = 1e-4 if logits.dtype == torch.float32 else 4 * torch.finfo(logits.dtype).eps
    off = ~torch.isclose(weights, expected, rtol=coarse, atol=1e-6)
    return found + [
        f"row {row}: other weights than the oracle"
        for row in off.any(-1).nonzero().flatten()[:SHOWN].tolist()
    ]
