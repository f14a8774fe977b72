"""Launching a compiled kernel with the least that the installed Triton allows.

``kernel[grid](...)`` spends most of its time on finding out which compiled kernel the arguments ask for. The launcher here
has been told: it hands pointers and numbers to the C function that Triton itself calls in the end. That function is no public
interface. Its shape is checked once for each kernel, and where it is not one of the two that are known (Triton 3.6, and 3.7
to 3.9) the kernel object's own ``run``, whose shape all of these versions share, is called instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Launcher = Callable[[int, int, tuple[Any, ...]], object]
    """``launcher(blocks, stream, arguments)``; the arguments are the kernel's own before its constants."""

NEEDED = ("launch", "launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")


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
