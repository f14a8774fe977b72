"""DeepGEMM's two layouts of a grouped product, over moe_routing's plan.

Contiguous: ``m_grouped_fp8_gemm_nt_contiguous(a, b, d, m_indices)``, where the rows of an expert
follow each other and begin at a multiple of the alignment. Masked:
``m_grouped_fp8_gemm_nt_masked(a, b, d, masked_m, expected_m)``, where each expert has a matrix of
its own. Both read nothing on the host, so they can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

import moe_routing

if TYPE_CHECKING:
    from torch import Tensor


class Layout(NamedTuple):
    """What to copy, what DeepGEMM takes, and the way back.

    :ivar tokens: int32, the token whose row lies at each place; T at places without one.
    :ivar experts: contiguous: ``m_indices``, int32, the expert of each row, -1 for rows that only
        pad. Masked: ``masked_m``, int32 ``[E]``, the rows of each expert.
    :ivar inverse: int32 ``[T, K]``, the place of each pair; -1 for one without a place.
    """

    tokens: Tensor
    experts: Tensor
    inverse: Tensor


def contiguous(ids: Tensor, num_experts: int, alignment: int = 128) -> Layout:
    """Return the layout of ``[M]`` rows, M a multiple of the alignment.

    :param alignment: what ``get_mk_alignment_for_contiguous_layout()`` returns.
    """
    plan = moe_routing.plan(ids, num_experts, block=alignment)
    assert plan.block_experts is not None  # noqa: S101 -- for mypy: there are blocks
    experts = plan.block_experts.repeat_interleave(alignment)
    pairs = torch.nn.functional.pad(
        plan.order, (0, len(experts) - len(plan.order)), value=ids.numel()
    )
    return Layout(
        pairs // ids.shape[1], torch.where(pairs == ids.numel(), -1, experts), plan.inverse
    )


def masked(ids: Tensor, num_experts: int, most: int) -> Layout:
    """Return the layout of ``[E, most]`` rows.

    :param most: rows of an expert's matrix. An expert with more pairs drops the last ones; with
        ``most = T`` none does, as long as a token's experts differ.
    """
    plan = moe_routing.plan(ids, num_experts, capacity=most, masked=True)
    return Layout(plan.order // ids.shape[1], plan.counts, plan.inverse)
