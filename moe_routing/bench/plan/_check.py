"""Whether an implementation plans what it should.

Asked before anything is timed, on ids that are timed. There is one right plan of any ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing import DispatchPlan

if TYPE_CHECKING:
    from moe_routing.bench._implementation import Implementation
    from moe_routing.bench.plan._inputs import Inputs

_UNWRITTEN = -7
"""No part of a plan has this element."""


def problems(implementation: Implementation, inputs: Inputs) -> list[str]:
    """Say what is wrong, a sentence for each part of the plan.

    A comparison may return another integer dtype than int32.
    """
    ids, out = inputs.given[0], inputs.outs[0]
    if implementation.into is not None:
        for part in out:
            if part is not None:
                part.fill_(_UNWRITTEN)
        implementation.into(ids, out)
        found = _differences(out, inputs.expected, exact=implementation.is_backend)
        if found:
            return found
    found = _differences(implementation.call(ids), inputs.expected, exact=implementation.is_backend)
    if found and implementation.into is not None:
        return ["with outputs that it allocates itself it computes something else"]
    return found


def _differences(made: tuple[Any, ...], expected: DispatchPlan, *, exact: bool) -> list[str]:
    found = []
    for name, part, right in zip(DispatchPlan._fields, made, expected, strict=True):
        if part is None or right is None:
            if part is not right:
                is_, has = ("None", "a tensor") if part is None else ("a tensor", "None")
                found.append(f"{name}: {is_}, the reference has {has}")
        elif part.shape != right.shape:
            found.append(f"{name}: shape {list(part.shape)}, the reference has {list(right.shape)}")
        elif exact and part.dtype != right.dtype:
            found.append(f"{name}: {part.dtype}, the reference has {right.dtype}")
        else:
            other = (part.cpu() != right).reshape(-1)
            if bool(other.any()):
                at = int(torch.argmax(other.int()))
                found.append(f"{name}: element {at} is not the reference's")
    return found
