"""``gather``: doctor's examination; conformance and a short benchmark of route and plan.

What raises is kept, and the rest goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_routing.doctor import Failure, examine
from moe_routing_registry.containment import PluginFailure, contained

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_routing.bench import AnySettings, Result
    from moe_routing.conformance.runner import Report

    Advance = Callable[[str, int, int], None]
    """What is being done, how many steps are done, how many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What was tried of an operation.

    :ivar backend: name of the backend that the device gets.
    :ivar conformance: of this backend, the quick profile; or what raised.
    :ivar bench: the same backend and what it is compared with; or what raised.
    """

    backend: str
    conformance: Report | Failure
    bench: Result | Failure

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return (
            not isinstance(self.conformance, Failure)
            and self.conformance.ok
            and not isinstance(self.bench, Failure)
            and not self.bench.wrong
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        parts = {"conformance": self.conformance, "bench": self.bench}
        return {
            "backend": self.backend,
            **{
                name: {"error": p.sentence} if isinstance(p, Failure) else p.to_dict()
                for name, p in parts.items()
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """All that is known of a machine.

    :ivar doctor: what ``examine`` returned.
    :ivar device: the device that operations were tried on, ``""`` where none can be used.
    :ivar operations: by name, what was tried of each operation that ``moe-routing bench`` knows.
    """

    doctor: dict[str, Any]
    device: str
    operations: dict[str, Tried]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return (
            bool(self.doctor["ok"])
            and bool(self.operations)
            and all(tried.ok for tried in self.operations.values())
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "ok": self.ok,
            "device": self.device,
            "doctor": self.doctor,
            "operations": {name: tried.to_dict() for name, tried in self.operations.items()},
        }


def gather(device: str | None, advance: Advance) -> Gathered:
    """Examine the machine, and try the backends that the device gets.

    :param device: ``None`` for the first accelerator, else the CPU.
    :raises UnknownDeviceError: ``device`` is nothing that torch knows; a ``ValueError``.
    """
    advance("doctor", 0, 1)
    doctor = examine(device=device)
    place = _place(doctor)
    return Gathered(
        doctor=doctor,
        device=place,
        operations={
            name: _tried(name, backend, place, advance)
            for name, backend in _winners(doctor, place).items()
        },
    )


def _place(doctor: dict[str, Any]) -> str:
    """Return the main device that routes: accelerators come after the CPU in the list."""
    places = [place for place, report in doctor["reports"].items() if report["winner"]]
    return next((place for place in places if place != "cpu"), places[0] if places else "")


def _winners(doctor: dict[str, Any], place: str) -> dict[str, str]:
    """Return the backend of each operation to try that has one on the device."""
    from moe_routing.bench import KINDS

    found = {
        operation["name"]: operation["devices"].get(place, {}).get("winner")
        for operation in doctor["operations"]
        if operation["name"] in KINDS
    }
    return {name: winner for name, winner in found.items() if winner}


def _tried(operation: str, backend: str, place: str, advance: Advance) -> Tried:
    return Tried(
        backend=backend,
        conformance=_kept(lambda: _conformance(operation, backend, place, advance)),
        bench=_kept(lambda: _bench(operation, place, advance)),
    )


def _kept(part: Callable[[], Any]) -> Any:  # noqa: ANN401 -- what the part returns, or its failure
    try:
        with contained("this part"):
            return part()
    except PluginFailure as failure:  # the page is for machines on which something is broken
        return Failure.of(failure.error)


def _conformance(operation: str, backend: str, place: str, advance: Advance) -> Report:
    from moe_routing.conformance.runner import run

    what = f"{operation}: conformance of {backend}"
    return run(
        backend,
        place,
        operation=operation,
        on_result=lambda _result, done, total: advance(what, done, total),
    )


def _bench(operation: str, place: str, advance: Advance) -> Result:
    from moe_routing.bench.measuring import measure

    return measure(
        _settings(operation, place),
        on_case=lambda _result, done, total: advance(f"{operation}: bench", done, total),
    )


def _settings(operation: str, place: str) -> AnySettings:
    from moe_routing.bench import PlanSettings, Settings, best_mode

    on_cpu = place == "cpu"
    tokens = (1, 16, 256, 4096) if on_cpu else (1, 16, 256, 4096, 65536)
    if operation == "plan":
        return PlanSettings(tokens=tokens, backends=(), device=place)
    return Settings(
        tokens=tokens,
        dtypes=("bfloat16", "float32"),
        device=place,
        modes=(best_mode(place),),
        compare=("eager",) if on_cpu else ("baseline", "eager"),
    )
