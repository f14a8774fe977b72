"""The functions of vLLM that this integration calls or is called by.

The file also tells whether the installed vLLM still has them as they were read.

The sources are read, not imported: importing a model of vLLM takes seconds and may initialise a
device, the doctor must not do that, and a plug-in runs in the process that must not.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, NamedTuple

from moe_routing.integrations.vllm._bodies import ROUTERS, find, folder, known, parse, unknown

if TYPE_CHECKING:
    from pathlib import Path

VARIABLE = "MOE_ROUTING_VLLM"
"""Switches the plug-in on."""
PLUGIN = "moe-routing"
"""Name of the entry point, which ``VLLM_PLUGINS`` takes."""


class PatchPoint(NamedTuple):
    """A function of vLLM.

    It has a file inside the package, a qualified name, and parameters, given without their types.
    """

    file: str
    name: str
    parameters: str


PATCH_POINTS = (
    PatchPoint(
        f"{ROUTERS}/router_factory.py",
        "create_fused_moe_router",
        "(top_k, global_num_experts, renormalize=True, use_grouped_topk=False, "
        "num_expert_group=None, topk_group=None, scoring_func='softmax', "
        "num_fused_shared_experts=0, shared_expert_weight=1.0, routed_scaling_factor=1.0, "
        "e_score_correction_bias=None, custom_routing_function=None, eplb_state=None, "
        "zero_expert_type=None, num_logical_experts=None, hash_indices_table=None, bias_vl=None, "
        "image_sentinel_lo=0, skip_padding=False)",
    ),
    PatchPoint(
        f"{ROUTERS}/base_router.py",
        "BaseRouter._compute_routing",
        "(self, hidden_states, router_logits, indices_type, *, input_ids=None)",
    ),
    PatchPoint(f"{ROUTERS}/fused_topk_router.py", "_get_padding_mask", "(num_tokens)"),
    PatchPoint("_aiter_ops.py", "rocm_aiter_ops.is_fused_moe_enabled", "(cls)"),
)
"""Equal in every release that was read.

The code of the routers, parameters included, is in ``known.json``.
"""


class Found(NamedTuple):
    """The vLLM that is installed.

    :ivar version: its version.
    :ivar problems: in a sentence each, why nothing of it is replaced.
    :ivar unknown: in a sentence each, which routers keep their own code because it was not read.
    """

    version: str
    problems: tuple[str, ...]
    unknown: tuple[str, ...]


def look() -> Found | None:
    """Compare the installed vLLM with what was recorded; ``None`` where there is none.

    Imports nothing of it.
    """
    root = folder()
    if root is None:
        return None
    version = _version(root / "_version.py")
    problems = []
    if ".".join(version.split(".")[:2]) not in known().versions:
        problems.append(
            f"its version is {version}, and only {' and '.join(known().versions)} were read"
        )
    for point in PATCH_POINTS:
        function = next(find(parse(root / point.file), point.name), None)
        if function is None:
            problems.append(f"{point.file} has no {point.name}")
        elif (parameters := _parameters(function)) != point.parameters:
            problems.append(f"{point.name} takes {parameters}, not {point.parameters}")
    return Found(version, tuple(problems), unknown(root))


def _version(file: Path) -> str:
    for node in parse(file):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if "__version__" in names:
                return str(node.value.value)
    return "unknown"


def _parameters(function: ast.FunctionDef) -> str:
    r"""Write the parameters as ``inspect.signature`` would, without types.

    >>> _parameters(ast.parse("def f(a: int, *, b: str = 'x') -> int: ...").body[0])
    "(a, *, b='x')"
    """
    arguments = function.args
    every = [
        *arguments.posonlyargs,
        *arguments.args,
        arguments.vararg,
        *arguments.kwonlyargs,
        arguments.kwarg,
    ]
    for argument in every:
        if argument is not None:
            argument.annotation = None
    return f"({ast.unparse(arguments)})"
