"""Writing a ``Report``: HTML that a vendor can publish, JSON, and JUnit's XML. Imports no torch."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from xml.etree import ElementTree as ET

from moe_routing._html import escape, page
from moe_routing_registry.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from moe_routing.conformance.runner import Report, Result, Status

STATUSES: tuple[Status, ...] = ("passed", "failed", "gap", "declined", "not_run", "not_applicable")
_WORST_FIRST: tuple[Status, ...] = (
    "failed",
    "gap",
    "passed",
    "declined",
    "not_run",
    "not_applicable",
)
_MARKS = {
    "passed": "✓",
    "failed": "✗",
    "gap": "△",
    "declined": "-",
    "not_run": "○",
    "not_applicable": "·",
}
_WORDS = {
    "passed": "passed",
    "failed": "failed",
    "gap": "fails, and the spec says why",
    "declined": "the backend declines it",
    "not_run": "cannot be run here",
    "not_applicable": "nothing to check here",
}
_UNFOLDED = 20


def write(report: Report, path: str | Path) -> None:
    """Write the report; the name's ending says how: ``.html``, ``.json`` or ``.xml`` (JUnit).

    :raises ValueError: the name ends in something else.
    """
    path = Path(path)
    writer = WRITERS.get(path.suffix)
    if writer is None:
        msg = f"report: expected a name that ends in {', '.join(WRITERS)}, got {str(path)!r}"
        raise ValueError(msg)
    path.write_text(writer(report), encoding="utf-8")


def to_json(report: Report) -> str:
    """Return ``Report.to_dict()`` as text."""
    return json.dumps(report.to_dict(), indent=1) + "\n"


def to_junit(report: Report) -> str:
    """Return JUnit's XML: a test suite a clause, a test case a check and case."""
    root = ET.Element(
        "testsuites", name=f"moe-routing conformance {report.backend}", time=f"{report.seconds:.3f}"
    )
    for clause, results in sorted(_by(report.results, lambda r: r.clause).items()):
        suite = ET.SubElement(
            root,
            "testsuite",
            name=f"{clause:02d} {report.clauses[clause].name}",
            tests=str(len(results)),
            failures=str(sum(r.status == "failed" for r in results)),
            errors="0",
            skipped=str(sum(r.status not in ("passed", "failed") for r in results)),
            time=f"{sum(r.seconds for r in results):.3f}",
            timestamp=report.started,
        )
        for result in results:
            case = ET.SubElement(
                suite,
                "testcase",
                classname=f"{report.backend}.{result.check}",
                name=result.id,
                time=f"{result.seconds:.6f}",
            )
            if result.status == "failed":
                ET.SubElement(
                    case, "failure", message=result.message.partition("\n")[0]
                ).text = result.message
            elif result.status != "passed":
                ET.SubElement(case, "skipped", message=f"{result.status}: {result.message}")
    ET.indent(root)
    # What XML cannot hold is left out: a message may quote a device's bytes.
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        + printable(ET.tostring(root, encoding="unicode"))
        + "\n"
    )


Key = TypeVar("Key")


def _by(results: Iterable[Result], key: Callable[[Result], Key]) -> dict[Key, list[Result]]:
    groups: dict[Key, list[Result]] = defaultdict(list)
    for result in results:
        groups[key(result)].append(result)
    return groups


def to_html(report: Report) -> str:
    """Return one page without scripts, pictures or links to elsewhere.

    Summary, matrix, and everything that did not pass.
    """
    verdict, style = report.verdict.partition(":")[0], "passed" if report.ok else "failed"
    title = f"{report.backend}: moe-routing conformance"
    parts = [
        (
            f"<h1>{escape(report.backend)} "
            f"<span class='verdict' style='background:var(--{style})'>{verdict}</span></h1>"
        ),
        _summary(report),
        "<h2>Families and clauses of the contract</h2>",
        matrix(report),
        legend(report),
        listing("Failures", report.failed, "failed"),
        _gaps(report),
        _reasons("Declined by the backend", [r for r in report.results if r.status == "declined"]),
        _reasons("Cannot be run here", [r for r in report.results if r.status == "not_run"]),
        _reasons(
            "Nothing to check here", [r for r in report.results if r.status == "not_applicable"]
        ),
        _checks(report),
        (
            f"<footer>Written by moe-routing {escape(report.versions.get('moe-routing', ''))}, "
            f"{escape(report.started)}.</footer>"
        ),
    ]
    return page(title, parts)


def _summary(report: Report) -> str:
    counts = ", ".join(f"{n} {s.replace('_', ' ')}" for s in STATUSES if (n := report.count(s)))
    rows = {
        "verdict": report.verdict,
        "operation": report.operation,
        "checks": counts,
        "device": report.device,
        "distribution": report.distribution,
        "profile": report.profile,
        "seed": str(report.seed),
        "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        "time": f"{report.seconds:.1f} s, begun {report.started}",
    }
    return (
        "<dl>"
        + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in rows.items())
        + "</dl>"
    )


def matrix(report: Report) -> str:
    """Return the table of families and clauses."""
    cells = _by(report.results, lambda r: (r.family, r.clause))
    families = sorted({r.family for r in report.results if r.family})
    clauses = [
        clause
        for clause in report.clauses.values()
        if any(r.clause == clause.number for r in report.results)
    ]
    head = "".join(f"<th><abbr title='{escape(p.rule)}'>{p.number}</abbr></th>" for p in clauses)
    rows = [
        f"<tr><th>{escape(family) or '(any)'}</th>"
        + "".join(_cell(cells.get((family, p.number), [])) for p in clauses)
        + "</tr>"
        for family in [*families, ""]
    ]
    body = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f"<div class='scroll'><table class='matrix'>{body}</table></div>"


def _cell(results: list[Result]) -> str:
    if not results:
        return "<td></td>"
    count = {status: sum(r.status == status for r in results) for status in STATUSES}
    worst = next(status for status in _WORST_FIRST if count[status])
    title = ", ".join(f"{n} {_WORDS[status]}" for status, n in count.items() if n)
    return (
        f"<td class='{worst}' title='{escape(title)}'>"
        f"{_MARKS[worst]} <small>{count[worst]}</small></td>"
    )


def legend(report: Report) -> str:
    """Return what the marks of ``matrix`` mean, and the clauses."""
    marks = " &nbsp; ".join(f"<span class='{s}'>{_MARKS[s]}</span> {_WORDS[s]}" for s in STATUSES)
    clauses = "".join(
        f"<tr><th>{p.number}</th><td>{escape(p.rule)}</td></tr>" for p in report.clauses.values()
    )
    return (
        f"<p>{marks}</p>"
        f"<details open><summary>The clauses</summary><table>{clauses}</table></details>"
    )


def listing(title: str, results: list[Result], style: str) -> str:
    """List results with their messages, the first of them unfolded."""
    if not results:
        return ""
    items = "".join(
        f"<details{' open' if n < _UNFOLDED else ''}>"
        f"<summary class='{style}'><code>{escape(r.id)}</code></summary>"
        f"<pre>{escape(r.message)}</pre></details>"
        for n, r in enumerate(results)
    )
    return f"<h2>{escape(title)} ({len(results)})</h2>{items}"


def _gaps(report: Report) -> str:
    if not report.gaps:
        return ""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(reason)}</td></tr>"
        for name, reason in report.gaps.items()
    )
    tried = [r for r in report.results if r.status == "gap"]
    return f"<h2>Conscious gaps</h2><table>{rows}</table>" + listing(
        "Checks that the gaps excuse", tried, "gap"
    )


def _reasons(title: str, results: list[Result]) -> str:
    """List reasons with how often each was given: there may be thousands of cases."""
    if not results:
        return ""
    reasons = _by(results, lambda r: (r.clause, r.check, r.message))
    rows = "".join(
        f"<tr><td>{r[0].clause}</td><td><code>{escape(r[0].check)}</code></td>"
        f"<td>{escape(r[0].message)}</td><td>{len(r)}</td></tr>"
        for r in reasons.values()
    )
    head = "<tr><th>clause</th><th>check</th><th>reason</th><th>cases</th></tr>"
    return (
        f"<h2>{escape(title)} ({len(results)})</h2>"
        f"<details><summary>{len(reasons)} reasons</summary>"
        f"<table><thead>{head}</thead>{rows}</table></details>"
    )


def _checks(report: Report) -> str:
    rows = "".join(
        f"<tr><td>{r[0].clause}</td><td><code>{escape(r[0].check)}</code></td>"
        f"<td>{sum(x.status == 'passed' for x in r)}</td>"
        f"<td>{len(r)}</td><td>{sum(x.seconds for x in r):.2f}</td></tr>"
        for r in _by(report.results, lambda r: r.check).values()
    )
    head = "<tr><th>clause</th><th>check</th><th>passed</th><th>cases</th><th>seconds</th></tr>"
    return f"<h2>Checks</h2><div class='scroll'><table><thead>{head}</thead>{rows}</table></div>"


WRITERS: dict[str, Callable[[Report], str]] = {".html": to_html, ".json": to_json, ".xml": to_junit}
