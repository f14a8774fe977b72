"""What the documentation tells a user to type works."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WRITTEN = sorted(
    page
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"))
    if not {"_build", ".venv"} & set(page.parts)
)
PAGES = [
    "README.md",
    "docs/expert_parallel.md",
    "docs/quickstart.md",
    "docs/families.md",
    "docs/index.md",
    "docs/integrations.md",
    "docs/gate.md",
    "docs/loads.md",
    "docs/permute.md",
    "docs/plan.md",
    "docs/rl_replay.md",
    "docs/scale.md",
]


def blocks_of(page, language):
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE
    )


def test_the_layer_of_the_page_on_training_learns_and_its_loads_become_flatter(capsys):
    names = {}
    for block in blocks_of("docs/train.md", "python"):
        exec(compile(block, "docs/train.md", "exec"), names)  # noqa: S102 -- running it is the test
    capsys.readouterr()
    assert names["errors"][-1] < names["errors"][0] / 4
    assert names["busiest"][0] > 2.5
    assert sum(names["busiest"][-10:]) / 10 < 1.7


@pytest.mark.parametrize("page", PAGES)
def test_the_python_on_a_page_runs(page, capsys):
    blocks = blocks_of(page, "python")
    assert blocks
    names = {}
    exec("import torch, moe_routing", names)  # noqa: S102 -- a page's later blocks build on its first
    for block in blocks:
        exec(compile(block, page, "exec"), names)  # noqa: S102 -- running it is the test
    capsys.readouterr()


@pytest.mark.parametrize(
    "page",
    [
        "docs/balancing.md",
        "docs/gate.md",
        "docs/loads.md",
        "docs/permute.md",
        "docs/plan.md",
        "docs/replay.md",
    ],
)
def test_the_results_on_a_page_are_right(page):
    blocks = blocks_of(page, "pycon")
    names = {}
    exec("import torch, moe_routing", names)  # noqa: S102 -- as above
    examples = doctest.DocTestParser().get_doctest("\n".join(blocks), names, page, None, None)
    assert len(examples.examples) >= 8
    assert doctest.DocTestRunner().run(examples).failed == 0


def test_what_is_generated_in_the_pages_is_as_the_code_has_it(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import tables

    pages = tables.pages()
    stale = [page.name for page, text in pages.items() if text != page.read_text()]
    assert not stale, "write it again: python docs/tables.py"
    assert {"contract.md", "families.md", "expert_parallel.md"} <= {page.name for page in pages}


def test_the_picture_of_the_layers_is_that_of_the_code(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import layers

    assert layers.picture() == layers.PICTURE.read_text(), "draw it again: python docs/layers.py"


CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINKS = {
    page: re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", CODE.sub("", page.read_text()))
    for page in WRITTEN
}


@pytest.mark.parametrize(
    "page", [page for page in WRITTEN if LINKS[page]], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_between_pages_lead_somewhere(page):
    for target in LINKS[page]:
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
