"""The process-wide registry, and the plug-ins that are in it even without metadata."""

from __future__ import annotations

from moe_routing.families import FAMILIES
from moe_routing.models import MODELS
from moe_routing.operations import OPERATIONS
from moe_routing_registry import Registry

BUILT_IN = {
    "eager": "moe_routing_backends.eager",
    "torch-compile": "moe_routing_backends.torch_compile",
    "triton": "moe_routing_backends.triton",
    "all-to-all": "moe_routing_backends.all_to_all",
    "all-reduce": "moe_routing_backends.all_reduce",
    "symmetric": "moe_routing_backends.symmetric",
}
"""The lines of ``[project.entry-points]`` in pyproject.toml, for a checkout without metadata.

A test checks that they are the same.
"""

_registry = Registry(BUILT_IN, reserved={*FAMILIES, *MODELS}, operations=OPERATIONS)


def registry() -> Registry:
    """Return the process-wide registry.

    Plug-ins are loaded when it is first asked for something.
    """
    return _registry
