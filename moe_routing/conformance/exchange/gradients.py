"""Clause 7: gradients through both exchanges."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch
from torch import distributed

from moe_routing.conformance.exchange import _sets, outcomes
from moe_routing.conformance.exchange._check import check
from moe_routing.conformance.requirements import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.exchange.cases import Case, World
    from moe_routing.conformance.under_test import BackendUnderTest


def _modes(profile: Profile) -> Iterator[Case]:
    for dtype in ("float32", "bfloat16"):
        for ids in ("experts", "strays"):
            yield from _sets.every_mode(profile, dtype=dtype, ids=ids)
    yield from _sets.every_mode(profile, dtype="float32", tokens="some_none")


@check(7, _modes, capability="gradients")
def gradients_flow_through_both_exchanges(under_test: BackendUnderTest, case: Case) -> None:
    """Gradients of tokens, weights and experts are those of one rank with all experts."""
    world = case.make(under_test.device)
    hidden, weights = (
        part.detach().clone().requires_grad_() for part in (world.mine.hidden, world.mine.weights)
    )
    factors = world.factors.to(world.device).requires_grad_()
    ep = world.parallel(under_test)
    with torch.inference_mode():  # what that call keeps must not get into autograd's way
        outcomes.exchanged(world, ep)
    rows, plan = ep.dispatch(hidden, world.mine.ids, weights)
    result = ep.combine(_computed(world, rows, plan.counts, factors))
    upstream = _upstream(world)
    require(result.requires_grad, "the result does not require gradients, but an operand does")
    made = torch.autograd.grad(result, (hidden, weights, factors), upstream[world.rank])
    of_hidden, of_weights, of_factors = (part.double().cpu() for part in made)
    # Each rank has the gradient of its own experts.
    total = of_factors.clone()
    distributed.all_reduce(total)
    right = _Exact(world, upstream)
    right.must_be_near("hidden", of_hidden, right.of_hidden)
    right.must_be_near("weights", of_weights, right.of_weights)
    right.must_be_near("the experts", total, right.of_factors)


def _computed(world: World, rows: Tensor, counts: Tensor, factors: Tensor) -> Tensor:
    """Compute this rank's experts as ``World.computed`` does, with gradients to their factors."""
    counts = counts[: len(world.experts)].long()
    experts = torch.tensor(world.experts, device=rows.device).repeat_interleave(counts)
    used = rows[: len(experts)] * factors[experts.long()][:, None]
    rest = used.detach().new_full((len(rows) - len(experts), used.shape[1]), torch.nan)
    return torch.cat((used, rest))


def _upstream(world: World) -> list[Tensor]:
    """Draw the gradient of each rank's results; one for all where they share the batch."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"upstream {world.case.id}".encode()))
    drawn = [
        torch.randn(one.hidden.shape, generator=generator).to(world.result_dtype)
        for one in world.drawn
    ]
    if world.case.shared:
        drawn = drawn[:1] * len(drawn)
    return [part.to(world.device) for part in drawn]


LEAST = 1e-30
"""An error that is none."""


class _Exact:
    """The gradients in float64, and between what they may lie.

    Each is a sum of products of up to four numbers. The sum of their magnitudes, times a unit of
    roundoff of the rows' dtype for each rounding on the way, bounds the error: a term is added at
    most as often as there are slots, columns, ranks and tokens.
    """

    def __init__(self, world: World, upstream: list[Tensor]) -> None:
        factors = world.factors.double().cpu()
        self._unit = torch.finfo(world.result_dtype).eps / 2
        tokens = sum(len(one.ids) for one in world.drawn)
        self._roundings = world.case.topk + world.case.columns + world.ranks + tokens
        total = torch.zeros(2, len(factors), dtype=torch.float64)
        drawn = world.drawn[:1] if world.case.shared else world.drawn
        for rank, (hidden, ids, weights, _) in enumerate(drawn):
            known = (ids >= 0) & (ids < len(factors))
            of = torch.where(known, factors[torch.where(known, ids, 0).long()], 0.0)  # [T, K]
            x, up = hidden.double(), upstream[rank].double().cpu()
            w = weights.double()
            with_abs = []
            for sign in (lambda t: t, torch.abs):
                dots = sign(x * up).sum(dim=1, keepdim=True)
                of_hidden = (sign(w) * of).sum(dim=1, keepdim=True) * sign(up)
                with_abs.append((of_hidden, dots * of))
                index = torch.where(known, ids, 0).long().flatten()
                per_slot = torch.where(known, sign(w) * dots, 0.0).flatten()
                total[len(with_abs) - 1].index_add_(0, index, per_slot)
            if rank == world.rank or world.case.shared:
                (exact_hidden, exact_weights), (abs_hidden, abs_weights) = with_abs
                self.of_hidden = (exact_hidden, abs_hidden)
                self.of_weights = (exact_weights, abs_weights)
        self.of_factors = (total[0], total[1])

    def must_be_near(self, name: str, made: Tensor, right: tuple[Tensor, Tensor]) -> None:
        """Hold a gradient against the exact one.

        :param right: the exact gradient, and the sum of its terms' magnitudes.
        """
        exact, magnitude = right
        bound = self._roundings * self._unit * magnitude + LEAST
        off = (made.detach() - exact).abs()
        wrong = ~(off <= bound)
        if wrong.any():
            most = float((off / bound).max())
            msg = (
                f"the gradient of {name}: {int(wrong.sum())} of {wrong.numel()} are wrong, "
                f"by up to {most:.1f} times what rounding explains"
            )
            raise AssertionError(msg)
