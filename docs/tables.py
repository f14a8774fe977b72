"""Write what is generated in the docs as Markdown: tables from the specs, clauses, examples' code.

It stands in the pages between marks, so that they read well where nobody builds them. ``python
docs/tables.py`` writes it again; a test holds the pages to it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import json
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_routing.conformance.contract import contract_of
from moe_routing.doctor import OTHER_VARIABLES, VARIABLES
from moe_routing.families import FAMILIES
from moe_routing.models import MODELS, NOT_EXPRESSED
from moe_routing_registry.verdict import FIXABLE, RejectCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from moe_routing.conformance.contract import Contract

DOCS = Path(__file__).parent
ROOT = DOCS.parent


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


def _variables(meanings: Mapping[str, str]) -> Callable[[], str]:
    rows = [(f"`{name}`", meaning) for name, meaning in meanings.items()]
    return lambda: _table(("variable", "meaning"), rows)


def _reject_codes() -> str:
    """Return the codes with the docstrings that stand below them in their file."""
    tree = ast.parse((ROOT / "registry/moe_routing_registry/verdict.py").read_text("utf-8"))
    (body,) = (
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == RejectCode.__name__
    )
    meanings = {
        ast.unparse(member.targets[0]): " ".join(ast.literal_eval(text.value).split())
        for member, text in itertools.pairwise(body)
        if isinstance(member, ast.Assign) and isinstance(text, ast.Expr)
    }
    rows = [
        (
            f"`{code.value}`",
            meanings[code.name].replace("``", "`"),
            "yes" if code in FIXABLE else "",
        )
        for code in RejectCode
    ]
    return _table(("code", "meaning", "fault"), rows)


def _launches(arch: str) -> Callable[[], str]:
    def written() -> str:
        held = json.loads((_TRITON / f"tables/{arch}.json").read_text("utf-8"))
        rows = [
            (
                _KINDS[rule["kind"]],
                rule["bits"],
                rule["experts"],
                rule["width"],
                _steps((step[0], _launch(*step[1:])) for step in rule["steps"]),
            )
            for rule in held["rules"]
        ]
        head = ("selection", "bits", "E", "list", "tokens and launch")
        return f"{held['provenance'].capitalize()}.\n\n{_table(head, rows)}"

    return written


_TRITON = ROOT / "backends" / "moe_routing_backends" / "triton"
_KINDS = {
    "logits": "by logits",
    "row_sum": "by logits, weights need the whole row",
    "sigmoid_bias": "by sigmoid + bias",
    "bias": "by another score + bias",
    "grouped": "in groups",
}
"""Kinds of specs in launch tables, for readers."""


def _launch(variant: str, rows: int, threads: int, warps: int, warp_size: int = 0) -> str:
    threads_of_row = "" if variant == "cooperative" else f"/{threads}"
    shape = f"`{variant}` {rows}{threads_of_row}"
    return shape + (f" w{warps}" if warps > 1 else "") + (f" s{warp_size}" if warp_size else "")


def _plan_launches() -> str:
    held = json.loads((_TRITON / "tables/sm_90.json").read_text("utf-8"))["plans"]
    rows = [
        (rule["layout"], rule["experts"], _steps(_merged(rule["steps"]))) for rule in held["rules"]
    ]
    table = _table(("layout", "E", "pairs and kernels"), rows)
    return f"{held['provenance'].capitalize()}.\n\n{table}"


def _merged(steps: Sequence[Sequence[int | None]]) -> Iterable[tuple[int | None, int | None]]:
    """Yield the end of each run of steps with the same number of kernels, and that number."""
    for step, after in zip(steps, [*steps[1:], (None, None)], strict=True):
        if step[1] != after[1]:
            yield step[0], step[1]


def _steps(steps: Iterable[tuple[int | None, object]]) -> str:
    """Say what serves up to which number; nothing is above the last step."""
    *before, (_, last) = steps
    served = [f"to {number:,}: {launch}" for number, launch in before]
    return "; ".join([*served, f"then {last}" if served else f"all: {last}"])


PUBLIC = (
    "moe_routing",
    "moe_routing.gating",
    "moe_routing.planning",
    "moe_routing.permutation",
    "moe_routing.distributed",
    "moe_routing.distributed.scale",
    "moe_routing.balancing",
    "moe_routing.models",
    "moe_routing.conformance",
    "moe_routing.integrations.transformers",
    "moe_routing.integrations.vllm",
    "moe_routing_registry",
)
"""Modules whose ``__all__`` is public; a test holds the reference to have every name."""


def _public() -> str:
    return "\n\n".join(f"**`{name}`**\n\n{_names(name)}" for name in PUBLIC)


def _names(module: str) -> str:
    """Return a table of a module's public names and the first sentences of their docstrings."""
    public = importlib.import_module(module)
    found = {name: getattr(public, name) for name in public.__all__}
    rows = [
        (f"`{name}`", (inspect.getdoc(value) or "").partition("\n")[0].replace("``", "`"))
        for name, value in sorted(found.items())
        if callable(value)
    ]
    return _table(("name", "what it is"), rows)


def _decisions() -> str:
    """Return a link to each decision, with its title."""
    paths = sorted((DOCS / "decisions").glob("0*.md"))
    titles = ((path.name, path.read_text("utf-8").partition("\n")[0]) for path in paths)
    return "\n".join(f"- [{title.removeprefix('# ')}]({name})" for name, title in titles)


_RESULTS = ROOT / "tests" / "versions" / "results.json"


def _versions() -> str:
    """Return what `make matrix` found, and each test that is known to fail with its reason."""
    every = json.loads(_RESULTS.read_text("utf-8")).values()
    rows = [
        (
            held["python"],
            held["torch"],
            held["triton"],
            held["transformers"],
            *(_counts(held[part]) for part in ("core", "transformers tests")),
            f"{sum(held['kits'].values()):,}",
            held["date"],
        )
        for held in every
    ]
    head = (
        "Python",
        "torch",
        "Triton",
        "transformers",
        "core tests",
        "with transformers",
        "kit",
        "on",
    )
    lines = [
        f"- torch {held['torch']}, Python {held['python']}: {_named(tests)}: {reason}"
        for held in every
        for reason, tests in _by_reason(held).items()
    ]
    return "\n\n".join([_table(head, rows), *(["\n".join(lines)] if lines else [])])


def _by_reason(held: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the tests that failed by the reason, as far as it is known."""
    found: dict[str, list[str]] = {}
    failed = held["known"] | dict.fromkeys(held["wrong"], "not explained")
    for test, reason in failed.items():
        found.setdefault(reason, []).append(test.rpartition(".")[2].partition("[")[0])
    return found


def _named(tests: Sequence[str]) -> str:
    names = list(dict.fromkeys(tests))
    return f"`{names[0]}`" + (f" and {len(tests) - 1} more" if len(tests) > 1 else "")


def _counts(part: Mapping[str, int]) -> str:
    return f"{part['passed']:,} passed" + (f", {part['failed']} failed" if part["failed"] else "")


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
    "moe_routing.doctor.VARIABLES": _variables(VARIABLES),
    "moe_routing.doctor.OTHER_VARIABLES": _variables(OTHER_VARIABLES),
    "moe_routing_registry.RejectCode": _reject_codes,
    "docs/decisions": _decisions,
    "__all__": _public,
    "tests/versions/results.json": _versions,
    "triton/tables/sm_90.json": _launches("sm_90"),
    "triton/tables/sm_90.json#plans": _plan_launches,
    "triton/tables/xpu.json": _launches("xpu"),
}
_MARKED = re.compile(
    r"<!-- written by docs/tables\.py from (?P<source>\S+)(?: at (?P<start>.+?))? -->\n"
    r".*?<!-- until here -->",
    re.DOTALL,
)
"""What is written, and its marks."""


def pages() -> dict[Path, str]:
    """Return the pages with marks, as they are when all is written again."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
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
    code = (ROOT / source).read_text(encoding="utf-8")
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
