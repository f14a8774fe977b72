"""Updates of the bias that experts are selected by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.balancing import _check

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


@torch.no_grad()
def update_bias(
    bias: Tensor, counts: Tensor, rate: float, *, group: ProcessGroup | None = None
) -> None:
    """Move the bias of every expert by ``rate`` towards an equal load, in place.

    ``rate`` is added where an expert got less than the mean, and subtracted where it got more. An
    expert with exactly the mean keeps its bias. (DeepSeek-V3 technical report, section 2.1.2,
    without an auxiliary loss.) Routers read a bias at each call, so the next call sees it. Nothing
    is read on the host.

    :param bias: ``[..., E]``, float32 or float64; leading dimensions are layers.
    :param counts: ``[..., E]``, int32 or int64: how often each expert was selected since the last
        update. It keeps its values.
    :param rate: 0 or more; DeepSeek-V3 trained with 0.001.
    :param group: a process group, over whose ranks the counts are added before; every rank then
        makes the same update. ``None`` for DTensors, whose counts are of all ranks already.
    :raises TypeError: an argument has the wrong type or dtype.
    :raises ValueError: an argument has the wrong value, shape or device.

    >>> bias = torch.zeros(3)
    >>> update_bias(bias, torch.tensor([6, 3, 0]), 0.25)
    >>> bias
    tensor([-0.2500,  0.0000,  0.2500])
    """
    _check.tensor("bias", bias, _check.BIASES)
    _check.tensor("counts", counts, _check.INTEGERS)
    _check.writable("bias", bias)
    _check.like("counts", counts, tuple(bias.shape), bias)
    rate = _check.rate(rate, bias.dtype)
    _check.group(group, bias)
    total = counts.long()
    if group is not None:
        total = total.clone()
        torch.distributed.all_reduce(total, group=group)
    # Compared in integers, as a quotient and a remainder: the mean may be none, a sum may be too
    # large for int64.
    experts = total.shape[-1]
    of_rests = (total % experts).sum(-1, keepdim=True)
    mean = (total // experts).sum(-1, keepdim=True) + of_rests // experts
    short = torch.where(total == mean, of_rests % experts, mean - total)
    bias.add_(short.sign().to(bias.dtype), alpha=rate)
