"""Requirements of a backend spec, checked from installed metadata.

Nothing is imported to find out.
"""

from __future__ import annotations

import importlib.metadata

from moe_routing_registry.containment import PluginFailure, contained
from moe_routing_registry.verdict import RejectCode, Verdict


def check(requirements: tuple[str, ...]) -> Verdict:
    """Say whether every PEP 508 requirement is met by what is installed.

    >>> check(("pluggy>=1",))
    Verdict(code=None, reason='', fix='')
    >>> check(("pluggy<0.1",)).code
    <RejectCode.REQUIREMENT_VERSION: 'requirement_version'>
    """
    for text in requirements:
        try:
            with contained(f"checking its requirement {text!r}"):
                verdict = _check_one(text)
        except PluginFailure as failure:
            # A marker that cannot be evaluated, or metadata that cannot be read.
            return Verdict.no(RejectCode.REQUIREMENT_MISSING, failure.sentence)
        if not verdict:
            return verdict
    return Verdict.yes()


def _check_one(text: str) -> Verdict:
    # Imported here: the import takes 25 ms, and most processes need not pay them.
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        return Verdict.no(
            RejectCode.REQUIREMENT_MISSING,
            f"its requirement {text!r} is not valid PEP 508: {error}",
        )
    if requirement.marker is not None and not requirement.marker.evaluate():
        return Verdict.yes()
    fix = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Verdict.no(
            RejectCode.REQUIREMENT_MISSING,
            f"needs {requirement.name}{requirement.specifier}, which is not installed",
            fix,
        )
    if not requirement.specifier.contains(version, prereleases=True):
        reason = f"needs {requirement.name}{requirement.specifier}, {version} is installed"
        return Verdict.no(RejectCode.REQUIREMENT_VERSION, reason, fix)
    return Verdict.yes()
