"""Every name that ``get_router`` takes, with its formula and source.

Nothing here imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from moe_routing.cli._show import UsageError
from moe_routing_registry import UnknownNameError

if TYPE_CHECKING:
    from moe_routing_registry import RoutingSpec


class Entry(NamedTuple):
    """A name that ``get_router`` takes.

    ``kind`` is ``"family"`` or ``"model"``; ``num_experts`` and ``topk`` are the defaults of the
    model's configuration.
    """

    name: str
    kind: str
    spec: RoutingSpec
    source: str
    num_experts: int | None = None
    topk: int | None = None

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "family": self.spec.family,
            "formula": self.spec.formula,
            "source": self.source,
            "num_experts": self.num_experts,
            "topk": self.topk,
        }


def catalogue() -> dict[str, Entry]:
    """Return every name: families first, then models, each in alphabetical order.

    >>> catalogue()["mixtral"].spec.formula
    'ids = topk(l); w = softmax(l[ids])'
    """
    from moe_routing._registry import registry
    from moe_routing.families import FAMILIES
    from moe_routing.models import MODELS

    known = registry()
    entries: dict[str, Entry] = {}
    for family, family_spec in known.families.items():
        entries[family] = Entry(family, "family", family_spec.spec, family_spec.source)
        brought_by = known.distribution(family, kind="family")
        entries |= {
            name: Entry(name, "model", spec, f"plug-in {brought_by}")
            for name, spec in family_spec.models.items()
        }
    entries |= {
        name: Entry(name, "family", family_spec.spec, family_spec.source)
        for name, family_spec in FAMILIES.items()
    }
    # A model may be called like its family, as Gemma4 is; `get_router` then gives the model.
    entries |= {
        p.name: Entry(p.name, "model", p.spec, p.source, p.num_experts, p.topk)
        for p in MODELS.values()
    }
    return dict(sorted(entries.items(), key=lambda item: (item[1].kind, item[0])))


def look_up(router: str) -> Entry:
    """Return one entry.

    :raises UnknownNameError: no such name.
    :raises UsageError: the name of a model whose routing cannot be expressed; says why.
    """
    from moe_routing.models import NOT_EXPRESSED

    known = catalogue()
    if router in known:
        return known[router]
    if router in NOT_EXPRESSED:
        msg = f"the routing of {router!r} cannot be expressed: {NOT_EXPRESSED[router]}"
        raise UsageError(msg)
    kind = "router"
    raise UnknownNameError(kind, router, known)
