"""The kit's quick part: a few seconds a backend, for ``moe-routing doctor --verify``; needs no pytest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found.

    :ivar point: the contract's point, 1 to 15.
    :ivar name: name of the check.
    :ivar ok: whether the backend kept it.
    :ivar sentence: what was checked, or what went wrong and where.
    """

    point: int
    name: str
    ok: bool
    sentence: str


def verify(backend: str, device: str = "cpu") -> list[Finding]:
    """Check the backend against the oracle on one device, in under 5 seconds; never raises for a wrong backend.

    ``dataclasses.asdict`` makes JSON of a finding.
    """
    raise NotImplementedError
