"""``gather``: doctor's examination, conformance and a short benchmark.

What raises is kept, and the rest goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_routing.doctor import Failure, examine
from moe_routing_registry.containment import PluginFailure, contained

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_routing.bench import Result, Settings
    from moe_routing.conformance.runner import Report

    Advance = Callable[[str, int, int], None]
    """What is being done, how many steps are done, how many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """All that is known of a machine.

    :ivar doctor: what ``examine`` returned.
    :ivar device: the device that conformance and benchmark ran on, ``""`` where none can be used.
    :ivar conformance: of the backend that the device gets, the quick profile; or what raised.
    :ivar bench: the same backend and what it is compared with; or what raised.
    """

    doctor: dict[str, Any]
    device: str
    conformance: Report | Failure | None
    bench: Result | Failure | None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        from moe_routing.bench import Result

        conforms = (
            self.conformance is not None
            and not isinstance(self.conformance, Failure)
            and self.conformance.ok
        )
        return (
            bool(self.doctor["ok"])
            and conforms
            and isinstance(self.bench, Result)
            and not self.bench.wrong
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        parts = {"conformance": self.conformance, "bench": self.bench}
        return {
            "ok": self.ok,
            "device": self.device,
            "doctor": self.doctor,
            **{
                name: {"error": p.sentence} if isinstance(p, Failure) else p and p.to_dict()
                for name, p in parts.items()
            },
        }


def gather(device: str | None, advance: Advance) -> Gathered:
    """Examine the machine, and try the backend that the device gets.

    :param device: ``None`` for the first accelerator, else the CPU.
    :raises UnknownDeviceError: ``device`` is nothing that torch knows; a ``ValueError``.
    """
    advance("doctor", 0, 1)
    doctor = examine(device=device)
    chosen = _choice(doctor)
    if chosen is None:
        return Gathered(doctor=doctor, device="", conformance=None, bench=None)
    place, backend = chosen
    return Gathered(
        doctor=doctor,
        device=place,
        conformance=_kept(lambda: _conformance(backend, place, advance)),
        bench=_kept(lambda: _bench(place, advance)),
    )


def _choice(doctor: dict[str, Any]) -> tuple[str, str] | None:
    """Return the main device and its backend: accelerators come after the CPU in the list."""
    winners = [
        (place, report["winner"]) for place, report in doctor["reports"].items() if report["winner"]
    ]
    return next(
        (choice for choice in winners if choice[0] != "cpu"), winners[0] if winners else None
    )


def _kept(part: Callable[[], Any]) -> Any:  # noqa: ANN401 -- what the part returns, or its failure
    try:
        with contained("this part"):
            return part()
    except PluginFailure as failure:  # the page is for machines on which something is broken
        return Failure.of(failure.error)


def _conformance(backend: str, place: str, advance: Advance) -> Report:
    from moe_routing.conformance.runner import run

    return run(
        backend,
        place,
        on_result=lambda _result, done, total: advance(f"conformance of {backend}", done, total),
    )


def _bench(place: str, advance: Advance) -> Result:
    from moe_routing.bench.measuring import measure

    return measure(
        _settings(place), on_case=lambda _result, done, total: advance("bench", done, total)
    )


def _settings(place: str) -> Settings:
    from moe_routing.bench import Settings, best_mode

    on_cpu = place == "cpu"
    return Settings(
        tokens=(1, 16, 256, 4096) if on_cpu else (1, 16, 256, 4096, 65536),
        dtypes=("bfloat16", "float32"),
        device=place,
        modes=(best_mode(place),),
        compare=("eager",) if on_cpu else ("baseline", "eager"),
    )
