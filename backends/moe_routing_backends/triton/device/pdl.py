"""Starting while the previous kernel still runs.

NVIDIA's programmatic dependent launch, from compute capability 9.0 on.

A kernel that is launched so may have its programs placed, and wait, before the previous one has
ended; and one that says so lets the next of its kind be placed before it has ended itself. Neither
changes what a kernel reads or writes: everything that touches memory comes after the wait, which
ends when all previous kernels have ended. There are two exceptions.

The last kernel of a plan and the second one of ``gate`` read before their wait. What they read was
there before the first kernel of the call, whose programs let the next one start only after their
own wait.
"""

from __future__ import annotations

import triton
import triton.language as tl

try:
    from triton.language.extra import cuda
except ImportError:  # a build of Triton for other vendors alone
    cuda = None

# Looked up here, because Triton looks for all that stands in a kernel, also after a condition that
# is false; Triton-XPU 3.3 has neither.
gdc_wait = getattr(cuda, "gdc_wait", None)
gdc_launch_dependents = getattr(cuda, "gdc_launch_dependents", None)


@triton.jit
def grid_dependency_wait(PDL: tl.constexpr):
    """Wait until the previous kernels have ended, and what they wrote can be read."""
    if PDL:
        gdc_wait()


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Let the next kernel be placed as soon as all programs of this one are.

    Worth it where those are few and short.
    """
    if PDL:
        gdc_launch_dependents()
