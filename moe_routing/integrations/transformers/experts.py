"""transformers' experts implementation ``"moe_routing"``.

It is what transformers' ``grouped_mm`` is, with ``moe_routing``'s plan, permute and combine in
place of the sort, the gathers and the sum. The products, gates and norms are transformers' own.
Importing this module registers it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations import moe

from moe_routing import combine, permute, plan
from moe_routing.integrations.transformers._fingerprint import RefusedError, fingerprint_of_function
from moe_routing.integrations.transformers._selection import NAME

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning.kernel import DispatchPlan

KNOWN = {
    "800cc169649a": "transformers 5.17",
    "ba3111465ca0": "transformers 5.18, 5.19",
    "c23c2adc0c58": "transformers 5.20 to 5.24",
}
"""Fingerprints of ``grouped_mm_experts_forward``, which ``experts_forward`` follows."""
_OF_PRODUCTS = 2
"""Parameters of experts that only multiply: the weights of the two products."""


def experts_forward(
    experts: Any,  # noqa: ANN401 -- a module of transformers; what it holds depends on its class
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Compute a layer's experts.

    An id outside ``[0, num_experts)``, as expert parallelism gives to other ranks' experts, has no
    place in the plan: it costs no product and adds nothing.
    """
    made = plan(top_k_index, experts.num_experts)
    # A product leaves the rows past the last expert as they were in memory. No result depends on
    # them, but the gradients of biases, and of parameters of a norm or an activation, sum over all.
    unwritten = None
    if torch.is_grad_enabled() and sum(1 for _ in experts.parameters()) > _OF_PRODUCTS:
        places = torch.arange(top_k_index.numel(), device=hidden_states.device)
        unwritten = (places >= made.offsets[-1])[:, None]
    rows = permute(hidden_states, made)
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    rows = _cleared(_linear(experts, up, rows, made, top_k_index), unwritten)
    rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)  # noqa: SLF001 -- the interface's own
    rows = _cleared(rows, unwritten)
    rows = _cleared(_linear(experts, "down_proj", rows, made, top_k_index), unwritten)
    if getattr(experts, "has_post_expert_norm", False):  # from transformers 5.20 on
        rows = experts.post_expert_norm(rows)
    return combine(rows, made, top_k_weights).to(hidden_states.dtype)


def _linear(experts: Any, name: str, rows: Tensor, made: DispatchPlan, ids: Tensor) -> Tensor:  # noqa: ANN401 -- likewise
    bias = None
    if experts.has_bias:
        expert = ids.reshape(-1)[made.order].clamp(0, experts.num_experts - 1)
        bias = getattr(experts, f"{name}_bias")[expert]
    out: Tensor = moe._grouped_linear(  # noqa: SLF001 -- what grouped_mm calls, and so is proven with it
        rows,
        getattr(experts, name),
        made.offsets[1:],
        bias=bias,
        is_transposed=experts.is_transposed,
    )
    return out


def _cleared(rows: Tensor, unwritten: Tensor | None) -> Tensor:
    """Return the rows with zeros in those that no product wrote, and no gradient to them."""
    return rows if unwritten is None else rows.masked_fill(unwritten, 0.0)


def refusal_of_release() -> str:
    """Say why this release's experts cannot be computed, ``""`` if they can."""
    try:
        found = fingerprint_of_function(moe.grouped_mm_experts_forward)
    except RefusedError as error:
        return str(error)
    if found in KNOWN:
        return ""
    return (
        f"the code of transformers' grouped_mm_experts_forward is none that is known "
        f"(fingerprint {found}): it was changed, or this transformers is newer"
    )


def _refused(*_args: Any, **_kwargs: Any) -> Tensor:  # noqa: ANN401 -- whatever experts are called with
    msg = f'experts_implementation: "{NAME}" cannot be used: {REFUSAL}; use "grouped_mm"'
    raise RuntimeError(msg)


REFUSAL = refusal_of_release()
moe.ALL_EXPERTS_FUNCTIONS.register(NAME, _refused if REFUSAL else experts_forward)
