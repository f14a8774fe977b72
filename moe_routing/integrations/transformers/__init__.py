"""transformers 5.17 to 5.24: a model's mixture-of-experts layers route through ``moe_routing``.

``patch(model)`` and ``unpatch(model)`` for a loaded model, ``patched(model)`` for a block,
``enable()`` for all that are loaded from now on. ``recording(model)`` and ``replaying(model,
records)`` keep what routers select, and have them select it again. Importing this package registers
the experts implementation ``"moe_routing"`` and, from transformers 5.23 on, the implementation of
expert parallelism of that name.
"""

from __future__ import annotations

from importlib.util import find_spec

from moe_routing.integrations.transformers._enable import disable, enable
from moe_routing.integrations.transformers._patch import patch, patched, unpatch
from moe_routing.integrations.transformers._replay import Records, recording, replaying
from moe_routing.integrations.transformers._report import (
    ExpertsLayer,
    GateLayer,
    Layer,
    LossLayer,
    PatchReport,
)

if find_spec("transformers") is not None:  # nothing to register without it
    from moe_routing.integrations.transformers import expert_parallel as expert_parallel
    from moe_routing.integrations.transformers import experts as experts

__all__ = [
    "ExpertsLayer",
    "GateLayer",
    "Layer",
    "LossLayer",
    "PatchReport",
    "Records",
    "disable",
    "enable",
    "patch",
    "patched",
    "recording",
    "replaying",
    "unpatch",
]
