"""Writes the tables of families and models as Markdown, from the specs themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.families import FAMILIES
from moe_routing.models import MODELS, NOT_EXPRESSED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path


def write(folder: Path) -> None:
    """Write ``families.md``, ``models.md`` and ``not_expressed.md`` into the folder."""
    folder.mkdir(exist_ok=True)
    families = [(f"`{name}`", f"`{card.spec.formula}`", card.source) for name, card in FAMILIES.items()]
    models = [
        (f"`{name}`", f"`{preset.spec.family}`", preset.num_experts, preset.topk, f"`{preset.spec.formula}`", preset.source)
        for name, preset in MODELS.items()
    ]
    (folder / "families.md").write_text(_table(("family", "formula (defaults)", "source"), families))
    (folder / "models.md").write_text(_table(("model_type", "family", "E", "K", "formula (defaults)", "notes"), models))
    (folder / "not_expressed.md").write_text(
        _table(("model_type", "why not"), [(f"`{name}`", reason) for name, reason in NOT_EXPRESSED.items()])
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
