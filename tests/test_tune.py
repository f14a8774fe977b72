"""``moe-routing tune``: what it asks of a backend's tuner, and what it shows.

It refuses where there is nothing to tune.
"""

from __future__ import annotations

import json

import pytest

from moe_routing._registry import registry
from moe_routing.cli import _tune
from moe_routing.cli._app import run
from moe_routing_registry import (
    BackendSpec,
    DeviceInfo,
    Request,
    RoutingProblem,
    RoutingSpec,
    Target,
    Toolchain,
)

ASKED = []
LAUNCH = {"variant": "cooperative", "block_t": 1, "num_warps": 4}


class Tuned:
    """What a tuner returns: something with ``to_dict``."""

    wrong = ()

    def to_dict(self):
        timed = {
            "tokens": 4096,
            "launch": LAUNCH,
            "us": 2.5,
            "launch_before": LAUNCH,
            "us_before": 3.25,
        }
        return {
            "table": "/cache/t.json", "before": "launch parameters from nowhere", "timed": [timed],
            "steps": [], "wrong": list(self.wrong), "unusable": ["rows: too big"],
        }  # fmt: skip


class Wrong(Tuned):
    wrong = ("lanes at T = 1: other bits",)


class Unkept(Tuned):
    def to_dict(self):
        return {**super().to_dict(), "not_kept": "[Errno 28] No space left on device"}


def tuner(problem, device, *, tokens="the tuner's own", on_step):
    ASKED.append((problem, device, tokens))
    on_step("about 1 min", 0, 2)
    on_step("T = 1: lanes", 0, 2)
    if problem.topk == 5:
        raise SystemExit(3)
    if problem.topk == 3 or getattr(problem, "dtype", "") == "float16":
        msg = "the launch in use computes something else"
        raise RuntimeError(msg)
    return {4: Wrong, 6: Unkept}.get(problem.topk, Tuned)()


def factory(_problem, _device):
    return lambda logits, **_operands: logits


@pytest.fixture
def tunable():
    """A backend of this process that is for the CPU and can be tuned."""
    ASKED.clear()
    here = {
        "factories": dict.fromkeys(("route", "plan"), f"{__name__}:factory"),
        "tuners": dict.fromkeys(("route", "plan"), f"{__name__}:tuner"),
        "targets": (Target("cpu"),),
    }
    registry().register(BackendSpec(name="tunable", priority=9, **here))
    yield
    registry().unregister("tunable")


@pytest.fixture
def cli(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def call(line):
        code = run(line.split())
        return code, *capsys.readouterr()

    return call


@pytest.mark.usefixtures("tunable")
def test_it_tunes_gemma4_where_nothing_is_named_and_shows_before_and_after(cli):
    code, out, _ = cli("tune --device cpu")
    assert code == 0
    [(problem, device, tokens)] = ASKED
    assert (problem.spec.family, problem.num_experts, problem.topk, problem.dtype) == (
        "gemma4",
        128,
        8,
        "bfloat16",
    )
    assert (device.type, tokens) == ("cpu", "the tuner's own")
    for shown in (
        "4,096",
        "2.50",
        "3.25",
        "cooperative, block_t=1, num_warps=4",
        "kept in /cache/t.json",
        "before: launch parameters from nowhere",
    ):
        assert shown in out
    assert "unusable: rows: too big" in out


@pytest.mark.usefixtures("tunable")
@pytest.mark.parametrize(
    ("options", "layout", "block", "title"),
    [
        ("", "sorted", 1, "plan E=128 K=8 int32"),
        ("--num-experts 64 -k 7", "sorted", 1, "plan E=64 K=7 int32"),
        ("-e 64 --topk 7 --block 32", "blocks", 32, "plan E=64 K=7 int32 block=32"),
    ],
)
def test_another_operation_is_tuned_for_its_example_or_the_sizes_that_are_named(
    cli, options, layout, block, title
):
    code, out, _ = cli(f"tune plan --device cpu --tokens 1,64 {options}")
    assert code == 0
    [(problem, _, tokens)] = ASKED
    assert (problem.operation, problem.layout, problem.block, tokens) == (
        "plan",
        layout,
        block,
        [1, 64],
    )
    assert title in out
    assert "cooperative, block_t=1, num_warps=4" in out
    code, out, _ = cli(f"tune plan --device cpu --json {options}")
    [found] = json.loads(out)["problems"]
    assert (code, found["backend"]) == (0, "tunable")
    assert found.items() >= problem.to_dict().items()


def test_an_operation_that_nobody_here_tunes_is_refused_by_its_name(cli):
    code, out, err = cli("tune plan --device cpu")
    assert (code, out) == (1, "")
    assert "eager computes plan, and has nothing to tune" in err


@pytest.mark.usefixtures("tunable")
def test_on_a_terminal_it_says_first_what_each_problem_takes(cli, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal then
    code, _, err = cli("tune --device cpu --model gemma4,mixtral")
    assert code == 0
    assert "gemma4 128/8 bfloat16: about 1 min" in err
    assert "mixtral 8/2 bfloat16: about 1 min" in err
    assert "bfloat16: T = 1" not in err


@pytest.mark.usefixtures("tunable")
def test_every_model_and_dtype_that_is_named_is_tuned_with_its_own_size_as_json(cli):
    code, out, _ = cli(
        "tune --device cpu --model deepseek_v3,mixtral --dtype bf16,fp32 --tokens 1,64 --json"
    )
    report = json.loads(out)
    assert (code, report["schema_version"]) == (0, 1)
    asked = [(p.spec.family, p.num_experts, p.topk, p.dtype, tokens) for p, _, tokens in ASKED]
    assert asked == [
        ("grouped_sigmoid_bias", 256, 8, "bfloat16", [1, 64]),
        ("grouped_sigmoid_bias", 256, 8, "float32", [1, 64]),
        ("softmax_topk", 8, 2, "bfloat16", [1, 64]),
        ("softmax_topk", 8, 2, "float32", [1, 64]),
    ]
    assert [one["router"] for one in report["problems"]] == ["deepseek_v3"] * 2 + ["mixtral"] * 2
    assert [one["num_experts"] for one in report["problems"]] == [256, 256, 8, 8]
    assert {one["backend"] for one in report["problems"]} == {"tunable"}
    assert report["problems"][0]["timed"][0]["us"] == 2.5


@pytest.mark.usefixtures("tunable")
def test_a_candidate_that_computes_wrong_is_exit_code_1(cli):
    code, out, _ = cli("tune --device cpu --router topk_softmax --experts 64 --topk 4")
    assert code == 1
    assert "wrong: lanes at T = 1: other bits" in out


@pytest.mark.usefixtures("tunable")
def test_what_the_tuner_raises_is_a_sentence_and_exit_code_1(cli):
    code, out, err = cli("tune --device cpu --router topk_softmax --experts 64 --topk 3")
    assert (code, out) == (1, "")
    assert "topk_softmax 64/3 bfloat16 on cpu" in err
    assert "computes something else" in err


@pytest.mark.usefixtures("tunable")
def test_a_tuner_that_exits_is_a_sentence_and_exit_code_1(cli):
    code, out, err = cli("tune --device cpu --router topk_softmax --experts 64 --topk 5")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "tunable: its tuner raised SystemExit: 3" in err


@pytest.mark.usefixtures("tunable")
def test_what_was_measured_before_a_failure_is_in_the_json_with_the_error(cli):
    code, out, _ = cli("tune --device cpu --model mixtral --dtype bf16,fp16 --json")
    assert code == 1
    assert [one["dtype"] for one in json.loads(out)["problems"]] == ["bfloat16"]
    assert "computes something else" in json.loads(out)["error"]


@pytest.mark.usefixtures("tunable")
def test_a_table_that_could_not_be_kept_is_exit_code_1_and_the_times_are_shown(cli):
    code, out, _ = cli("tune --device cpu --router topk_softmax --experts 64 --topk 6")
    assert code == 1
    assert "2.50" in out
    assert "not kept: [Errno 28] No space left on device" in out


def test_a_machine_without_such_a_device_is_refused_with_what_to_do(cli):
    code, out, err = cli("tune --device cpu")
    assert (code, out) == (1, "")
    assert "nothing to tune on cpu" in err
    assert "triton is for cuda and rocm, the device is cpu" in err
    assert "try: moe-routing doctor" in err


def test_a_gpu_without_triton_is_refused_with_the_command_that_installs_it():
    fix = "pip install 'moe-routing[triton]'"
    missing = Toolchain(name="triton", version=None, usable=False, detail="not installed", fix=fix)
    device = DeviceInfo(
        type="cuda",
        platform="cuda",
        index=0,
        arch="sm_90",
        name="NVIDIA H200",
        toolchains=(missing,),
    )
    problem = RoutingProblem(spec=RoutingSpec(family="f"), num_experts=8, topk=2, dtype="bfloat16")
    said = _tune._refusal(registry().resolve(problem, device, Request()))
    assert said.startswith("nothing to tune on cuda:0 (NVIDIA H200, sm_90): ")
    assert "triton needs a Triton that compiles for cuda: not installed" in said
    assert said.endswith(f"try: {fix}")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--tokens 1,x", "--tokens: expected an integer >= 1, got 'x'"),
        ("--dtype fp9", "--dtype: expected one of bf16, fp16, fp32, got 'fp9'"),
        ("--model gema4", "did you mean 'gemma4'"),
        ("--device cpu --topk 500", "topk: expected 1 <= topk <= num_experts (128), got 500"),
        ("--device warp:9", "warp:9"),
        ("--block 64", "--block: the operation 'route' has none"),
        ("plan --device cpu --dtype fp32", "--dtype: the operation 'plan' has none"),
        ("plan --device cpu --model gemma4", "--router: the operation 'plan' has none"),
        ("plan --device cpu --topk 65", "topk: expected an int from 1 to 64, got 65"),
        ("plane --device cpu", "did you mean 'plan'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(cli, arguments, complaint):
    code, out, err = cli(f"tune {arguments}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert complaint in err
