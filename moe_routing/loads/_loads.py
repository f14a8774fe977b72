"""``Loads``: how busy the experts of each layer were, as numbers, a table, JSON and a drawing."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from moe_routing_registry.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rich.table import Table

SCHEMA_VERSION = 1
ALL = "all layers"


@dataclass(frozen=True)
class Load:
    """How many slots each expert got.

    :ivar counts: a number for each expert.

    >>> load = Load((6, 2, 0, 0))
    >>> load.total, load.shares, load.max_over_mean
    (8, (0.75, 0.25, 0.0, 0.0), 3.0)
    >>> round(load.entropy, 4)
    0.8113
    """

    counts: tuple[int, ...]

    @property
    def total(self) -> int:
        """All slots: tokens times K, where none was padding."""
        return sum(self.counts)

    @property
    def shares(self) -> tuple[float, ...]:
        """The part of all slots that each expert got; 0 for each where nothing was counted."""
        total = self.total or 1
        return tuple(count / total for count in self.counts)

    @property
    def entropy(self) -> float | None:
        """Of the shares, in bits: log2(E) if all are equal, 0 if one expert got everything.

        ``None`` where nothing was counted.
        """
        if not self.total:
            return None
        return -sum(share * math.log2(share) for share in self.shares if share) + 0.0

    @property
    def max_over_mean(self) -> float | None:
        """How often the mean the busiest expert got: 1 if all are equal, at most E.

        ``None`` where nothing was counted.
        """
        return max(self.counts) * len(self.counts) / self.total if self.total else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: the counts, and everything above."""
        return {
            "counts": list(self.counts),
            "total": self.total,
            "shares": list(self.shares),
            "entropy": self.entropy,
            "max_over_mean": self.max_over_mean,
        }


@dataclass(frozen=True)
class Loads:
    """What a ``LoadMonitor`` read: show it with rich, or take ``to_dict()`` for programs.

    :ivar layers: the load of each layer, by its name.

    >>> loads = Loads({"layers.0": Load((3, 1)), "layers.1": Load((2, 2))})
    >>> loads.overall.counts
    (5, 3)
    >>> print(loads)
    2 layers, 8 slots, busiest expert up to 1.5 times the mean (layers.0)
    """

    layers: Mapping[str, Load]

    @property
    def overall(self) -> Load:
        """The sum of all layers, expert id by expert id: what a rank that holds those ids gets.

        Layers that are busy at different ids make up for each other here, unlike in ``worst``.
        """
        columns = zip_longest(*(load.counts for load in self.layers.values()), fillvalue=0)
        return Load(tuple(map(sum, columns)))

    @property
    def worst(self) -> str | None:
        """Name of the layer whose ``max_over_mean`` is largest; ``None`` if nothing was counted."""
        ratios = {name: load.max_over_mean for name, load in self.layers.items()}
        known = {name: ratio for name, ratio in ratios.items() if ratio is not None}
        return max(known, key=known.__getitem__) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: ``schema_version``, ``layers``, ``overall`` and ``worst``."""
        return {
            "schema_version": SCHEMA_VERSION,
            "layers": {name: load.to_dict() for name, load in self.layers.items()},
            "overall": self.overall.to_dict(),
            "worst": self.worst,
        }

    def to_json(self) -> str:
        """Return ``to_dict()`` as JSON."""
        return json.dumps(self.to_dict())

    def save_plot(self, path: str | Path) -> None:
        """Draw a field for each layer and expert: how often the layer's mean the expert got.

        Needs matplotlib, ``pip install 'moe-routing[bench]'``.

        :param path: the file to write; its name ends in .png or .svg.
        :raises ValueError: it ends in something else, or nothing was counted.
        :raises ModuleNotFoundError: matplotlib is not installed.
        """
        from moe_routing.loads._plot import save

        save(self, path)

    def __str__(self) -> str:
        """Say it in a line."""
        layers = "1 layer" if len(self.layers) == 1 else f"{len(self.layers)} layers"
        start = f"{layers}, {self.overall.total:,} slots"
        worst = self.worst
        if worst is None:
            return start
        times = self.layers[worst].max_over_mean
        return f"{start}, busiest expert up to {times:.3g} times the mean ({printable(worst)})"

    def __rich__(self) -> Table:
        """Return a table for rich: a row for each layer, and one for all.

        It has the busiest expert with its share, how many experts got no slot, and the entropy with
        the most that it can be.
        """
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        built = Table(title=str(self), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        built.add_column("Layer", overflow="fold")
        for column in ("Slots", "Max/mean", "Busiest", "Idle", "Bits"):
            built.add_column(column, justify="right")
        for name, load in self.layers.items():
            built.add_row(Text(printable(name)), *_cells(load))
        if len(self.layers) > 1:
            built.add_section()
            built.add_row(ALL, *_cells(self.overall))
        return built


def _cells(load: Load) -> list[str]:
    if load.entropy is None:
        return ["0", *["-"] * 4]
    busiest = max(load.counts)
    return [
        f"{load.total:,}",
        f"{load.max_over_mean:.2f}",
        f"{load.counts.index(busiest)}: {busiest / load.total:.1%}",
        f"{load.counts.count(0)}/{len(load.counts)}",
        f"{load.entropy:.2f}/{math.log2(len(load.counts)):.2f}",
    ]
