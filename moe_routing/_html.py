"""The frame of every HTML page that the tools write.

A page is one file without scripts, light or dark, for screens from a phone's width up.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from moe_routing_registry.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d0d7de; --soft: #f6f8fa;
  --passed: #1a7f37; --failed: #cf222e; --gap: #9a6700; --declined: #57606a; --not_run: #6e7781;
  --not_applicable: #8c959f;
}
@media (prefers-color-scheme: dark) { :root {
  --ink: #e6edf3; --paper: #0d1117; --line: #30363d; --soft: #161b22;
  --passed: #3fb950; --failed: #f85149; --gap: #d29922; --declined: #8b949e; --not_run: #7d8590;
  --not_applicable: #6e7681; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
.verdict { display: inline-block; padding: .1rem .7rem; border-radius: 1rem; color: var(--paper);
  font-weight: 600; font-size: 1rem; vertical-align: middle; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; }
dt { color: var(--declined); } dd { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { border: 1px solid var(--line); padding: .25rem .5rem;
  text-align: left; vertical-align: top; }
thead th { background: var(--soft); }
.matrix td { text-align: center; min-width: 2.2rem; white-space: nowrap; }
.matrix th abbr { text-decoration: none; cursor: help; }
.passed { color: var(--passed); } .failed { color: var(--failed); font-weight: 700; }
.gap { color: var(--gap); } .declined { color: var(--declined); }
.not_run { color: var(--not_run); } .not_applicable { color: var(--not_applicable); }
td.failed { background: color-mix(in srgb, var(--failed) 15%, transparent); }
td small { opacity: .75; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .6rem;
  margin: .3rem 0; }
code { font-family: ui-monospace, monospace; font-size: .88em; overflow-wrap: anywhere; }
.plot { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.plot > * { max-width: 100%; } .plot td { white-space: nowrap; }
.plot td:not(:nth-child(2)), .plot th:not(:nth-child(2)) { text-align: right; }
img { max-width: 100%; height: auto; }
footer { margin-top: 3rem; color: var(--declined); font-size: .85rem; }
"""


def escape(text: object) -> str:
    """Return a value's text, safe between tags and in attributes.

    All text from outside enters a page through this function.
    """
    return html.escape(printable(str(text)))


def page(title: str, parts: Iterable[str]) -> str:
    """Return a whole page.

    :param parts: HTML, one after another.

    >>> page("a < b", ["<p>c</p>"]).count("a &lt; b")
    1
    """
    head = (
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{CSS}</style>"
    )
    body = "\n".join(parts)
    return f"<!doctype html>\n<html lang='en'><head>{head}</head>\n<body>\n{body}\n</body></html>\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table that scrolls sideways by itself where the page is narrow.

    >>> table(["a"], [["<b>"]]).partition("</thead>")[2]
    '<tbody><tr><td>&lt;b&gt;</td></tr></tbody></table></div>'
    """
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    inside = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f"<div class='scroll'><table>{inside}</table></div>"
