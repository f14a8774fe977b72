"""transformers' implementation of expert parallelism ``"moe_routing"``.

``DistributedConfig(ep_size=..., ep_implementation="moe_routing")`` brings the tokens to the experts
through ``moe_routing.distributed.ExpertParallel``, by the transport that the registry chooses. What
computes the experts is the model's own choice, as without us. Importing this module registers it
where transformers has the interface, which it has from 5.23 on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from moe_routing.distributed import ExpertParallel
from moe_routing.integrations.transformers._selection import NAME
from moe_routing.integrations.transformers._slices import gathered, sliced

try:
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
except ImportError:  # an older release; then nothing makes the class below
    EPImplementation, EPImplementationInterface = object, None

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh

    from moe_routing.distributed import Received

_OWN_ROWS = ("eager", "grouped_mm", NAME)
"""Experts implementations that read no row without an expert. ``batched_mm`` multiplies all."""
TIMEOUT = 7200.0
"""Seconds that ranks wait for each other when a model is loaded, as transformers has them wait."""
_EXCHANGES: MutableMapping[DeviceMesh, dict[tuple[int, bool], ExpertParallel]] = (
    WeakIdKeyDictionary()
)
"""What the layers of a model share, by the mesh object that transformers passes to all of them.

By the object, not by the group or by equality: an entry must be found on all ranks or on none, and
what is left of a model that was deleted would be found on those that have not collected it yet.
"""


class MoeRoutingEP(EPImplementation):  # type: ignore[misc] # transformers' types are not read
    """How one layer's experts get their tokens. transformers makes it when it loads a model.

    Where the ranks of the expert group hold the same batch and no gradient flows to it, each
    computes its own experts for all tokens and the results are added: no token moves, no size is
    read on the host. Otherwise each rank of a tensor parallel group takes its slice of their batch,
    sends the tokens to their experts, and shares the results with the others.

    It keeps nothing between calls, so a call may be repeated for activation checkpointing, and the
    layers of a model with as many experts use the same exchange.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        """Agree with the other ranks: here, since all of them load the layers in the same order."""
        super().__init__(experts, ep_mesh, tp_mesh)
        self._experts = experts
        num_experts = self.num_local_experts * ep_mesh.size()
        self._exchange = _exchange(ep_mesh, num_experts, shared_batch=False)
        self._in_place = (
            _exchange(ep_mesh, num_experts, shared_batch=True) if self.shares_batch else None
        )

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the experts' weighted sums ``[T, H]`` for the tokens of this rank's batch."""
        tokens = (hidden_states, top_k_index, top_k_weights)
        if self._in_place is not None and not _requires_grad(*tokens):
            return self._through(self._in_place, *tokens)
        if self.tp_mesh.size() == 1:
            return self._through(self._exchange, *tokens)
        group = self.tp_mesh.get_group()
        slices = (sliced(part, group) for part in tokens)
        return gathered(self._through(self._exchange, *slices), len(hidden_states), group)

    def _through(self, ep: ExpertParallel, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        received = ep.dispatch_rows(hidden, ids, weights)
        return ep.combine_rows(self._computed(received), received)

    def _computed(self, received: Received) -> Tensor:
        """Have the experts compute what arrived.

        Whatever they compute, backward goes through all of it: other ranks wait for this one's part
        of the way back, and, where FSDP shards the experts, for its gradients, be they 0.
        """
        rows, ids, weights = received.rows, received.ids, received.weights
        if not len(rows):
            return self._connected(torch.empty_like(rows), received)
        elsewhere = ids < 0
        if torch.is_grad_enabled() and self._implementation not in _OWN_ROWS:
            # A row without an expert may hold NaN, which makes NaN of the 0 of its gradient.
            rows = rows.masked_fill(elsewhere.all(dim=1, keepdim=True), 0.0)
        # transformers' experts know the number of experts as the id of none, with the weight 0.
        ids = torch.where(elsewhere, self.num_local_experts, ids).long()
        if weights is None:
            weights = rows.new_ones(ids.shape)
        else:
            weights = weights.masked_fill(elsewhere, 0.0)
        out: Tensor = self.experts_forward(rows, ids, weights)
        # `eager` adds to zeros, which depend on nothing where no row has an expert.
        return out if out.requires_grad else self._connected(out, received)

    @property
    def _implementation(self) -> str | None:
        config = getattr(self._experts, "config", None)
        return getattr(config, "_experts_implementation", None)

    def _connected(self, out: Tensor, received: Received) -> Tensor:
        """Return the result as one of all that a result depends on."""
        operands = (received.rows, received.weights, *self._experts.parameters())
        differentiable = [part for part in operands if part is not None and part.requires_grad]
        if not (differentiable and torch.is_grad_enabled()):
            return out
        result: Tensor = _Connected.apply(out, *differentiable)  # type: ignore[no-untyped-call]
        return result


class _Connected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *operands: Tensor) -> Tensor:  # noqa: ANN401 -- a bag by design
        ctx.save_for_backward(*operands)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 -- likewise
        return None, *map(torch.zeros_like, ctx.saved_tensors)


def _requires_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _exchange(mesh: DeviceMesh, num_experts: int, *, shared_batch: bool) -> ExpertParallel:
    """Return what the layers of a model share; make it for the first."""
    made = _EXCHANGES.setdefault(mesh, {})
    key = (num_experts, shared_batch)
    if key not in made:
        made[key] = ExpertParallel(
            mesh.get_group(),
            num_experts,
            reduce="rank" if shared_batch else "none",
            shared_batch=shared_batch,
            device=mesh.device_type,
            timeout=TIMEOUT,
        )
    return made[key]


if EPImplementationInterface is not None:
    EPImplementationInterface.register(NAME, MoeRoutingEP)
