"""What Dynamo cannot trace: JSON, locks, the registry.

What these functions return is a constant of the graph.

Imported while Dynamo traces, never before: the decorator imports all of Dynamo.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.compiler import assume_constant_result

from moe_routing_registry import RoutingSpec
from moe_routing_registry.request import verify_rate

FIELDS = tuple(f.name for f in dataclasses.fields(RoutingSpec) if f.init)


def text_of(spec: RoutingSpec) -> str:
    """Return a spec's canonical JSON, of a spec made inside a compiled function too."""
    text: str = _text(*[getattr(spec, name) for name in FIELDS])
    return text


@assume_constant_result
def _text(*values: Any) -> str:  # noqa: ANN401 -- the fields of a spec
    return RoutingSpec(**dict(zip(FIELDS, values, strict=True))).to_json()


def spec_named(router: str) -> RoutingSpec:
    """Return the spec of a model or family, inside a compiled function."""
    # One field at a time: Dynamo takes strings and numbers as constants, and no objects. It cannot
    # guard their types, so each becomes the result of an operation that does not change it.
    values: dict[str, Any] = {}
    for name in FIELDS:
        value = _field_of(router, name)
        if value is not None:
            values[name] = (
                value is True if name in _FLAGS else value + "" if name in _TEXTS else value + 0
            )
    return RoutingSpec(**values)


_FLAGS = tuple(f.name for f in dataclasses.fields(RoutingSpec) if f.type == "bool")
_TEXTS = tuple(
    f.name for f in dataclasses.fields(RoutingSpec) if f.type in ("str", "Selection", "GroupBy")
)


@assume_constant_result
def _field_of(router: str, name: str) -> Any:  # noqa: ANN401 -- a field's own type
    from moe_routing._public import named

    return getattr(named(router), name)


@assume_constant_result
def check_backend(backend: str) -> None:
    """Raise ``UnknownNameError`` for a misspelt backend."""
    from moe_routing._registry import registry
    from moe_routing_registry import Request

    registry().check_names(Request(backend=backend, asked_by="argument"))


@assume_constant_result
def shared_shadow_key(verify: float | bool | None) -> str | None:  # noqa: FBT001 -- True is what users write
    """Return the key of what watches the routers that compiled functions make.

    Such a router is gone when its function returns, so all with one rate share a watch, which
    reports to the logger.
    """
    rate = verify_rate(verify)
    if not rate:
        return None
    from moe_routing.reference.shadow import shared

    return shared(rate).key
