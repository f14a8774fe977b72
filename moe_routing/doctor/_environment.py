"""The environment variables in force, and the values among them that are wrong."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_routing.integrations.vllm.patch_points import VARIABLE as VLLM_VARIABLE
from moe_routing_registry import UnknownNameError
from moe_routing_registry.device import INTERPRETER
from moe_routing_registry.request import (
    BACKEND_VARIABLE,
    BLOCK_VARIABLE,
    STRICT_VARIABLE,
    VERIFY_VARIABLE,
    flag,
    verify_rate,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

PREFIX = "MOE_ROUTING_"
VARIABLES = {
    BACKEND_VARIABLE: "the backend to use, or an error",
    BLOCK_VARIABLE: "backends that must not be used, separated by commas",
    STRICT_VARIABLE: "1: a choice below the device's best is an error",
    VERIFY_VARIABLE: "sample:0.01: one call in a hundred is compared with the oracle",
    VLLM_VARIABLE: "1: vLLM routes through moe_routing",
}
HIDING = {
    "CUDA_VISIBLE_DEVICES": "the NVIDIA and AMD devices that torch may see",
    "HIP_VISIBLE_DEVICES": "the AMD devices that torch may see",
    "ROCR_VISIBLE_DEVICES": "the AMD devices that ROCm may see",
    "ZE_AFFINITY_MASK": "the Intel devices that torch may see",
    "ONEAPI_DEVICE_SELECTOR": "the Intel devices that SYCL may see",
}
"""Variables of others that decide which devices torch sees."""
OTHER_VARIABLES = HIDING | {
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0: torch imports no third-party device backends",
    INTERPRETER: (
        "1: triton interprets kernels on the CPU, for those who name its backends, "
        "and compiles none"
    ),
}
"""Variables of others that change what is found here."""


class Variable(NamedTuple):
    """A variable that is set; ``problem`` says what is wrong with it, ``""`` where nothing is."""

    name: str
    value: str
    meaning: str
    problem: str


def variables(backends: Collection[str]) -> list[Variable]:
    """List the variables that are set, ours first, and judge the values of ours.

    :param backends: the names that exist.
    """
    ours = sorted((name, value) for name, value in os.environ.items() if name.startswith(PREFIX))
    return [
        *(
            Variable(name, value, VARIABLES.get(name, "unknown"), _judge(name, value, backends))
            for name, value in ours
        ),
        *(
            Variable(name, os.environ[name], meaning, "")
            for name, meaning in OTHER_VARIABLES.items()
            if name in os.environ
        ),
    ]


def _judge(name: str, value: str, backends: Collection[str]) -> str:
    kind, meant = f"backend in {name}", [part.strip() for part in value.split(",") if part.strip()]
    if name not in VARIABLES:
        return str(UnknownNameError("variable", name, VARIABLES))
    if name in (STRICT_VARIABLE, VLLM_VARIABLE):
        return _refusal(flag, name)
    if name == VERIFY_VARIABLE:
        return _refusal(verify_rate, None)
    if name == BACKEND_VARIABLE:
        meant = [value.strip()] if value.strip() else []
    return "; ".join(
        str(UnknownNameError(kind, part, backends)) for part in meant if part not in backends
    )


def _refusal(read: Callable[[Any], object], argument: str | None) -> str:
    """Return what a reader says against the value, ``""`` where it takes it."""
    try:
        read(argument)
    except ValueError as error:
        return str(error)
    return ""
