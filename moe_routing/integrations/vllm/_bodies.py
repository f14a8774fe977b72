"""Whether a router of vLLM computes by code that was read: ``known.json`` has the fingerprints.

The files are read, not imported, so that the answer is the same on every machine: vLLM defines its
Triton kernels only where there is a GPU. Of what is in memory it is asked only whether it was
written in these files, as another plug-in may have replaced it. Compiled operators are not looked
at, nor are the functions of AITER, with which nothing is replaced.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_routing.integrations._code import described, digest, home_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

ROUTERS = "model_executor/layers/fused_moe/router"
_PACKAGE = f"vllm.{ROUTERS.replace('/', '.')}."
_BASE = (f"{ROUTERS}/base_router.py", "BaseRouter._select_experts")
_METHODS = ("__init__", "_compute_routing")
_CLASSES = (
    ("cpu_router", "CPURouter"),
    ("custom_routing_router", "CustomRoutingRouter"),
    ("fused_topk_bias_router", "FusedTopKBiasRouter"),
    ("fused_topk_router", "FusedTopKRouter"),
    ("grouped_topk_router", "GroupedTopKRouter"),
)
_ROOTS = {
    "gemma4.Gemma4Router": (("model_executor/models/gemma4.py", "Gemma4Router.routing_function"),),
    **{
        f"{module}.{name}": (
            _BASE,
            *((f"{ROUTERS}/{module}.py", f"{name}.{method}") for method in _METHODS),
        )
        for module, name in _CLASSES
    },
}
"""From a class that can be replaced to the functions that its routing begins with.

Each a file and a qualified name.
"""


class Known(NamedTuple):
    """What was read.

    :ivar versions: the releases, as ``"0.33"``.
    :ivar bodies: class -> fingerprint -> the releases that have it.
    """

    versions: tuple[str, ...]
    bodies: Mapping[str, Mapping[str, str]]


class Body(NamedTuple):
    """The code by which a router computes.

    :ivar fingerprint: hash of what the functions say.
    :ivar functions: where they are, each a module and a qualified name.
    """

    fingerprint: str
    functions: tuple[tuple[str, str], ...]


@functools.cache
def known() -> Known:
    """Return the content of ``known.json``."""
    told = json.loads(Path(__file__).with_name("known.json").read_text())
    return Known(tuple(told["versions"]), told["bodies"])


def folder() -> Path | None:
    """Return the folder of the vLLM that is installed; ``None`` where there is none."""
    package = importlib.util.find_spec("vllm")
    return None if package is None or package.origin is None else Path(package.origin).parent


def unknown(root: Path) -> tuple[str, ...]:
    """Say in a sentence each which routers in that folder compute by code that was not read."""
    return tuple(f"{name}: {reason}" for name in _ROOTS if (reason := _reason(root, name)))


def why_left(name: str) -> str:
    """Say in a sentence why the router of that class must keep its own code; ``""`` if it need not.

    :param name: module and class, ``"cpu_router.CPURouter"``.
    """
    root = folder()
    if root is None:
        return "vLLM is not installed"
    return _reason(root, name) or next(filter(None, map(_replaced, body(root, name).functions)), "")


@functools.cache
def body(root: Path, name: str) -> Body:
    """Read the functions that a router computes by.

    Where its routing begins, and what that calls in vLLM's router modules.
    """
    read = functools.cache(lambda file: parse(root / file))
    trees: dict[tuple[str, str], ast.AST] = {}
    waiting = set(_ROOTS[name])
    while waiting:
        file, function = waiting.pop()
        nodes = list[ast.stmt](find(read(file), function))
        if not nodes:  # a variable, a class, or a function from elsewhere
            continue
        trees[file, function] = ast.Module(body=nodes, type_ignores=[])
        named = {node.id for node in ast.walk(trees[file, function]) if isinstance(node, ast.Name)}
        imported = _imported(read(file))
        waiting |= {imported.get(called, (file, called)) for called in named} - trees.keys()
    said = {f"{Path(file).stem}.{function}": tree for (file, function), tree in trees.items()}
    places = sorted(
        (f"vllm.{file.removesuffix('.py').replace('/', '.')}", function) for file, function in trees
    )
    return Body(digest([], said), tuple(places))


def parse(file: Path) -> list[ast.stmt]:
    """Return the statements of a file.

    None if it is not there, or in a language that this Python does not know.
    """
    try:
        return ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError):
        return []


def find(nodes: Iterable[ast.AST], name: str) -> Iterator[ast.FunctionDef]:
    """Yield the functions of a qualified name.

    Functions in a branch, a handler or any other block are found too.
    """
    head, _, rest = name.partition(".")
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            yield node
        elif isinstance(node, ast.ClassDef) and node.name == head and rest:
            yield from find(node.body, rest)
        elif not isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        ):  # what is in those is local
            yield from find(ast.iter_child_nodes(node), name)


def _reason(root: Path, name: str) -> str:
    found = body(root, name).fingerprint
    if found in known().bodies[name]:
        return ""
    return (
        f"its code is none that was read (fingerprint {found}): it was changed, or this vLLM is "
        "newer"
    )


def _imported(statements: list[ast.stmt]) -> dict[str, tuple[str, str]]:
    """Return where the functions are that a module imports from other router modules.

    Name -> file and name there.
    """
    return {
        alias.asname or alias.name: (
            f"{ROUTERS}/{node.module.removeprefix(_PACKAGE)}.py",
            alias.name,
        )
        for node in ast.walk(ast.Module(body=statements, type_ignores=[]))
        if isinstance(node, ast.ImportFrom)
        and node.module is not None
        and node.module.startswith(_PACKAGE)
        for alias in node.names
    }


def _replaced(place: tuple[str, str]) -> str:
    """Say who replaced a function in memory.

    ``""`` if nobody did, or if this machine does not define it.
    """
    module, name = place
    value: Any = sys.modules.get(module)
    for part in name.split("."):
        value = inspect.getattr_static(value, part, None)
    if value is None or is_from(module, value):
        return ""
    return f"{module}.{name} was replaced, by {described(value)}"


def is_from(module: str, value: Any) -> bool:  # noqa: ANN401 -- whatever a module holds
    """Whether a function was written in that module.

    What torch, Triton and functools made of it counts as the function.
    """
    while True:
        maker = home_of(value) if isinstance(value, FunctionType) else type(value).__module__
        inner = {"torch": "__wrapped__", "functools": "__wrapped__", "triton": "fn"}.get(
            maker.partition(".")[0], ""
        )
        if not hasattr(value, inner):
            return isinstance(value, FunctionType) and maker == module
        value = getattr(value, inner)
