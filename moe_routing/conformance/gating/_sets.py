"""Sets of cases that several checks share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_routing.conformance.gating.cases import FACTORS, Case
from moe_routing.conformance.variants import VARIANTS, fits

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moe_routing.conformance.cases import Profile

FORMS: tuple[Mapping[str, Any], ...] = (
    {"variant": "gemma4", "factors": ("norm", "input_scale", "multiplier")},
    {"variant": "grouped_sigmoid_bias", "float32_weight": True},
    {"dtype": "float32", "factors": ("router_bias",)},
    {"dtype": "float16", "factors": FACTORS, "variant": "gemma4"},
    {"variant": "softmax_topk", "logits_dtype": "bfloat16"},
    {"factors": ("norm_weight",), "dtype": "float32"},
)
"""Gemma 4, DeepSeek-V3, gpt-oss, everything at once, logits of a bfloat16 model, and a norm."""
ORDERS = (True, False)
"""Whether sums are in one order for every number of tokens."""


def in_every_form(profile: Profile, **words: Any) -> Iterator[Case]:  # noqa: ANN401 -- fields of a Case
    """Yield a case of every form in either order; for smoke of a few."""
    for form in FORMS[:3] if profile == "smoke" else FORMS:
        for invariant in ORDERS:
            yield Case(**{**form, "invariant": invariant, **words})


def of_every_variant(profile: Profile) -> Iterator[Case]:
    """Yield a case of every family and modifier, with padding, a map and int64 ids in turn."""
    for n, variant in enumerate(VARIANTS):
        if profile == "smoke" and "/" in variant:
            continue
        k = 8 if fits(VARIANTS[variant], 64, 8) else 2
        yield Case(
            variant=variant, topk=k, invariant=n % 3 > 0, valid=("all", "int", "tensor")[n % 3],
            mapped=n % 2 == 0, ids_dtype=("int32", "int64")[n // 2 % 2],
        )  # fmt: skip
