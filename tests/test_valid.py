"""A mask of valid tokens: what users of routers see. The kit has the maths (clause 13)."""

import pytest
import torch

import moe_routing
from moe_routing_registry import RejectCode

E, K, T = 16, 4, 9
MASK = torch.tensor([False, False, True, True, True, False, True, True, False])


def test_padding_may_stand_at_the_left_of_a_batch():
    route, logits = moe_routing.get_router("mixtral"), torch.randn(T, E)
    plain = route(logits, K)
    for mask in (MASK, ~MASK, MASK):
        weights, ids = route(logits, K, valid=mask)
        assert torch.equal(ids[mask], plain.ids[mask])
        assert torch.equal(weights[mask], plain.weights[mask])
        assert (ids[~mask] == -1).all()
        assert (weights[~mask] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"valid": MASK, "num_valid_tokens": 3}, "valid: expected None with num_valid_tokens"),
        ({"valid": MASK[1:]}, r"valid: expected shape \[9\], got \[8\]"),
        ({"valid": MASK.int()}, r"valid: expected a bool tensor \[T\]"),
        ({"valid": [True] * T}, r"valid: expected a bool tensor \[T\]"),
        ({"num_valid_tokens": MASK}, "num_valid_tokens: expected an int, .*; a mask is `valid`"),
    ],
)
@pytest.mark.parametrize("warm", [False, True])
def test_a_wrong_mask_is_named(arguments, said, warm):
    route, logits = moe_routing.get_router("mixtral"), torch.randn(T, E)
    hidden, weight = torch.randn(T, 8), torch.randn(E, 8)
    if warm:
        route(logits, K, valid=MASK)
    for call in (
        lambda: route(logits, K, **arguments),
        lambda: route.with_plan(logits, K, **arguments),
        lambda: route.gate(hidden, weight, K, **arguments),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{said}"):
            call()


def test_a_plan_and_a_gate_leave_masked_rows_out():
    route, logits = moe_routing.get_router("mixtral"), torch.randn(T, E)
    planned = route.with_plan(logits, K, valid=MASK)
    assert planned.plan.offsets[-1] == MASK.sum() * K
    made = route.gate(torch.randn(T, 8), torch.randn(E, 8), K, valid=MASK)
    assert (made.ids == -1).all(-1).tolist() == (~MASK).tolist()


def test_shadow_mode_compares_masked_rows():
    route = moe_routing.Router(moe_routing.list_routers()["mixtral"], verify=True)
    route(torch.randn(T, E), K, valid=MASK)
    assert (route.health().compared, route.health().ok) == (1, True)


def test_explain_says_who_takes_no_mask():
    device = moe_routing.probe("cpu")
    report = moe_routing.explain("mixtral", operands=("valid", "ids"))
    assert (report.winner, report.device) == ("eager", device)
    assert "with ids, valid" in str(report.problem)
    assert RejectCode.OPERANDS.value == "operands"
