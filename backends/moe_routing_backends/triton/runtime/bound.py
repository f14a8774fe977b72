"""``Bound``: a problem bound to a device, whose kernels are launched with tensors and numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from triton import JITFunction

from moe_routing.private_api import current_device, current_stream, is_observed
from moe_routing_backends.triton.device.pdl import grid_dependency_wait
from moe_routing_backends.triton.runtime.launcher import NEVER_CURRENT, Compiled
from moe_routing_backends.triton.runtime.xpu import SUB_GROUP
from moe_routing_backends.triton.tuning.choose import supports_pdl
from moe_routing_registry.device import INTERPRETER

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing_registry import DeviceInfo, Problem

MOST_PROGRAMS = 2**31 - 1
SHOWN = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64})
"""Dtypes that kernels compute with. Tensors of others are bytes to Triton, which lacks some."""


def check_interpreter(device: DeviceInfo) -> None:
    """Require kernels that were imported for the device: interpreted on the CPU, else compiled."""
    if (device.type == "cpu") == isinstance(grid_dependency_wait, JITFunction):
        msg = (
            f"{INTERPRETER} was changed after Triton's kernels were imported: "
            "set or unset it before Python starts"
        )
        raise RuntimeError(msg)


class Bound:
    """The device, and launching."""

    def __init__(self, problem: Problem, device: DeviceInfo) -> None:
        """Compile nothing yet."""
        self._index = NEVER_CURRENT if device.type == "cpu" else device.index or 0
        self._warp = SUB_GROUP if device.platform == "xpu" else max(device.warp_sizes, default=32)
        self._pdl = supports_pdl(device)
        where = "cpu" if device.type == "cpu" else f"{device.type}:{self._index}"
        self._compiled = Compiled(problem, torch.device(where), self._advice)
        self._ready = self._compiled.launchers

    @property
    def notes(self) -> tuple[str, ...]:
        """Say whether launches take the slow way, which only a launch can tell."""
        why = self._compiled.indirect
        return (f"launches through Triton's own launcher: {why}",) if why else ()

    def _launch(  # noqa: PLR0913, PLR0917 -- what a launch is
        self,
        kernel: Any,  # noqa: ANN401 -- Triton's own object
        programs: int,
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[int, ...],
        constants: tuple[Any, ...],
        threads: int,
        dtypes: tuple[torch.dtype | None, ...] = (),
    ) -> None:
        """Launch a kernel, which takes tensors, numbers, constants and ``PDL`` in this order.

        :param dtypes: of the tensors, as far as neither the problem nor the constants fix them.
        """
        key = (kernel.fn, constants, *dtypes)
        launcher = self._ready.get(key)
        if launcher is None or current_device() != self._index or is_observed():
            # Only Triton's own launch calls its hooks.
            self._compiled.launch_and_keep(
                key, kernel, programs, (*map(_handed, tensors), *numbers), (*constants, self._pdl),
                max(1, threads // self._warp), SUB_GROUP, pdl=self._pdl,
            )  # fmt: skip
            return
        at = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        launcher(programs, current_stream(self._index), (*at, *numbers))

    def _advice(self, _key: tuple[Any, ...]) -> str:
        return "call it once with tensors of the same kind"


def _handed(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor that Triton is shown, on the same memory."""
    return tensor if tensor is None or tensor.dtype in SHOWN else tensor.view(torch.uint8)
