"""Launch tables: which kernel serves how many tokens.

A table that cannot be read is tested too.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_routing_backends.triton.kernels import supports
from moe_routing_backends.triton.kernels.spec import kind
from moe_routing_backends.triton.tuning import choose, store, table
from moe_routing_registry import DeviceInfo, RoutingProblem, RoutingSpec

H200 = DeviceInfo(type="cuda", platform="cuda", arch="sm_90", name="NVIDIA H200", warp_sizes=(32,))
RULE = (
    '{"schema": 1, "provenance": "x", "rules": '
    '[{"kind": "logits", "bits": 16, "experts": 8, "width": 8, "steps": [%s]}]}'
)
GEMMA4 = RoutingSpec(family="gemma4", renormalize=True, per_expert_scale=True)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store.own_table.cache_clear()
    yield tmp_path
    store.own_table.cache_clear()


def steps_on(device, asked):
    return choose.table_for(device, asked).steps(asked)


def problem(**changes):
    return RoutingProblem(
        **{"spec": GEMMA4, "num_experts": 128, "topk": 8, "dtype": "bfloat16", **changes}
    )


@pytest.mark.usefixtures("home")
def test_the_shipped_table_applies_to_an_h200_and_says_that_it_was_measured_on_an_h100():
    assert "H100" in choose.table_for(H200, problem()).provenance


@pytest.mark.usefixtures("home")
def test_few_tokens_get_the_cooperative_kernel_and_many_the_filter():
    steps = steps_on(H200, problem())
    assert steps[0].launch.variant == "cooperative"
    assert steps[-1].launch.variant == "filter"
    assert steps[-1].tokens == math.inf


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 60, "topk": 4},
        {"layout": "strided"},
        {"topk": 22, "num_experts": 512},
        {"spec": RoutingSpec(family="f", selection="sparsemixer"), "topk": 2},
        {"spec": RoutingSpec(family="f", num_groups=8, topk_groups=4, topk_per_group=True)},
    ],
)
@pytest.mark.usefixtures("home")
def test_what_no_other_variant_can_do_goes_to_the_cooperative_kernel(changes):
    assert {s.launch.variant for s in steps_on(H200, problem(**changes))} == {"cooperative"}


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, [1, 4, 8]),
        ({"num_experts": 2048, "layout": "strided", "dtype": "float32"}, [1, 4, 8]),
        ({"spec": GEMMA4.replace(renormalize=False)}, [1, 4, 8]),
        ({"spec": GEMMA4.replace(renormalize=False), "num_experts": 384}, [1, 2, 2]),
        ({"spec": GEMMA4.replace(renormalize=False), "num_experts": 2048}, [1, 1, 1]),
    ],
)
@pytest.mark.usefixtures("home")
def test_recorded_ids_have_a_kernel_and_a_rule_of_their_own(changes, rows):
    asked = problem(operands=frozenset({"ids", "counts"}), **changes)
    steps = steps_on(H200, asked)
    assert [s.launch.variant for s in steps] == ["weigh"] * 3
    assert [s.launch.block_t for s in steps] == rows
    assert steps[-1].tokens == math.inf
    assert all(supports(asked, s.launch) for s in steps)
    assert "rule for recorded ids" in choose.describe_table(H200, asked)
    assert not any(supports(asked, s.launch) for s in steps_on(H200, problem(**changes)))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.usefixtures("home")
def test_rows_that_threads_of_the_filter_cannot_share_evenly_go_to_the_thread_per_row_kernel(
    renormalize,
):
    spec = GEMMA4.replace(renormalize=renormalize)
    assert steps_on(H200, problem(spec=spec, num_experts=72))[-1].launch.variant == "thread_per_row"
    assert steps_on(H200, problem(spec=spec, num_experts=96))[-1].launch.variant == "filter"


SIGMOID = RoutingSpec(family="f", score="sigmoid", selection="scores_plus_bias", renormalize=True)


@pytest.mark.parametrize(
    ("spec", "num_experts", "variant"),
    [
        (SIGMOID, 128, "filter"),
        (SIGMOID.replace(score="sqrtsoftplus"), 128, "block"),
        (SIGMOID.replace(score="softmax"), 128, "block"),
        (SIGMOID.replace(logit_softcap=5.0), 128, "block"),
        (SIGMOID, 72, "block"),  # nine chunks of 8: no two threads can share them
    ],
)
@pytest.mark.usefixtures("home")
def test_biased_sigmoids_go_to_the_filter_where_threads_share_rows_evenly(
    spec, num_experts, variant
):
    assert steps_on(H200, problem(spec=spec, num_experts=num_experts))[-1].launch.variant == variant


@pytest.mark.usefixtures("home")
def test_where_eight_threads_cannot_share_a_row_four_do():
    steps = steps_on(
        H200, problem(spec=SIGMOID, num_experts=160)
    )  # the rule for 256 has eight threads: 20 chunks
    assert {(s.launch.variant, s.launch.threads_per_row) for s in steps} >= {("filter", 4)}
    assert "thread_per_row" not in {s.launch.variant for s in steps}


@pytest.mark.parametrize(("arch", "variant"), [("sm_80", "block"), ("sm_100", "filter")])
@pytest.mark.usefixtures("home")
def test_without_the_filter_biased_sigmoids_are_routed_as_other_biased_scores(arch, variant):
    device = DeviceInfo(type="cuda", platform="cuda", arch=arch, warp_sizes=(32,))
    assert steps_on(device, problem(spec=SIGMOID))[-1].launch.variant == variant


@pytest.mark.usefixtures("home")
def test_a_table_without_a_rule_for_biased_sigmoids_has_one_for_biased_scores():
    rule = RULE.replace('"logits"', '"bias"') % '[null, "block", 8, 4, 1]'
    asked = problem(spec=SIGMOID)
    assert [s.launch.variant for s in table.parse(rule, "x").steps(asked)] == ["block"]


@pytest.mark.usefixtures("home")
def test_an_unknown_arch_gets_the_rule_of_thumb_and_says_so():
    found = choose.table_for(DeviceInfo(type="cuda", platform="cuda", arch="sm_80"), problem())
    assert found.source == "the derived table"
    assert "unmeasured on sm_80" in found.provenance


@pytest.mark.parametrize(("arch", "filters"), [("sm_80", False), ("sm_100", True)])
@pytest.mark.usefixtures("home")
def test_only_devices_with_packed_minima_get_the_filter_kernel(arch, filters):
    device = DeviceInfo(type="cuda", platform="cuda", arch=arch, warp_sizes=(32,))
    assert ("filter" in {s.launch.variant for s in steps_on(device, problem())}) == filters


@pytest.mark.usefixtures("home")
def test_groups_of_many_tokens_go_to_the_block_kernel_as_long_as_the_lists_are_short():
    grouped = RoutingSpec(family="f", num_groups=8, topk_groups=4)
    assert [steps_on(H200, problem(spec=grouped, topk=k))[-1].launch.variant for k in (8, 9)] == [
        "block",
        "cooperative",
    ]


@pytest.mark.parametrize(
    ("platform", "arch", "early"),
    [
        ("cuda", "sm_80", False),
        ("cuda", "sm_89", False),
        ("cuda", "sm_90", True),
        ("cuda", "sm_120", True),
        ("rocm", "gfx942", False),
    ],
)
def test_kernels_start_early_on_nvidias_devices_from_compute_capability_9_on(platform, arch, early):
    assert choose.supports_pdl(DeviceInfo(type="cuda", platform=platform, arch=arch)) is early


@pytest.mark.usefixtures("home")
def test_a_wave_of_64_threads_gets_twice_the_rows():
    narrow = steps_on(H200, problem())[-1].launch
    wide = steps_on(
        DeviceInfo(type="cuda", platform="rocm", arch="gfx942", warp_sizes=(64,)), problem()
    )[-1].launch
    assert wide.block_t == 2 * narrow.block_t


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "Expecting"),
        ("[]", "schema: expected 1, got list"),
        ('{"schema": 2}', "schema: expected 1, got 2"),
        ('{"schema": 1, "provenance": "x"}', "rules: expected list, got None"),
        (RULE % '[8, "cooperative", 3, 1, 1]', "steps: expected rising tokens and powers of two"),
        (RULE % '["cooperative", 1, 1, 1]', "steps: expected [tokens or null"),
    ],
)
def test_a_table_that_cannot_be_used_is_ignored_with_a_warning_that_names_the_file(
    home, text, complaint
):
    path = store.user_path(H200)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert path.is_relative_to(home)
    with pytest.warns(RuntimeWarning, match=re.escape(str(path)) + ".*" + re.escape(complaint)):
        found = choose.table_for(H200, problem())
    assert "H100" in found.provenance


def test_a_written_table_reads_back_the_same():
    text = (choose.SHIPPED / "sm_90.json").read_text()
    rules = table.parse(text, "shipped").rules
    assert table.parse(table.to_json("sm_90", "x", rules), "again").rules == rules
    assert json.loads(text)["arch"] == "sm_90"


@pytest.mark.slow
def test_the_shipped_table_is_what_the_kept_measurement_comes_to(tmp_path):
    benchmarks, made = Path(__file__).parents[2] / "benchmarks", tmp_path / "sm_90.json"
    kept = max((benchmarks / "results").glob("h100-*-tables.json"))
    command = [sys.executable, benchmarks / "launch_tables.py", "table", kept, made]
    subprocess.run(command, check=True)
    assert made.read_text() == (choose.SHIPPED / "sm_90.json").read_text()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (GEMMA4, "logits"),
        (RoutingSpec(family="f", renormalize=True, renorm_floor=1e-12), "row_sum"),
        (RoutingSpec(family="f", score="sigmoid", selection="scores_plus_bias"), "sigmoid_bias"),
        (
            RoutingSpec(
                family="f", score="sigmoid", selection="scores_plus_bias", logit_softcap=5.0
            ),
            "bias",
        ),
        (RoutingSpec(family="f", score="sigmoid", selection="logits_plus_bias"), "bias"),
        (RoutingSpec(family="f", num_groups=4, topk_per_group=True), "grouped"),
    ],
)
def test_specs_are_classed_by_what_is_done_for_every_expert(spec, expected):
    assert kind(spec) == expected
