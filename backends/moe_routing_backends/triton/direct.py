"""Launching a compiled kernel with the least that the installed Triton allows.

``kernel[grid](...)`` spends most of its time on finding out which compiled kernel the arguments ask for. The launcher here
has been told: it hands pointers and numbers to the C function that Triton itself calls in the end. That function is no public
interface. Its shape is checked once for each kernel, and where it is not one of the two that are known (Triton 3.6, and 3.7
to 3.9) the kernel object's own ``run``, whose shape all of these versions share, is called instead.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from moe_routing_backends.triton.xpu import launch_options
from moe_routing_registry.locks import ForkSafeLock

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing_registry import RoutingProblem

    Launcher = Callable[[int, int, tuple[Any, ...]], object]
    """``launcher(blocks, stream, arguments)``; the arguments are the kernel's own before its constants."""

NEEDED = ("launch", "launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")

ALIGNMENT = 16
"""Bytes of the widest load."""
NEVER_CURRENT = -2
"""The CPU's index, which no current device has, and no lack of one either (-1)."""
_interpreting = ForkSafeLock()
"""Triton's interpreter patches its language for the time of a launch, so one kernel is interpreted at a time."""
READABLE = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})
"""Dtypes of vectors that Triton reads on every device; some of the 8-bit formats it knows on some, and one on none."""

if torch.cuda.is_available():
    # What torch.cuda.current_device and Inductor's generated code call; the public ways take ten times as long.
    current_device = torch._C._cuda_getDevice  # noqa: SLF001 -- likewise
    current_stream = torch._C._cuda_getCurrentRawStream  # noqa: SLF001 -- likewise
    empty = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]  # noqa: SLF001 -- likewise; no stub has it
else:  # without CUDA: no device is current, so nothing asks for its stream or its memory

    def current_device() -> int:
        """Return no device's index."""
        return -1

    def current_stream(device: int) -> int:
        """Say that there is none."""
        raise AssertionError(device)

    def empty(size: tuple[int, int], strides: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Say that there is none."""
        raise AssertionError(size, strides, dtype)


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

    def __init__(self, problem: RoutingProblem, device: torch.device) -> None:
        """Begin with nothing compiled."""
        self.launchers: dict[tuple[Any, ...], Launcher] = {}
        self.indirect = ""
        self._problem = problem
        self._device = device

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
        early: bool = False,
    ) -> None:
        """Launch through Triton's JIT, compiling where needed, and keep the compiled kernel.

        :param early: launch while the previous kernel still runs (``early.py``).
        :raises RuntimeError: the kernel is not compiled, and a CUDA graph is being captured.
        """
        if key not in self.launchers and capturing():
            problem, device = self._problem, self._device
            training = ", training=True" if key[0] == "backward" else ""
            msg = (
                f"moe-routing's Triton kernel for {problem} is not compiled yet, and nothing compiles while a CUDA graph is "
                f"captured: before the capture, call route.warmup({problem.num_experts}, {problem.topk}, "
                f"dtype=torch.{problem.dtype}, device='{device}'{training}), or route inputs of the same kind once"
            )
            raise RuntimeError(msg)
        if self._device.type == "cpu":
            self._interpret(kernel, blocks, (*arguments, *constants), num_warps)
            return
        if self._device.type == "xpu":  # always by the JIT: nothing else of Triton-XPU could be tried
            with torch.xpu.device(self._device):
                options = launch_options(num_warps, warp_size)
                kernel[blocks,](*arguments, *constants, enable_fp_fusion=False, **options)
            return
        with torch.cuda.device(self._device):
            options = {"num_warps": num_warps, "enable_fp_fusion": False, **({"launch_pdl": True} if early else {})}
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
    text = f"moe-routing launches through Triton's own launcher, which takes the host some 10 us longer: {reason}"
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def launcher_of(compiled: Any, constants: tuple[Any, ...]) -> tuple[Launcher, str]:  # noqa: ANN401 -- Triton's own object
    """Return the cheapest launcher for a compiled kernel, and why it is not the direct one (or ``""``)."""
    run = compiled.run
    function, metadata = compiled.function, compiled.packed_metadata
    reason = why_not_direct(run)
    if reason:
        hooks = (None, None, None)
        return (
            lambda blocks, stream, arguments: run(
                blocks, 1, 1, stream, function, metadata, *hooks, *arguments, *constants
            ),
            reason,
        )  # fmt: skip
    launch = run.launch
    head: tuple[Any, ...]
    if hasattr(run, "kernel_signature"):
        head = (function, run.launch_cooperative_grid, run.launch_pdl, metadata, None, None, None, None, None)
        head = (*head, run.arg_annotations, run.kernel_signature)
        return lambda blocks, stream, arguments: launch(blocks, 1, 1, stream, *head, arguments + constants), ""
    head = (function, run.launch_cooperative_grid, run.launch_pdl, None, None, metadata, None, None, None)
    return lambda blocks, stream, arguments: launch(blocks, 1, 1, stream, *head, *arguments, *constants), ""


def why_not_direct(run: Any) -> str:  # noqa: ANN401 -- Triton's own object
    """Say what is unusual about a kernel's launcher, or return ``""``."""
    if type(run).__name__ != "CudaLauncher":
        return f"{type(run).__name__} is not CUDA's launcher"
    missing = [name for name in NEEDED if not hasattr(run, name)]
    if missing:
        return f"Triton's CudaLauncher has no {', '.join(missing)}"
    if run.global_scratch_size or run.profile_scratch_size:
        return "the kernel asks for scratch memory"
    if hasattr(run, "arg_annotations") != hasattr(run, "kernel_signature"):
        return "Triton's CudaLauncher is of no known shape"
    if getattr(run, "gsan_enabled", False):
        return "Triton's sanitizer is on"
    return ""
