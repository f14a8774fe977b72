"""``Result``: what was measured, on what; reading and writing it, and finding what got slower.

Imports no torch.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from moe_routing.bench._plan_settings import PlanCase, PlanSettings
from moe_routing.bench._settings import Case, Settings
from moe_routing_registry.text import shown

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

AnyCase: TypeAlias = Case | PlanCase
AnySettings: TypeAlias = Settings | PlanSettings
KINDS: dict[str, tuple[type[AnyCase], type[AnySettings]]] = {
    settings.operation: (case, settings)
    for case, settings in ((Case, Settings), (PlanCase, PlanSettings))
}
"""The case and the settings of each operation that can be measured."""
Key = tuple[AnyCase, str, str, bool]
"""Case, mode, implementation and whether it is a backend.

What makes two rows of two runs the same configuration.
"""
SCHEMA_VERSION = 1
"""Grows whenever a key is renamed, removed or changes its meaning.

New keys may come at any time.
"""
_MOST_BYTES = 1 << 26
"""Of a kept run's file; a run of a thousand rows has 300 KiB."""
_DEVICE = ("name", "platform", "arch", "threads")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One implementation on one case, timed in one mode; or why it was not.

    :ivar implementation: name of a backend, or of a comparison.
    :ivar is_backend: whether it is a backend.
    :ivar rounds: microseconds a call, the median of each round; rounds of different implementations
        took turns.
    :ivar bytes: that a call must move: inputs once, outputs once.
    :ivar wrong: what is wrong with what it computed; then nothing was timed.
    :ivar skipped: why nothing was timed otherwise.
    """

    case: AnyCase
    mode: str
    implementation: str
    is_backend: bool
    rounds: tuple[float, ...] = ()
    bytes: int = 0
    wrong: tuple[str, ...] = ()
    skipped: str = ""

    @property
    def key(self) -> Key:
        """What makes two rows of two runs the same configuration."""
        return (self.case, self.mode, self.implementation, self.is_backend)

    @property
    def label(self) -> str:
        """Name the implementation: a backend and a comparison may have the same name."""
        return f"{'backend' if self.is_backend else 'comparison'}: {self.implementation}"

    @property
    def microseconds(self) -> float | None:
        """The median of the rounds; ``None`` where nothing was timed."""
        return median(self.rounds) if self.rounds else None

    @property
    def spread(self) -> float:
        """Half the distance between the fastest and the slowest round, in microseconds."""
        return (max(self.rounds) - min(self.rounds)) / 2 if self.rounds else 0.0

    @property
    def bytes_per_second(self) -> float | None:
        """What was moved over the time."""
        return self.bytes / self.microseconds * 1e6 if self.microseconds else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; the derived ones are for other programs, and not read back."""
        time, rate = self.microseconds, self.bytes_per_second
        return {
            **self.case._asdict(),
            "mode": self.mode,
            "implementation": self.implementation,
            "is_backend": self.is_backend,
            "microseconds": None if time is None else round(time, 4),
            "spread": round(self.spread, 4),
            "rounds": [round(each, 4) for each in self.rounds],
            "bytes": self.bytes,
            "bytes_per_second": None if rate is None else round(rate),
            "wrong": list(self.wrong),
            "skipped": self.skipped,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], case: type[AnyCase] = Case) -> Row:
        """Rebuild from ``to_dict``'s values, of an operation with such cases."""
        return cls(
            case=case(**{name: values[name] for name in case._fields}),
            rounds=tuple(float(time) for time in values["rounds"]),
            wrong=tuple(values["wrong"]),
            **{
                name: values[name]
                for name in ("mode", "implementation", "is_backend", "bytes", "skipped")
            },
        )


@dataclass(slots=True, kw_only=True)
class Result:
    """A run.

    :ivar device: ``name``, ``platform``, ``arch``, ``threads`` (of the CPU, 0 on others) and
        ``cache`` in bytes.
    :ivar versions: of Python, torch, triton and moe-routing.
    :ivar copy_rate: bytes read and written a second by a large copy on the device itself.
    :ivar launch_floor: microseconds that the smallest launch takes, by mode.
    """

    settings: AnySettings
    device: dict[str, Any]
    versions: dict[str, str]
    date: str
    copy_rate: float
    launch_floor: dict[str, float]
    rows: list[Row] = field(default_factory=list)

    @property
    def wrong(self) -> list[Row]:
        """What computed something else than it should."""
        return [row for row in self.rows if row.wrong]

    def share(self, row: Row) -> float | None:
        """How much of the copy rate a row reached: 1.0 is as fast as a copy of the same bytes."""
        return row.bytes_per_second / self.copy_rate if row.bytes_per_second else None

    def slowdown(self, row: Row) -> float | None:
        """How many times the time of the first backend a row takes, in the same case and mode."""
        own = next(
            (r.microseconds for r in self.rows if r.is_backend and r.key[:2] == row.key[:2]), None
        )
        return row.microseconds / own if own and row.microseconds else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "what": "moe-routing bench: microseconds a call, the median of the medians of rounds",
            "operation": self.settings.operation,
            "date": self.date,
            "device": self.device,
            "versions": self.versions,
            "copy_bytes_per_second": round(self.copy_rate),
            "launch_floor_us": {mode: round(time, 4) for mode, time in self.launch_floor.items()},
            "settings": self.settings.to_dict(),
            "rows": [row.to_dict() for row in self.rows],
        }

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read a run that ``to_dict``'s JSON was written of.

        :raises OSError: the file cannot be read.
        :raises ValueError: the file holds something else; says what.
        """
        if not path.is_file():
            path.stat()  # "No such file" is the system's to say
            msg = f"{path}: expected a file that `moe-routing bench --json` has written"
            raise ValueError(msg)
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            msg = (
                f"{path}: expected what `moe-routing bench --json` prints, "
                f"got more than {_MOST_BYTES} bytes"
            )
            raise ValueError(msg)
        try:
            held = json.loads(text)
            if held["schema_version"] != SCHEMA_VERSION:
                msg = (
                    f"expected schema_version {SCHEMA_VERSION}, got {held['schema_version']!r:.100}"
                )
                raise ValueError(msg)  # noqa: TRY301 -- said below, like all that is wrong with it
            # Earlier runs were all of routing, and did not say so.
            operation = held.get("operation", "route")
            if operation not in KINDS:
                msg = f"expected a run of {' or '.join(KINDS)}, got one of {operation!r:.100}"
                raise ValueError(msg)  # noqa: TRY301 -- likewise
            case, settings = KINDS[operation]
            return cls(
                settings=settings.from_dict(held["settings"]),
                device=held["device"],
                versions=held["versions"],
                date=held["date"],
                copy_rate=float(held["copy_bytes_per_second"]),
                launch_floor=held["launch_floor_us"],
                rows=[Row.from_dict(row, case) for row in held["rows"]],
            )
        except (
            AttributeError,
            KeyError,
            OverflowError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            msg = (
                f"{path}: expected what `moe-routing bench --json` prints, "
                f"got {type(error).__name__}: {error}"
            )
            raise ValueError(msg) from error

    def to_csv(self) -> str:
        """Return the rows as a table for other programs."""
        text = io.StringIO()
        lists = ("rounds", "wrong")
        writer = csv.DictWriter(
            text, [name for name in self._columns() if name not in lists], extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(row.to_dict() for row in self.rows)
        return text.getvalue()

    def _columns(self) -> list[str]:
        case = self.settings.cases[0]
        return list(Row(case=case, mode="", implementation="", is_backend=True).to_dict())


class Loss(NamedTuple):
    """A configuration that got slower by more than the noise of both runs.

    No round is as fast as the slowest before.
    """

    row: Row
    before: Row

    def __str__(self) -> str:
        """Say it in a line."""
        then, now = self.before.microseconds or 0.0, self.row.microseconds or 0.0
        return (
            f"{self.row.case} {self.row.mode} {self.row.label}: "
            f"{now:,.2f} us ({min(self.row.rounds):,.2f} at best), "
            f"before {then:,.2f} ({max(self.before.rounds):,.2f} at worst): {now / then:.2f} times"
        )


def losses(before: Result, now: Result) -> list[Loss]:
    """Return what got slower since a run on the same device.

    :raises ValueError: the runs are of different devices, or ``now`` holds a configuration that
        ``before`` lacks.
    """
    refuse_another_run(before, now.device, now.settings)
    known = {row.key: row for row in before.rows if row.rounds}
    found = []
    for row in now.rows:
        old = known.get(row.key)
        if row.rounds and old is None:
            msg = (
                "against: expected a run of the same configurations, "
                f"got one without {row.case} {row.mode} {row.label}"
            )
            raise ValueError(msg)
        if row.rounds and old is not None and min(row.rounds) > max(old.rounds):
            found.append(Loss(row, old))
    return found


def refuse_another_run(before: Result, device: dict[str, Any], settings: AnySettings) -> None:
    """Refuse an earlier run that is not comparable to these settings.

    :raises ValueError: the run was on another kind of device, used its device in another way, or
        did not measure all of these cases.
    """
    for name in _DEVICE:
        if before.device.get(name) != device.get(name):
            here, there = shown(device.get(name)), shown(before.device.get(name))
            msg = f"against: expected a run on the same device, {name} {here}, got {there}"
            raise ValueError(msg)
    known = {(row.case, row.mode) for row in before.rows}
    for case in settings.cases:
        for mode in settings.modes:
            if (case, mode) not in known:
                msg = (
                    "against: expected a run of the same configurations, "
                    f"got one without {case} {mode}"
                )
                raise ValueError(msg)


def merged(first: Result, second: Result, keys: Collection[Key]) -> Result:
    """Return the first run with the rows of these keys replaced by the second's."""
    again = {row.key: row for row in second.rows if row.key in keys}
    return dataclasses.replace(first, rows=[again.get(row.key, row) for row in first.rows])
