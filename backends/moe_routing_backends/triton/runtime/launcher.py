"""Compile a kernel by its first launch, and keep its cheapest launcher.

It is the cheapest that the installed Triton allows. ``kernel[grid](...)`` spends most of its time
on finding the compiled kernel that the arguments ask for. The launcher that is kept was made for
one compiled kernel, and hands over pointers and numbers alone
(``moe_routing.private_api.launcher_of``).
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.private_api import is_profiling, launcher_of
from moe_routing_backends.triton.runtime.xpu import launch_options
from moe_routing_registry.locks import ForkSafeLock

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing.private_api import Launcher
    from moe_routing_registry import Problem

ALIGNMENT = 16
"""Bytes of the widest load."""
NEVER_CURRENT = -2
"""The CPU's index, which no current device has, and no lack of one either (-1)."""
_interpreting = ForkSafeLock()
"""Held while a kernel is interpreted, one at a time.

Triton's interpreter patches its language for the time of a launch.
"""
READABLE = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})
"""Dtypes of vectors that Triton reads on every device.

It reads some of the 8-bit formats on some devices, and one on none.
"""


def as_readable(vector: Tensor | None) -> Tensor | None:
    """Return a vector in a dtype that kernels can read: itself, or its numbers in float32."""
    return vector if vector is None or vector.dtype in READABLE else vector.float()


def capturing() -> bool:
    """Tell whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Compiled:
    """The kernels that are compiled for one problem on one device, each with its cheapest launcher.

    :ivar launchers: by whatever of the arguments a kernel was compiled for.
    :ivar indirect: why launches take the slow way, or ``""``.
    """

    def __init__(
        self, problem: Problem, device: torch.device, advice: Callable[[tuple[Any, ...]], str]
    ) -> None:
        """Begin with nothing compiled.

        :param advice: says what to do before a CUDA graph is captured, given a launcher's key.
        """
        self.launchers: dict[tuple[Any, ...], Launcher] = {}
        self.indirect = ""
        self._made_for: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._problem = problem
        self._device = device
        self._advice = advice

    def launch_and_keep(  # noqa: PLR0913, PLR0917 -- what a launch is
        self,
        key: tuple[Any, ...],
        kernel: Any,  # noqa: ANN401 -- Triton's own object
        blocks: int,
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        num_warps: int,
        warp_size: int = 0,
        *,
        pdl: bool = False,
        registers: int | None = None,
    ) -> None:
        """Launch through Triton's JIT, compiling where needed, and keep the compiled kernel.

        :param key: says all that the kernel and its constants depend on.
        :param pdl: launch while the previous kernel still runs (``device/pdl.py``).
        :param registers: how many a thread may take, on CUDA. Without a number the assembler
            prefers so few that the most programs fit on a multiprocessor, and loads wait for them.
        :raises RuntimeError: the kernel is not compiled, and a CUDA graph is being captured.
        """
        made = kernel, constants, num_warps, warp_size, registers
        # Otherwise a later call by this key would get the wrong kernel. Where Triton interprets
        # kernels every launch comes here.
        if self._made_for.setdefault(key, made) != made:
            msg = f"two kernels of {self._problem} have one key, {key}"
            raise AssertionError(msg)
        if key not in self.launchers and capturing():
            msg = (
                f"moe-routing's Triton kernel for {self._problem} is not compiled yet, and nothing "
                f"compiles while a CUDA graph is captured: before the capture, {self._advice(key)}"
            )
            raise RuntimeError(msg)
        # The range names what the kernel's own name does not, the family or the operation, for a
        # profiler of PyTorch and for NVTX.
        name = f"moe_routing::{self._problem.family or self._problem.operation}"
        with torch.profiler.record_function(name) if is_profiling() else nullcontext():
            self._launch(
                key, kernel, blocks, arguments, constants, num_warps, warp_size, pdl=pdl,
                registers=registers,
            )  # fmt: skip

    def _launch(  # noqa: PLR0913, PLR0917 -- what a launch is
        self,
        key: tuple[Any, ...],
        kernel: Any,  # noqa: ANN401 -- Triton's own object
        blocks: int,
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        num_warps: int,
        warp_size: int,
        *,
        pdl: bool,
        registers: int | None,
    ) -> None:
        if self._device.type == "cpu":
            self._interpret(kernel, blocks, (*arguments, *constants), num_warps)
            return
        if self._device.type == "xpu":
            # Always by the JIT: nothing else of Triton-XPU could be tried.
            with torch.xpu.device(self._device):
                options = launch_options(num_warps, warp_size)
                kernel[blocks,](*arguments, *constants, enable_fp_fusion=False, **options)
            return
        with torch.cuda.device(self._device):
            options = {
                "num_warps": num_warps,
                "enable_fp_fusion": False,
                **({"launch_pdl": True} if pdl else {}),
                **({"maxnreg": registers} if registers else {}),
            }
            compiled = kernel[blocks,](*arguments, *constants, **options)
            self.launchers[key], self.indirect = launcher_of(compiled, constants)
        if self.indirect and torch.version.hip is None:  # on ROCm there is no other way
            _say_once(self.indirect)

    @staticmethod
    def _interpret(kernel: Any, blocks: int, arguments: tuple[Any, ...], num_warps: int) -> None:  # noqa: ANN401 -- likewise
        """Run a kernel in Triton's interpreter, which computes with NumPy."""
        import numpy as np

        # NumPy warns where a GPU's arithmetic is silent: of infinities that the kernels mean.
        with _interpreting, np.errstate(all="ignore"):
            kernel[blocks,](*arguments, num_warps=num_warps)


@cache
def _say_once(reason: str) -> None:
    text = (
        "moe-routing launches through Triton's own launcher, "
        f"which takes the host some 2 us longer: {reason}"
    )
    warnings.warn(text, RuntimeWarning, stacklevel=2)
