"""A formula that is compiled whole, for the operations that are called through Dynamo."""

from __future__ import annotations

import itertools
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.exc import TorchDynamoException

from moe_routing.python_warnings import not_raised
from moe_routing_registry.locks import ForkSafeLock

if TYPE_CHECKING:
    from moe_routing_registry import DeviceInfo, Problem

_counter = itertools.count()


class Graph:
    """A function of tensors: a graph for all sizes of 2 and more, and one for each size of 1."""

    def __init__(self, formula: FunctionType, problem: Problem) -> None:
        """Bind; the first call compiles."""
        self._problem = problem
        self._lock = ForkSafeLock()
        # Dynamo keeps its graphs by code object: each problem needs its own.
        name = f"{problem.operation}_{next(_counter)}"
        code: CodeType = formula.__code__.replace(co_name=name)
        own = FunctionType(code, formula.__globals__, name, None, formula.__closure__)
        self._compiled = torch.compile(own, fullgraph=True, dynamic=True)

    def __call__(self, *arguments: Any) -> Any:  # noqa: ANN401 -- the formula's own
        """Call it; ``RuntimeError`` says why it cannot be compiled."""
        with self._lock, torch.no_grad(), not_raised():
            try:
                return self._compiled(*arguments)
            except TorchDynamoException as error:
                cause = getattr(error, "inner_exception", error)
                said = f"{type(cause).__name__}: {cause}".strip().partition("\n")[0]
                msg = f"torch-compile cannot compile {self._problem}: {said}; use backend='eager'"
                raise RuntimeError(msg) from error


def located(device: DeviceInfo) -> torch.device:
    """Return the device as PyTorch names it."""
    if device.index is None:
        return torch.device(device.type)
    return torch.device(device.type, device.index)
