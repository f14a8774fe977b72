"""Launch tables: which kernel serves how many tokens, and what happens to a table that cannot be read."""

import json
import math
import re

import pytest

from moe_routing_backends.triton import table
from moe_routing_backends.triton.plan import Launch, kind
from moe_routing_registry import DeviceInfo, RoutingProblem, RoutingSpec

H200 = DeviceInfo(type="cuda", platform="cuda", arch="sm_90", name="NVIDIA H200", warp_sizes=(32,))
RULE = '{"schema": 1, "provenance": "x", "rules": [{"kind": "logits", "bits": 16, "experts": 8, "width": 8, "steps": [%s]}]}'
GEMMA4 = RoutingSpec(family="gemma4", renormalize=True, per_expert_scale=True)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "user_path", lambda device: tmp_path / f"{device.arch}.json")
    table.table_for.cache_clear()
    yield tmp_path
    table.table_for.cache_clear()


def problem(**changes):
    return RoutingProblem(**{"spec": GEMMA4, "num_experts": 128, "topk": 8, "dtype": "bfloat16", **changes})


@pytest.mark.usefixtures("home")
def test_the_shipped_table_speaks_for_an_h200_and_says_where_it_was_measured():
    assert "H200" in table.table_for(H200).provenance


@pytest.mark.usefixtures("home")
def test_few_tokens_get_the_lanes_variant_and_many_the_rows_variant():
    steps = table.table_for(H200).steps(problem())
    assert steps[0].launch.variant == "lanes"
    assert steps[-1].launch.variant == "rows"
    assert steps[-1].tokens == math.inf


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 60, "topk": 4},
        {"layout": "strided"},
        {"topk": 22, "num_experts": 512},
        {"spec": RoutingSpec(family="f", selection="sparsemixer"), "topk": 2},
        {"spec": RoutingSpec(family="f", num_groups=8, topk_groups=4)},
    ],
)
@pytest.mark.usefixtures("home")
def test_what_the_rows_variant_cannot_do_goes_to_the_lanes_variant(changes):
    assert {s.launch.variant for s in table.table_for(H200).steps(problem(**changes))} == {"lanes"}


@pytest.mark.usefixtures("home")
def test_an_unknown_arch_gets_the_rule_of_thumb_and_says_so():
    found = table.table_for(DeviceInfo(type="cuda", platform="cuda", arch="sm_80"))
    assert found.source == "rule of thumb"
    assert "unmeasured on sm_80" in found.provenance


@pytest.mark.usefixtures("home")
def test_a_wave_of_64_lanes_gets_twice_the_rows():
    narrow = table.table_for(H200).steps(problem())[-1].launch
    wide = (
        table.table_for(DeviceInfo(type="cuda", platform="rocm", arch="gfx942", warp_sizes=(64,))).steps(problem())[-1].launch
    )
    assert wide.block_t == 2 * narrow.block_t


def test_the_users_own_table_is_asked_first(home):
    rules = {("logits", 16, 128, 8): (table.Step(math.inf, Launch("lanes", 8, 1, 4)),)}
    table.write(home / "sm_90.json", table.to_json("sm_90", "tuned here", rules))
    found = table.table_for(H200)
    assert found.provenance == "tuned here"
    assert found.steps(problem()) == rules["logits", 16, 128, 8]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "Expecting"),
        ("[]", "schema: expected 1, got list"),
        ('{"schema": 2}', "schema: expected 1, got 2"),
        ('{"schema": 1, "provenance": "x"}', "rules: expected list, got None"),
        (
            RULE % '[8, "lanes", 3, 1, 1]',
            "steps: expected rising tokens and powers of two",
        ),
        (
            RULE % '["lanes", 1, 1, 1]',
            "steps: expected [tokens or null",
        ),
    ],
)
def test_a_table_that_cannot_be_used_is_ignored_with_a_warning_that_names_the_file(home, text, complaint):
    (home / "sm_90.json").write_text(text)
    with pytest.warns(RuntimeWarning, match=re.escape(str(home / "sm_90.json")) + ".*" + re.escape(complaint)):
        found = table.table_for(H200)
    assert "H200" in found.provenance


def test_a_table_is_written_whole_or_not_at_all(home):
    table.write(home / "t.json", "old")
    with pytest.raises(TypeError):
        table.write(home / "t.json", None)
    assert (home / "t.json").read_text() == "old"


def test_a_written_table_reads_back_the_same():
    text = (table.SHIPPED / "sm_90.json").read_text()
    rules = table.parse(text, "shipped").rules
    assert table.parse(table.to_json("sm_90", "x", rules), "again").rules == rules
    assert json.loads(text)["arch"] == "sm_90"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (GEMMA4, "logits"),
        (RoutingSpec(family="f", renormalize=True, renorm_floor=1e-12), "row_sum"),
        (RoutingSpec(family="f", score="sigmoid", selection="scores_plus_bias"), "bias"),
        (RoutingSpec(family="f", num_groups=4, topk_per_group=True), "grouped"),
    ],
)
def test_specs_are_classed_by_what_is_done_for_every_expert(spec, expected):
    assert kind(spec) == expected
