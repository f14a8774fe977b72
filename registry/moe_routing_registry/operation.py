"""``OperationSpec``: an operation that backends compute. ``route`` is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from moe_routing_registry import _fields
from moe_routing_registry.text import require_name


@runtime_checkable
class Problem(Protocol):
    """What a backend is asked to build: one operation, at one size.

    Problems are compared and hashed by value.
    """

    @property
    def operation(self) -> str:
        """Name of the operation."""
        ...

    @property
    def family(self) -> str:
        """Name of the routing family whose formula is computed.

        ``""`` for an operation without one.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, ``operation`` among them."""
        ...

    def __hash__(self) -> int:
        """Hash by value."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationSpec:
    """An operation: a name for users and backends, and the paths of its parts.

    Only some tools import those parts. Each path is ``"package.module:attribute"``, imported when
    it is needed. Raises ``TypeError`` or ``ValueError`` that names the field, what was expected and
    what came.

    :ivar name: the key in ``BackendSpec.factories``, and the ``operation`` of its problems.
    :ivar example: path of a problem, for which doctor asks every backend.
    :ivar oracle: path of the float64 oracle.
    :ivar contract: path of a ``moe_routing.conformance.Contract``: its clauses and checks, which
        every backend must pass.
    :ivar summary: one line for ``moe-routing doctor``.
    """

    name: str
    example: str
    oracle: str
    contract: str
    summary: str = ""

    def __post_init__(self) -> None:
        """Check every field."""
        _fields.keep(
            self,
            name=require_name("name", self.name),
            example=_fields.path("example", self.example),
            oracle=_fields.path("oracle", self.oracle),
            contract=_fields.path("contract", self.contract),
            summary=_fields.text("summary", self.summary),
        )
