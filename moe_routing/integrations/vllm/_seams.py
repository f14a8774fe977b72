"""What of vLLM this integration stands on, as it was when it was read, and whether the installed vLLM still looks so.

The sources are read, not imported: importing a model of vLLM takes seconds and may initialise a device, the doctor must
not do that, and a plug-in runs in the process that must not.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import NamedTuple

VARIABLE = "MOE_ROUTING_VLLM"
"""Switches the plug-in on."""
PLUGIN = "moe-routing"
"""Name of the entry point, which ``VLLM_PLUGINS`` takes."""
VERSIONS = ("0.32", "0.33")
"""The releases whose sources were read."""
ROUTERS = "model_executor/layers/fused_moe/router"
_COMPUTE = "(self, hidden_states, router_logits, indices_type, *, input_ids=None)"


class Seam(NamedTuple):
    """A function of vLLM: its file inside the package, its qualified name, and its parameters without their types."""

    file: str
    name: str
    parameters: str


SEAMS = (
    Seam(
        f"{ROUTERS}/router_factory.py",
        "create_fused_moe_router",
        "(top_k, global_num_experts, renormalize=True, use_grouped_topk=False, num_expert_group=None, topk_group=None, "
        "scoring_func='softmax', num_fused_shared_experts=0, shared_expert_weight=1.0, routed_scaling_factor=1.0, "
        "e_score_correction_bias=None, custom_routing_function=None, eplb_state=None, zero_expert_type=None, "
        "num_logical_experts=None, hash_indices_table=None, bias_vl=None, image_sentinel_lo=0, skip_padding=False)",
    ),
    Seam(f"{ROUTERS}/base_router.py", "BaseRouter._compute_routing", _COMPUTE),
    Seam(f"{ROUTERS}/fused_topk_router.py", "FusedTopKRouter._compute_routing", _COMPUTE),
    Seam(
        f"{ROUTERS}/fused_topk_router.py",
        "FusedTopKRouter.__init__",
        "(self, top_k, global_num_experts, scoring_func='softmax', renormalize=True, eplb_state=None)",
    ),
    Seam(f"{ROUTERS}/fused_topk_router.py", "_get_padding_mask", "(num_tokens)"),
    Seam(f"{ROUTERS}/fused_topk_bias_router.py", "FusedTopKBiasRouter._compute_routing", _COMPUTE),
    Seam(
        f"{ROUTERS}/fused_topk_bias_router.py",
        "FusedTopKBiasRouter.__init__",
        "(self, top_k, global_num_experts, e_score_correction_bias=None, renormalize=True, routed_scaling_factor=1.0, "
        "eplb_state=None, *, scoring_func='sigmoid', hash_indices_table=None, num_fused_shared_experts=0, "
        "shared_expert_weight=1.0, bias_vl=None, image_sentinel_lo=0)",
    ),
    Seam(f"{ROUTERS}/grouped_topk_router.py", "GroupedTopKRouter._compute_routing", _COMPUTE),
    Seam(
        f"{ROUTERS}/grouped_topk_router.py",
        "GroupedTopKRouter.__init__",
        "(self, top_k, global_num_experts, num_expert_group, topk_group, renormalize=True, scoring_func='softmax', "
        "routed_scaling_factor=1.0, e_score_correction_bias=None, num_fused_shared_experts=0, eplb_state=None, "
        "skip_padding=False)",
    ),
    Seam(f"{ROUTERS}/cpu_router.py", "CPURouter._compute_routing", _COMPUTE),
    Seam(
        f"{ROUTERS}/cpu_router.py",
        "CPURouter.__init__",
        "(self, top_k, global_num_experts, use_grouped_topk=False, num_expert_group=None, topk_group=None, "
        "renormalize=True, scoring_func='softmax', routed_scaling_factor=1.0, e_score_correction_bias=None, "
        "custom_routing_function=None, hash_indices_table=None, eplb_state=None)",
    ),
    Seam(f"{ROUTERS}/custom_routing_router.py", "CustomRoutingRouter._compute_routing", _COMPUTE),
    Seam(
        f"{ROUTERS}/custom_routing_router.py",
        "CustomRoutingRouter.__init__",
        "(self, top_k, global_num_experts, custom_routing_function, eplb_state=None, renormalize=True)",
    ),
    Seam(
        "model_executor/models/gemma4.py",
        "Gemma4Router.routing_function",
        "(self, hidden_states, gating_output, topk, renormalize)",
    ),
    Seam("_aiter_ops.py", "rocm_aiter_ops.is_fused_moe_enabled", "(cls)"),
)
"""Equal in every release of ``VERSIONS``."""


class Found(NamedTuple):
    """The vLLM that is installed: its version, and in one sentence each what keeps it from being replaced."""

    version: str
    problems: tuple[str, ...]


def look() -> Found | None:
    """Compare the installed vLLM with what was recorded; ``None`` where there is none. Imports nothing of it."""
    package = importlib.util.find_spec("vllm")
    if package is None or package.origin is None:
        return None
    root = Path(package.origin).parent
    version = _version(root / "_version.py")
    problems = []
    if ".".join(version.split(".")[:2]) not in VERSIONS:
        problems.append(f"its version is {version}, and only {' and '.join(VERSIONS)} were read")
    trees = {file: _parse(root / file) for file in dict.fromkeys(seam.file for seam in SEAMS)}
    for seam in SEAMS:
        function = _find(trees[seam.file], seam.name)
        if function is None:
            problems.append(f"{seam.file} has no {seam.name}")
        elif (parameters := _parameters(function)) != seam.parameters:
            problems.append(f"{seam.name} takes {parameters}, not {seam.parameters}")
    return Found(version, tuple(problems))


def _version(file: Path) -> str:
    for node in _parse(file):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if "__version__" in names:
                return str(node.value.value)
    return "unknown"


def _parse(file: Path) -> list[ast.stmt]:
    try:
        return ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError):  # not there, or in a language that this Python does not know: nothing is found in it
        return []


def _find(body: list[ast.stmt], name: str) -> ast.FunctionDef | None:
    head, _, rest = name.partition(".")
    for node in body:
        if rest and isinstance(node, ast.ClassDef) and node.name == head:
            return _find(node.body, rest)
        if not rest and isinstance(node, ast.FunctionDef) and node.name == head:
            return node
    return None


def _parameters(function: ast.FunctionDef) -> str:
    r"""Write the parameters as ``inspect.signature`` would, without types.

    >>> _parameters(ast.parse("def f(a: int, *, b: str = 'x') -> int: ...").body[0])
    "(a, *, b='x')"
    """
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
    for argument in every:
        if argument is not None:
            argument.annotation = None
    return f"({ast.unparse(arguments)})"
