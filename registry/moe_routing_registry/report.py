"""``ResolutionReport``: which backend was chosen, who asked for it, and why no other was.

It also names the other backends that could serve the request.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_routing_registry.text import printable
from moe_routing_registry.verdict import RejectCode

if TYPE_CHECKING:
    from moe_routing_registry.device import DeviceInfo
    from moe_routing_registry.operation import Problem
    from moe_routing_registry.request import AskedBy
    from moe_routing_registry.verdict import Verdict

_ASKED = {
    "argument": "asked for by the argument backend={name!r}",
    "context": "asked for by `with moe_routing.prefer({name!r})`",
    "environment": "asked for by MOE_ROUTING_BACKEND={name}",
    "probe": "the best that fits this device",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A backend that fits.

    :ivar name: its name.
    :ivar priority: its priority.
    :ivar distribution: the distribution that brought it, ``"moe-routing 0.1.0"`` for example.
    """

    name: str
    priority: int
    distribution: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A backend, or a plug-in that got no further, that does not fit.

    :ivar name: name of the backend, or of the entry point that failed before it could name one.
    :ivar verdict: the code, the sentence, and the command that fixes it.
    :ivar distribution: the distribution that brought it.
    :ivar traceback: where it raised, ``""`` where nothing raised.
    """

    name: str
    verdict: Verdict
    distribution: str
    traceback: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "name": self.name,
            "code": self.verdict.code.value if self.verdict.code else None,
            "reason": self.verdict.reason,
            "fix": self.verdict.fix,
            "distribution": self.distribution,
            "traceback": self.traceback,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolutionReport:
    """The outcome of a choice; ``str()`` is for people, ``to_dict()`` for programs.

    :ivar problem: what was to be built; ``None`` where even that could not be said (``explain`` of
        nonsense).
    :ivar device: for which device; ``None`` likewise.
    :ivar winner: name of the chosen backend, or ``None`` where none fits.
    :ivar asked_by: ``"argument"``, ``"context"``, ``"environment"`` or ``"probe"``.
    :ivar requested: the name that was asked for, or ``None``.
    :ivar eligible: everyone who fits, best first; the winner is among them.
    :ivar rejected: everyone who does not, with code, sentence and fix.
    :ivar missed: name of a better backend that this device could have had, or ``None``.
    :ivar error: why there is no winner, where it is not the backends' doing, or ``""``.
    :ivar notes: what the winner says of itself, a line each (which launch table it uses, for
        example).
    """

    problem: Problem | None = None
    device: DeviceInfo | None = None
    winner: str | None = None
    asked_by: AskedBy = "probe"
    requested: str | None = None
    eligible: tuple[Candidate, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    missed: str | None = None
    error: str = ""
    notes: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """One sentence on how the winner came to win, or why nobody did."""
        if self.error:
            return self.error
        if self.winner is None and self.requested is not None:
            asked = "" if self.asked_by == "argument" else f", {self._asked(self.requested)},"
            return f"backend {self.requested!r}{asked} cannot be used here"
        if self.winner is None:
            return "no backend fits"
        return self._asked(self.winner)

    def _asked(self, name: str) -> str:
        return _ASKED[self.asked_by].format(name=name)

    def without(self, rejection: Rejection) -> ResolutionReport:
        """Return the report after the winner could not be built.

        The next one wins, unless this one was named.
        """
        eligible = tuple(c for c in self.eligible if c.name != rejection.name)
        return dataclasses.replace(
            self,
            winner=eligible[0].name if eligible and self.requested is None else None,
            eligible=eligible,
            rejected=(*self.rejected, rejection),
            missed=self.missed or (rejection.name if self.requested is None else None),
        )

    def rejection(self, name: str) -> Rejection | None:
        """Return what was said against the backend of that name, or ``None``."""
        return next((r for r in self.rejected if r.name == name), None)

    @property
    def considered(self) -> tuple[Rejection, ...]:
        """The rejected that a reader wants to know of: without those for other operations.

        The backend that was asked for by name is among them, whatever it computes.
        """
        return tuple(
            r
            for r in self.rejected
            if r.verdict.code is not RejectCode.OPERATION or r.name == self.requested
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "problem": self.problem.to_dict() if self.problem else None,
            "device": self.device.to_dict() if self.device else None,
            "winner": self.winner,
            "why": self.why,
            "asked_by": self.asked_by,
            "requested": self.requested,
            "missed": self.missed,
            "error": self.error,
            "notes": list(self.notes),
            "eligible": [
                {"name": c.name, "priority": c.priority, "distribution": c.distribution}
                for c in self.eligible
            ],
            "rejected": [rejection.to_dict() for rejection in self.rejected],
        }

    def __str__(self) -> str:
        """Tell who was considered, a line each, without what would steer a terminal."""
        lines = [f"{self.winner or 'no backend'}: {self.why}"]
        if self.problem is not None:
            lines.append(f"  for {self.problem} on {self.device}")
        lines += [f"  note: {note}" for note in self.notes]
        lines += [
            f"  also fits: {c.name} (priority {c.priority})"
            for c in self.eligible
            if c.name != self.winner
        ]
        for r in self.considered:
            code = r.verdict.code.value if r.verdict.code else "?"
            lines.append(
                f"  not {r.name}: {r.verdict.reason} [{code}]"
                + (f"; fix: {r.verdict.fix}" if r.verdict.fix else "")
            )
        return "\n".join(printable(" ".join(line.split("\n"))) for line in lines)
