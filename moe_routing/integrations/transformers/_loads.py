"""``patch(model, loads=monitor)``: routers that count what they route."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from torch.compiler import is_compiling

from moe_routing.private_api import is_in_backward

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing import Router, RoutingOutput
    from moe_routing.gating.kernel import GateOutput
    from moe_routing.integrations.transformers._tapes import Taped
    from moe_routing.loads import LoadMonitor

Route: TypeAlias = "Router | Counting | Taped"
"""What routes for a recipe."""
LOADS = "_moe_routing_loads"
"""Attribute of a router that ``patch`` was asked to count: the ``Counted`` that says where."""


class Counted(NamedTuple):
    """The counts of a router.

    :ivar layer: the name of the router in its model.
    """

    monitor: LoadMonitor
    layer: str

    def counts(self, num_experts: int, like: Tensor) -> Tensor | None:
        """Return what to count into; ``None`` where a backward computes a layer a second time."""
        if not is_compiling() and is_in_backward():
            return None
        return self.monitor.on(self.layer, num_experts, like.device)


class Counting:
    """Routes as a router does, and counts: stands in its place in a recipe."""

    def __init__(self, route: Router, counted: Counted) -> None:
        """Count what that router routes."""
        self._route, self._counted = route, counted

    def __call__(self, logits: Tensor, *args: Any, **options: Any) -> RoutingOutput:  # noqa: ANN401 -- a router's own
        """Route and count."""
        counts = self._counted.counts(logits.shape[-1], logits)
        return self._route(logits, *args, counts=counts, **options)

    def gate(self, hidden: Tensor, weight: Tensor, *args: Any, **options: Any) -> GateOutput:  # noqa: ANN401 -- a gate's own
        """Gate and count; the logits are returned too."""
        counts = self._counted.counts(weight.shape[0], weight)
        made: GateOutput = self._route.gate(hidden, weight, *args, counts=counts, **options)
        return made
