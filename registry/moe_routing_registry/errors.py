"""Errors and warnings that the registry raises; each names what came and what was expected."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from moe_routing_registry.text import shown

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moe_routing_registry.report import Rejection, ResolutionReport


class MoeRoutingWarning(UserWarning):
    """Base of every warning of this project, so that one filter catches them all."""


class PluginWarning(MoeRoutingWarning):
    """A plug-in failed, and only that plug-in is not used.

    ``moe-routing doctor --verbose`` shows the traceback.
    """


class DowngradeWarning(MoeRoutingWarning):
    """Automatic choice landed below the best backend that this device could have had."""


class UnknownNameError(ValueError):
    """A router, family, backend or setting was named that does not exist.

    >>> UnknownNameError("router", "gema4", ["gemma4", "mixtral"])
    UnknownNameError("unknown router 'gema4': did you mean 'gemma4'? Known: gemma4, mixtral")
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        """Find near names."""
        self.kind = kind
        self.name = name
        self.known = tuple(sorted(known))
        near = difflib.get_close_matches(name, self.known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        super().__init__(
            f"unknown {kind} {shown(name)}: {hint}Known: {', '.join(self.known) or '(none)'}"
        )


class DuplicateNameError(RuntimeError):
    """Two distributions registered the same name, so a choice between them would be silent."""

    def __init__(self, kind: str, name: str, first: str, second: str) -> None:
        """Say who brought it."""
        self.kind = kind
        self.name = name
        self.distributions = (first, second)
        super().__init__(
            f"{kind} {name!r} is registered twice, by {first} and by {second}; "
            f"uninstall one of them, or set MOE_ROUTING_BLOCK={name} to use neither"
        )


class BackendUnavailableError(RuntimeError):
    """No backend fits, or the one that was named does not; ``report`` holds every reason."""

    def __init__(self, message: str, report: ResolutionReport) -> None:
        """Append the report."""
        self.report = report
        super().__init__(f"{message}\n{report}")


class FactoryError(RuntimeError):
    """A backend that fits could not be built; ``rejection`` says why."""

    def __init__(self, rejection: Rejection) -> None:
        """Name the backend and the reason."""
        self.rejection = rejection
        super().__init__(f"backend {rejection.name!r}: {rejection.verdict.reason}")
