"""Tuning ``plan``: candidates are held to the formula before they are timed.

What is kept applies from then on. Kernels run in Triton's interpreter.
"""

import dataclasses
import json
from pathlib import Path

import pytest
from scripts import printed

from moe_routing.planning import PlanProblem
from moe_routing_backends.triton.planning import tune
from moe_routing_backends.triton.planning.launches import MOST_PAIRS, PlanLaunch
from moe_routing_registry import DeviceInfo

CPU = DeviceInfo(type="cpu", platform="cpu")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Tune in a process of its own, once for each way."""
    found = {}

    def run(how):
        if how not in found:
            script = Path(__file__).with_name("interpreted_plan_tune.py")
            home = str(tmp_path_factory.mktemp(how))
            found[how] = json.loads(printed(script, how, XDG_CACHE_HOME=home))
        return found[how]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "where", "sentence"),
    [("places", "wrong", "other bits"), ("raises", "unusable", "registers")],
)
def test_what_plans_wrong_or_does_not_run_is_said_and_never_used(tuned, how, where, sentence):
    found = tuned(how)
    several = [launch for launch in found["candidates"] if launch[0] > 1]
    assert len(found["tuned"][where]) >= len(several) > 0
    assert all(sentence in said for said in found["tuned"][where])
    assert all(said.startswith(("2 launches", "3 launches")) for said in found["tuned"][where])
    assert {step["launch"]["launches"] for step in found["tuned"]["steps"]} == {1}


@pytest.mark.slow
def test_where_the_launch_in_use_plans_wrong_nothing_is_kept(tuned):
    found = tuned("in-use")
    assert "nothing is tuned" in found["error"]
    assert found["source"] == "the derived table"


@pytest.mark.slow
@pytest.mark.parametrize(("how", "layout"), [("places", "sorted"), ("blocks", "blocks")])
def test_the_fastest_that_is_right_is_kept_with_the_rules_of_route_and_applies(tuned, how, layout):
    found = tuned(how)
    assert found["rule"] == [[16, layout]]
    assert found["route_kept"]
    assert found["source"] == found["tuned"]["table"]
    assert "the derived table" in found["tuned"]["before"]
    assert [timed["tokens"] for timed in found["tuned"]["timed"]] == [3, 20]
    for timed in found["tuned"]["timed"]:
        assert timed["us"] <= timed["us_before"]
    kept = [[step["pairs"], list(step["launch"].values())] for step in found["tuned"]["steps"]]
    assert found["kept"][: len(kept)] == kept
    assert found["kept"][-1][0] is None


@pytest.mark.slow
def test_every_candidate_plans_as_the_formula_in_both_layouts(tuned):
    assert tuned("blocks")["tuned"]["wrong"] == tuned("blocks")["tuned"]["unusable"] == []
    assert tuned("changes")["tuned"]["wrong"] == tuned("changes")["tuned"]["unusable"] == []


@pytest.mark.slow
def test_progress_says_first_what_there_is_to_do(tuned):
    (first_said, first, every), (last_said, last, _), _ = tuned("places")["steps_said"]
    assert first_said.startswith("about ")
    assert "kernels to compile" in first_said
    assert (first, last_said, last) == (0, "done", every)


@pytest.mark.slow
def test_where_the_fastest_changes_between_two_sizes_the_change_is_looked_for(tuned):
    found = tuned("changes")
    steps = [(step["pairs"], step["launch"]["launches"]) for step in found["tuned"]["steps"]]
    assert steps == [(46, 1), (None, 3)]  # pairs: between 23 and 24 tokens of two
    between = [T for T in found["sizes"] if 1 < T < 40]
    assert {23, 24} < set(between)
    assert len(between) < 10  # the sizes between were halved


@pytest.mark.parametrize("changes", [{"drop": "last"}, {"layout": "masked", "drop": "last"}])
def test_a_problem_with_a_capacity_is_refused_before_anything_is_measured(changes):
    problem = dataclasses.replace(PlanProblem(num_experts=16, topk=2), **changes)
    with pytest.raises(ValueError, match=r"^problem: expected one without a capacity"):
        tune.tune(problem, CPU)


@pytest.mark.parametrize("experts", [16, 128, 4096])
def test_candidates_have_warps_enough_and_serve_only_as_many_pairs_as_they_may(experts):
    problem = PlanProblem(num_experts=experts, topk=4)
    offered = tune.candidates(problem)
    assert {launch.launches for launch in offered} == {1, 2, 3}
    assert len(offered) == len(set(offered))
    assert min(launch.num_warps for launch in offered) >= experts / 512
    inputs = tune.PlanInputs(problem, CPU, 1)
    for launch in offered:
        serves = [
            pairs for pairs in (4, 1 << 13, 1 << 17, 1 << 20) if inputs.serves(launch, pairs // 4)
        ]
        assert max(serves) == MOST_PAIRS.get(launch.launches, 1 << 20)
    assert not inputs.serves(PlanLaunch(1, 32, 4, tile=2048), 4)  # 16 pairs
