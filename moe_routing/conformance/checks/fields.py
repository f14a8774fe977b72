"""Clauses 6 and 15: every field of a spec, with values that the families' own specs do not have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance.checks import _sets
from moe_routing.conformance.checks._check import check
from moe_routing.conformance.checks.traced import compare_gradients
from moe_routing.conformance.variants import BUILT_IN, VARIANTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moe_routing.conformance.cases import Call, Case, Profile
    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing_registry import RoutingSpec

_DEEP_ROWS = 512
SCALES = (-1.5, 0.0, 2.0, -1e-3, 1e3)
"""Scales of experts: of both signs, 0, small and large."""


@dataclass(frozen=True, slots=True)
class Changed:
    """A variant with some fields changed."""

    variant: str
    fields: Mapping[str, Any]

    @property
    def case(self) -> Case:
        """The variant's smallest case."""
        (case,) = _sets.of_every_variant("smoke", variants=[self.variant])
        return case

    @property
    def id(self) -> str:
        """The case, and the fields with their values."""
        return "-".join([self.case.id, *(f"{name}={value}" for name, value in self.fields.items())])

    @property
    def family(self) -> str:
        """Name of the family."""
        return self.case.family

    def make(self, under_test: BackendUnderTest) -> Call:
        """Make the call of the changed spec.

        It has a scale of each expert if the change asks for one.
        """
        call = self.case.make(under_test.device)
        call.spec = call.spec.replace(**self.fields)
        if call.spec.per_expert_scale:
            scale = torch.tensor(SCALES, device=under_test.device).repeat(self.case.num_experts)
            call = call.but(per_expert_scale=scale[: self.case.num_experts])
        return call


def _changes(spec: RoutingSpec) -> Iterator[dict[str, Any]]:
    """Yield changes of a spec, several fields at once: each is a kernel of its own."""
    if spec.selection == "sparsemixer":  # has no use for the others, and no spec says them
        yield {"scale": -2.5, "per_expert_scale": True}
        yield {"scale": 0.0, "shared_experts": 3, "shared_weight": -0.25}
        yield {"scale": 1e30, "zero_experts": 9, "jitter": 0.0}
        yield {"jitter": 0.3}
        return
    floor = {"softmax": 0.6, "sigmoid": 7.6, "sqrtsoftplus": 12.0}[spec.score]
    yield {"scale": -2.5, "logit_softcap": 0.5}
    yield {"scale": 0.0, "shared_experts": 3, "shared_weight": -0.25}
    yield {"scale": 1e30, "logit_multiplier": 4.0, "zero_experts": 9}
    yield {"scale": 1e-5, "logit_multiplier": 1e-6}
    yield {"renormalize": True, "renorm_epsilon": 0.5, "logit_softcap": 7.5}
    # Some rows reach the first floor, all the second.
    yield {"renormalize": True, "renorm_epsilon": 0.0, "renorm_floor": floor}
    yield {"renormalize": True, "renorm_epsilon": 0.25, "renorm_floor": 20.0}
    yield {
        "renormalize": not spec.renormalize,
        "renorm_epsilon": 0.0,
        "renorm_floor": 0.0,
        "per_expert_scale": True,
    }
    if spec.grouped:
        yield {"num_groups": 2, "topk_groups": 1}
        yield {"num_groups": 32, "topk_groups": 32}
        yield {"group_sum": 1 if spec.group_sum == 2 else 2}  # noqa: PLR2004 -- DeepSeek-V3's
        yield {"group_sum": 5, "group_by": "scores"}


def _changed(profile: Profile) -> Iterator[Changed]:
    """Yield changes of every built-in family.

    Which fields another follows, only its own oracle knows.
    """
    for variant in _sets.FEW if profile == "smoke" else _sets.FAMILIES:
        if variant in BUILT_IN:
            for fields in _changes(VARIANTS[variant]):
                yield Changed(variant, fields)


@check(6, _changed)
def every_field_of_the_spec_is_followed(under_test: BackendUnderTest, case: Changed) -> None:
    """Unusual scales, caps, multipliers, epsilons, floors and groups of a spec are followed.

    Scales, caps and multipliers are negative, zero, small and large; the epsilon is large; the
    floor is reached; the groups are others than the family's.
    """
    under_test.check(case.make(under_test))


def _biased_softmax(_profile: Profile) -> Iterator[Changed]:
    """Yield variants whose bias selects experts of any share, with an epsilon and with a floor."""
    for variant, spec in VARIANTS.items():
        biased = spec.selection in {"scores_plus_bias", "logits_plus_bias"}
        if variant in BUILT_IN and spec.score == "softmax" and biased:
            yield Changed(variant, {"renormalize": True, "renorm_epsilon": 1e-20})
            fields = {"renormalize": True, "renorm_epsilon": 0.0, "renorm_floor": 1e-18}
            yield Changed(variant, fields)


@check(6, _biased_softmax)
def shares_far_below_the_best_have_exact_weights(
    under_test: BackendUnderTest, case: Changed
) -> None:
    """A softmax that is divided by its sum and a tiny epsilon, or a floor, is exact.

    The bias selects experts up to 75 below the best of the row: shares that float32 barely holds.
    Differences to the best are rounded, each in its own way. In two rows they are so large that the
    shares are 0.
    """
    call = case.make(under_test)
    experts, topk, generator = case.case.num_experts, call.topk, case.case.generator()
    rows = torch.rand(_DEEP_ROWS, experts, generator=generator) * 8
    highest = torch.rand(_DEEP_ROWS, 1, generator=generator) * 22 + 8
    below = torch.rand(_DEEP_ROWS, 1, generator=generator) * 75
    among = torch.rand(_DEEP_ROWS, topk, generator=generator) * 13
    picked = torch.randperm(experts, generator=generator)[:topk]
    rows[:, picked] = highest - below - among
    rows[-1, picked] = -1e30
    highest[-2:] = torch.tensor([[1e30], [torch.finfo(torch.float32).max]])
    others = torch.ones(experts, dtype=torch.bool).index_fill(0, picked, value=False)
    rows[:, int(others.nonzero()[0])] = highest[:, 0]
    call.logits = rows.to(under_test.device)
    bias = torch.zeros(experts)
    bias[picked] = 1000.0
    under_test.check(call.but(bias=bias.to(under_test.device)))


@check(15, _changed, capability="gradients")
def gradients_follow_every_field_of_the_spec(under_test: BackendUnderTest, case: Changed) -> None:
    """The same for the gradients, of scales of every sign too."""
    call = case.make(under_test)
    call.logits = call.logits / 8  # far beyond a cap, float32 loses the digits of its slope
    compare_gradients(under_test, case.case, call)
