"""``to_html``: everything on one page."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from moe_routing._html import escape, page, table
from moe_routing.doctor import Failure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.report._gather import Gathered, Tried

_GIB = 2**30
_MARKS = {
    "ok": ("✓", "passed"),
    "warning": ("!", "gap"),
    "problem": ("✗", "failed"),
    "skipped": ("-", "declined"),
}


def to_html(gathered: Gathered) -> str:
    """Return one page, without scripts or links to elsewhere."""
    return page("moe-routing report", _parts(gathered))


def _parts(gathered: Gathered) -> Iterator[str]:
    doctor = gathered.doctor
    verdict, style = ("fine", "passed") if gathered.ok else ("needs a look", "failed")
    background = f"background:var(--{style})"
    shown = f"<span class='verdict' style='{background}'>{verdict}</span>"
    yield f"<h1>moe-routing report {shown}</h1>"
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    versions = ", ".join(f"{name} {version}" for name, version in doctor["versions"].items())
    yield f"<p>{escape(versions)}; {now}</p>"
    yield f"<p>{escape(_contents(gathered))}</p>"
    yield from _checks(doctor)
    yield from _machine(doctor)
    yield from _backends(doctor)
    yield from _operations(gathered)
    for name, tried in gathered.operations.items():
        yield from _conformance(name, tried, gathered.device)
        yield from _bench(name, tried)
    yield from _not_tried(gathered)


def _contents(gathered: Gathered) -> str:
    found = "This page has doctor's findings for all operations"
    if not gathered.operations:
        return f"{found}. No device here has a backend, so nothing was tried."
    names = " and ".join(gathered.operations)
    return f"{found}, and conformance and benchmark of {names} on {gathered.device}."


def _checks(doctor: dict[str, Any]) -> Iterator[str]:
    yield "<h2>Checks</h2>"
    for check in doctor["checks"]:
        if check["status"] == "skipped":
            continue
        mark, style = _MARKS[check["status"]]
        fix = f"<pre>{escape(check['fix'])}</pre>" if check["fix"] else ""
        name, summary = escape(check["name"]), escape(check["summary"])
        found = f"<span class='{style}'>{mark}</span> <b>{name}</b>: {summary}"
        yield f"<div>{found}{fix}</div>"


def _machine(doctor: dict[str, Any]) -> Iterator[str]:
    devices = [
        (
            device["type"] if device["index"] is None else f"{device['type']}:{device['index']}",
            device["name"] or "unknown",
            device["arch"] or "unknown",
            f"{device['total_memory'] / _GIB:.1f} GiB" if device["total_memory"] else "unknown",
            device["compute_units"] or "unknown",
        )
        for device in doctor["devices"]
    ]
    yield "<h2>Devices</h2>" + table(("device", "name", "arch", "memory", "units"), devices)
    toolchains = [
        (t["name"], t["version"] or "no", "yes" if t["usable"] else "no", t["detail"])
        for t in doctor["toolchains"]
    ]
    yield "<h2>Toolchains</h2>" + table(("name", "installed", "usable", "what"), toolchains)
    variables = [
        (v["name"], v["value"], v["problem"] or v["meaning"]) for v in doctor["environment"]
    ]
    if variables:
        yield "<h2>Environment variables</h2>" + table(("name", "value", "meaning"), variables)


def _backends(doctor: dict[str, Any]) -> Iterator[str]:
    for place in doctor["reports"]:
        states = [
            (backend["name"], backend["devices"][place])
            for backend in doctor["backends"]
            if "route" in backend["operations"]  # who computes the others, the next table says
        ]
        rows = [
            (name, " ".join(filter(None, (state["state"], state["code"]))), state["reason"])
            for name, state in states
        ]
        yield f"<h2>Backends on {escape(place)}</h2>" + table(("name", "state", "why"), rows)
        yield from (
            f"<div>to use {escape(name)}: <pre>{escape(s['fix'])}</pre></div>"
            for name, s in states
            if s["fix"]
        )
    for failure in doctor["plugin_failures"]:
        name, reason = escape(failure["name"]), escape(failure["reason"])
        yield f"<p class='failed'>plug-in {name}: {reason}</p>"


def _operations(gathered: Gathered) -> Iterator[str]:
    """Say of every operation which backend each device gets."""
    rows = [
        (operation["name"], place, report["winner"] or "none", report["why"])
        for operation in gathered.doctor["operations"]
        for place, report in operation["devices"].items()
    ]
    if rows:
        yield "<h2>Operations</h2>" + table(("operation", "device", "backend", "why"), rows)


def _conformance(operation: str, tried: Tried, device: str) -> Iterator[str]:
    found = tried.conformance
    where = f"conformance of {tried.backend} on {device}"
    yield f"<h2>{escape(operation)}: {escape(where)}</h2>"
    if isinstance(found, Failure):
        yield _failed(found)
        return
    from moe_routing.conformance.report import legend, listing, matrix

    style = "passed" if found.ok else "failed"
    done = f"{found.verdict}; the {found.profile} profile, in {found.seconds:.0f} s"
    yield f"<p class='{style}'>{escape(done)}</p>"
    yield matrix(found) + legend(found)
    yield listing("Failures", found.failed, "failed")


def _bench(operation: str, tried: Tried) -> Iterator[str]:
    found = tried.bench
    yield f"<h2>{escape(operation)}: benchmark</h2>"
    if isinstance(found, Failure):
        yield _failed(found)
    else:
        from moe_routing.bench.page import sections

        yield from sections(found, heading="h3")


def _not_tried(gathered: Gathered) -> Iterator[str]:
    """Say how to check the operations that the page is not about."""
    place = gathered.device
    commands = [
        f"moe-routing conformance {winner} --operation {operation['name']} --device {place}"
        for operation in gathered.doctor["operations"]
        if operation["name"] not in gathered.operations
        and (winner := operation["devices"].get(place, {}).get("winner"))
    ]
    if commands:
        lines = escape("\n".join(commands))
        yield f"<h2>Not tried here</h2><p>Other operations are checked by</p><pre>{lines}</pre>"


def _failed(failure: Failure) -> str:
    return f"<p class='failed'>{escape(failure.sentence)}</p><pre>{escape(failure.traceback)}</pre>"
