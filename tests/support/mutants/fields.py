"""Fields of a spec with values that the author's models do not have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.formula import weights_backward
from moe_routing.reference import oracle
from mutants._mutant import Reference, caught_by

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing_registry import DeviceInfo, RoutingProblem


@caught_by(
    "every_field_of_the_spec_is_followed",
    "topk_softmax",
    saying=r"weight of id \d+ is \d.*, exactly -",
)
class AbsoluteFactor(Reference):
    """Takes the factor on the weights for positive."""

    def __init__(self, problem: RoutingProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.spec = self.spec.replace(scale=abs(self.spec.scale))


@caught_by(
    "every_field_of_the_spec_is_followed",
    "topk_softmax",
    saying=r"weight of id \d+ is .*, exactly 0:",
)
class ZeroFactorIsNoFactor(Reference):
    """Writes `scale or 1`."""

    def __init__(self, problem: RoutingProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.spec = self.spec.replace(scale=self.spec.scale or 1.0)


@caught_by(
    "every_field_of_the_spec_is_followed",
    "topk_softmax",
    saying=r"weight of id \d+ is .*, exactly -",
)
class CapIsAnInteger(Reference):
    """Keeps the cap as an integer, and 0 for none."""

    def __init__(self, problem: RoutingProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        if self.spec.logit_softcap is not None:
            self.spec = self.spec.replace(logit_softcap=int(self.spec.logit_softcap) or None)


@caught_by(
    "every_field_of_the_spec_is_followed",
    "topk_softmax",
    saying=r"weight of id \d+ is .*, exactly 1\.",
)
class SmallMultiplierIsOne(Reference):
    """Takes a multiplier that half precision rounds to nothing for one that is not set."""

    def __init__(self, problem: RoutingProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        if self.spec.logit_multiplier < 1e-4:
            self.spec = self.spec.replace(logit_multiplier=1.0)


@caught_by(
    "every_field_of_the_spec_is_followed",
    "sigmoid_bias_topk",
    saying=r"weight of id \d+ is .*, exactly 0\.1",
)
class EpsilonTwice(Reference):
    """Adds the epsilon to the sum, and again to the denominator."""

    def __init__(self, problem: RoutingProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.spec = self.spec.replace(renorm_epsilon=2 * self.spec.renorm_epsilon)


@caught_by(
    "every_field_of_the_spec_is_followed",
    "softmax_bias_topk",
    saying=r"weight of id \d+ is .*, exactly 0\.",
)
class FloorIsAnEpsilon(Reference):
    """Adds the floor where the sum may not fall below it."""

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        epsilon, floor = self.spec.renorm_epsilon, self.spec.renorm_floor
        self.spec, before = (
            self.spec.replace(renorm_epsilon=epsilon + floor, renorm_floor=0.0),
            self.spec,
        )
        weights = super().weigh(logits, ids, bias, scale)
        self.spec = before
        return weights


@caught_by(
    "every_field_of_the_spec_is_followed",
    "softmax_bias_topk",
    saying=r"weight of id \d+ is .*, exactly 0\.",
)
class FloorOnlyAgainstZero(Reference):
    """Takes a floor for what keeps 0 out of the denominator."""

    def __init__(self, problem: RoutingProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.spec = self.spec.replace(renorm_floor=min(self.spec.renorm_floor, 1e-9))


@caught_by(
    "every_field_of_the_spec_is_followed",
    "topk_softmax",
    saying=r"weight of id \d+ is .*, exactly 0:|, exactly .*: off by",
)
class ZeroExpertsByEight(Reference):
    """Rounds the number of zero experts up to whole vectors."""

    def __init__(self, problem: RoutingProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.spec = self.spec.replace(zero_experts=-(-self.spec.zero_experts // 8) * 8)


@caught_by(
    "every_field_of_the_spec_is_followed", "sparsemixer", saying=r"weight of id \d+ is .*, exactly"
)
class JitterAsInThePaper(Reference):
    """Knows one threshold."""

    def __init__(self, problem: RoutingProblem, device: DeviceInfo) -> None:
        super().__init__(problem, device)
        self.spec = self.spec.replace(jitter=0.01)


@caught_by(
    "every_field_of_the_spec_is_followed",
    "grouped_sigmoid_bias",
    "grouped_softmax",
    saying="not among the best 1",
)
class FewestGroups(Reference):
    """Keeps two groups at least."""

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        kept = max(self.spec.topk_groups, min(2, self.spec.num_groups))
        return oracle.select(self.spec.replace(topk_groups=kept), logits, self.topk, **operands)


class _WithABackward(Reference):
    """Brings the closed form as a backward of its own."""

    def backward(
        self, grad_weights: Tensor, logits: Tensor, ids: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of logits and scale."""
        return weights_backward(
            self.spec,
            self.given(grad_weights),
            logits,
            ids,
            None if scale is None else self.seen(scale),
        )

    def seen(self, scale: Tensor) -> Tensor:
        """Return the scale that the backward reads."""
        return scale

    def given(self, grad_weights: Tensor) -> Tensor:
        """Return the gradient that it goes back from."""
        return grad_weights


@caught_by(
    "gradients_follow_every_field_of_the_spec", "topk_softmax", saying="gradient of logits at"
)
class GradientOfAbsoluteScale(_WithABackward):
    """Takes the scale for a norm on the way back alone."""

    def seen(self, scale: Tensor) -> Tensor:
        return scale.abs()


@caught_by(
    "gradients_follow_every_field_of_the_spec", "topk_softmax", saying="gradient of logits at"
)
class GradientOfAbsoluteFactor(_WithABackward):
    """Forgets the sign of the factor on the way back."""

    def given(self, grad_weights: Tensor) -> Tensor:
        return -grad_weights if self.spec.scale < 0 else grad_weights


@caught_by(
    "gradients_follow_every_field_of_the_spec", "softmax_bias_topk", saying="gradient of logits at"
)
class GradientThroughTheFloor(_WithABackward):
    """Goes back through the sum where the floor is the denominator."""

    def backward(
        self, grad_weights: Tensor, logits: Tensor, ids: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of the spec without its floor.

        They are scaled to the denominator with the floor.
        """
        if self.spec.renorm_floor < 1e-3:
            return super().backward(grad_weights, logits, ids, scale)
        floored = oracle.weights_at(self.spec, logits, ids.long())
        self.spec, before = self.spec.replace(renorm_floor=0.0, renorm_epsilon=1e-20), self.spec
        ratio = (floored / oracle.weights_at(self.spec, logits, ids.long())).nan_to_num(0.0)
        found = super().backward((grad_weights * ratio).float(), logits, ids, scale)
        self.spec = before
        return found


@caught_by(
    "shares_far_below_the_best_have_exact_weights",
    "softmax_bias_topk",
    saying=r"weight of id \d+ is .*: off by .*, allowed",
)
class DifferencesToTheBestOfTheRow(Reference):
    """Divides shares of exponents that float32 has rounded."""

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        exact = super().weigh(logits, ids, bias, scale)
        if not self.spec.renorm_epsilon + self.spec.renorm_floor:
            return exact
        x = oracle.transformed(self.spec, oracle.clean(logits)).float()
        powers = (x - x.amax(1, keepdim=True)).double().exp()
        shares = (powers / powers.sum(1, keepdim=True)).gather(1, ids)
        total = shares.sum(1, keepdim=True) + self.spec.renorm_epsilon
        return shares / total.clamp(min=self.spec.renorm_floor) * self.spec.scale
