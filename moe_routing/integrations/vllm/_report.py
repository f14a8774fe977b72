"""What the plug-in did in this process: one line for each kind of router that the process built."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Site:
    """The routers of one class of vLLM and one formula that this process built.

    :ivar router: name of vLLM's class.
    :ivar formula: what they compute now; ``""`` where they were left alone.
    :ivar reason: why they were left alone; ``""`` where they were replaced.
    :ivar layers: how many there are.
    :ivar calls: how often Python called the replacement: 0 where experts with a kernel of their own
        route inside it. A replay of a CUDA graph is not a call, nor is one of a compiled graph.
    """

    router: str
    formula: str
    reason: str
    layers: int = 0
    calls: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What the plug-in did in this process.

    :ivar active: whether the routers that vLLM builds from now on are looked at.
    :ivar refusal: why not, where it was asked to; ``""`` where it was not.
    :ivar sites: what was replaced, and what was left alone.
    """

    active: bool
    refusal: str
    sites: tuple[Site, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            **dataclasses.asdict(self),
            "sites": [dataclasses.asdict(site) for site in self.sites],
        }


class _State:
    """What this process did so far.

    Written when vLLM starts and builds a model, which one thread does.
    """

    def __init__(self) -> None:
        self.active = False
        self.refusal = ""
        self.sites: dict[tuple[str, str, str], Site] = {}


STATE = _State()


def report() -> Report:
    """Return what the plug-in did in this process so far.

    >>> report().active
    False
    """
    return Report(
        STATE.active,
        STATE.refusal,
        tuple(dataclasses.replace(site) for site in STATE.sites.values()),
    )


def site_of(router: str, *, formula: str = "", reason: str = "") -> tuple[Site, bool]:
    """Return the line for a router, one layer more than before, and whether it is new."""
    key = (router, formula, reason)
    new = key not in STATE.sites
    site = STATE.sites.setdefault(key, Site(*key))
    site.layers += 1
    return site, new
