"""Compare ``fingerprints.json`` with releases of transformers, without importing them.

``python tests/integrations/fingerprints.py FOLDER...``, each what ``pip install --no-deps --target
FOLDER transformers==...`` made. Prints each router's code that the file does not know: class,
fingerprint, source. Give it a recipe of ``_recipes.py`` that computes the same, or write one, and
add the line; ``test_transformers_routers.py`` then holds it against the router. Prints the code of
``grouped_mm_experts_forward`` too, if ``experts.py`` does not know it, and of each function
``load_balancing_loss_func`` that ``losses.py`` does not know.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from moe_routing.integrations._code import digest
from moe_routing.integrations.transformers import losses
from moe_routing.integrations.transformers._proof import known
from moe_routing.integrations.transformers.experts import KNOWN


def of_release(site, path):
    """Fingerprint a class from the files of a release; ``None`` where it has no such class."""
    folder, _, name = path.partition(".")
    file = Path(site) / "transformers" / "models" / folder / f"modeling_{folder}.py"
    if not file.exists():
        return None, ""
    body = ast.parse(file.read_text()).body
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    found = next(
        (node for node in body if isinstance(node, ast.ClassDef) and node.name == name), None
    )
    if found is None:
        return None, ""
    trees = {
        node.name: node
        for node in found.body
        if isinstance(node, ast.FunctionDef) and node.name != "__init__"
    }
    named = {
        node.id for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.Name)
    }
    bases = [ast.unparse(base).rpartition(".")[2] for base in found.bases]
    return digest(
        bases, trees | {name: functions[name] for name in named & set(functions)}
    ), ast.unparse(found)


def of_experts(site):
    """Fingerprint the implementation that ours of the experts follows."""
    body = ast.parse((Path(site) / "transformers" / "integrations" / "moe.py").read_text()).body
    name = "grouped_mm_experts_forward"
    (function,) = (n for n in body if isinstance(n, ast.FunctionDef) and n.name == name)
    return digest([], {name: function}), ast.unparse(function)


def of_losses(site):
    """Fingerprint every load balancing loss of a release: model, fingerprint, source."""
    for file in sorted((Path(site) / "transformers" / "models").glob("*/modeling_*.py")):
        text = file.read_text()
        if f"def {losses.THEIRS}(" in text:
            for node in ast.parse(text).body:
                if isinstance(node, ast.FunctionDef) and node.name == losses.THEIRS:
                    fingerprint = digest([], {losses.THEIRS: node})
                    yield file.parent.name, fingerprint, ast.unparse(node)


def main(sites):
    unknown = {}
    for site in sites:
        fingerprint, source = of_experts(site)
        if fingerprint not in KNOWN:
            unknown["grouped_mm_experts_forward", fingerprint] = (site, source)
        for folder, fingerprint, source in of_losses(site):
            if fingerprint not in losses.KNOWN.keys() | losses.OTHERS.keys():
                unknown.setdefault((f"{folder}.{losses.THEIRS}", fingerprint), (site, source))
        for path, recipes in known().items():
            fingerprint, source = of_release(site, path)
            if fingerprint is not None and fingerprint not in recipes:
                unknown.setdefault((path, fingerprint), (site, source))
    for (path, fingerprint), (site, source) in unknown.items():
        sys.stdout.write(f"{site}: {path} {fingerprint}\n{source}\n\n")
    return len(unknown)


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
