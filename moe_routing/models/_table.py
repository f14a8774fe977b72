"""``MODELS``: every preset by name.

``NOT_EXPRESSED``: the models that ``RoutingSpec`` cannot say, and why.

>>> MODELS["deepseek_v3"].spec.scale, MODELS["deepseek_v3"].num_experts, MODELS["deepseek_v3"].topk
(2.5, 256, 8)
>>> MODELS["gemma4_text"].spec == MODELS["gemma4"].spec
True
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from moe_routing.models import _sigmoid, _softmax

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_routing.models._preset import ModelPreset

_ROWS = (
    *_softmax.PLAIN,
    *_softmax.SELECTED_FIRST,
    *_softmax.BIASED,
    *_sigmoid.DEEPSEEK_ROUTERS,
    *_sigmoid.BIASED,
    *_sigmoid.UNBIASED,
)

MODELS: Mapping[str, ModelPreset] = MappingProxyType(
    {preset.name: preset for preset in sorted(_ROWS, key=lambda p: p.name)}
)
"""Every preset by its model name.

A model with several parts is there under its own name and its text model's.
"""

NOT_EXPRESSED: Mapping[str, str] = MappingProxyType(
    {
        "doge": (
            "an expert's score is the sum of the scores of two product keys, each found by a top-k "
            "of its own"
        ),
        "inkling_mm_model": (
            "the logits of the shared experts take part in the renormalisation of the routed ones"
        ),
        "inkling_text": (
            "the logits of the shared experts take part in the renormalisation of the routed ones"
        ),
        "nllb-moe": (
            "tokens beyond an expert's capacity are dropped, so routing depends on the tokens "
            "before"
        ),
        "switch_transformers": (
            "tokens beyond an expert's capacity are dropped, so routing depends on the tokens "
            "before"
        ),
        "vitpose_backbone": (
            "there is no router: the caller names the expert of each image (dataset_index)"
        ),
    }
)
"""Models of transformers 5.24 with experts whose routing ``RoutingSpec`` cannot express.

Name -> why.
"""
