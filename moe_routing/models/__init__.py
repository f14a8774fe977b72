"""Model presets: transformers' ``model_type`` -> routing spec, read from a configuration.

This package is free of torch and of transformers: a configuration is any object or dict with a
``model_type``. Every preset is proven in ``tests/test_models.py`` against the router that
transformers 5.24 itself runs, on the same logits. The presets compute the *routed* weights only:
shared experts are added by the models themselves, so ``shared_experts`` is 0 in all of them; an
engine that fuses them asks for slots with ``spec.replace(shared_experts=...)``.
"""

from __future__ import annotations

from moe_routing.models._preset import ModelPreset
from moe_routing.models._read import ConfiguredRouting, from_config, spec_of
from moe_routing.models._table import MODELS, NOT_EXPRESSED

__all__ = ["MODELS", "NOT_EXPRESSED", "ConfiguredRouting", "ModelPreset", "from_config", "spec_of"]
