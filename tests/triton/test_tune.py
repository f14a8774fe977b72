"""Tuning: candidates are checked before they are timed, and what is kept applies from then on.

Kernels run in Triton's interpreter.
"""

import json
from pathlib import Path

import pytest
from scripts import printed

from moe_routing_backends.triton.tuning.tune import CACHE, Inputs
from moe_routing_registry import DeviceInfo, RoutingProblem, RoutingSpec

CPU = DeviceInfo(type="cpu", platform="cpu")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Tune in processes of their own.

    The rows variant is wrong, raises, or is faster from 24 tokens on.
    """

    def run(how):
        script = Path(__file__).with_name("interpreted_tune.py")
        return json.loads(printed(script, how, XDG_CACHE_HOME=str(tmp_path_factory.mktemp(how))))

    return {how: run(how) for how in ("wrong", "raises", "changes")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "where", "sentence"),
    [("wrong", "wrong", "other bits"), ("raises", "unusable", "registers")],
)
def test_what_computes_wrong_or_does_not_run_is_said_and_never_used(tuned, how, where, sentence):
    found = tuned[how]
    assert {"cooperative", "thread_per_row"} <= set(found["offered"])
    assert len(found["tuned"][where]) == found["of_rows"] > 0
    assert all(sentence in said for said in found["tuned"][where])
    assert "thread_per_row" not in {step["variant"] for step in found["kept"]}


@pytest.mark.slow
def test_the_fastest_that_is_right_is_kept_and_applies(tuned):
    found = tuned["wrong"]
    assert found["kept"] == [found["last_right"]]
    assert found["source"] == found["tuned"]["table"]
    assert Path(found["source"]).is_file()
    assert "the derived table" in found["tuned"]["before"]
    assert [timed["tokens"] for timed in found["tuned"]["timed"]] == [1, 3]
    assert all(timed["us"] <= timed["us_before"] for timed in found["tuned"]["timed"])


@pytest.mark.slow
def test_progress_says_first_what_there_is_to_do_and_counts_compilations_and_measurements(tuned):
    found = tuned["wrong"]
    (first_said, first, every), (last_said, last, _), reports = found["steps_said"]
    assert (first, last, reports) == (0, every, every + 2)
    launches = found["of_all"]
    assert (
        first_said
        == f"about 1 min: {launches} kernels to compile, about {2 * launches} measurements"
    )
    assert (every, last_said) == (3 * launches, "done")


@pytest.mark.slow
def test_where_the_fastest_changes_between_two_sizes_the_change_is_looked_for(tuned):
    found = tuned["changes"]
    assert [timed["tokens"] for timed in found["tuned"]["timed"]] == [1, 40]
    assert [(step["tokens"], step["launch"]["variant"]) for step in found["tuned"]["steps"]] == [
        (23, "cooperative"),
        (None, "thread_per_row"),
    ]
    between = [T for T in found["sizes"] if 1 < T < 40]
    assert {23, 24} < set(between)
    assert len(between) < 10  # the sizes between were halved


def taken(inputs, tokens):
    """Return the logits and outputs that a measurement of so many tokens takes in turns.

    The list ends where the first come again.
    """
    calls = []
    turn = inputs.turns(lambda logits, *, out: calls.append((logits, *out)), tokens)
    while len(calls) < 2 or calls[-1][0].data_ptr() != calls[0][0].data_ptr():
        turn()
    return calls[:-1]


@pytest.mark.parametrize(("dtype", "experts", "topk"), [("bfloat16", 64, 6), ("float32", 200, 5)])
def test_inputs_are_aligned_and_those_of_more_tokens_begin_with_those_of_fewer(
    dtype, experts, topk
):
    inputs = Inputs(
        RoutingProblem(spec=RoutingSpec(family="f"), num_experts=experts, topk=topk, dtype=dtype),
        CPU,
        50_001,
    )
    few, more, many = (taken(inputs, T) for T in (3, 401, 50_001))
    assert (len(few), len(more), len(many)) == (16, 16, 4)
    assert len(many[0][0]) == 50_001
    assert all(
        tensor.data_ptr() % 16 == 0
        for one in (few, more, many)
        for tensors in one
        for tensor in tensors
    )
    assert all(a[0].data_ptr() == b[0].data_ptr() for a, b in zip(few, more, strict=True))
    assert all(a[0].data_ptr() == b[0].data_ptr() for a, b in zip(few[::4], many, strict=True))


def test_as_many_inputs_take_turns_as_the_cache_holds():
    inputs = Inputs(
        RoutingProblem(spec=RoutingSpec(family="f"), num_experts=64, topk=2, dtype="float32"),
        CPU,
        30_000,
    )
    fits = {T: len(taken(inputs, T)) for T in (2048, 2049, 4096, 4097, 30_000)}
    assert fits == {2048: 16, 2049: 8, 4096: 8, 4097: 4, 30_000: 4}
    assert CACHE == 16 * 2048 * 64 * 4
