"""Time and memory of transformers' load balancing loss, by its own function and by ours, on a CPU.

``python benchmarks/transformers_loss.py`` prints a line for each number of threads. Each process
measures one function, so that its peak of memory is its own: once for the times, and once with
glibc's allocator told to give freed tensors back at once, so that they do not count. Gradients of
logits are dropped when they are made, as a model's backward does. CPU seconds of all threads are
printed next to the wall time, for machines that others use too.
"""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
import sys
import time

LAYERS, T, E, K = 48, 16_384, 128, 8
RUNS = 3
OURS, THEIRS = "ours", "transformers"
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""What glibc reads: larger blocks than this are the system's own again when they are freed."""


def peak() -> float:
    """Return the most memory that this process had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(which: str, threads: str, dtype: str) -> None:
    """Print for each run the wall and CPU time of both ways, and two peaks of memory."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    from moe_routing.integrations.transformers._balance import load_balancing_loss

    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    logits = tuple(
        torch.randn(T, E).to(getattr(torch, dtype)).requires_grad_() for _ in range(LAYERS)
    )
    for layer in logits:
        layer.register_post_accumulate_grad_hook(lambda layer: setattr(layer, "grad", None))
    loss = {OURS: load_balancing_loss, THEIRS: load_balancing_loss_func}[which]
    loss((logits[0],), E, K).backward()  # loads code, and leaves a peak of one layer
    before = peak()
    for _ in range(RUNS):
        moments = [(time.perf_counter(), time.process_time())]
        value = loss(logits, E, K)
        moments.append((time.perf_counter(), time.process_time()))
        forward = peak() - before
        value.backward()
        moments.append((time.perf_counter(), time.process_time()))
        spans = [
            end - start
            for first, second in itertools.pairwise(moments)
            for start, end in zip(first, second, strict=True)
        ]
        print(*spans, forward, peak() - before)


def measured(
    which: str, threads: int, dtype: str, environment: dict[str, str]
) -> list[list[float]]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, which, str(threads), dtype]
    done = subprocess.run(  # noqa: S603 -- this file
        command, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return [[float(x) for x in line.split()] for line in done.stdout.splitlines()]


def main() -> None:
    """Print a line for each function, dtype and number of threads."""
    print(f"{LAYERS} layers, {T} tokens, {E} experts, top {K}; best of {RUNS}")
    for dtype in ("float32", "bfloat16"):
        for threads in (1, 2):
            for which in (THEIRS, OURS):
                runs = measured(which, threads, dtype, {})
                first = measured(which, threads, dtype, GIVES_BACK)[0]
                best = [min(column) for column in zip(*runs, strict=True)]
                print(
                    f"{dtype}, {threads} threads, {which}: forward {best[0]:.2f} s "
                    f"({best[1]:.2f} of CPU), backward {best[2]:.2f} s ({best[3]:.2f}), "
                    f"{first[4]:.0f} MiB after forward, {first[5]:.0f} MiB at most",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:]:
        measure(*sys.argv[1:])
    else:
        main()
