"""``dense``: weights and ids ``[..., K]`` as rows over all experts, ``[..., E]``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_routing import _check
from moe_routing_registry.text import refusal

_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class DenseRouting(NamedTuple):
    """Routing with a column for each expert, as Megatron-Core's layers read it.

    :ivar probs: ``[..., E]``, the weight of each expert, 0 where it was not selected.
    :ivar routing_map: ``[..., E]``, bool: whether the expert was selected. A selected expert may
        have the weight 0.
    """

    probs: Tensor
    routing_map: Tensor


def dense(weights: Tensor, ids: Tensor, num_experts: int) -> DenseRouting:
    """Return the weights of a routing, and who was selected, with a column for each expert.

    An id outside ``[0, num_experts)``, of padding or of another rank's expert, adds nothing,
    whatever its weight is. Weights of equal ids in a row add up; three or more of them on a GPU in
    no fixed order. Nothing is read on the host.

    :param weights: ``[..., K]``, float32, bfloat16, float16 or float64; what a router returned.
        Gradients flow to it.
    :param ids: ``[..., K]``, int32 or int64; likewise.
    :param num_experts: E. With shared experts it counts them too.
    :returns: ``DenseRouting(probs, routing_map)``, both ``[..., E]`` and contiguous; ``probs`` has
        the dtype of the weights.
    :raises TypeError: an argument has the wrong type or dtype.
    :raises ValueError: an argument has the wrong value, shape or device.

    >>> weights, ids = torch.tensor([[0.75, 0.25], [0.5, 0.0]]), torch.tensor([[2, 0], [1, -1]])
    >>> probs, routing_map = dense(weights, ids, 3)
    >>> probs.tolist()
    [[0.25, 0.0, 0.75], [0.0, 0.5, 0.0]]
    >>> routing_map.tolist()
    [[True, False, True], [False, True, False]]
    """
    num_experts = _checked(weights, ids, num_experts)
    inside = (ids >= 0) & (ids < num_experts)
    # Where nothing is to be added, nothing is added to the first expert.
    column = ids.masked_fill(~inside, 0).long()
    shape = (*ids.shape[:-1], num_experts)
    probs = weights.new_zeros(shape).scatter_add(-1, column, weights.masked_fill(~inside, 0.0))
    slots = torch.zeros(shape, dtype=torch.int32, device=ids.device)
    return DenseRouting(probs, slots.scatter_add(-1, column, inside.int()) > 0)


def _checked(weights: object, ids: object, num_experts: object) -> int:
    for name, value, dtypes in (("weights", weights, _WEIGHTS), ("ids", ids, _check.IDS_DTYPES)):
        if not isinstance(value, Tensor):
            raise TypeError(refusal(name, "a tensor [..., K]", value))
        if value.dtype not in dtypes:
            expected = f"dtype {' or '.join(sorted(map(str, dtypes)))}"
            raise TypeError(refusal(name, expected, value))
        if not _check.is_dense(value) or not value.dim():
            raise ValueError(refusal(name, "a dense tensor [..., K] of rank 1 or more", value))
    assert isinstance(weights, Tensor)  # noqa: S101 -- for mypy: the loop has looked
    assert isinstance(ids, Tensor)  # noqa: S101 -- likewise
    if ids.shape != weights.shape:
        raise ValueError(refusal("ids", f"the weights' shape {list(weights.shape)}", ids))
    if ids.device != weights.device:
        raise ValueError(refusal("ids", f"the weights' device {weights.device}", ids))
    return _check.experts(num_experts)
