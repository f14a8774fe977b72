"""``Verdict``: yes, or no with a code, a sentence and the command that fixes it.

The codes are a closed list, ``RejectCode``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from moe_routing_registry.text import line, refusal, shown


class RejectCode(str, Enum):
    """Why a backend is not used. Tests and scripts rely on these, never on the sentences."""

    IMPORT_FAILED = "import_failed"
    """The plug-in's module raised at import, or its metadata could not be read.

    Doctor also uses it for an import that does not end.
    """
    REGISTRATION_FAILED = "registration_failed"
    """The plug-in's hook raised, is misspelt, or returned something other than specs.

    It also stands for a spec with the name of a built-in one.
    """
    API_VERSION = "api_version"
    """The spec is written for another version of the plug-in interface."""
    BLOCKED = "blocked"
    """``MOE_ROUTING_BLOCK`` names it."""
    OPERATION = "operation"
    """It has no factory for this operation."""
    PLATFORM = "platform"
    """It is for other platforms than this device's."""
    ARCH = "arch"
    """It is for this platform, but not for this generation of it."""
    REQUIREMENT_MISSING = "requirement_missing"
    """A package that it needs is not installed."""
    REQUIREMENT_VERSION = "requirement_version"
    """A package that it needs is installed in a version that does not fit."""
    TOOLCHAIN = "toolchain"
    """A compiler or runtime that it needs cannot be used for this device."""
    FAMILY = "family"
    """It does not know this routing family."""
    DTYPE = "dtype"
    """It does not take this dtype of logits or ids."""
    SHAPE = "shape"
    """E or K is outside its range."""
    LAYOUT = "layout"
    """It does not take these strides."""
    OPERANDS = "operands"
    """It does not take an operand that a call brings: recorded ``ids``, for example."""
    GROUP = "group"
    """It is not for such a group of ranks: their number, their hosts, or what each holds."""
    INVARIANCE = "invariance"
    """It has no order of summation that is the same for every number of tokens."""
    TRAINING = "training"
    """It has no gradients, or cannot go back through maths that the closed form does not know.

    Such maths needs a backward of the backend's own.
    """
    EXPLICIT_ONLY = "explicit_only"
    """It could run, but only when it is named."""
    SUPPORT_RULE_FAILED = "support_rule_failed"
    """Its support rule raised, or returned something that is not a verdict."""
    FACTORY_FAILED = "factory_failed"
    """Its factory raised when it was asked to build."""


FIXABLE = frozenset(
    {
        RejectCode.API_VERSION,
        RejectCode.REQUIREMENT_MISSING,
        RejectCode.REQUIREMENT_VERSION,
        RejectCode.TOOLCHAIN,
        RejectCode.SUPPORT_RULE_FAILED,
        RejectCode.FACTORY_FAILED,
    }
)
"""Codes of a fault of the machine or of the plug-in.

Without that fault, a better backend could have been chosen.
"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A backend's answer to a problem on a device.

    Make one with ``Verdict.yes()`` or ``Verdict.no(...)``.

    A rejection without a code cannot be constructed:

    >>> Verdict(None, "just because")
    Traceback (most recent call last):
    ...
    TypeError: code: a rejection needs a RejectCode, got None with reason 'just because'
    >>> bool(Verdict.yes())
    True

    Reason and fix are shown on terminals: they are kept as one line of at most 1,000 characters,
    without control characters.

    :ivar code: why not, or ``None`` for yes.
    :ivar reason: the same in a sentence, ``""`` for yes.
    :ivar fix: the command that fixes it, or ``""`` where there is none.
    """

    code: RejectCode | None = None
    reason: str = ""
    fix: str = ""

    def __post_init__(self) -> None:
        """Check the fields, and hold code and reason together."""
        for name in ("reason", "fix"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(refusal(name, "a string", getattr(self, name)))
            object.__setattr__(self, name, line(getattr(self, name)))
        code: object = self.code
        if not isinstance(code, RejectCode) and (code is not None or self.reason or self.fix):
            got = f"{shown(self.code)} with reason {shown(self.reason)}"
            msg = f"code: a rejection needs a RejectCode, got {got}"
            raise TypeError(msg)
        if self.code is not None and not self.reason:
            msg = f"reason: a rejection needs a sentence with its code, got {shown(self.reason)}"
            raise ValueError(msg)

    @classmethod
    def yes(cls) -> Verdict:
        """Accept."""
        return cls()

    @classmethod
    def no(cls, code: RejectCode, reason: str, fix: str = "") -> Verdict:
        """Decline, with a code, a sentence and, if one exists, the command that fixes it."""
        return cls(code, reason, fix)

    def __bool__(self) -> bool:
        """Tell whether this is a yes."""
        return self.code is None
