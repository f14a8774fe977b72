"""Clauses 1 and 3: logits, and what is rounded before selection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mutants.gating._mutant import Fused, Projects, caught_by

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.gating import Projection
    from moe_routing.kernel import RoutingOutput

FAR = r"row \d+: the logit of expert \d+ is .*, exactly .*; right are .* to "


@caught_by("logits_of_every_size_are_within_their_bound", saying=FAR)
class WholeSlicesOnly(Projects):
    """Leaves out the columns past the last slice of 128."""

    def read(self, projection: Projection) -> Projection:
        hidden = projection.hidden.clone()
        if hidden.shape[1] > 128:
            hidden[:, hidden.shape[1] // 128 * 128 :] = 0
        return projection._replace(hidden=hidden)


@caught_by("logits_of_every_size_are_within_their_bound", saying=FAR)
class UpTo512Experts(Projects):
    """Leaves experts from 512 on at 0."""

    def write(self, made: Tensor, logits: Tensor) -> None:
        super().write(made, logits)
        logits[:, 512:] = 0


@caught_by("every_factor_is_in_the_logits", saying=FAR)
class NoRouterBias(Projects):
    """Forgets the bias of the linear layer."""

    def read(self, projection: Projection) -> Projection:
        return projection._replace(router_bias=None)


@caught_by("every_factor_is_in_the_logits", saying=FAR)
class NoNormWeight(Projects):
    """Forgets the weight of the norm."""

    def read(self, projection: Projection) -> Projection:
        return projection._replace(norm_weight=None)


@caught_by("every_factor_is_in_the_logits", saying=FAR)
class BiasBeforeTheNorm(Projects):
    """Applies the factor of the norm after the bias was added."""

    def add(self, projection: Projection) -> Tensor:
        if projection.eps is None:
            return super().add(projection)
        hidden = projection.hidden.double()
        r = (hidden.square().mean(1, keepdim=True) + projection.eps).rsqrt()
        return super().add(projection._replace(eps=None)) * r.float()


@caught_by("values_of_every_kind_are_summed_in_float32", saying=FAR)
class LogitsThroughBfloat16(Projects):
    """Takes logits from a product that returns bfloat16."""

    def add(self, projection: Projection) -> Tensor:
        return super().add(projection).bfloat16().float()


@caught_by("values_of_every_kind_are_summed_in_float32", saying=FAR)
class ScaledInputsInBfloat16(Projects):
    """Rounds the scaled inputs to bfloat16, as a product takes them."""

    def read(self, projection: Projection) -> Projection:
        if projection.input_scale is None:
            return projection
        hidden = (projection.hidden.float() * projection.input_scale.float()).bfloat16()
        plain = projection._replace(eps=None, input_scale=None, hidden=hidden)
        return projection if projection.eps is not None else plain

    def add(self, projection: Projection) -> Tensor:
        if projection.input_scale is None or projection.eps is None:
            return super().add(projection)
        hidden = projection.hidden.float()
        r = (hidden.square().mean(1, keepdim=True) + projection.eps).rsqrt()
        inputs = (hidden * r * projection.input_scale.float()).bfloat16()
        return super().add(projection._replace(hidden=inputs, eps=None, input_scale=None))


@caught_by("values_of_every_kind_are_summed_in_float32", saying=FAR)
class SumsInBfloat16(Projects):
    """Adds two halves of the columns, each rounded to bfloat16."""

    def add(self, projection: Projection) -> Tensor:
        half = projection.hidden.shape[1] // 2
        if half == 0 or projection.eps is not None:
            return super().add(projection)
        left, right = projection.hidden.clone(), projection.hidden.clone()
        left[:, half:] = 0
        right[:, :half] = 0
        parts = [
            super(SumsInBfloat16, self).add(some).bfloat16().float()
            for some in (
                projection._replace(hidden=left),
                projection._replace(hidden=right, router_bias=None),
            )
        ]
        return parts[0] + parts[1]


@caught_by("rounded_logits_are_routed", saying=r"ids? .*|weight of id")
class RoundedAfterSelection(Fused):
    """Selects on float32 logits, and rounds what it returns."""

    def routed(
        self, projection: Projection, logits: Tensor | None, **operands: Any
    ) -> RoutingOutput:
        made = self.add(self.read(projection))
        if logits is not None:
            self.write(made, logits)
        return self.route(made, **operands)


@caught_by("rounded_logits_are_routed", saying=r"logits are not the float32 logits rounded|" + FAR)
class CutOffInsteadOfRounded(Projects):
    """Drops the bits that bfloat16 does not have."""

    def write(self, made: Tensor, logits: Tensor) -> None:
        if logits.dtype is torch.bfloat16:
            made = (made.view(torch.int32) & -(1 << 16)).view(torch.float32)
        super().write(made, logits)


@caught_by("rounded_logits_are_routed", saying=FAR)
class SaturatedInsteadOfRounded(Projects):
    """Stores the largest number of a dtype for logits above it."""

    def write(self, made: Tensor, logits: Tensor) -> None:
        most = torch.finfo(logits.dtype).max
        super().write(made.clamp(-most, most), logits)
