"""The launch table of ``plan``: which launch serves how many pairs; and what is no table."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_routing.planning import PlanProblem
from moe_routing_backends import triton
from moe_routing_backends.triton.kernels.spec import Launch
from moe_routing_backends.triton.planning.launches import FALLBACK, PlanLaunch, PlanStep
from moe_routing_backends.triton.planning.planner import TritonPlanner
from moe_routing_backends.triton.planning.table import PlanTable, steps_up_to
from moe_routing_backends.triton.planning.tune import candidates
from moe_routing_backends.triton.tuning import choose, store, table
from moe_routing_registry import DeviceInfo

H100 = DeviceInfo(type="cuda", platform="cuda", arch="sm_90", name="NVIDIA H100", warp_sizes=(32,))
GFX = DeviceInfo(type="cuda", platform="rocm", arch="gfx942", warp_sizes=(64,))
PROBLEM = PlanProblem(num_experts=128, topk=8)
BLOCKS = PlanProblem(num_experts=128, topk=8, layout="blocks", block=64)
MASKED = PlanProblem(num_experts=128, topk=8, layout="masked", drop="last")
GOOD = [None, 3, 128, 2, 256, 64, 4]
STEPS = (PlanStep(100, PlanLaunch(1, 16, 4)), PlanStep(None, PlanLaunch(3, 128, 2, group=2)))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store.own_table.cache_clear()
    yield tmp_path
    store.own_table.cache_clear()


def made(*lines, experts=128, layout="sorted", **changes):
    """Return a file with one rule of ``plan``."""
    rule = {"experts": experts, "layout": layout, "steps": list(lines)}
    plans = {"provenance": "by hand", "rules": [rule], **changes}
    return json.dumps({"schema": 1, "provenance": "x", "rules": [], "plans": plans})


def steps_on(device, problem):
    return choose.plan_table_for(device, problem).steps(problem)


def test_the_table_of_sm_90_was_measured_on_an_h100_and_notes_say_so():
    (said,) = triton.notes(PROBLEM, H100)
    assert "tables/sm_90.json" in said
    assert "measured" in said
    assert "H100" in said


def test_few_pairs_get_one_launch_and_many_three():
    steps = steps_on(H100, PROBLEM)
    assert (steps[0].launch.launches, steps[-1].launch.launches) == (1, 3)
    assert steps[-1].pairs is None


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_other_devices_have_the_launches_of_sm_90_and_notes_say_that_nothing_was_measured(arch):
    device = DeviceInfo(type="cuda", platform="cuda", arch=arch, warp_sizes=(32,))
    assert steps_on(device, PROBLEM) == steps_on(H100, PROBLEM)
    (said,) = triton.notes(PROBLEM, device)
    assert said.startswith("launch parameters from the derived table (from the table of sm_90")
    assert said.endswith(f"unmeasured on {arch})")


def test_a_planner_takes_the_launches_of_the_table():
    store.keep_plans(H100, {(128, "sorted"): STEPS})
    planner = TritonPlanner(PROBLEM, H100)
    assert planner._launches == [step.launch for step in STEPS]
    assert planner._limits == [100]


def of(*keys):
    """Return a table in which a rule's last group says which it is."""
    rules = {
        key: (PlanStep(None, PlanLaunch(3, 128, 2, group=1 << place)),)
        for place, key in enumerate(keys)
    }
    return PlanTable("x", "by hand", rules), lambda problem, table: next(
        key for key in keys if table.rules[key] == table.steps(problem)
    )


@pytest.mark.parametrize(
    ("experts", "nearest"),
    [(1, 16), (31, 16), (33, 64), (64, 64), (127, 64), (129, 256), (999, 256)],
)
def test_the_rule_of_the_least_ratio_of_experts_applies(experts, nearest):
    found, rule_of = of((16, "sorted"), (64, "sorted"), (256, "sorted"))
    problem = PlanProblem(num_experts=experts, topk=2)

    assert rule_of(problem, found)[0] == nearest


def test_the_masked_layout_has_the_rules_of_blocks_and_other_layouts_are_a_last_resort():
    found, rule_of = of((128, "blocks"), (64, "sorted"))
    assert rule_of(BLOCKS, found) == (128, "blocks")
    assert rule_of(MASKED, found) == (128, "blocks")
    assert rule_of(PROBLEM, found) == (64, "sorted")
    found, rule_of = of((128, "blocks"))
    assert rule_of(PROBLEM, found) == (128, "blocks")


@pytest.mark.parametrize(("experts", "warps"), [(512, 1), (513, 2), (2048, 4), (4096, 8)])
def test_programs_have_warps_enough_for_vectors_over_all_experts(experts, warps):
    found = PlanTable("x", "by hand", {(128, "sorted"): (PlanStep(None, PlanLaunch(3, 128, 1)),)})
    (step,) = found.steps(PlanProblem(num_experts=experts, topk=2))
    assert step.launch.num_warps == warps


def test_where_the_last_line_has_an_end_three_launches_serve_what_is_beyond():
    rules = table.parse(made([64, 1, 16, 1, 256, 64, 1]), "x").plans
    assert rules.steps(PROBLEM)[-1] == PlanStep(None, FALLBACK)
    assert PlanTable("x", "by hand", {}).steps(PROBLEM) == (PlanStep(None, FALLBACK),)


def test_a_measured_launch_serves_no_more_pairs_than_it_may():
    one, two, three = PlanLaunch(1, 16, 1), PlanLaunch(2, 64, 2), PlanLaunch(3, 128, 2)
    assert steps_up_to([(10**6, one), (None, three)]) == (
        PlanStep(1 << 13, one),
        PlanStep(None, three),
    )
    assert steps_up_to([(1 << 14, two), (1 << 15, one), (None, two)]) == (
        PlanStep(1 << 14, two),
        PlanStep(1 << 17, two),
    )


# The user's own table.


def test_the_users_own_rule_applies_where_it_is_as_near():
    store.keep_plans(H100, {(128, "sorted"): STEPS})
    assert steps_on(H100, PROBLEM) == STEPS
    assert "tuned on this NVIDIA H100" in triton.notes(PROBLEM, H100)[0]
    assert "tuned" not in triton.notes(BLOCKS, H100)[0]
    far = store.keep_plans(H100, {(4096, "blocks"): STEPS})
    assert "tuned" not in triton.notes(BLOCKS, H100)[0]
    assert str(far) in triton.notes(PlanProblem(num_experts=4096, topk=8, layout="blocks"), H100)[0]


def test_rules_of_route_and_plan_are_kept_in_one_file_and_none_is_lost():
    route = {("logits", 16, 64, 8): (table.Step(float("inf"), Launch("cooperative", 1, 1, 1)),)}
    store.keep_plans(H100, {(64, "sorted"): STEPS})
    store.keep(H100, route)
    store.keep_plans(H100, {(128, "sorted"): STEPS})
    own = store.own_table(H100)
    assert own.rules == route
    assert own.plans.rules == {(64, "sorted"): STEPS, (128, "sorted"): STEPS}


def test_a_written_table_reads_back_the_same():
    shipped = table.usable(choose.SHIPPED / "sm_90.json")
    text = table.to_json("sm_90", shipped.provenance, shipped.rules, plans=shipped.plans)
    assert text == (choose.SHIPPED / "sm_90.json").read_text()


def test_every_candidate_can_be_kept():
    for experts in (16, 4096):
        problem = PlanProblem(num_experts=experts, topk=8)
        for launch in candidates(problem):
            steps = steps_up_to([(None, launch)])
            store.keep_plans(GFX, {(experts, "sorted"): steps})
            assert store.own_table(GFX).plans.rules[experts, "sorted"] == steps


BROKEN = {
    "no section": (
        '{"schema": 1, "provenance": "x", "rules": [], "plans": 3}',
        "plans: expected dict",
    ),
    "no rules": (made(rules=None), "plans: rules: expected list, got None"),
    "no provenance": (made(GOOD, provenance=1), "plans: provenance: expected str, got 1"),
    "no experts": (made(GOOD, experts=0), "plans: experts: expected 1 to 4096, got 0"),
    "too many experts": (made(GOOD, experts=4097), "plans: experts: expected 1 to 4096"),
    "true experts": (made(GOOD, experts=True), "plans: experts: expected int, got True"),
    "no such layout": (made(GOOD, layout="masked"), "plans: layout: expected 'sorted' or 'blocks'"),
    "no list": (made("x"), "[pairs or null, launches, size, num_warps, tile, step, group]"),
    "too short": (made(GOOD[:-1]), "[pairs or null, launches, size"),
    "falling": (made([64, *GOOD[1:]], [64, *GOOD[1:]]), "rising pairs"),
    "no pairs": (made([0, *GOOD[1:]]), "rising pairs"),
    "fractions": (made([64.0, *GOOD[1:]]), "rising pairs"),
    "true pairs": (made([True, *GOOD[1:]]), "rising pairs"),
    "lines after null": (made(GOOD, [64, *GOOD[1:]]), "null in the last line alone"),
    "two nulls": (made(GOOD, GOOD), "null in the last line alone"),
    "four launches": (made([None, 4, *GOOD[2:]]), "launches of 1, 2 or 3"),
    "no launches": (made([None, 0, *GOOD[2:]]), "launches of 1, 2 or 3"),
    "true launches": (made([64, True, *GOOD[2:]]), "launches of 1, 2 or 3"),
    "a list of launches": (made([64, [1], *GOOD[2:]]), "launches of 1, 2 or 3"),
    "no power": (made([None, 3, 96, 2, 256, 32, 4]), "powers of two"),
    "no group": (made([None, 3, 128, 2, 256, 64, 0]), "powers of two"),
    "negative": (made([None, 3, 128, -2, 256, 64, 4]), "powers of two"),
    "a float": (made([None, 3, 128.0, 2, 256, 64, 4]), "powers of two"),
    "true": (made([None, 3, 128, True, 256, 64, 4]), "powers of two"),
    "a step beyond the size": (made([None, 3, 32, 2, 256, 64, 4]), "a step of at most the size"),
    "one launch for any number": (made([None, 1, 32, 4, 256, 64, 1]), "at most 8192 pairs"),
    "one launch for many": (made([8193, 1, 32, 4, 256, 64, 1]), "at most 8192 pairs"),
    "two launches for any number": (made([None, 2, 64, 4, 256, 64, 1]), "at most 131072 pairs"),
    "many at once": (made([64, 1, 512, 4, 256, 64, 1]), "at most 256 pairs placed at a time"),
    "a long step": (made([None, 3, 512, 2, 256, 512, 4]), "at most 256 pairs placed at a time"),
    "a long size": (made([None, 3, 8192, 2, 256, 64, 4]), "size of at most 4096"),
    "many warps": (made([None, 3, 128, 32, 256, 64, 4]), "num_warps of at most 16"),
    "a long tile": (made([64, 1, 16, 4, 1 << 40, 64, 1]), "tile of at most 4096"),
    "a long group": (made([None, 3, 128, 2, 256, 64, 2048]), "group of at most 1024"),
}


@pytest.mark.parametrize(("text", "complaint"), BROKEN.values(), ids=BROKEN)
def test_a_broken_table_is_ignored_with_a_warning_and_repaired_by_tuning(text, complaint):
    path = store.user_path(H100)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    pattern = re.escape(str(path)) + ".*" + re.escape(complaint)
    with pytest.warns(RuntimeWarning, match=pattern):
        assert "tuned" not in triton.notes(PROBLEM, H100)[0]
    with pytest.warns(RuntimeWarning, match=pattern):
        store.keep_plans(H100, {(128, "sorted"): STEPS})
    assert steps_on(H100, PROBLEM) == STEPS


# Measurements, and the table that they come to.


@pytest.mark.slow
def test_a_table_is_made_of_measurements_and_of_what_ships_otherwise(tmp_path):
    kept, written = tmp_path / "out.json", tmp_path / "table.json"
    rule = {
        "key": [64, "sorted"],
        "K": 6,
        "launches": ["1 16 4 256 64 1", "3 128 2 256 64 4"],
        "us": {"1": {"0": 3.0, "1": 7.0}, "9": {"0": 3.0, "1": 7.0}, "99": {"0": 9.0, "1": 7.0}},
    }
    about = {"arch": "sm_90", "with": "torch 2", "device": "NVIDIA H100", "date": "2026-11-27"}
    kept.write_text(json.dumps({**about, "rules": [rule]}))
    script = Path(__file__).parents[2] / "benchmarks" / "plan_tables.py"
    subprocess.run([sys.executable, script, "table", kept, written], check=True)
    found, shipped = (table.usable(path) for path in (written, choose.SHIPPED / "sm_90.json"))
    assert (found.rules, found.provenance) == (shipped.rules, shipped.provenance)
    assert found.plans.rules == {
        **shipped.plans.rules,
        (64, "sorted"): (
            PlanStep(179, PlanLaunch(1, 16, 4)),  # between 54 and 594 pairs
            PlanStep(None, PlanLaunch(3, 128, 2, group=4)),
        ),
    }
    assert "on an NVIDIA H100 on 2026-11-27" in found.plans.provenance
