"""Write what is generated in the docs as Markdown.

That is tables from the specs, and the clauses of the contract.

``python docs/tables.py`` writes the clauses into ``contract.md`` again; a test holds that page to
them.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing.conformance.clauses import CLAUSES
from moe_routing.families import FAMILIES
from moe_routing.models import MODELS, NOT_EXPRESSED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


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
_BEGIN, _END = (
    "<!-- written by docs/tables.py from moe_routing/conformance/clauses.py -->",
    "<!-- until here -->",
)


def contract() -> str:
    """Return ``contract.md`` with its clauses written again."""
    from moe_routing.conformance.checks import ROUTE

    before, _, rest = CONTRACT.read_text(encoding="utf-8").partition(_BEGIN)
    parts = [_BEGIN]
    for clause in CLAUSES.values():
        names = ", ".join(
            f"`{check.name}`" for check in ROUTE.checks if check.clause == clause.number
        )
        text = textwrap.fill(
            f"{clause.text} *Why:* {clause.reason}",
            110,
            break_long_words=False,
            break_on_hyphens=False,
        )
        checks = textwrap.fill(
            f"Checks: {names}.", 110, break_long_words=False, break_on_hyphens=False
        )
        parts.append(f"### {clause.number}. {clause.title}\n\n{text}\n\n{checks}")
    return before + "\n\n".join(parts) + "\n\n" + _END + rest.partition(_END)[2]


if __name__ == "__main__":
    CONTRACT.write_text(contract(), encoding="utf-8")
