"""``shared_weights=``: weights of shared experts that a call brings.

They are written after the kernel, for every backend. A shared column holds the spec's
``shared_weight``, and 0 in rows of padding: so the output itself says which rows those are,
whatever made them padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from moe_routing import _check
from moe_routing._overlap import overlaps
from moe_routing.kernel import RoutingOutput
from moe_routing.private_api import is_functorch_wrapped_tensor
from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TypeGuard

    from moe_routing_registry import RoutingSpec


def check(
    shared_weights: object,
    spec: RoutingSpec,
    like: object,
    written: Mapping[str, object],
    counts: object,
) -> None:
    """Require a weight of each shared expert, or of each one in each row.

    What is wrong with other arguments is left to the call itself.

    :param like: what has the leading shape and the device: logits, or hidden states.
    :param written: the call's outputs, by name.
    :param counts: what the call counts in, if it does.
    :raises TypeError: they are no tensor of floats, or there are DTensors.
    :raises ValueError: they have the wrong shape, device or memory, or the spec has no shared
        experts that can have weights.
    """
    if not spec.shared_experts:
        expected = "None, because the spec has no shared_experts"
        raise ValueError(refusal("shared_weights", expected, shared_weights))
    if not spec.shared_weight:
        expected = "None, because the spec's shared_weight is 0, as in rows of padding"
        raise ValueError(refusal("shared_weights", expected, shared_weights))
    if (
        not isinstance(shared_weights, Tensor)
        or not shared_weights.is_floating_point()
        or shared_weights.dtype == _check.PACKED
    ):
        count = spec.shared_experts
        expected = f"a float tensor of shape [{count}] or [..., {count}]"
        raise TypeError(refusal("shared_weights", expected, shared_weights))
    if not _is_memory(like) or not like.dim():
        return
    each, rows = [spec.shared_experts], [*like.shape[:-1], spec.shared_experts]
    if not _check.is_dense(shared_weights) or list(shared_weights.shape) not in (each, rows):
        expected = f"a dense float tensor of shape {each} or {rows}"
        raise ValueError(refusal("shared_weights", expected, shared_weights))
    if shared_weights.device != like.device:
        expected = f"a tensor on {like.device}"
        raise ValueError(refusal("shared_weights", expected, shared_weights.device))
    outputs = {name: one for name, one in written.items() if _is_memory(one)}
    counted = [counts] if _is_memory(counts) else []
    tensors = (shared_weights, *outputs.values(), *counted)
    if any(map(_check.is_dtensor, (like, *tensors))):
        expected = "None with DTensors; route the rows of each rank by themselves"
        raise TypeError(refusal("shared_weights", expected, shared_weights))
    if is_dynamo_compiling() or any(map(is_functorch_wrapped_tensor, tensors)):
        return  # there are no addresses
    _check.check_apart(outputs, {"shared_weights": shared_weights})
    if any(overlaps(one, shared_weights) for one in counted):
        expected = "a tensor that shares no memory with another"
        raise ValueError(refusal("counts", expected, "one that overlaps shared_weights"))


def _is_memory(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and _check.is_dense(value)


def weighed(
    output: RoutingOutput, shared_weights: Tensor, count: int, *, in_place: bool = False
) -> RoutingOutput:
    """Return the output with those weights in its last columns, and 0 in rows of padding.

    :param shared_weights: ``[count]`` or ``[..., count]``, rounded to float32; gradients flow to
        it.
    :param in_place: whether the weights are the caller's ``out``, and are written there.
    """
    weights, ids = output
    columns = weights[..., -count:]
    # A product would make NaN of an infinite weight in a row of padding.
    made = torch.where(columns != 0, shared_weights.to(weights.dtype), 0.0)
    if in_place:
        columns.copy_(made)
        return output
    return RoutingOutput(torch.cat([weights[..., :-count], made], dim=-1), ids)
