"""Writing a ``Report``: HTML that a vendor can publish, JSON, and JUnit's XML. Imports no torch."""

from __future__ import annotations

import html
import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from xml.etree import ElementTree as ET

from moe_routing.testing.points import POINTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from moe_routing.testing.kit import Report, Result, Status

STATUSES: tuple[Status, ...] = ("passed", "failed", "gap", "declined", "not_applicable")
_WORST_FIRST: tuple[Status, ...] = ("failed", "gap", "passed", "declined", "not_applicable")
_MARKS = {"passed": "✓", "failed": "✗", "gap": "△", "declined": "-", "not_applicable": "·"}
_WORDS = {
    "passed": "passed",
    "failed": "failed",
    "gap": "fails, and the card says why",
    "declined": "the card declines it",
    "not_applicable": "nothing to check here",
}
_UNFOLDED = 20
_CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d0d7de; --soft: #f6f8fa;
  --passed: #1a7f37; --failed: #cf222e; --gap: #9a6700; --declined: #57606a; --not_applicable: #8c959f;
}
@media (prefers-color-scheme: dark) { :root {
  --ink: #e6edf3; --paper: #0d1117; --line: #30363d; --soft: #161b22;
  --passed: #3fb950; --failed: #f85149; --gap: #d29922; --declined: #8b949e; --not_applicable: #6e7681; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.verdict { display: inline-block; padding: .1rem .7rem; border-radius: 1rem; color: var(--paper); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; }
dt { color: var(--declined); } dd { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { border: 1px solid var(--line); padding: .25rem .5rem; text-align: left; vertical-align: top; }
thead th { background: var(--soft); } .matrix td { text-align: center; min-width: 2.2rem; white-space: nowrap; }
.matrix th abbr { text-decoration: none; cursor: help; }
.passed { color: var(--passed); } .failed { color: var(--failed); font-weight: 700; } .gap { color: var(--gap); }
.declined { color: var(--declined); } .not_applicable { color: var(--not_applicable); }
td.failed { background: color-mix(in srgb, var(--failed) 15%, transparent); } td small { opacity: .75; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .6rem; margin: .3rem 0; }
code { font-family: ui-monospace, monospace; font-size: .88em; overflow-wrap: anywhere; }
footer { margin-top: 3rem; color: var(--declined); font-size: .85rem; }
"""


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
    return json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n"


def to_junit(report: Report) -> str:
    """Return JUnit's XML: a test suite a point, a test case a check and case."""
    root = ET.Element("testsuites", name=f"moe-routing conformance {report.backend}", time=f"{report.seconds:.3f}")
    for point, results in sorted(_by(report.results, lambda r: r.point).items()):
        suite = ET.SubElement(
            root,
            "testsuite",
            name=f"{point:02d} {POINTS[point].name}",
            tests=str(len(results)),
            failures=str(sum(r.status == "failed" for r in results)),
            errors="0",
            skipped=str(sum(r.status not in ("passed", "failed") for r in results)),
            time=f"{sum(r.seconds for r in results):.3f}",
            timestamp=report.started,
        )
        for result in results:
            case = ET.SubElement(
                suite, "testcase", classname=f"{report.backend}.{result.check}", name=result.id, time=f"{result.seconds:.6f}"
            )
            if result.status == "failed":
                ET.SubElement(case, "failure", message=_clean(result.message.partition("\n")[0])).text = _clean(result.message)
            elif result.status != "passed":
                ET.SubElement(case, "skipped", message=_clean(f"{result.status}: {result.message}"))
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _clean(text: str) -> str:
    """Leave out what XML cannot hold: a message may quote a device's bytes."""
    return "".join(c for c in text if c in "\t\n" or c >= " ")


Key = TypeVar("Key")


def _by(results: Iterable[Result], key: Callable[[Result], Key]) -> dict[Key, list[Result]]:
    groups: dict[Key, list[Result]] = defaultdict(list)
    for result in results:
        groups[key(result)].append(result)
    return groups


def to_html(report: Report) -> str:
    """Return one page without scripts, pictures or links to elsewhere: summary, matrix, and everything that did not pass."""
    verdict, style = ("conforms", "passed") if report.ok else ("does not conform", "failed")
    title = f"{report.backend}: moe-routing conformance"
    parts = [
        f"<h1>{_e(report.backend)} <span class='verdict' style='background:var(--{style})'>{verdict}</span></h1>",
        _summary(report),
        "<h2>Families and points of the contract</h2>",
        _matrix(report),
        _legend(),
        _listing("Failures", report.failed, "failed"),
        _gaps(report),
        _reasons("Declined by the card", [r for r in report.results if r.status == "declined"]),
        _reasons("Nothing to check here", [r for r in report.results if r.status == "not_applicable"]),
        _checks(report),
        f"<footer>Written by moe-routing {_e(report.versions.get('moe-routing', ''))}, {_e(report.started)}.</footer>",
    ]
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{_e(title)}</title>"
    body = "\n".join(parts)
    return f"<!doctype html>\n<html lang='en'><head>{head}<style>{_CSS}</style></head>\n<body>\n{body}\n</body></html>\n"


def _e(text: object) -> str:
    return html.escape(str(text))


def _summary(report: Report) -> str:
    counts = ", ".join(f"{n} {s.replace('_', ' ')}" for s in STATUSES if (n := report.count(s)))
    rows = {
        "checks": counts,
        "device": report.device,
        "distribution": report.distribution,
        "profile": report.profile,
        "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        "time": f"{report.seconds:.1f} s, begun {report.started}",
    }
    return "<dl>" + "".join(f"<dt>{_e(k)}</dt><dd>{_e(v)}</dd>" for k, v in rows.items()) + "</dl>"


def _matrix(report: Report) -> str:
    cells = _by(report.results, lambda r: (r.family, r.point))
    families = sorted({r.family for r in report.results if r.family})
    points = [point for point in POINTS.values() if any(r.point == point.number for r in report.results)]
    head = "".join(f"<th><abbr title='{_e(p.rule)}'>{p.number}</abbr></th>" for p in points)
    rows = [
        f"<tr><th>{_e(family) or '(any)'}</th>" + "".join(_cell(cells.get((family, p.number), [])) for p in points) + "</tr>"
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
    return f"<td class='{worst}' title='{_e(title)}'>{_MARKS[worst]} <small>{count[worst]}</small></td>"


def _legend() -> str:
    marks = " &nbsp; ".join(f"<span class='{s}'>{_MARKS[s]}</span> {_WORDS[s]}" for s in STATUSES)
    points = "".join(f"<tr><th>{p.number}</th><td>{_e(p.rule)}</td></tr>" for p in POINTS.values())
    return f"<p>{marks}</p><details open><summary>The points</summary><table>{points}</table></details>"


def _listing(title: str, results: list[Result], style: str) -> str:
    """List results with their messages, the first of them unfolded."""
    if not results:
        return ""
    items = "".join(
        f"<details{' open' if n < _UNFOLDED else ''}><summary class='{style}'><code>{_e(r.id)}</code></summary>"
        f"<pre>{_e(r.message)}</pre></details>"
        for n, r in enumerate(results)
    )
    return f"<h2>{title} ({len(results)})</h2>{items}"


def _gaps(report: Report) -> str:
    if not report.gaps:
        return ""
    rows = "".join(f"<tr><th>{_e(name)}</th><td>{_e(reason)}</td></tr>" for name, reason in report.gaps.items())
    tried = [r for r in report.results if r.status == "gap"]
    return f"<h2>Conscious gaps</h2><table>{rows}</table>" + _listing("Checks that the gaps excuse", tried, "gap")


def _reasons(title: str, results: list[Result]) -> str:
    """List reasons with how often each was given: there may be thousands of cases."""
    if not results:
        return ""
    reasons = _by(results, lambda r: (r.point, r.check, r.message))
    rows = "".join(
        f"<tr><td>{r[0].point}</td><td><code>{_e(r[0].check)}</code></td><td>{_e(r[0].message)}</td><td>{len(r)}</td></tr>"
        for r in reasons.values()
    )
    table = f"<table><thead><tr><th>point</th><th>check</th><th>reason</th><th>cases</th></tr></thead>{rows}</table>"
    return f"<h2>{title} ({len(results)})</h2><details><summary>{len(reasons)} reasons</summary>{table}</details>"


def _checks(report: Report) -> str:
    rows = "".join(
        f"<tr><td>{r[0].point}</td><td><code>{_e(r[0].check)}</code></td><td>{sum(x.status == 'passed' for x in r)}</td>"
        f"<td>{len(r)}</td><td>{sum(x.seconds for x in r):.2f}</td></tr>"
        for r in _by(report.results, lambda r: r.check).values()
    )
    head = "<tr><th>point</th><th>check</th><th>passed</th><th>cases</th><th>seconds</th></tr>"
    return f"<h2>Checks</h2><div class='scroll'><table><thead>{head}</thead>{rows}</table></div>"


WRITERS: dict[str, Callable[[Report], str]] = {".html": to_html, ".json": to_json, ".xml": to_junit}
