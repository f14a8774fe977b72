"""``moe_routing.plan`` on tensors that are no plain memory, and on fakes.

The kit (``tests/conformance/test_plan_kit.py``) holds what it computes.
"""

from __future__ import annotations

import pytest
import torch
from mutants import Mutant, registered
from mutants.planning import Reference
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import moe_routing
from moe_routing._dispatch import chosen
from moe_routing.planning import call

IDS = torch.tensor([[1, 0], [1, 2], [-1, 1]], dtype=torch.int32)


class Subclass(torch.Tensor):
    """A tensor as users derive one, without code of its own."""


class Recording(Reference):
    """Writes down the type of the ids that it is called with, and whether weights are no memory."""

    called_with: list[tuple] = []  # noqa: RUF012 -- the tests clear it

    def plan(self, ids, capacity, weights):
        lazy = weights is not None and (weights.is_neg() or weights._is_zerotensor())
        self.called_with.append((type(ids), lazy))
        return super().plan(ids, capacity, weights)


@pytest.fixture
def recording():
    """Register the backend that records, and yield its name."""
    Recording.called_with.clear()
    with registered(Mutant(Recording, "", operation="plan")) as name:
        yield name


def same(made, expected):
    return all(
        torch.equal(one, other)
        for one, other in zip(made, expected, strict=True)
        if other is not None
    )


@pytest.mark.parametrize("out", [False, True])
def test_a_subclass_of_tensor_is_planned(out):
    plain = moe_routing.plan(IDS, 3, block=2)
    given = moe_routing.plan(IDS.flip(0), 3, block=2) if out else None
    for _ in range(2):
        made = moe_routing.plan(IDS.as_subclass(Subclass), 3, block=2, out=given)
        assert same(made, plain)
        assert (made is given) == out


@pytest.mark.parametrize(
    "weights",
    [
        torch._neg_view(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])),
        torch._efficientzerotensor(3, 2),
    ],
    ids=["negated lazily", "zeros without memory"],
)
def test_a_kernel_is_given_memory_that_holds_the_weights(weights, recording):
    real = weights.clone().resolve_neg() + 0.0
    options = {"capacity": 1, "drop": "least_weight", "backend": recording}
    expected = moe_routing.plan(IDS, 3, weights=real, **options)
    for _ in range(2):
        assert same(moe_routing.plan(IDS, 3, weights=weights, **options), expected)
    assert Recording.called_with == [(torch.Tensor, False)] * 3


def test_no_kernel_is_called_where_operators_are_faked(recording):
    for calls in (1, 2):
        moe_routing.plan(IDS, 3, backend=recording)
        with FakeTensorMode(allow_non_fake_inputs=True):
            made = moe_routing.plan(IDS, 3, backend=recording)
        assert type(made.order) is FakeTensor
        assert Recording.called_with == [(torch.Tensor, False)] * calls


def test_a_part_of_out_in_the_place_of_another_is_refused_in_later_calls_too():
    """Both have one element, so only their places tell them apart."""
    ids = torch.zeros(1, 1, dtype=torch.int32)
    out = moe_routing.plan(ids, 3, block=1)
    wrong = out._replace(block_experts=None, num_dropped=out.block_experts)
    for _ in range(3):
        with pytest.raises(TypeError, match=r"^out: .* for block_experts, got None"):
            moe_routing.plan(ids, 3, block=1, out=wrong)
        assert moe_routing.plan(ids, 3, block=1, out=out) is out


def test_a_compiled_function_fills_a_plan():
    expected = moe_routing.plan(IDS, 3, block=2)
    out = moe_routing.plan(IDS.flip(0), 3, block=2)
    compiled = torch.compile(
        lambda ids, out: moe_routing.plan(ids, 3, block=2, out=out),
        fullgraph=True,
        backend="aot_eager",
    )
    assert same(compiled(IDS, out), expected)
    assert same(out, expected)


def test_the_operator_refuses_what_plan_refuses():
    with pytest.raises(ValueError, match=r"^num_experts: expected an int from 1 to 4096, got 5000"):
        torch.ops.moe_routing.plan(IDS, None, 5000, 1, 0, "sorted", "nothing", None)


def test_a_choice_is_made_once_for_calls_of_the_operator(recording, monkeypatch):
    made = []
    monkeypatch.setattr(
        call, "chosen", lambda *arguments: made.append(arguments) or chosen(*arguments)
    )
    for _ in range(3):
        torch.ops.moe_routing.plan(IDS, None, 3, 1, 0, "sorted", "nothing", recording)
    assert len(made) == 1
    assert len(Recording.called_with) == 3
