"""Clauses 1 to 6: what is selected, and with which weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_routing.conformance.checks import _sets
from moe_routing.conformance.checks._check import check
from moe_routing.conformance.requirements import require
from moe_routing.conformance.under_test import NotRunError, must_match, same_bits
from moe_routing.conformance.variants import VARIANTS
from moe_routing.kernel import RoutingOutput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Call, Case, Profile
    from moe_routing.conformance.under_test import BackendUnderTest

GUARD = 64
"""Elements before and after the outputs that must stay as they are."""


@check(1, _sets.sizes_and_dtypes)
def ids_come_in_exact_order(under_test: BackendUnderTest, case: Case) -> None:
    """Ids and weights are the oracle's, for every family, size and dtype."""
    call = case.make(under_test.device)
    out = None
    if case.out:
        columns = call.topk + call.spec.shared_experts
        out = RoutingOutput(
            torch.full((case.num_tokens, columns), torch.nan, device=under_test.device),
            torch.full(
                (case.num_tokens, columns), -7, dtype=call.ids_dtype, device=under_test.device
            ),
        )
    output = under_test.route(call, out)
    require(
        out is None or (output.weights is out.weights and output.ids is out.ids),
        "out: not what was returned",
    )
    must_match(call, output)


@check(1, _sets.many_tokens)
def ids_come_in_exact_order_for_many_tokens(under_test: BackendUnderTest, case: Case) -> None:
    """The same for a quarter of a million tokens, on an accelerator."""
    if under_test.device.type == "cpu":
        msg = f"T={case.num_tokens} is for accelerators"
        raise NotRunError(msg)
    under_test.check(case.make(under_test.device))


@check(1, _sets.rows_of("ties"))
def equal_scores_go_to_the_lower_id(under_test: BackendUnderTest, case: Case) -> None:
    """Equal scores go to the lower expert id; +0 and -0 are equal."""
    call = case.make(under_test.device)
    for bias in (None, 0.0, 0.5):
        if bias is not None and not call.spec.needs_bias:
            continue
        under_test.check(
            call
            if bias is None
            else call.but(bias=torch.full((case.num_experts,), bias, device=under_test.device))
        )


def _grouped(profile: Profile) -> Iterator[Case]:
    names = [name for name, spec in VARIANTS.items() if spec.num_groups > 1]
    return _sets.of_every_variant(profile, variants=names)


@check(1, _grouped)
def groups_are_scored_as_the_spec_says(under_test: BackendUnderTest, case: Case) -> None:
    """Groups with one, two and three good experts rank by the spec's group score.

    The fewer, the better each is.
    """
    call = case.make(under_test.device)
    groups = call.logits.clone().view(len(call.logits), call.spec.num_groups, -1) / 4 - 3
    groups[:, ::4, 0] += 5  # one high
    groups[:, 1::2, :2] += 4.5  # two good: below by maximum, above by the sum of two
    groups[:, 2::4, :3] += 4  # three: above by the sum of three
    call.logits = groups.flatten(1)
    under_test.check(call)


def _summed(profile: Profile) -> Iterator[Case]:
    names = [
        name
        for name, spec in VARIANTS.items()
        if spec.num_groups > 1 and spec.group_sum > 1 and spec.group_by == "selection"
    ]
    return _sets.of_every_variant(profile, variants=names)


@check(1, _summed)
def group_sums_beyond_float32_are_equal(under_test: BackendUnderTest, case: Case) -> None:
    """Groups whose sums are beyond float32's range, at either end, are equal.

    The lower ones are kept.
    """
    call = case.make(under_test.device)
    groups = call.spec.num_groups
    # The exact sum of the last group is the highest.
    for lowest, highest in ((0.6, 1.0), (-1.0, -0.6)):
        share = torch.linspace(
            lowest, highest, groups, dtype=torch.float64, device=under_test.device
        )
        share = share.repeat_interleave(case.num_experts // groups)
        if call.spec.needs_bias:
            under_test.check(call.but(bias=(share * torch.finfo(torch.float32).max).float()))
        else:
            call.logits = (
                (share * torch.finfo(call.logits.dtype).max)
                .to(call.logits.dtype)
                .repeat(case.num_tokens, 1)
            )
            under_test.check(call)


@check(2, _sets.rows_of("ties", "non_finite"))
def ids_are_unique_and_in_range(under_test: BackendUnderTest, case: Case) -> None:
    """Ids are unique and in [0, E) for awkward rows and for awkward biases.

    The biases push every score far down or to NaN.
    """
    call = case.make(under_test.device)
    _must_be_valid(case, under_test.route(call))
    if not call.spec.needs_bias:
        return
    for value in (-1e4, 1e4, -torch.inf, torch.inf, torch.nan):
        bias = torch.full((case.num_experts,), value, device=under_test.device)
        _must_be_valid(case, under_test.route(call.but(bias=bias)))
        _must_be_valid(
            case,
            under_test.route(
                call.but(bias=bias.scatter(0, torch.zeros_like(bias, dtype=torch.long), 0.0))
            ),
        )


def _must_be_valid(case: Case, output: RoutingOutput) -> None:
    ids = output.ids[:, : case.topk].long()
    outside = (ids < 0) | (ids >= case.num_experts)
    require(not outside.any(), f"ids outside [0, {case.num_experts}): {ids[outside][:8].tolist()}")
    ordered = ids.sort(dim=-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(-1)
    require(
        not twice.any() or case.spec.selection == "token_table",
        f"ids chosen twice: {ids[twice][:1].tolist()}",
    )


def _biased(profile: Profile) -> Iterator[Case]:
    return _sets.of_every_variant(
        profile, variants=[name for name, spec in VARIANTS.items() if spec.needs_bias]
    )


@check(2, _biased)
def scores_below_minus_one_are_ranked_too(under_test: BackendUnderTest, case: Case) -> None:
    """Biases around -1e4 put every biased score far below -1, and the best are still found."""
    call = case.make(under_test.device)
    spread = torch.linspace(-1e4, -1e4 - 64, case.num_experts, device=under_test.device)
    under_test.check(call.but(bias=spread.roll(case.num_experts // 3)))


@check(3, _sets.rows_of("non_finite"))
def nan_and_inf_follow_the_rule(under_test: BackendUnderTest, case: Case) -> None:
    """NaN counts as -inf, infinities as the largest finite numbers; weights stay finite."""
    output = under_test.check(case.make(under_test.device))
    require(output.weights.isfinite().all(), "weights are not all finite")


def _biased_scores(profile: Profile) -> Iterator[Case]:
    names = [name for name, spec in VARIANTS.items() if spec.selection == "scores_plus_bias"]
    return _sets.of_every_variant(profile, variants=names)


@check(3, _biased_scores)
def nan_keeps_its_bias(under_test: BackendUnderTest, case: Case) -> None:
    """A NaN logit has the score of -inf, and its expert's bias still counts.

    This holds if the bias is the highest of all, and for many tokens too.
    """
    for tokens in (case.num_tokens, 4099):
        call = case.but(num_tokens=tokens).make(under_test.device)
        call.logits[:, [3, -2]] = torch.nan
        bias = torch.linspace(0, 0.5, case.num_experts, device=under_test.device)
        bias[3], bias[-2] = 14, 500
        under_test.check(call.but(bias=bias))


@check(3, _biased)
def biases_that_are_not_finite_follow_the_rule(under_test: BackendUnderTest, case: Case) -> None:
    """An expert with a NaN bias is ranked as one with -inf, one with +inf above all others."""
    call = case.make(under_test.device)
    bias = torch.linspace(-0.5, 0.5, case.num_experts, device=under_test.device)
    for value, first in ((torch.nan, 0), (-torch.inf, 1), (torch.inf, 2)):
        under_test.check(
            call.but(bias=bias.clone().index_fill(0, _every_seventh(bias, first), value))
        )
        bias[_every_seventh(bias, first)] = value
    under_test.check(call.but(bias=bias))


def _every_seventh(vector: torch.Tensor, first: int) -> torch.Tensor:
    return torch.arange(first, len(vector), 7, device=vector.device)


@check(3, _sets.rows_of("extreme"))
def large_logits_do_not_overflow(under_test: BackendUnderTest, case: Case) -> None:
    """Sorted, one-hot, far apart and largest logits give the oracle's ids and weights."""
    under_test.check(case.make(under_test.device))


@check(4, _sets.rows_of("close"))
def selection_is_exact_in_float32(under_test: BackendUnderTest, case: Case) -> None:
    """Logits that differ by a unit in the last place are told apart.

    This holds under saturated scores, and for subnormal logits.
    """
    call = case.make(under_test.device)
    under_test.check(call)
    if call.spec.needs_bias:
        under_test.check(call.but(bias=torch.zeros(case.num_experts, device=under_test.device)))


@check(4, _sets.where(_sets.of_every_family, dtype="float64"))
def float64_logits_are_rounded_first(under_test: BackendUnderTest, case: Case) -> None:
    """Float64 logits that are equal in float32 are ties."""
    call = case.make(under_test.device)
    rising = (
        torch.arange(case.num_experts, dtype=torch.float64, device=under_test.device) * 2.0**-40
    )
    call.logits = call.logits.float().double().sign() + rising
    under_test.check(call)


@check(5, _biased_scores)
def weights_are_gathered_not_subtracted(under_test: BackendUnderTest, case: Case) -> None:
    """With scores around 1e-8 and a bias of 12 the weights keep all their digits."""
    call = case.make(under_test.device)
    call.logits = (call.logits / 4 - 18.4).to(call.logits.dtype)
    if call.spec.score == "softmax":
        call.logits[:, 0] = 0  # takes all the probability, and has no bias
    bias = torch.full((case.num_experts,), 12.0, device=under_test.device)
    bias[0] = 0
    under_test.check(call.but(bias=bias))


@check(6, _sets.of_every_variant)
def weights_match_the_oracle(under_test: BackendUnderTest, case: Case) -> None:
    """Weights are within tolerance for logits of every magnitude.

    They are renormalised and scaled in the right order.
    """
    call = case.make(under_test.device)
    magnitude = torch.logspace(-4, 2, len(call.logits), device=under_test.device)[:, None]
    call.logits = (call.logits * magnitude).to(call.logits.dtype)
    under_test.check(call)
    call.logits = call.logits - 12  # scores of 1e-5 and less, under a sigmoid
    under_test.check(call)


def _scaled(profile: Profile) -> Iterator[Case]:
    names = [name for name, spec in VARIANTS.items() if spec.per_expert_scale]
    return _sets.of_every_variant(profile, variants=names)


@check(6, _scaled)
def scales_that_are_not_finite_scale_their_expert_alone(
    under_test: BackendUnderTest, case: Case
) -> None:
    """NaN and infinite scales multiply the weights of their experts alone.

    They change nothing of padding, zero experts or other experts.
    """
    call = case.but(valid="int").make(under_test.device)
    call.logits[0] *= 40  # weights that are 0 in float32
    scale = torch.linspace(-2, 2, case.num_experts, dtype=torch.float64, device=under_test.device)
    for first, value in enumerate((torch.nan, torch.inf, -torch.inf, 0.0, 1e300)):
        scale[_every_seventh(scale, first)] = value
    for operand in (scale, scale.float()):
        under_test.check(call.but(per_expert_scale=operand))
        under_test.check(call.but(per_expert_scale=operand, num_valid_tokens=3))
    call.spec = call.spec.replace(zero_experts=case.num_experts // 2)
    under_test.check(call.but(per_expert_scale=scale))


@check(6, _sets.of_every_variant)
def an_expert_map_renames_at_the_very_end(under_test: BackendUnderTest, case: Case) -> None:
    """Scale, bias and zero experts go by logical ids; only the ids that come out are physical."""
    under_test.check(case.but(mapped=True).make(under_test.device))


@check(6, _sets.of_every_family)
def ids_dtype_is_as_asked(under_test: BackendUnderTest, case: Case) -> None:
    """Ids are int32 by default and int64 on request, with the same values; weights are float32."""
    call = case.make(under_test.device)
    narrow = under_test.check(call)
    by_default = under_test.router(call.spec)(call.logits, call.topk, **call.operands)
    require(
        by_default.ids.dtype == torch.int32,
        f"ids: expected int32 by default, got {by_default.ids.dtype}",
    )
    call.ids_dtype = torch.int64
    wide = under_test.check(call)
    require(torch.equal(wide.ids, narrow.ids.long()), "int64 ids are not the int32 ids")


@check(6, _sets.of_every_variant)
def outputs_are_contiguous(under_test: BackendUnderTest, case: Case) -> None:
    """Weights and ids of either dtype are contiguous, for one token, few and many.

    Compiled callers rely on it.
    """
    for tokens in (1, 3, 300):
        for ids_dtype in (torch.int32, torch.int64):
            call = case.but(num_tokens=tokens).make(under_test.device)
            call.ids_dtype = ids_dtype
            under_test.check(call)


@check(6, _sets.of_every_family)
def every_output_is_written_and_nothing_else(under_test: BackendUnderTest, case: Case) -> None:
    """Given outputs are written in full, and not one element before or after them.

    Inputs stay as they were.
    """
    for tokens in (1, 2, 33):
        for ids_dtype in (torch.int32, torch.int64):
            call = case.but(num_tokens=tokens).make(under_test.device)
            call.ids_dtype = ids_dtype
            _must_stay_inside(under_test, call)


def _must_stay_inside(under_test: BackendUnderTest, call: Call) -> None:
    shape = (len(call.logits), call.topk + call.spec.shared_experts)
    size = shape[0] * shape[1]
    weights = torch.full((size + 2 * GUARD,), torch.nan, device=under_test.device)
    ids = torch.full((size + 2 * GUARD,), -7, dtype=call.ids_dtype, device=under_test.device)
    inside = slice(GUARD, GUARD + size)
    before = {name: value.clone() for name, value in _tensors(call)}
    output = under_test.route(
        call, RoutingOutput(weights[inside].view(shape), ids[inside].view(shape))
    )
    for name, value in _tensors(call):
        require(same_bits(value, before[name]), f"{name}: was changed")
    unwritten = weights[inside].isnan() | (ids[inside] == -7)  # noqa: PLR2004 -- as filled above
    require(
        not unwritten.any(), f"{int(unwritten.sum())} of {size} elements of out were not written"
    )
    for name, filled in (("weights", weights.isnan()), ("ids", ids == -7)):  # noqa: PLR2004 -- same
        outside = ~torch.cat([filled[:GUARD], filled[-GUARD:]])
        require(
            not outside.any(),
            f"{name}: {int(outside.sum())} of {2 * GUARD} elements around out were written",
        )
    must_match(call, output)


def _tensors(call: Call) -> list[tuple[str, torch.Tensor]]:
    named = {"logits": call.logits, **call.operands}
    return [(name, value) for name, value in named.items() if isinstance(value, torch.Tensor)]
