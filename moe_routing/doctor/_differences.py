"""What ranks found, compared: the check ``ranks``."""

from __future__ import annotations

import itertools
import shlex
from typing import TYPE_CHECKING, Any

from moe_routing.doctor._check import Check
from moe_routing.doctor._environment import HIDING
from moe_routing_registry.request import BACKEND_VARIABLE, BLOCK_VARIABLE, STRICT_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from moe_routing.doctor._check import Status

    Finding = dict[str, Any]

_CHOICES = {
    "backend": ("the backend of route", (BACKEND_VARIABLE, BLOCK_VARIABLE, STRICT_VARIABLE)),
    "transport": ("the transport", (BLOCK_VARIABLE, STRICT_VARIABLE)),
    "shared_batch_transport": (
        "the transport of a shared batch",
        (BLOCK_VARIABLE, STRICT_VARIABLE),
    ),
}
"""What is chosen on each rank, and the variables by which it is."""


def judged(found: Sequence[Finding], *, asked: bool) -> list[Check]:
    """Judge whether ranks agree in what must be the same, and add what only others than 0 found.

    :param found: what each rank found, by rank.
    :param asked: whether the device was asked for, so that ranks may share it.
    """
    fine = [one for one in found if not one["error"]]
    checks = [
        _check("problem", f"rank {one['rank']}: {one['error']}", details=one["traceback"])
        for one in found
        if one["error"]
    ]
    checks += _versions(fine)
    checks += _plugins(fine)
    checks += _devices(fine)
    checks += _choices(fine)
    checks += [] if asked else _shared(fine)
    checks += _elsewhere(fine)
    return checks or [_agreement(found)]


def _check(status: Status, summary: str, fix: str = "", details: str = "") -> Check:
    return Check(name="ranks", status=status, summary=summary, fix=fix, details=details)


def _agreement(found: Sequence[Finding]) -> Check:
    one, hosts = found[0], len({other["host"] for other in found})
    summary = (
        f"{_counted(len(found), 'rank')} on {_counted(hosts, 'host')} agree: "
        f"{one['backend'] or 'no backend'} routes, {one['transport'] or 'none'} moves tokens"
    )
    return _check("ok", summary)


def _counted(number: int, word: str) -> str:
    return f"{number} {word}" + ("s" if number > 1 else "")


def _versions(found: Sequence[Finding]) -> Iterable[Check]:
    """Compare versions; those of torch and Triton may differ, but then results may too."""
    for name in ("moe-routing", "torch", "triton"):
        said = _by_value(found, [one["versions"].get(name) for one in found])
        if len(said) > 1:
            version = next(iter(said))
            fix = f"pip install {name}=={version}" if version and name == "moe-routing" else ""
            status: Status = "problem" if name == "moe-routing" else "warning"
            yield _check(status, f"{name} differs: {_told(said)}", fix)


def _plugins(found: Sequence[Finding]) -> Iterable[Check]:
    """Compare the backends of plug-ins and who brought them, those that differ alike in a line."""
    alike: dict[tuple[str | None, ...], list[str]] = {}
    for name in sorted({name for one in found for name in one["plugins"]}):
        alike.setdefault(tuple(one["plugins"].get(name) for one in found), []).append(name)
    for brought, names in alike.items():
        said = _by_value(found, brought)
        if len(said) <= 1:
            continue
        distribution, _, version = next(filter(None, brought)).partition(" ")
        known = version and not distribution.startswith("(")
        fix = f"pip install {shlex.quote(f'{distribution}=={version}')}" if known else ""
        words = f"{'backend' if len(names) == 1 else 'backends'} {', '.join(names)}"
        yield _check("problem", f"plug-ins differ: {words} {_told(said, 'is missing')}", fix)


def _devices(found: Sequence[Finding]) -> Iterable[Check]:
    said = _by_value(
        found, [" ".join(filter(None, (one["platform"], one["arch"]))) for one in found]
    )
    if len(said) > 1:
        yield _check("problem", f"the kind of device differs: {_told(said, 'none')}")


def _choices(found: Sequence[Finding]) -> Iterable[Check]:
    """Compare what was chosen, and name the variables by which it was, those that differ once."""
    told: set[str] = set()
    for key, (what, variables) in _CHOICES.items():
        said = _by_value(found, [one[key] for one in found])
        if len(said) <= 1:
            continue
        values = {
            name: _by_value(found, [one["environment"].get(name) for one in found])
            for name in variables
            if name not in told
        }
        apart = {name: value for name, value in values.items() if len(value) > 1}
        why = "".join(f"; {name} is {_told(at, 'not set')}" for name, at in apart.items())
        fix = f"unset {' '.join(apart)}" if apart else ""
        told |= apart.keys()
        yield _check("problem", f"{what} differs: {_told(said, 'none')}{why}", fix)


def _shared(found: Sequence[Finding]) -> Iterable[Check]:
    """Name the ranks that would use one accelerator together."""
    seen: dict[tuple[str, str, tuple[str | None, ...]], list[int]] = {}
    for one in found:
        if one["platform"] not in ("", "cpu"):
            visible = tuple(one["environment"].get(name) for name in HIDING)
            seen.setdefault((one["host"], one["device"], visible), []).append(one["rank"])
    for (host, device, _visible), ranks in seen.items():
        if len(ranks) > 1:
            yield _check("warning", f"{_ranks(ranks)} share {device} of {host}")


def _elsewhere(found: Sequence[Finding]) -> Iterable[Check]:
    """Tell what other ranks found and rank 0 did not, each once."""
    key = ("name", "summary", "status", "fix")
    known = {
        tuple(check[part] for part in key)
        for one in found
        if one["rank"] == 0
        for check in one["findings"]
    }
    others: dict[tuple[str, ...], tuple[list[int], str]] = {}
    for one in found:
        for check in one["findings"]:
            what = tuple(check[part] for part in key)
            if what not in known:
                others.setdefault(what, ([], check["details"]))[0].append(one["rank"])
    for (name, summary, status, fix), (ranks, details) in others.items():
        yield Check(
            name="ranks",
            status=status,  # type: ignore[arg-type] # a status of a check
            summary=f"{_ranks(ranks)}: {name}: {summary}",
            fix=fix,
            details=details,
        )


def _by_value(
    found: Sequence[Finding], values: Sequence[str | None]
) -> dict[str | None, list[int]]:
    """Group ranks by what each of them says, rank 0's first."""
    said: dict[str | None, list[int]] = {}
    for one, value in zip(found, values, strict=True):
        said.setdefault(value, []).append(one["rank"])
    return said


def _told(said: dict[str | None, list[int]], nothing: str = "not installed") -> str:
    return ", ".join(f"{value or nothing} on {_ranks(ranks)}" for value, ranks in said.items())


def _ranks(ranks: Sequence[int]) -> str:
    """Name ranks, of several in a row the first and the last.

    >>> _ranks([1]), _ranks([0, 1, 2, 5])
    ('rank 1', 'ranks 0-2 and 5')
    """
    rows = [
        [rank for _, rank in row]
        for _, row in itertools.groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0])
    ]
    said = " and ".join(str(row[0]) if len(row) == 1 else f"{row[0]}-{row[-1]}" for row in rows)
    return f"rank{'s' if len(ranks) > 1 else ''} {said}"
