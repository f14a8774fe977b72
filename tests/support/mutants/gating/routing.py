"""Clauses 2 and 5: what is routed, and rows that must not be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mutants.gating._mutant import Fused, Projects, caught_by

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.gating import Projection
    from moe_routing.kernel import RoutingOutput


@caught_by("every_family_routes_the_logits", saying=r"row \d+: (ids?|weight of id) ")
class SelectsOnBfloat16(Fused):
    """Routes logits that are rounded more than those that it returns."""

    def route(self, logits: Tensor, **operands: Any) -> RoutingOutput:
        return super().route(logits.bfloat16().to(logits.dtype), **operands)


@caught_by("every_family_routes_the_logits", saying=r"row \d+: ids? ")
class NoSelectionBias(Fused):
    """Forgets the bias of selection."""

    def route(self, logits: Tensor, **operands: Any) -> RoutingOutput:
        if operands.get("bias") is not None:
            operands["bias"] = torch.zeros_like(operands["bias"])
        return super().route(logits, **operands)


@caught_by("without_logits_the_same_is_routed", saying=r"without logits: \w+ has other bits")
class OtherLogitsWhereNobodyLooks(Fused):
    """Uses a faster product where no logits are asked for."""

    def routed(
        self, projection: Projection, logits: Tensor | None, **operands: Any
    ) -> RoutingOutput:
        if logits is None:
            weight = projection.router_weight.bfloat16().to(projection.router_weight.dtype)
            bias = projection.router_bias
            bias = None if bias is None else bias * 1.01
            projection = projection._replace(
                router_weight=weight, router_bias=bias, multiplier=projection.multiplier * 1.001
            )
        return super().routed(projection, logits, **operands)


@caught_by("equal_logits_go_to_the_lower_id", saying=r"id \d+ at position|expected ids \[0, 1")
class HigherIdFirst(Fused):
    """Gives equal logits to the higher id."""

    def route(self, logits: Tensor, **operands: Any) -> RoutingOutput:
        if operands.get("per_expert_scale") is not None:
            operands["per_expert_scale"] = operands["per_expert_scale"].flip(0)
        if operands.get("bias") is not None:
            return super().route(logits, **operands)
        made = super().route(logits.flip(1), **operands)
        return made._replace(ids=logits.shape[1] - 1 - made.ids)


@caught_by("a_row_out_of_range_spoils_no_other", saying=r"\w+ of other rows changed|the logit of")
class OneScaleForTheBatch(Projects):
    """Divides all rows by the largest magnitude of the batch, and multiplies again."""

    def add(self, projection: Projection) -> Tensor:
        most = projection.hidden.float().abs().amax()
        made = super().add(projection)
        return made / most * most


@caught_by("garbage_in_padding_is_blank", saying=r"padding: row \d+ needs ")
class IgnoresPadding(Fused):
    """Routes rows of padding too."""

    def route(self, logits: Tensor, **operands: Any) -> RoutingOutput:
        operands["num_valid_tokens"] = None
        return super().route(logits, **operands)
