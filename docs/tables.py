"""Write what is generated in the docs as Markdown.

That is tables from the specs, and the clauses of the contract.

``python docs/tables.py`` writes the clauses into ``contract.md`` again; a test holds that page to
them.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing.conformance.contract import contract_of
from moe_routing.families import FAMILIES
from moe_routing.models import MODELS, NOT_EXPRESSED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from moe_routing.conformance.contract import Contract


def write(folder: Path) -> None:
    """Write ``families.md``, ``models.md`` and ``not_expressed.md`` into the folder."""
    folder.mkdir(exist_ok=True)
    families = [
        (f"`{name}`", f"`{spec.spec.formula}`", spec.source) for name, spec in FAMILIES.items()
    ]
    models = [
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
    (folder / "families.md").write_text(
        _table(("family", "formula (defaults)", "source"), families)
    )
    (folder / "models.md").write_text(
        _table(("model_type", "family", "E", "K", "formula (defaults)", "notes"), models)
    )
    (folder / "not_expressed.md").write_text(
        _table(
            ("model_type", "why not"),
            [(f"`{name}`", reason) for name, reason in NOT_EXPRESSED.items()],
        )
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return (
        "\n".join(
            "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |"
            for line in lines
        )
        + "\n"
    )


CONTRACT = Path(__file__).with_name("contract.md")
_SOURCES = {
    "route": "moe_routing/conformance/clauses.py",
    "gate": "moe_routing/conformance/gate_clauses.py",
    "plan": "moe_routing/conformance/plan_clauses.py",
    "permute": "moe_routing/conformance/permute_clauses.py",
    "combine": "moe_routing/conformance/combine_clauses.py",
    "exchange": "moe_routing/conformance/exchange_clauses.py",
}
"""Operations with a section of clauses in ``contract.md``, and where their clauses are."""
_END = "<!-- until here -->"


def contract() -> str:
    """Return ``contract.md`` with its clauses written again."""
    text = CONTRACT.read_text(encoding="utf-8")
    for operation, source in _SOURCES.items():
        begin = f"<!-- written by docs/tables.py from {source} -->"
        before, _, rest = text.partition(begin)
        parts = [begin, *_clauses(contract_of(operation)), _END]
        text = before + "\n\n".join(parts) + rest.partition(_END)[2]
    return text


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
    CONTRACT.write_text(contract(), encoding="utf-8")
