"""Tune ``plan`` in Triton's interpreter by a clock of this script; print JSON.

The argument says what a kernel does wrong (``places``, ``raises`` or ``in-use``), or that three
launches are faster for many tokens (``changes``), or that the layout is ``blocks``.

A process of its own, because ``TRITON_INTERPRET=1`` must be set before the kernels are imported.
"""

import itertools
import json
import re
import sys

from interpreter import interpret

interpret()

import torch  # noqa: E402 -- after Triton interprets

from moe_routing.planning import PlanProblem  # noqa: E402 -- likewise
from moe_routing_backends.triton.kernels.spec import Launch  # noqa: E402 -- likewise
from moe_routing_backends.triton.planning import planner  # noqa: E402 -- likewise
from moe_routing_backends.triton.planning.tune import candidates, tune  # noqa: E402 -- likewise
from moe_routing_backends.triton.tuning import choose, store, table  # noqa: E402 -- likewise
from moe_routing_registry import DeviceInfo  # noqa: E402 -- likewise

CPU = DeviceInfo(type="cpu", platform="cpu", name="the interpreter")
E, K = 16, 2


class Altered:
    """A kernel that raises, or changes the first place of the order that it wrote."""

    def __init__(self, kernel, *, raises):
        self.kernel, self.raises = kernel, raises

    def __getitem__(self, grid):
        def run(*arguments, **options):
            if self.raises:
                msg = "out of registers"
                raise RuntimeError(msg)
            self.kernel[grid](*arguments, **options)
            arguments[self.kernel.arg_names.index("order")][0] += 1

        return run


def alter(name, *, raises=False):
    setattr(planner, name, Altered(getattr(planner, name), raises=raises))


def three_are_faster_from_24_on(said):
    """Return a clock by which three launches take 33 us, one launch 10 us and one a token."""

    def clock(_work, _device):
        tokens, launches = re.match(r"T = (\d+): (\d) launch", said[-1][0]).groups()
        return {"1": 10 + int(tokens), "3": 33}.get(launches, 1000)

    return clock


def later_is_faster(_said):
    """Return a clock by which whatever is measured later is faster."""
    seconds = itertools.count(1)

    def clock(work, _device):
        work()
        return 1e6 / next(seconds)

    return clock


def main():
    """Tune a problem; a rule of ``route`` stands in the table before."""
    torch.set_num_threads(1)
    how, said = sys.argv[1], []
    clock, tokens = later_is_faster(said), (3, 20)
    if how == "changes":
        clock, tokens = three_are_faster_from_24_on(said), (1, 40)
    elif how != "blocks":
        name = "moe_routing_plan" if how == "in-use" else "moe_routing_plan_place"
        alter(name, raises=how == "raises")
    layout = {"layout": "blocks", "block": 4} if how == "blocks" else {}
    problem = PlanProblem(num_experts=E, topk=K, **layout)
    route = {("logits", 16, 64, 8): (table.Step(float("inf"), Launch("cooperative", 1, 1, 1)),)}
    store.keep(CPU, route)
    error, tuned = "", None
    try:
        tuned = tune(
            problem, CPU, tokens=tokens, on_step=lambda *step: said.append(step), clock=clock
        )
    except RuntimeError as raised:
        error = str(raised)
    kept = choose.plan_table_for(CPU, problem)
    json.dump(
        {
            "error": error,
            "tuned": tuned and tuned.to_dict(),
            "kept": kept.steps(problem),
            "source": kept.source,
            "rule": [list(key) for key in kept.rules],
            "route_kept": store.own_table(CPU).rules == route,
            "candidates": candidates(problem),
            "steps_said": [said[0], said[-1], len(said)],
            "sizes": sorted(
                {int(what.split()[2].rstrip(":")) for what, _, _ in said if what.startswith("T = ")}
            ),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
