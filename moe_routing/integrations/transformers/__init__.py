"""transformers 5.17 to 5.24: a model's mixture-of-experts layers route through ``moe_routing``.

``patch(model)`` and ``unpatch(model)`` for a loaded model, ``patched(model)`` for a block,
``enable()`` for all that are loaded from now on.
"""

from __future__ import annotations

from moe_routing.integrations.transformers._enable import disable, enable
from moe_routing.integrations.transformers._patch import patch, patched, unpatch
from moe_routing.integrations.transformers._report import Layer, PatchReport

__all__ = ["Layer", "PatchReport", "disable", "enable", "patch", "patched", "unpatch"]
