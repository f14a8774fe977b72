"""Compare one call's outputs with the reference.

Ids must be as exact as float32 can tell, and weights within the contract's bounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from fuzz import reference

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    from moe_routing_registry import RoutingSpec


class Verdict(NamedTuple):
    """What is wrong.

    :ivar problems: a sentence each; the first row that shows it is named.
    :ivar row: a row that shows the first problem, if a single row does.
    :ivar near_ties: rows in which another order than the exact one was accepted.
    """

    problems: list[str]
    row: int | None = None
    near_ties: int = 0


class _Rows(NamedTuple):
    """Rows of an output, and where in it they stand."""

    ids: Tensor
    weights: Tensor
    places: Tensor

    def columns(self, which: slice) -> _Rows:
        return _Rows(self.ids[:, which], self.weights[:, which], self.places)


def judge(
    spec: RoutingSpec,
    topk: int,
    operands: dict[str, Tensor],
    valid: int | None,
    out: tuple[Tensor, Tensor],
) -> Verdict:
    """Judge outputs of a call without ``expert_map``, each thing after those that it depends on."""
    weights, ids = out[0].double(), out[1].long()
    tokens, experts = operands["logits"].shape
    padding = reference.is_padding(tokens, experts, valid, operands)
    everywhere = _Rows(ids, weights, torch.arange(tokens))
    wrong = padding & ((ids != -1).any(1) | (weights != 0).any(1))
    if found := _first("padding is not blank", wrong, everywhere):
        return found
    places = (~padding).nonzero().flatten()
    rows = _Rows(ids[places], weights[places], places)
    l = reference.widened(operands["logits"])[places]
    routed, shared = rows.columns(slice(topk)), rows.columns(slice(topk, None))
    recorded = reference.is_recorded(operands)[places]
    least = torch.where(recorded, -1, 0)[:, None]
    if found := _first(
        "ids out of range", ((routed.ids < least) | (routed.ids >= experts)).any(1), routed
    ):
        return found
    wrong = (shared.ids != torch.arange(experts, experts + spec.shared_experts)).any(1) | (
        shared.weights != float(torch.tensor(spec.shared_weight, dtype=torch.float32))
    ).any(1)
    if found := _first("wrong shared slots", wrong, shared):
        return found
    wanted, near_ties = torch.empty_like(routed.ids), 0
    if recorded.any():
        wanted[recorded] = operands["ids"][places].long()[recorded]
    wrong, usual = (routed.ids != wanted).any(1), ~recorded
    if "token_ids" in operands:
        token_ids, table = operands["token_ids"][places].long(), operands["expert_table"]
        wanted[usual] = table[token_ids[usual]].long()
        wrong = (routed.ids != wanted).any(1)
    else:
        wrong[usual], near_ties, wanted[usual] = _selected(
            spec, l[usual], operands.get("bias"), routed.ids[usual]
        )
    if found := _first("wrong ids", wrong, routed, wanted):
        return found
    exact, off, anything = reference.weights_at(
        spec, l, routed.ids, operands.get("per_expert_scale")
    )
    infinite = ~exact.isfinite() & (
        (routed.weights == exact) | (routed.weights.isnan() & exact.isnan())
    )
    near = exact.isfinite() & ((routed.weights - exact).abs() <= off)
    if found := _first("wrong weights", ~(near | infinite | anything).all(1), routed, exact):
        return found
    return Verdict([], near_ties=near_ties)


def _first(what: str, wrong: Tensor, rows: _Rows, expected: Tensor | None = None) -> Verdict | None:
    if not wrong.any():
        return None
    at = int(wrong.nonzero()[0])
    row = int(rows.places[at])
    said = f"{what} in {int(wrong.sum())} of {len(wrong)} rows, first in row {row}: "
    said += f"ids {_shown(rows.ids[at])}, weights {_shown(rows.weights[at])}"
    return Verdict([said + ("" if expected is None else f"; expected {_shown(expected[at])}")], row)


def _shown(numbers: Tensor) -> str:
    return (
        "["
        + ", ".join(f"{n:.9g}" for n in numbers[:12].tolist())
        + (", ..." if len(numbers) > 12 else "")
        + "]"
    )


def _selected(
    spec: RoutingSpec, l: Tensor, bias: Tensor | None, ids: Tensor
) -> tuple[Tensor, int, Tensor]:
    """Return which rows have wrong ids, the number of near ties, and the exact ids.

    A near tie is a row whose ids are right and not the exact ones.
    """
    by, off = reference.selected_on(spec, l, bias)
    judged, judged_off = reference.judged(spec, l, reference.Selected(by, off))
    wanted = reference.select(spec, by, ids.shape[1], judged)
    wrong = (ids != wanted).any(1)
    near_ties = 0
    if bias is not None or (spec.grouped and spec.group_sum > 1):
        added = (
            torch.zeros(l.shape[1])
            if bias is None
            else reference.as_double(bias).nan_to_num(-torch.inf, torch.inf, -torch.inf)
        )
        for row in wrong.nonzero().flatten().tolist():
            keys = list(zip(l[row].tolist(), added.tolist(), strict=True))
            groups = kept_groups(spec, judged[row], judged_off[row])
            if possible(spec, by[row], off[row], keys, ids[row].tolist(), groups):
                wrong[row] = False
                near_ties += 1
    return wrong, near_ties, wanted


def possible(  # noqa: PLR0913, PLR0917 -- what is known of the scores, and of the groups
    spec: RoutingSpec,
    by: Tensor,
    off: Tensor,
    keys: list[tuple[float, ...]],
    ids: list[int],
    kept: tuple[Collection[int], Collection[int]],
) -> bool:
    """Whether scores within their bounds exist for which these ids, in this order, are right.

    The function checks necessary conditions of it.

    :param keys: experts with equal keys have equal scores in any arithmetic.
    :param kept: the groups that are kept for certain, and those that cannot be.
    """
    if len(set(ids)) < len(ids):
        return False
    low, high = (by - off).tolist(), (by + off).tolist()
    groups = spec.num_groups
    size = len(low) // groups
    certain, ruled_out = kept
    if any(i // size in ruled_out for i in ids):
        return False
    highest = torch.inf  # that the next may have
    for i in ids:
        highest = min(highest, high[i])
        if highest < low[i]:
            return False
    # Of each set of experts that compete for places: the highest value that the last chosen may
    # have.
    last = {}
    running = torch.inf
    counts = dict.fromkeys(range(groups), 0)
    for i in ids:
        running = min(running, high[i])
        last[i // size if spec.topk_per_group else 0] = running
        counts[i // size] += 1
    if spec.topk_per_group and len(set(counts.values())) > 1:
        return False
    chosen = set(ids)
    for u in range(len(low)):
        if (
            u not in chosen
            and u // size in certain
            and low[u] > last[u // size if spec.topk_per_group else 0]
        ):
            return False
    return _ties_by_id(keys, ids, size if groups > 1 else len(low))


def kept_groups(
    spec: RoutingSpec, by: Tensor, off: Tensor
) -> tuple[Collection[int], Collection[int]]:
    """Return the groups that are kept for certain, and those that cannot be.

    :param by: what groups are judged by.
    """
    if not spec.grouped:
        return range(spec.num_groups), ()
    if spec.group_sum > 1:
        magnitude = by.abs().unflatten(-1, (spec.num_groups, -1)).amax(-1, keepdim=True)
        rounded = spec.group_sum * magnitude * reference.SUM
        off = off + rounded.expand(-1, len(by) // spec.num_groups).flatten()
    low, high = (reference.group_scores(spec, by + o).tolist() for o in (-off, off))
    certain, ruled_out = set(), set()
    for g in range(spec.num_groups):
        others = [h for h in range(spec.num_groups) if h != g]
        # Bounds that meet leave only a tie, as of two sums that are clamped for certain: the lower
        # group wins it.
        if sum((high[h], g) > (low[g], h) for h in others) < spec.topk_groups:
            certain.add(g)
        if sum((low[h], g) > (high[g], h) for h in others) >= spec.topk_groups:
            ruled_out.add(g)
    return certain, ruled_out


def _ties_by_id(keys: list[tuple[float, ...]], ids: list[int], size: int) -> bool:
    """Whether equal keys are chosen by ascending id.

    No expert is chosen before a lower one of its group.
    """
    chosen: dict[tuple[float, ...], int] = {}
    for i in ids:
        if chosen.setdefault(keys[i], i) > i:
            return False
        chosen[keys[i]] = i
    places, lower = set(ids), set()
    for i, key in enumerate(keys):
        if i not in places:
            lower.add((i // size, key))
        elif (i // size, key) in lower:
            return False
    return True
