"""Write what is generated in the docs as Markdown: tables from the specs, clauses, examples' code.

It stands in the pages between marks, so that they read well where nobody builds them. ``python
docs/tables.py`` writes it again; a test holds the pages to it.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing.conformance.contract import contract_of
from moe_routing.families import FAMILIES
from moe_routing.models import MODELS, NOT_EXPRESSED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from moe_routing.conformance.contract import Contract


def _families() -> str:
    rows = [(f"`{name}`", f"`{spec.spec.formula}`", spec.source) for name, spec in FAMILIES.items()]
    return _table(("family", "formula (defaults)", "source"), rows)


def _models() -> str:
    rows = [
        (
            f"`{name}`",
            f"`{preset.spec.family}`",
            preset.num_experts,
            preset.topk,
            f"`{preset.spec.formula}`",
            preset.source,
        )
        for name, preset in MODELS.items()
    ]
    return _table(("model_type", "family", "E", "K", "formula (defaults)", "notes"), rows)


def _not_expressed() -> str:
    rows = [(f"`{name}`", reason) for name, reason in NOT_EXPRESSED.items()]
    return _table(("model_type", "why not"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


DOCS = Path(__file__).parent
_SOURCES = {
    "route": "moe_routing/conformance/clauses.py",
    "gate": "moe_routing/conformance/gate_clauses.py",
    "plan": "moe_routing/conformance/plan_clauses.py",
    "permute": "moe_routing/conformance/permute_clauses.py",
    "combine": "moe_routing/conformance/combine_clauses.py",
    "exchange": "moe_routing/conformance/exchange_clauses.py",
    "balance": "moe_routing/conformance/balance_clauses.py",
}
"""Operations with a section of clauses in ``contract.md``, and where their clauses are."""
_TABLES = {
    "moe_routing.families.FAMILIES": _families,
    "moe_routing.models.MODELS": _models,
    "moe_routing.models.NOT_EXPRESSED": _not_expressed,
}
_MARKED = re.compile(
    r"<!-- written by docs/tables\.py from (?P<source>\S+)(?: at (?P<start>.+?))? -->\n"
    r".*?<!-- until here -->",
    re.DOTALL,
)
"""What is written, and its marks."""


def pages() -> dict[Path, str]:
    """Return the pages with marks, as they are when all is written again."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
    marked = {path: text for path, text in texts.items() if _MARKED.search(text)}
    return {path: _MARKED.sub(_written, text) for path, text in marked.items()}


def _written(found: re.Match[str]) -> str:
    begin, _, _ = found[0].partition("\n")
    return "\n\n".join((begin, _content(found["source"], found["start"]), "<!-- until here -->"))


def _content(source: str, start: str | None) -> str:
    if source in _TABLES:
        return _TABLES[source]()
    for operation, of_clauses in _SOURCES.items():
        if source == of_clauses:
            return "\n\n".join(_clauses(contract_of(operation)))
    return _code(source, start)


def _code(source: str, start: str | None) -> str:
    """Return an example's code, from the first line on that begins so."""
    code = (DOCS.parent / source).read_text(encoding="utf-8")
    if start is not None:
        code = code[code.index(f"\n{start}") + 1 :]
    return f"```py\n{code.rstrip()}\n```"


def _clauses(contract: Contract) -> Iterable[str]:
    for clause in contract.clauses.values():
        names = ", ".join(
            f"`{check.name}`" for check in contract.checks if check.clause == clause.number
        )
        text = _filled(f"{clause.text} *Why:* {clause.reason}")
        checks = _filled(f"Checks: {names}.")
        yield f"### {clause.number}. {clause.title}\n\n{text}\n\n{checks}"


def _filled(text: str) -> str:
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
