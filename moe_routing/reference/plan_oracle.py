"""The dispatch plan by its definition: a walk over the pairs, in plain Python.

Slow, and independent of every backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.planning.kernel import DispatchPlan

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning.problem import PlanProblem


def plan(
    problem: PlanProblem, ids: Tensor, capacity: int | None = None, weights: Tensor | None = None
) -> DispatchPlan:
    """Return the one right plan of ids ``[T, K]``, on the CPU.

    >>> from moe_routing.planning.problem import PlanProblem
    >>> ids = torch.tensor([[1, 0], [1, 2]])
    >>> plan(PlanProblem(num_experts=3, topk=2, layout="blocks", block=2), ids).order.tolist()
    [1, 4, 0, 2, 3, 4, 4]
    """
    num_tokens, topk = ids.shape
    num_experts, pairs = problem.num_experts, num_tokens * topk
    of_expert: list[list[int]] = [[] for _ in range(num_experts)]
    left_over: list[int] = []
    for pair, expert in enumerate(ids.reshape(-1).tolist()):
        (of_expert[expert] if 0 <= expert < num_experts else left_over).append(pair)
    num_dropped = 0
    if problem.drop != "nothing":
        flat = None if weights is None else weights.reshape(-1).tolist()
        for expert, mine in enumerate(of_expert):
            by_rank = mine
            if problem.drop == "least_weight":
                assert flat is not None  # noqa: S101 -- for mypy: the problem needs weights
                by_rank = sorted(mine, key=lambda pair: -_number(flat[pair]))
            kept = set(by_rank[:capacity])
            left_over += [pair for pair in mine if pair not in kept]
            num_dropped += len(mine) - len(kept)
            of_expert[expert] = [pair for pair in mine if pair in kept]
    left_over.sort()
    order, offsets = _placed(problem, of_expert, left_over, pairs, capacity)
    inverse = [-1] * pairs
    for place, pair in enumerate(order):
        if pair < pairs:
            inverse[pair] = place
    block_experts = None
    if problem.layout == "blocks":
        of_block = [
            expert
            for expert in range(num_experts)
            for _ in range(offsets[expert], offsets[expert + 1], problem.block)
        ]
        num_blocks = -(-len(order) // problem.block)
        block_experts = _ints(of_block + [-1] * (num_blocks - len(of_block)))
    placed = _ints(order)
    return DispatchPlan(
        placed.view(num_experts, -1) if problem.layout == "masked" else placed,
        _ints(inverse).view(num_tokens, topk),
        _ints([len(mine) for mine in of_expert]),
        _ints(offsets),
        block_experts,
        None if problem.drop == "nothing" else _ints([num_dropped]),
    )


def _placed(
    problem: PlanProblem,
    of_expert: list[list[int]],
    left_over: list[int],
    pairs: int,
    capacity: int | None,
) -> tuple[list[int], list[int]]:
    """Return the pair at each place, and where each expert begins."""
    order: list[int] = []
    offsets = [0]
    for mine in of_expert:
        order += mine
        if problem.layout == "masked":
            assert capacity is not None  # noqa: S101 -- for mypy: the problem has one
            order += [pairs] * (capacity - len(mine))
        else:
            order += [pairs] * (-len(mine) % problem.block)
        offsets.append(len(order))
    if problem.layout == "sorted":
        order += left_over
    elif problem.layout == "blocks":
        # As many places as any ids of this number could need.
        most = pairs + min(pairs, problem.num_experts) * (problem.block - 1)
        order += [pairs] * (most - len(order))
    return order, offsets


def _number(weight: float) -> float:
    """Count NaN as -inf."""
    return float("-inf") if weight != weight else weight  # noqa: PLR0124 -- NaN alone differs from itself


def _ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
