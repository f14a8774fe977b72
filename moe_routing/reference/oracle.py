"""The float64 oracle: what every backend is measured against, written for reading.

One implementation serves all families, because a family is data. It follows the numbered semantics
of ``docs/contract.md`` step by step, in plain torch float64 operations, with no thought of speed.
It is differentiable: autograd through ``route`` is the reference for gradients.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING

import torch

from moe_routing._registry import registry
from moe_routing.kernel import RoutingOutput

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing_registry import RoutingSpec

FLOAT32_MAX = torch.finfo(torch.float32).max


def route(  # noqa: PLR0913 -- the operands of the maths, as in Router.__call__
    spec: RoutingSpec,
    logits: Tensor,
    topk: int,
    *,
    per_expert_scale: Tensor | None = None,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    expert_table: Tensor | None = None,
    num_valid_tokens: int | Tensor | None = None,
    valid: Tensor | None = None,
    expert_map: Tensor | None = None,
    ids: Tensor | None = None,
) -> RoutingOutput:
    """Route ``logits [T, E]`` in float64, by the definition.

    :returns: weights float64 ``[T, K + shared_experts]`` and ids int64 of the same shape.

    Assumes arguments that ``Router`` would accept; it checks none of them.

    >>> from moe_routing_registry import RoutingSpec
    >>> spec = RoutingSpec(family="f", renormalize=True)
    >>> weights, ids = route(spec, torch.tensor([[0.0, 1.0, 1.0]]), 2)
    >>> ids.tolist(), weights.tolist()
    ([[1, 2]], [[0.5, 0.5]])
    """
    theirs = brought(spec.family)
    if theirs is not None:
        return theirs(
            spec, logits, topk, per_expert_scale=per_expert_scale, bias=bias, token_ids=token_ids,
            expert_table=expert_table, num_valid_tokens=num_valid_tokens, expert_map=expert_map,
            **{name: o for name, o in (("ids", ids), ("valid", valid)) if o is not None},
        )  # fmt: skip
    chosen = select(spec, logits, topk, bias=bias, token_ids=token_ids, expert_table=expert_table)
    if ids is not None:
        chosen = replayed(ids, chosen, logits.shape[1])
    weights = weights_at(spec, logits, chosen, per_expert_scale=per_expert_scale)
    return finish(
        spec,
        weights,
        chosen,
        logits.shape[1],
        num_valid_tokens=num_valid_tokens if valid is None else valid,
        expert_map=expert_map,
    )


def brought(family: str) -> Callable[..., RoutingOutput] | None:
    """Return the oracle that a plug-in brought with its family.

    ``None`` means that the family has the oracle of this module.
    """
    family_spec = registry().families.get(family)
    if family_spec is None or not family_spec.oracle:
        return None
    theirs: Callable[..., RoutingOutput] = resolve_name(family_spec.oracle)
    return theirs


def select(  # noqa: PLR0913 -- the operands of selection
    spec: RoutingSpec,
    logits: Tensor,
    topk: int,
    *,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    expert_table: Tensor | None = None,
) -> Tensor:
    """Return the logical ids ``[T, K]`` that the exact maths selects, in its order."""
    if spec.selection == "token_table":
        assert token_ids is not None  # noqa: S101 -- for mypy: Router has checked
        assert expert_table is not None  # noqa: S101 -- likewise
        return _from_table(token_ids, expert_table, logits.shape[1])
    keys = selection_keys(spec, logits, bias=bias)
    if spec.topk_per_group:
        keys = _keep_topk_of_each_group(keys, spec.num_groups, topk // spec.num_groups)
    elif spec.grouped:
        keys = _keep_best_groups(spec, keys, judged_by(spec, logits, keys))
    return descending(keys)[:, :topk]


def replayed(recorded: Tensor, usual: Tensor, num_experts: int) -> Tensor:
    """Return the recorded ids ``[T, K]``, and the usual ones in rows without a record.

    A row with a recorded id outside [-1, E) has no experts.
    """
    recorded = recorded.long()
    ids = torch.where((recorded == -1).all(-1, keepdim=True), usual, recorded)
    wrong = ((recorded < -1) | (recorded >= num_experts)).any(-1, keepdim=True)
    return ids.masked_fill(wrong, -1)


def _from_table(token_ids: Tensor, expert_table: Tensor, num_experts: int) -> Tensor:
    """Return the row of the table for each token.

    -1 for a token that is not in it, or whose row names no expert of ours.
    """
    experts = torch.full(
        (len(token_ids), expert_table.shape[1]), -1, dtype=torch.long, device=token_ids.device
    )
    known = (token_ids >= 0) & (token_ids < len(expert_table))
    experts[known] = expert_table[token_ids[known].long()].long()
    outside = ((experts < 0) | (experts >= num_experts)).any(-1)
    experts[outside] = -1
    return experts


def selection_keys(spec: RoutingSpec, logits: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Return the float64 keys ``[T, E]`` that top-k looks at, before any group limit."""
    l = clean(logits.detach())
    if not spec.needs_bias:
        return l
    assert bias is not None  # noqa: S101 -- for mypy: Router has checked
    x = transformed(spec, l)
    base = log_scores(spec, x).exp() if spec.selection == "scores_plus_bias" else x
    biased = base + bias.detach().float().double()
    return biased.nan_to_num(nan=-FLOAT32_MAX).clamp(-FLOAT32_MAX, FLOAT32_MAX)


def clean(logits: Tensor) -> Tensor:
    """Return ``l``: rounded to float32, NaN as -inf, clamped to float32's finite range; in float64.

    Non-finite entries become constants, so no gradient flows to them.
    """
    l = logits.float().double()
    return torch.where(
        l.isfinite(),
        l,
        l.detach().nan_to_num(nan=-FLOAT32_MAX, posinf=FLOAT32_MAX, neginf=-FLOAT32_MAX),
    )


def transformed(spec: RoutingSpec, l: Tensor) -> Tensor:
    """Return ``x``: ``l`` times the multiplier, clamped again, under the soft cap."""
    x = (
        (l * spec.logit_multiplier).clamp(-FLOAT32_MAX, FLOAT32_MAX)
        if spec.logit_multiplier != 1.0
        else l
    )
    return x if spec.logit_softcap is None else spec.logit_softcap * (x / spec.logit_softcap).tanh()


def log_scores(spec: RoutingSpec, x: Tensor) -> Tensor:
    """Return the logarithm of the scores of ``x [T, E]``; logarithms never underflow.

    Raises ``ValueError`` for a score function that only a third party's own oracle knows.
    """
    if spec.score == "softmax":
        return torch.log_softmax(x, dim=-1)
    if spec.score == "sigmoid":
        return torch.nn.functional.logsigmoid(x)
    if spec.score == "sqrtsoftplus":
        return 0.5 * _log_softplus(x)
    msg = (
        f"spec.score: the kit's oracle knows softmax, sigmoid and sqrtsoftplus, got {spec.score!r}"
    )
    raise ValueError(msg)


def _log_softplus(x: Tensor) -> Tensor:
    """Return ``log(log(1 + e^x))``.

    Below -40 it is x, because there log(1 + e^x) is e^x to float64's last bit: e^-40 is 4e-18,
    below float64's unit roundoff 1.1e-16.
    """
    very_negative = x < -40.0  # noqa: PLR2004 -- see above
    usual = torch.where(very_negative, 0.0, x)
    return torch.where(very_negative, x, torch.logaddexp(usual, torch.zeros_like(usual)).log())


def weights_at(
    spec: RoutingSpec, logits: Tensor, ids: Tensor, *, per_expert_scale: Tensor | None = None
) -> Tensor:
    """Return the float64 weights ``[T, K]`` of the logical ``ids``, whoever selected them.

    0 in slots of -1, which have no expert.

    A renormalisation without epsilon and floor is a ratio of exact scores, hence a softmax over
    their logarithms. ``per_expert_scale`` is rounded to float32, and multiplies as IEEE 754 says:
    NaN and infinities come out as they are, and 0 times an infinity is NaN. A zero expert's weight
    is 0 whatever its scale.
    """
    x = transformed(spec, clean(logits))
    absent, ids = ids < 0, ids.clamp(min=0)
    # What no sum counts; a row without any expert has weights 0 in the end, and must not be 0/0.
    uncounted = absent & ~absent.all(-1, keepdim=True)
    if spec.selection == "sparsemixer":
        weights = _sparsemixer_weights(spec, clean(logits), ids, uncounted)
    elif spec.renormalize and not (spec.renorm_epsilon or spec.renorm_floor):
        # The denominator of softmax itself cancels.
        log_ratios = x if spec.score == "softmax" else log_scores(spec, x)
        of_selected = log_ratios.gather(1, ids).masked_fill(uncounted, -torch.inf)
        weights = torch.softmax(of_selected, dim=-1)
    else:
        weights = log_scores(spec, x).gather(1, ids).exp().masked_fill(uncounted, 0.0)
        if spec.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + spec.renorm_epsilon).clamp(
                min=spec.renorm_floor
            )
    weights = weights * spec.scale
    if per_expert_scale is not None:
        weights = weights * per_expert_scale.float().double()[ids]
    return weights.where(ids < logits.shape[1] - spec.zero_experts, 0.0).masked_fill(absent, 0.0)


def _sparsemixer_weights(spec: RoutingSpec, l: Tensor, ids: Tensor, absent: Tensor) -> Tensor:
    """Return the weight of each round.

    A softmax over the entries within ``2 * jitter`` of the round's best. An expert that was
    recorded may be none of those: its weight is 0. A round without an expert takes none away.
    """
    weights = []
    for k in range(ids.shape[1]):
        left = l
        for before in range(k):
            taken = torch.zeros_like(l, dtype=torch.bool)
            taken = taken.scatter(1, ids[:, before : before + 1], ~absent[:, before : before + 1])
            left = left.masked_fill(taken, -torch.inf)
        best = left.detach().amax(-1, keepdim=True)
        # 0/0 is NaN, which is not > 2 * jitter.
        ratio = (best - left.detach()) / left.detach().abs().maximum(best)
        masked = left.masked_fill(ratio > 2 * spec.jitter, -torch.inf)
        weights.append(torch.softmax(masked, dim=-1).gather(1, ids[:, k : k + 1]))
    return torch.cat(weights, dim=1)


def finish(  # noqa: PLR0913 -- the operands of the last steps
    spec: RoutingSpec,
    weights: Tensor,
    ids: Tensor,
    num_experts: int,
    *,
    num_valid_tokens: int | Tensor | None = None,
    expert_map: Tensor | None = None,
) -> RoutingOutput:
    """Append the shared slots, rename logical to physical ids, and blank the padding."""
    if spec.shared_experts:
        shared = torch.arange(num_experts, num_experts + spec.shared_experts, device=ids.device)
        ids = torch.cat([ids, shared.expand(len(ids), -1)], dim=1)
        constant = weights.new_full((len(ids), spec.shared_experts), spec.shared_weight)
        weights = torch.cat([weights, constant], dim=1)
    absent = ids < 0
    padding = absent[:, : ids.shape[1] - spec.shared_experts].all(-1, keepdim=True)
    if num_valid_tokens is not None:
        padding = padding | ~valid_rows(num_valid_tokens, len(ids), ids.device).unsqueeze(1)
    if expert_map is not None:
        ids = expert_map.long()[ids.clamp(min=0)].masked_fill(absent, -1)
    return RoutingOutput(weights.masked_fill(padding, 0.0), ids.masked_fill(padding, -1))


def valid_rows(
    num_valid_tokens: int | Tensor | None, num_tokens: int, device: torch.device
) -> Tensor:
    """Tell which rows ``[T]`` are no padding: those before the number, or those of the mask."""
    if isinstance(num_valid_tokens, torch.Tensor) and num_valid_tokens.dtype is torch.bool:
        return num_valid_tokens.to(device)
    most = num_tokens if num_valid_tokens is None else min(int(num_valid_tokens), num_tokens)
    return torch.arange(num_tokens, device=device) < most


def descending(keys: Tensor) -> Tensor:
    """Return the positions of ``keys [T, N]`` by descending key.

    Equal keys are in the order of their positions; -0 is equal to +0.
    """
    # -0 + 0 is +0: radix sorts look at bits.
    return torch.sort(keys + 0.0, dim=-1, descending=True, stable=True).indices


def judged_by(spec: RoutingSpec, logits: Tensor, keys: Tensor) -> Tensor:
    """Return the float64 values ``[T, E]`` that groups are judged by.

    :param keys: what top-k looks at.
    """
    if spec.group_by == "selection":
        return keys
    return log_scores(spec, transformed(spec, clean(logits.detach()))).exp()


def group_scores(spec: RoutingSpec, judged: Tensor) -> Tensor:
    """Return the score ``[T, G]`` of each group: the sum of its best ``group_sum`` experts.

    Of all, if it has fewer. The sum goes from the best on, and is clamped to float32's finite range
    after each step, as all that is selected on: groups whose sums are beyond it are equal.
    """
    grouped = judged.reshape(len(judged), spec.num_groups, judged.shape[1] // spec.num_groups)
    best = grouped.sort(dim=-1, descending=True).values[..., : spec.group_sum]
    total = best[..., 0]
    for value in best.unbind(-1)[1:]:
        total = (total + value).clamp(-FLOAT32_MAX, FLOAT32_MAX)
    return total


def _keep_best_groups(spec: RoutingSpec, keys: Tensor, judged: Tensor) -> Tensor:
    """Set the keys outside the best ``topk_groups`` groups to -inf, so that none is selected."""
    kept = torch.zeros(len(keys), spec.num_groups, dtype=torch.bool, device=keys.device)
    kept.scatter_(1, descending(group_scores(spec, judged))[:, : spec.topk_groups], value=True)
    return keys.masked_fill(
        ~kept.repeat_interleave(keys.shape[1] // spec.num_groups, dim=1), -torch.inf
    )


def _keep_topk_of_each_group(keys: Tensor, num_groups: int, topk_of_each: int) -> Tensor:
    """Set every key but the best ``topk_of_each`` of each group to -inf."""
    grouped = keys.reshape(len(keys) * num_groups, -1)
    kept = torch.zeros_like(grouped, dtype=torch.bool)
    kept.scatter_(1, descending(grouped)[:, :topk_of_each], value=True)
    return grouped.masked_fill(~kept, -torch.inf).view(keys.shape)
