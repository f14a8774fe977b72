"""Plan random ids by random launches in Triton's interpreter, against the oracle.

A process of its own, with ``TRITON_INTERPRET=1``. Argument: a seed.
"""

# ruff: noqa: S311 -- cases are no secrets

import random
import sys

import torch

import moe_routing
from moe_routing.planning import DispatchPlan, PlanProblem
from moe_routing.planning.call import shapes
from moe_routing.reference import plan_oracle
from moe_routing_backends.triton.planning.launches import PlanLaunch, PlanStep
from moe_routing_backends.triton.planning.planner import TritonPlanner

LAUNCHES = (
    PlanLaunch(1, 512, 1, tile=32),
    PlanLaunch(1, 16, 1, tile=32),
    PlanLaunch(1, 32, 4, tile=128),
    PlanLaunch(2, 16, 1, step=16),
    PlanLaunch(2, 32, 1, step=16, group=2),
    PlanLaunch(3, 64, 4, step=16),
    PlanLaunch(3, 16, 4, step=16, group=4),
)
UNTOUCHED = -77
CASES = 60


def drawn():
    """Return a problem, ids, a capacity and weights."""
    experts, topk = random.choice([1, 2, 3, 7, 16, 64, 128, 255]), random.randint(1, 9)
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


def main(seed):
    """Plan, and compare every part."""
    random.seed(seed)
    torch.manual_seed(seed)
    device = moe_routing.probe("cpu")
    for _ in range(CASES):
        problem, ids, capacity, weights = drawn()
        launch = random.choice(LAUNCHES)
        expected = plan_oracle.plan(problem, ids, capacity, weights)
        made = DispatchPlan(
            *(
                None if shape is None else torch.full(shape, UNTOUCHED, dtype=torch.int32)
                for shape in shapes(problem, len(ids), capacity)
            )
        )
        planner = TritonPlanner(problem, device, (PlanStep(None, launch),))
        planner(ids, made, capacity=capacity, weights=weights)
        for name, part, right in zip(DispatchPlan._fields, made, expected, strict=True):
            same = part is right is None or torch.equal(part, right)
            assert same, f"seed {seed}: {problem}, {launch}: {name} of {list(ids.shape)}"


if __name__ == "__main__":
    main(int(sys.argv[1]))
