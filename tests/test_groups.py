"""How groups of experts are judged: how many of a group count, and by which of their scores."""

import pytest
import torch

import moe_routing
from moe_routing_backends import triton
from moe_routing_registry import DeviceInfo, RejectCode, RoutingProblem, RoutingSpec, Toolchain

GROUPED = RoutingSpec(family="f", num_groups=2, topk_groups=1)
INTERPRETER = DeviceInfo(
    type="cpu", platform="cpu", toolchains=(Toolchain(name="triton", version="3.7.1", usable=True),)
)


def kept(spec, logits, **operands):
    """Return the group that is kept of two."""
    _, ids = moe_routing.get_router(spec)(torch.tensor([logits]), 1, **operands)
    return int(ids) // (len(logits) // 2)


@pytest.mark.parametrize(("group_sum", "best"), [(1, 0), (2, 1), (3, 0), (4, 1), (9, 1)])
def test_the_best_n_of_a_group_count_and_all_where_it_has_fewer(group_sum, best):
    # Sums of the best n: 9, 10, 11, 6 and 8, 11, 10, 9.
    logits = [9.0, 1.0, 1.0, -5.0, 8.0, 3.0, -1.0, -1.0]
    assert kept(GROUPED.replace(group_sum=group_sum), logits) == best


def test_equal_sums_go_to_the_lower_group():
    assert kept(GROUPED.replace(group_sum=3), [1.0, 2.0, 3.0, 3.0, 1.0, 2.0]) == 0


def test_a_sum_is_clamped_after_each_step_from_the_best_expert_on():
    largest = torch.finfo(torch.float32).max
    # The exact sum is the largest number; after the second step it is that too, so the third
    # leaves 0.
    logits = [largest, largest, -largest, 1e38, 0.0, 0.0]
    assert kept(GROUPED.replace(group_sum=3), logits) == 1


def test_groups_are_judged_by_the_scores_where_the_spec_says_so():
    # Two good experts have the higher sum of logits, one very good has more of the softmax.
    logits = [6.0, -9.0, 1.0, 1.0]
    by_logits = GROUPED.replace(group_sum=2)
    assert kept(by_logits, logits) == 1
    assert kept(by_logits.replace(group_by="scores"), logits) == 0


def test_groups_are_judged_without_the_bias_where_the_spec_says_scores():
    spec = GROUPED.replace(score="sigmoid", selection="scores_plus_bias")
    logits, bias = [2.0, 2.0, 0.0, 0.0], torch.tensor([0.0, 0.0, 0.9, 0.9])
    assert kept(spec, logits, bias=bias) == 1
    assert kept(spec.replace(group_by="scores"), logits, bias=bias) == 0


def test_the_maximum_of_scores_is_refused_where_the_highest_logit_says_it_exactly():
    with pytest.raises(
        ValueError, match=r"^group_by: expected 'selection', because with group_sum"
    ):
        GROUPED.replace(group_by="scores")


@pytest.mark.parametrize("selection", ["sparsemixer", "token_table"])
def test_what_knows_no_groups_judges_none(selection):
    with pytest.raises(ValueError, match=r"^group_by: expected 'selection', because selection"):
        RoutingSpec(family="f", selection=selection, group_by="scores", group_sum=2)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"group_sum": 3}, "sums the best 2 of a group at most, not 3"),
        (
            {"group_sum": 2, "group_by": "scores"},
            "judges groups by what top-k looks at, not by group_by='scores'",
        ),
        ({"group_sum": 1}, ""),
        ({"group_sum": 2}, ""),
        ({"group_sum": 3, "num_groups": 4, "topk_groups": 4}, ""),  # groups of two have no third
        ({"group_sum": 3, "num_groups": 1}, ""),
    ],
)
@pytest.mark.parametrize("supports", [triton.supports, triton.supports_xpu])
def test_the_triton_backends_decline_group_scores_that_their_kernels_do_not_know(
    monkeypatch, supports, fields, reason
):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = GROUPED.replace(**fields)
    problem = RoutingProblem(spec=spec, num_experts=8, topk=2, dtype="float32")
    verdict = supports(problem, INTERPRETER)
    assert (verdict.code, verdict.reason) == (RejectCode.FAMILY if reason else None, reason)
