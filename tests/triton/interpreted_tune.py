"""Tune in Triton's interpreter by a clock of this script.

A variant is wrong, raises or is faster for many tokens; print JSON.

A process of its own, because Triton must interpret before the kernels are imported: ``interpreted``
has it do so.
"""

import dataclasses
import itertools
import json
import re
import sys

import torch
from interpreted import SPECS

from moe_routing_backends.triton.kernels import OF_LAUNCHES
from moe_routing_backends.triton.kernels.spec import Launch
from moe_routing_backends.triton.tuning import choose
from moe_routing_backends.triton.tuning.tune import candidates, tune
from moe_routing_registry import DeviceInfo, RoutingProblem

CPU = DeviceInfo(type="cpu", platform="cpu", name="the interpreter")


class Altered:
    """A kernel that a test alters.

    It raises, or writes a weight that is off by one part in a million.
    """

    def __init__(self, kernel, *, raises):
        self.kernel, self.raises = kernel, raises
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        def run(logits, weights, *rest, **options):
            if self.raises:
                msg = "out of registers"
                raise RuntimeError(msg)
            self.kernel[grid](logits, weights, *rest, **options)
            weights[-1, 0] *= 1 + 1e-6

        return run


def faster_from_24_on(said):
    """Return a clock by which rows take 33 us, lanes 10 us and one a token, and all else long."""

    def clock(_work, _device):
        tokens, variant = re.match(r"T = (\d+): (\w+),", said[-1][0]).groups()
        return {"cooperative": 10 + int(tokens), "thread_per_row": 33}.get(variant, 1000)

    return clock


def later_is_faster(_said):
    """Return a clock by which whatever is measured later is faster."""
    seconds = itertools.count(1)

    def clock(work, _device):
        work()
        return 1e6 / next(seconds)

    return clock


def main():
    """Tune a problem whose rows variant has a fault, or is faster from 24 tokens on.

    The argument says which; the faults are a wrong result and an exception.
    """
    torch.set_num_threads(1)
    how, said = sys.argv[1], []
    if how == "changes":
        clock, tokens = faster_from_24_on(said), (1, 40)
    else:
        right = OF_LAUNCHES["thread_per_row"]
        OF_LAUNCHES["thread_per_row"] = right._replace(
            kernel=Altered(right.kernel, raises=how == "raises")
        )
        clock, tokens = later_is_faster(said), (3, 1)
    problem = RoutingProblem(spec=SPECS["gemma4"], num_experts=16, topk=2, dtype="float32")
    offered = candidates(problem, CPU)
    tuned = tune(problem, CPU, tokens=tokens, on_step=lambda *step: said.append(step), clock=clock)
    kept = choose.table_for(CPU, problem)
    json.dump(
        {
            "offered": sorted({c.variant for c in offered}),
            "tuned": tuned.to_dict(),
            "kept": [dataclasses.asdict(step.launch) for step in kept.steps(problem)],
            "last_right": dataclasses.asdict(
                [c for c in offered if c.variant != "thread_per_row"][-1]
            ),
            "source": kept.source,
            "sizes": sorted(
                {int(what.split()[2].rstrip(":")) for what, _, _ in said if what.startswith("T = ")}
            ),
            "steps_said": [said[0], said[-1], len(said)],
            "of_all": len(offered),
            "of_rows": sum(
                isinstance(c, Launch) and c.variant == "thread_per_row" for c in offered
            ),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
