"""``Check``: one line of the doctor's findings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "warning", "problem", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What one check found.

    :ivar name: name of the check, which ``doctor --check`` takes.
    :ivar status: ``"ok"``; ``"warning"``: works, but not as well as it could; ``"problem"``:
        something that was asked for cannot be used; ``"skipped"``: does not apply here.
    :ivar summary: a sentence.
    :ivar fix: the command that fixes it, or ``""``.
    :ivar details: lines for ``--verbose``: a traceback, or what was checked one by one.
    """

    name: str
    status: Status
    summary: str
    fix: str = ""
    details: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)
