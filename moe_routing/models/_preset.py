"""``ModelPreset``: a model's routing as data, and the few words in which the tables are written."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from moe_routing.families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_routing_registry import RoutingSpec

    Changes = Mapping[str, Any]
    Choices = Mapping[str, Mapping[object, Changes]]
    Reads = Mapping[str, "str | tuple[str, ...]"]


class _AnythingElse:
    """The last option of a choice: every value that no other option names."""

    def __repr__(self) -> str:
        return "anything else"


ANYTHING_ELSE: Final = _AnythingElse()
SIZES: Final = ("num_experts", "topk")
"""What a preset reads and its spec does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPreset:
    """A model name, and its routing with the defaults of its configuration class.

    The preset also says how a configuration changes that routing.

    :ivar name: the ``model_type`` of transformers, or of the released configuration where
        transformers has none.
    :ivar spec: the routing that the configuration class's defaults give.
    :ivar num_experts: E by the same defaults, ``None`` where the class has no default.
    :ivar topk: K likewise.
    :ivar source: whose code the preset follows, and where others disagree with it.
    :ivar reads: field (``num_experts``, ``topk``, or one of ``RoutingSpec``) -> the attribute that
        holds it; of several names for one thing the first that is there. ``num_experts`` is read
        without the zero experts.
    :ivar choices: attribute -> value -> fields that this value fixes; a value that is not listed is
        refused.
    :ivar defaults: attribute -> the value that it has where a configuration lacks it; all others
        must be there.
    """

    name: str
    spec: RoutingSpec
    num_experts: int | None
    topk: int | None
    source: str
    reads: Reads = field(hash=False)
    choices: Choices = field(hash=False)
    defaults: Changes = field(hash=False)

    @property
    def family(self) -> str:
        """Name of the family that the defaults belong to."""
        return self.spec.family

    @property
    def settings(self) -> tuple[str, ...]:
        """The attributes that the spec depends on; of several names for one thing the first."""
        read = [first(names) for field, names in self.reads.items() if field not in SIZES]
        return tuple(dict.fromkeys([*self.choices, *read]))


def first(names: str | tuple[str, ...]) -> str:
    """Return the first of the names for one thing."""
    return names if isinstance(names, str) else names[0]


def row(  # noqa: PLR0913 -- the columns of the table
    *names: str,
    family: str,
    size: tuple[int | None, int | None],
    reads: Reads,
    source: str,
    choices: Choices | None = None,
    defaults: Changes | None = None,
    **changes: Any,  # noqa: ANN401 -- fields of RoutingSpec, checked by it
) -> list[ModelPreset]:
    """Write a row of the table.

    Models that share their configuration attributes, and the fields unlike the family's.
    """
    spec = FAMILIES[family].spec.replace(**changes)
    return [
        ModelPreset(
            name=name,
            spec=spec,
            num_experts=size[0],
            topk=size[1],
            source=source,
            reads=MappingProxyType(dict(reads)),
            choices=MappingProxyType(dict(choices or {})),
            defaults=MappingProxyType(dict(defaults or {})),
        )
        for name in names
    ]
