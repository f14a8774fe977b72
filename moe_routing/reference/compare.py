"""Comparing an output with the oracle.

Exact where no rounding is involved, elsewhere within the error bound of float32.

A selection is right if it is the exact one, or if scores exist within the float32 error bound of
the exact ones (``moe_routing.reference.error_bounds`` derives it) for which it would be. Selection
on logits involves no rounding, so there nothing but the exact answer is right. Two experts with the
same logit and the same bias have the same score in any arithmetic, so between them the lower id
always comes first.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from moe_routing.reference import error_bounds, oracle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from typing_extensions import Unpack

    from moe_routing.kernel import RoutingOutput
    from moe_routing_registry import RoutingSpec

RTOL = 2e-6
"""The contract's relative tolerance of weights.

They are compared with the oracle's weights at the ids that the backend chose.
"""
ATOL = 1e-12
CHUNK = 1 << 22
"""Elements compared at a time: float64 copies of them stay below a few hundred MB."""
MANY = 5
"""After this many wrong rows nothing new is learnt."""


class Operands(TypedDict, total=False):
    """The operands of a routing call other than logits and topk."""

    per_expert_scale: Tensor | None
    bias: Tensor | None
    token_ids: Tensor | None
    expert_table: Tensor | None
    num_valid_tokens: int | Tensor | None
    valid: Tensor | None
    expert_map: Tensor | None
    ids: Tensor | None


@dataclass(slots=True)
class Comparison:
    """What comparing an output with the oracle found.

    :ivar problems: a sentence for each thing that is wrong; empty if the output is right.
    :ivar near_ties: rows that differ from the exact selection, within the error bound.
    :ivar rows: rows compared.
    """

    problems: list[str] = field(default_factory=list)
    near_ties: int = 0
    rows: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def compare(
    spec: RoutingSpec,
    logits: Tensor,
    topk: int,
    output: RoutingOutput,
    **operands: Unpack[Operands],
) -> Comparison:
    """Compare ``output`` with the oracle.

    :param logits: ``[T, E]``, any float dtype and strides.
    :param output: what the backend returned: weights float32 and ids int32 or int64, ``[T, K +
        shared_experts]``.
    :param operands: what else the backend was given; ``expert_map`` must map different experts to
        different ids.
    :raises ValueError: it does not.

    >>> from moe_routing_registry import RoutingSpec
    >>> from moe_routing import RoutingOutput
    >>> logits = torch.tensor([[0.0, 3.0, 3.0]])
    >>> wrong = RoutingOutput(torch.tensor([[1.0]]), torch.tensor([[2]]))
    >>> compare(RoutingSpec(family="f", renormalize=True), logits, 1, wrong).problems
    ['row 0: id 2 at position 0 stands before id 1 although their scores are equal']
    """
    found = Comparison(rows=len(logits))
    found.problems += _shape_problems(spec, logits, topk, output)
    if not found.ok:
        return found
    padding = _padding(spec, logits, operands)
    found.problems += _padding_problems(output, padding)
    if oracle.brought(spec.family) is not None:
        found.problems += _problems_with_theirs(spec, logits, topk, output, operands)
        return found
    for rows in (~padding).nonzero().flatten().split(max(1, CHUNK // logits.shape[1])):
        if len(rows) and len(found.problems) < MANY:
            _compare_rows(spec, logits, topk, output, operands, rows, found)
    return found


def _problems_with_theirs(
    spec: RoutingSpec, logits: Tensor, topk: int, output: RoutingOutput, operands: Operands
) -> Iterator[str]:
    """Hold a third party's family to the oracle that came with it.

    Nothing is known here of its near ties.
    """
    exact = oracle.route(spec, logits, topk, **operands)
    for row in (
        (output.ids.long() != exact.ids.to(output.ids.device))
        .any(-1)
        .nonzero()
        .flatten()[:MANY]
        .tolist()
    ):
        yield (
            f"row {row}: ids {output.ids[row].tolist()}, its oracle says {exact.ids[row].tolist()}"
        )
    theirs = exact.weights.to(output.weights.device)
    far = ~torch.isclose(output.weights.double(), theirs, rtol=RTOL, atol=ATOL, equal_nan=True)
    for row in far.any(-1).nonzero().flatten()[:MANY].tolist():
        yield (
            f"row {row}: weights {output.weights[row].tolist()}, "
            f"its oracle says {exact.weights[row].tolist()}"
        )


def _shape_problems(
    spec: RoutingSpec, logits: Tensor, topk: int, output: RoutingOutput
) -> Iterator[str]:
    shape = (len(logits), topk + spec.shared_experts)
    for name, tensor, dtypes in (
        ("weights", output.weights, (torch.float32,)),
        ("ids", output.ids, (torch.int32, torch.int64)),
    ):
        if tensor.shape != shape:
            yield f"{name}: expected shape {shape}, got {tuple(tensor.shape)}"
        if tensor.dtype not in dtypes:
            yield f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {tensor.dtype}"
        if tensor.device != logits.device:
            yield f"{name}: expected device {logits.device}, got {tensor.device}"


def _padding(spec: RoutingSpec, logits: Tensor, operands: Operands) -> Tensor:
    """Tell which rows ``[T]`` are padding.

    Those past ``num_valid_tokens``, and those to which the table or the record gives no experts.
    """
    mask = operands.get("valid")
    said = operands.get("num_valid_tokens") if mask is None else mask
    padding = ~oracle.valid_rows(said, len(logits), logits.device)
    recorded = operands.get("ids")
    recorded = None if recorded is None else recorded.long()
    if spec.selection == "token_table":
        table = {name: operands.get(name) for name in ("token_ids", "expert_table")}
        without = (oracle.select(spec, logits, 0, **table) < 0).any(-1)  # type: ignore[arg-type] # two tensors
        padding |= without if recorded is None else without & (recorded == -1).all(-1)
    if recorded is not None:
        padding |= ((recorded < -1) | (recorded >= logits.shape[1])).any(-1)
    return padding


def _padding_problems(output: RoutingOutput, padding: Tensor) -> Iterator[str]:
    for name, tensor, blank in (("ids", output.ids, -1), ("weights", output.weights, 0)):
        wrong = padding & (tensor != blank).any(-1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            yield f"padding: row {row} needs {name} {blank}, got {tensor[row].tolist()}"


def _compare_rows(  # noqa: PLR0913, PLR0917 -- private; the caller's own arguments
    spec: RoutingSpec,
    logits: Tensor,
    topk: int,
    output: RoutingOutput,
    operands: Operands,
    rows: Tensor,
    found: Comparison,
) -> None:
    # Most often nothing is padding, and a slice copies nothing.
    first, last = int(rows[0]), int(rows[-1])
    part = slice(first, last + 1) if last - first == len(rows) - 1 else rows
    num_experts = logits.shape[1]
    home = exact_device(logits)
    l = logits.detach()[part].to(home)
    ids = logical_ids(output.ids[part].to(home).long(), operands.get("expert_map"))
    weights = output.weights.detach()[part].to(home).double()
    recorded = _at(operands.get("ids"), home)
    recorded = None if recorded is None else recorded[part].long()
    usual = rows.new_ones(len(rows), dtype=torch.bool, device=home)
    if recorded is not None:
        usual = (recorded == -1).all(-1)
    found.problems += _id_problems(spec, ids, topk, num_experts, rows, usual)
    found.problems += _shared_problems(spec, weights, topk, rows)
    if not found.ok:
        return
    ids, weights = ids[:, :topk], weights[:, :topk]
    bias, token_ids = _at(operands.get("bias"), home), _at(operands.get("token_ids"), home)
    table, scale = (
        _at(operands.get("expert_table"), home),
        _at(operands.get("per_expert_scale"), home),
    )
    if scale is not None:
        scale = scale.float()  # PyTorch hardly computes in 8-bit formats
    tokens = None if token_ids is None else token_ids[part]
    exact = oracle.select(spec, l, topk, bias=bias, token_ids=tokens, expert_table=table)
    if recorded is not None:
        exact = oracle.replayed(recorded, exact, num_experts)
    for row in (ids != exact).any(-1).nonzero().flatten().tolist():
        got, expected = ids[row].tolist(), exact[row].tolist()
        problem = (
            _row_problem(
                spec, l[row : row + 1].cpu(), _at(bias, torch.device("cpu")), got, expected
            )
            if usual[row]
            else f"ids {got} are not the recorded {expected}"
        )
        if problem:
            found.problems.append(f"row {int(rows[row])}: {problem}")
            if len(found.problems) >= MANY:
                return
        else:
            found.near_ties += 1
    found.problems += _weight_problems(spec, l, ids, weights, scale, rows)


def renaming_problems(plain: RoutingOutput, mapped: RoutingOutput, expert_map: Tensor) -> list[str]:
    """Say what ``expert_map`` changed but the ids.

    :param plain: what the same call without ``expert_map`` returned, and which is right.
    """
    ids = plain.ids.long()
    renamed = torch.where(ids < 0, ids, expert_map.long()[ids.clamp(min=0)])
    for name, got, expected in (
        ("ids", mapped.ids.long(), renamed),
        ("weights", mapped.weights.view(torch.int32), plain.weights.view(torch.int32)),
    ):
        wrong = (got != expected).any(-1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            with_map = getattr(mapped, name)[row].tolist()
            without = f"; without expert_map {getattr(plain, name)[row].tolist()}"
            said = f", renamed {renamed[row].tolist()}" if name == "ids" else ""
            return [f"row {row}: {name} {with_map}{without}{said}"]
    return []


def exact_device(tensor: Tensor) -> torch.device:
    """Return where float64 maths on the tensor is possible.

    Its own device, or the CPU (Metal has no float64).
    """
    return tensor.device if tensor.device.type in ("cpu", "cuda", "xpu") else torch.device("cpu")


def _at(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(device)


def logical_ids(ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """Undo ``expert_map``, whose physical ids may be any numbers.

    An id that no expert has becomes -1.

    :raises ValueError: two experts have one physical id: then ids do not tell which it was
        (``renaming_problems`` does).
    """
    if expert_map is None:
        return ids
    physical, logical = expert_map.to(ids.device).long().sort()
    if (physical[1:] == physical[:-1]).any():
        different = len(physical.unique())
        msg = (
            f"expert_map: expected a physical id of its own for each of {len(physical)} experts, "
            f"got {different} different ids"
        )
        raise ValueError(msg)
    place = torch.searchsorted(physical, ids.contiguous()).clamp(max=len(physical) - 1)
    return torch.where(physical[place] == ids, logical[place], -1)


def _id_problems(  # noqa: PLR0913, PLR0917 -- likewise
    spec: RoutingSpec, ids: Tensor, topk: int, num_experts: int, rows: Tensor, usual: Tensor
) -> Iterator[str]:
    """Say which ids no selection gives.

    :param usual: tells which rows are selected; the ids of the others were recorded.
    """
    routed = ids[:, :topk]
    outside = ((routed < 0) | (routed >= num_experts)).any(-1) & usual
    if outside.any():
        row = int(outside.nonzero()[0])
        yield f"row {int(rows[row])}: ids {routed[row].tolist()} are not all in [0, {num_experts})"
    ordered = routed.sort(dim=-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(-1) & usual
    if twice.any() and spec.selection != "token_table":
        row = int(twice.nonzero()[0])
        yield f"row {int(rows[row])}: ids {routed[row].tolist()} are not unique"
    expected = torch.arange(num_experts, num_experts + spec.shared_experts, device=ids.device)
    if (ids[:, topk:] != expected).any():
        yield f"shared slots: expected ids {expected.tolist()}, got {ids[:, topk:][0].tolist()}"


def _shared_problems(spec: RoutingSpec, weights: Tensor, topk: int, rows: Tensor) -> Iterator[str]:
    expected = weights.new_tensor(spec.shared_weight).float()
    if spec.shared_experts and (weights[:, topk:] != expected).any():
        yield (
            f"shared slots: expected weight {expected.item():g} in rows from {int(rows[0])} on, "
            f"got {weights[:, topk:].flatten()[:8].tolist()}"
        )


def _weight_problems(  # noqa: PLR0913, PLR0917 -- private; the caller's own arguments
    spec: RoutingSpec, l: Tensor, ids: Tensor, weights: Tensor, scale: Tensor | None, rows: Tensor
) -> Iterator[str]:
    exact = oracle.weights_at(spec, l, ids, per_expert_scale=scale)
    scales = (
        exact.new_full(exact.shape, abs(spec.scale))
        if scale is None
        else abs(spec.scale) * scale.double().abs()[ids.clamp(min=0)]
    )
    tolerance = (
        ATOL * scales.masked_fill(~scales.isfinite(), 0.0)
        + (RTOL + error_bounds.weight_error(spec, l, ids.clamp(min=0))) * exact.abs()
        + error_bounds.FLUSHED
    ).masked_fill(ids < 0, 0.0)  # a slot without an expert has weight 0, and no other
    low = high = exact
    if spec.selection == "sparsemixer":
        # The mask compares a float32 quotient with a threshold: one subtraction, one division, the
        # threshold's rounding.
        slack = (2 + error_bounds.FAST_DIVISION) * error_bounds.U
        others = [
            oracle.weights_at(
                spec.replace(jitter=spec.jitter * factor), l, ids, per_expert_scale=scale
            )
            for factor in (1 - slack, 1 + slack)
        ]
        low, high = torch.minimum(*others), torch.maximum(*others)
    # What is beyond float32's range is infinite there.
    low, high = (_in_float32(end) for end in (low - tolerance, high + tolerance))
    wrong = ~((weights >= low) & (weights <= high))  # NaN is wrong
    if scale is not None and not scale.isfinite().all():
        # float32 may take such weights for 0, and 0 times infinity is NaN.
        tiny = oracle.weights_at(spec, l, ids).abs() <= ATOL
        right = (weights == exact) | (weights.isnan() & (exact.isnan() | tiny))
        wrong = torch.where(exact.isfinite(), wrong, ~right)
    for row, k in wrong.nonzero()[:MANY].tolist():
        got, expected = float(weights[row, k]), float(exact[row, k])
        yield (
            f"row {int(rows[row])}: weight of id {int(ids[row, k])} is {got:.9g}, "
            f"exactly {expected:.9g}: "
            f"off by {abs(got - expected):.3g}, allowed {float(tolerance[row, k]):.3g}"
        )


def _in_float32(x: Tensor) -> Tensor:
    limit = oracle.FLOAT32_MAX
    return x.masked_fill(x > limit, torch.inf).masked_fill(x < -limit, -torch.inf)


def _row_problem(
    spec: RoutingSpec, l: Tensor, bias: Tensor | None, ids: list[int], exact: list[int]
) -> str:
    """Say why ``ids`` are wrong for the one row ``l [1, E]``, or return ``""``."""
    if spec.selection == "token_table":
        return f"ids {ids} are not the table's {exact}"
    row = _Row(spec, l, bias)
    if spec.topk_per_group:
        return _per_group_problem(row, ids)
    if not spec.grouped:
        return row.problem(ids, range(len(row.keys)))
    problems = [row.problem(ids, row.experts(groups)) for groups in row.possible_groups(ids)]
    if not problems:
        touched = sorted({i // row.group_size for i in ids})
        return (
            f"ids {ids} lie in groups {touched}, which are not among the best {spec.topk_groups}; "
            f"exact ids are {exact}"
        )
    return min(problems, key=len)  # "" if any choice of groups explains the ids


def _per_group_problem(row: _Row, ids: list[int]) -> str:
    """Take each group alone, then the order among the selected."""
    for group in range(row.spec.num_groups):
        inside = [i for i in ids if i // row.group_size == group]
        if len(inside) != len(ids) // row.spec.num_groups:
            return f"{len(inside)} ids of group {group}, expected {len(ids) // row.spec.num_groups}"
        if problem := row.problem(inside, row.experts((group,))):
            return problem
    return row.problem(ids, ids)


class _Row:
    """One row's exact selection keys and the interval that float32 may have put each into."""

    def __init__(self, spec: RoutingSpec, l: Tensor, bias: Tensor | None) -> None:
        keys = oracle.selection_keys(spec, l, bias=bias)
        error = error_bounds.key_error(spec, l, keys)
        self.spec = spec
        self.keys: list[float] = keys[0].tolist()
        self.error: list[float] = error[0].tolist()
        biases = (
            [0.0] * len(self.keys)
            if bias is None
            else bias.float().nan_to_num(nan=-torch.inf).tolist()
        )
        self.same = [
            (l, b) if abs(b) < torch.inf else (0.0, b)
            for l, b in zip(oracle.clean(l)[0].tolist(), biases, strict=True)
        ]
        """What determines an expert's score; equal entries have equal scores in any arithmetic."""
        self.group_size = len(self.keys) // spec.num_groups
        judged = oracle.judged_by(spec, l, keys)
        off = error_bounds.judged_error(spec, l, keys)
        self.judged_low: list[float] = (judged - off)[0].tolist()
        self.judged_high: list[float] = (judged + off)[0].tolist()
        self.judged_same: list[Any] = (
            list(self.same) if spec.group_by == "selection" else oracle.clean(l)[0].tolist()
        )

    def experts(self, groups: tuple[int, ...]) -> list[int]:
        return [e for g in groups for e in range(g * self.group_size, (g + 1) * self.group_size)]

    def problem(self, ids: list[int], eligible: range | list[int]) -> str:
        """Say why ``ids`` cannot be the best ``eligible`` experts in order, or return ``""``."""
        position = {e: p for p, e in enumerate(ids)}
        last = len(ids)
        if any(e not in set(eligible) for e in ids):
            return f"ids {ids} are not all in the groups that were kept"
        order = ids + [e for e in eligible if e not in position]
        # Of the experts before, the one whose score may be least high.
        lowest_above: int | None = None
        for place, e in enumerate(order):
            if lowest_above is not None and not self._may_precede(lowest_above, e):
                return self._said(lowest_above, position[lowest_above], e)
            if place < last and (lowest_above is None or self._high(e) < self._high(lowest_above)):
                lowest_above = e
        first_of: dict[tuple[float, float], int] = {}
        for e in sorted(eligible, key=lambda e: (position.get(e, last), e)):
            before = first_of.setdefault(self.same[e], e)
            if before > e:
                return (
                    f"id {before} at position {position[before]} stands before id {e} "
                    "although their scores are equal"
                )
            first_of[self.same[e]] = max(before, e)
        return ""

    def _high(self, e: int) -> float:
        return self.keys[e] + self.error[e]

    def _may_precede(self, above: int, below: int) -> bool:
        return self._high(above) >= self.keys[below] - self.error[below]

    def _said(self, above: int, place: int, below: int) -> str:
        a, b = self.keys[above], self.keys[below]
        return (
            f"id {above} at position {place} (score {a:.9g}) stands before "
            f"id {below} (score {b:.9g}): "
            f"a gap of {b - a:.3g}, float32 blurs {self.error[above] + self.error[below]:.3g}"
        )

    def possible_groups(self, ids: list[int]) -> Iterator[tuple[int, ...]]:
        """Yield every set of groups that float32 may keep and that holds all ``ids``."""
        count, keep = self.spec.num_groups, self.spec.topk_groups
        bounds_of = [self._group_interval(g) for g in range(count)]
        touched = {i // self.group_size for i in ids}
        if len(touched) > keep:
            return
        low, high = [b[0] for b in bounds_of], [b[1] for b in bounds_of]
        content: list[object] = [
            sorted(self.judged_same[e] for e in self.experts((g,))) for g in range(count)
        ]
        if self.spec.group_sum > 1:
            # Sums that are known exactly, those that are clamped among them, are equal whatever
            # they are sums of.
            content = [
                bound[0] if bound[0] == bound[1] else same
                for bound, same in zip(bounds_of, content, strict=True)
            ]
        sure = {
            g for g in range(count) if sum(high[o] >= low[g] for o in range(count) if o != g) < keep
        } | touched
        maybe = [
            g
            for g in range(count)
            if g not in sure and sum(low[o] > high[g] for o in range(count)) < keep
        ]
        for chosen in itertools.combinations(maybe, max(keep - len(sure), 0)):
            kept = tuple(sorted(sure | set(chosen)))
            left = [g for g in range(count) if g not in kept]
            feasible = not left or min(high[g] for g in kept) >= max(low[g] for g in left)
            skips_an_equal = any(
                lower < g and content[lower] == content[g] for g in kept for lower in left
            )
            if feasible and len(kept) == keep and not skips_an_equal:
                yield kept

    def _group_interval(self, group: int) -> tuple[float, float]:
        inside = self.experts((group,))
        return (
            self._sum_of_best([self.judged_low[e] for e in inside], -error_bounds.U),
            self._sum_of_best([self.judged_high[e] for e in inside], error_bounds.U),
        )

    def _sum_of_best(self, values: list[float], rounding: float) -> float:
        """Add the best as the contract says, each sum rounded to one side as far as may be."""
        limit = oracle.FLOAT32_MAX
        total, *others = sorted(values, reverse=True)[: self.spec.group_sum]
        for value in others:
            total += value
            total = min(max(total + rounding * abs(total), -limit), limit)
        return min(max(total, -limit), limit)
