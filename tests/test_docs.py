"""What the documentation tells a user to type works."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WRITTEN = sorted(
    page
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"))
    if not {"_build", ".venv"} & set(page.parts)
)
# Their code is run elsewhere, because it takes longer or needs an installed backend.
ELSEWHERE = {
    "docs/train.md": "test_the_layer_of_the_page_on_training_learns_and_its_loads_become_flatter",
    "docs/writing_a_backend.md": "tests/conformance/test_writing_a_backend.py",
}


CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def blocks_of(page, language):
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE
    )


def pages_with(language):
    names = [str(page.relative_to(ROOT)) for page in WRITTEN]
    return [name for name in names if name not in ELSEWHERE and blocks_of(name, language)]


def test_the_layer_of_the_page_on_training_learns_and_its_loads_become_flatter(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)  # it saves a program
    names = {}
    for block in blocks_of("docs/train.md", "python"):
        exec(compile(block, "docs/train.md", "exec"), names)  # noqa: S102 -- running it is the test
    capsys.readouterr()
    assert names["errors"][-1] < names["errors"][0] / 4
    assert names["busiest"][0] > 2.5
    assert sum(names["busiest"][-10:]) / 10 < 1.7


def test_the_pages_whose_code_runs_are_those_that_have_some():
    assert {"README.md", "docs/your_own_layer.md"} <= set(pages_with("python"))
    assert {"docs/plan.md", "docs/batch_invariance.md"} <= set(pages_with("pycon"))
    assert all(blocks_of(page, "python") for page in ELSEWHERE)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's
@pytest.mark.parametrize("page", pages_with("python"))
def test_the_python_on_a_page_runs(page, capsys):
    names = {}
    exec("import torch, moe_routing", names)  # noqa: S102 -- a page's later blocks build on its first
    for block in blocks_of(page, "python"):
        exec(compile(block, page, "exec"), names)  # noqa: S102 -- running it is the test
    capsys.readouterr()


@pytest.mark.parametrize("page", pages_with("console"))
def test_each_command_on_a_page_has_a_line_of_its_own(page):
    for block in blocks_of(page, "console"):
        lines = block.splitlines()
        assert lines[0].startswith("$ "), f"what is typed comes first: {lines[0]}"
        joined = [line for line in lines if re.search(r"(?<=\S) \$ \w", line)]
        assert not joined


def test_no_item_of_a_list_runs_on_in_the_line_of_another():
    joined = [
        f"{page.name}: {line}"
        for page in WRITTEN
        for line in CODE.sub("", page.read_text()).splitlines()
        if not line.startswith("|") and re.search(r"[.:;] - \*\*", line)
    ]
    assert not joined


@pytest.mark.parametrize("page", pages_with("pycon"))
def test_the_results_on_a_page_are_right(page):
    blocks = blocks_of(page, "pycon")
    names = {}
    exec("import torch, moe_routing", names)  # noqa: S102 -- as above
    examples = doctest.DocTestParser().get_doctest("\n".join(blocks), names, page, None, None)
    assert examples.examples
    assert doctest.DocTestRunner().run(examples).failed == 0


def test_what_is_generated_in_the_pages_is_as_the_code_has_it(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import tables

    pages = tables.pages()
    stale = [page.name for page, text in pages.items() if text != page.read_text()]
    assert not stale, "write it again: python docs/tables.py"
    assert {"contract.md", "families.md", "expert_parallel.md"} <= {page.name for page in pages}


def test_the_page_on_versions_has_a_row_for_each_environment_that_was_run():
    held = json.loads((ROOT / "tests" / "versions" / "results.json").read_text())
    page = (ROOT / "docs" / "versions.md").read_text()
    for environment in held.values():
        row = [environment[name] for name in ("python", "torch", "triton", "transformers")]
        assert f"\n| {' | '.join(row)} |" in page


def test_the_picture_of_the_layers_is_that_of_the_code(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import layers

    assert layers.picture() == layers.PICTURE.read_text(), "draw it again: python docs/layers.py"


def test_the_drawings_are_those_of_their_script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import drawings

    stale = [path.name for path, svg in drawings.drawings().items() if svg != path.read_text()]
    assert not stale, "draw them again: python docs/drawings.py"
    named = "".join(page.read_text() for page in WRITTEN)
    assert all(f"figures/{path.name}" in named for path in drawings.drawings())


PUBLIC = runpy.run_path(str(ROOT / "docs" / "tables.py"))["PUBLIC"]
DIRECTIVE = re.compile(r"^\.\. (currentmodule|auto\w+):: (\S+)", re.MULTILINE)


def documented():
    """Yield the objects that autodoc is told to document, on all pages."""
    for page in WRITTEN:
        module = ""
        for directive, name in DIRECTIVE.findall(page.read_text()):
            if directive == "currentmodule":
                module = name
            else:
                owner, _, attribute = f"{module}.{name}".rpartition(".")
                if name.startswith("moe_routing"):
                    owner, _, attribute = name.rpartition(".")
                yield getattr(importlib.import_module(owner), attribute)


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_on_a_page_of_the_reference(module):
    public = importlib.import_module(module)
    on_pages = {id(found) for found in documented()}
    assert [n for n in public.__all__ if id(getattr(public, n)) not in on_pages] == []


PAGES_OF_DOCS = [page for page in WRITTEN if page.parent == ROOT / "docs"]


def test_the_index_leads_to_every_page():
    listed = set(LINKS[ROOT / "docs" / "index.md"])
    unlisted = [page.name for page in PAGES_OF_DOCS if page.name not in listed | {"index.md"}]
    assert not unlisted


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
