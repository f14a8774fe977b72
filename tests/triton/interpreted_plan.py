"""Plan ids by every kind of launch in Triton's interpreter, against the oracle.

A process of its own, with ``TRITON_INTERPRET=1``. Arguments: ``drawn``, a seed and how many cases,
for random ids; or ``far`` and a file to be made, for ids that are far apart in memory.
"""

# ruff: noqa: S311 -- cases are no secrets

import random
import sys
from itertools import cycle
from pathlib import Path

from interpreter import interpret

interpret()

import torch  # noqa: E402 -- after Triton interprets

import moe_routing  # noqa: E402 -- likewise
from moe_routing.planning import DispatchPlan, PlanProblem  # noqa: E402 -- likewise
from moe_routing.planning.call import shapes  # noqa: E402 -- likewise
from moe_routing.reference import plan_oracle  # noqa: E402 -- likewise
from moe_routing_backends.triton.planning.launches import PlanLaunch, PlanStep  # noqa: E402 -- likewise
from moe_routing_backends.triton.planning.planner import TritonPlanner  # noqa: E402 -- likewise

ONE = PlanLaunch(1, 16, 1, tile=32)
TWO = PlanLaunch(2, 32, 1, step=16, group=2)
THREE = PlanLaunch(3, 16, 4, step=16, group=4)
LAUNCHES = (
    ONE,
    PlanLaunch(1, 512, 1, tile=32),
    PlanLaunch(1, 32, 4, tile=128),
    TWO,
    PlanLaunch(2, 16, 1, step=16),
    THREE,
    PlanLaunch(3, 64, 4, step=16),
)
UNTOUCHED = -77


def case():
    """Return a problem, ids, a capacity and weights."""
    experts, topk = random.choice([1, 2, 3, 7, 16, 33, 64]), random.randint(1, 9)
    tokens = random.choice([1, 2, 3, 5, 17, 40])
    layout = random.choice(["sorted", "blocks", "masked"])
    drop = random.choice(["nothing", "last", "least_weight"][layout == "masked" :])
    dtype = random.choice(["int32", "int64"])
    problem = PlanProblem(
        num_experts=experts, topk=topk, ids_dtype=dtype, layout=layout, drop=drop,
        block=random.choice([1, 2, 3, 16, 100]) if layout == "blocks" else 1,
    )  # fmt: skip
    ids = torch.randint(-2, experts + 2, (tokens, topk), dtype=getattr(torch, dtype))
    if random.random() < 0.3:
        ids = ids.t().contiguous().t()
    capacity = None if drop == "nothing" else random.randint(1, 6)
    weights = torch.randint(-2, 3, (tokens, topk)).float() if drop == "least_weight" else None
    return problem, ids, capacity, weights


def check(about, problem, launch, ids, **given):
    """Plan, and compare every part."""
    expected = plan_oracle.plan(problem, ids, given.get("capacity"), given.get("weights"))
    made = DispatchPlan(
        *(
            None if shape is None else torch.full(shape, UNTOUCHED, dtype=torch.int32)
            for shape in shapes(problem, len(ids), given.get("capacity"))
        )
    )
    planner = TritonPlanner(problem, moe_routing.probe("cpu"), (PlanStep(None, launch),))
    planner(ids, made, **given)
    for name, part, right in zip(DispatchPlan._fields, made, expected, strict=True):
        same = part is right is None or torch.equal(part, right)
        assert same, f"{about}: {problem}, {launch}: {name} of {list(ids.shape)}"


def drawn(seed, cases):
    """Plan random ids, by each kind of launch in turn."""
    random.seed(int(seed))
    torch.manual_seed(int(seed))
    for _, launch in zip(range(int(cases)), cycle(LAUNCHES), strict=False):
        problem, ids, capacity, weights = case()
        check(f"seed {seed}", problem, launch, ids, capacity=capacity, weights=weights)


def far(path):
    """Plan ids whose places in memory int32 cannot count, though it can count their strides.

    They lie in a file with holes, of which nothing but the ids is ever on the disk.
    """
    problem = PlanProblem(num_experts=5, topk=3)
    for strides in ((1, 2**30 + 1), (2**30 + 1, 1), (2**31 - 1, 7), (11, 2**31 - 1)):
        for launch in ONE, TWO, THREE:
            Path(path).unlink(missing_ok=True)
            size = 1 + 3 * strides[0] + 2 * strides[1]
            storage = torch.from_file(path, shared=True, size=size, dtype=torch.int32)
            ids = storage.as_strided((4, problem.topk), strides)
            ids.copy_(torch.arange(12).view(4, 3) * 7 % 5)
            check(f"strides {strides}", problem, launch, ids)


if __name__ == "__main__":
    {"drawn": drawn, "far": far}[sys.argv[1]](*sys.argv[2:])
