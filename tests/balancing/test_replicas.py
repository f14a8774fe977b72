"""``place_replicas``: every expert has a slot, busy ones more, and ranks are nearly equal."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_routing.balancing import place_replicas


def rank_loads(loads, placement, ranks):
    """Return how much each rank gets, if replicas share their expert's load."""
    share = (loads.double() / placement.replica_count).gather(-1, placement.physical_to_logical)
    return share.unflatten(-1, (ranks, -1)).sum(-1)


@st.composite
def problems(draw):
    ranks, experts = draw(st.integers(1, 8)), draw(st.integers(1, 24))
    least = -(-experts // ranks)
    slots = ranks * draw(st.integers(least, least + 4))
    loads = draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts))
    return torch.tensor(loads), slots, ranks


@given(problem=problems())
def test_the_three_tensors_say_the_same_and_no_expert_is_without_a_slot(problem):
    loads, slots, ranks = problem
    physical, logical, counts = place_replicas(loads, num_slots=slots, num_ranks=ranks)
    assert torch.equal(physical.bincount(minlength=len(loads)), counts)
    assert counts.min() >= 1
    assert counts.sum() == slots
    assert logical.shape == (len(loads), counts.max())
    for expert, of_expert in enumerate(logical.tolist()):
        own = of_expert[: counts[expert]]
        assert own == sorted(own)
        assert (physical[own] == expert).all()
        assert of_expert[counts[expert] :] == [-1] * (len(of_expert) - len(own))


@given(problem=problems())
def test_no_other_expert_would_lower_the_highest_load_of_a_replica_by_one_more(problem):
    loads, slots, ranks = problem
    counts = place_replicas(loads, num_slots=slots, num_ranks=ranks).replica_count
    highest = (loads / counts).max()
    # Nobody who has several would be above the highest with one less, but for equal loads.
    fewer = loads[counts > 1] / (counts[counts > 1] - 1)
    assert (fewer >= highest).all()


def test_ranks_are_nearer_to_equal_than_experts_in_their_order():
    loads = torch.distributions.Pareto(1.0, 1.2).sample((16, 64))
    ranks, slots = 8, 80
    placed = place_replicas(loads, num_slots=slots, num_ranks=ranks)
    ours = rank_loads(loads, placed, ranks)
    plain = loads.unflatten(-1, (ranks, -1)).sum(-1)
    mean = loads.sum(-1) / ranks
    assert ((ours.amax(-1) / mean) < (plain.amax(-1) / mean)).all()
    assert (ours.amax(-1) / mean).median() < 1.02
    torch.testing.assert_close(ours.sum(-1), loads.double().sum(-1))


def test_layers_are_placed_each_for_itself_and_the_longest_list_says_how_wide_all_are():
    loads = torch.tensor([[8, 1, 1], [1, 1, 1]])
    placed = place_replicas(loads, num_slots=6, num_ranks=2)
    alone = [place_replicas(row, num_slots=6, num_ranks=2) for row in loads]
    assert torch.equal(placed.replica_count, torch.tensor([[4, 1, 1], [2, 2, 2]]))
    assert placed.logical_to_physical.shape == (2, 3, 4)
    for layer, one in enumerate(alone):
        assert torch.equal(placed.physical_to_logical[layer], one.physical_to_logical)
        width = one.logical_to_physical.shape[-1]
        assert torch.equal(placed.logical_to_physical[layer, :, :width], one.logical_to_physical)


def test_two_replicas_of_an_expert_are_on_two_ranks_where_loads_allow_it():
    placed = place_replicas(torch.zeros(4), num_slots=8, num_ranks=2)
    assert placed.replica_count.tolist() == [2, 2, 2, 2]
    on_ranks = placed.physical_to_logical.unflatten(0, (2, 4)).sort(-1).values
    assert on_ranks.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"loads": [1, 2]}, TypeError, "loads: expected a tensor of dtype"),
        ({"loads": torch.tensor([1.0, torch.nan])}, ValueError, "loads: expected finite numbers"),
        ({"loads": torch.tensor([1, -1])}, ValueError, "loads: expected finite numbers of 0"),
        ({"loads": torch.ones(4, device="meta")}, ValueError, "loads: expected a plain"),
        ({"num_slots": 7}, ValueError, "num_slots: expected a multiple of num_ranks = 2"),
        ({"num_slots": 2}, ValueError, "num_slots: expected a multiple .* of E = 4 or more"),
        ({"num_slots": 8.0}, TypeError, "num_slots: expected an int"),
        ({"num_ranks": 0}, ValueError, "num_ranks: expected an int of 1 or more"),
        ({"num_ranks": True}, TypeError, "num_ranks: expected an int"),
    ],
)
def test_bad_arguments_are_named(changed, error, said):
    arguments = {"loads": torch.ones(4), "num_slots": 6, "num_ranks": 2, **changed}
    with pytest.raises(error, match=f"^{said}.*got "):
        place_replicas(**arguments)
