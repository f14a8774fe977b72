"""Random calls of every backend against ``fuzz.reference``.

``tests/support/fuzz/run.py`` runs many more of them.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shlex
import subprocess
import sys

import pytest
import torch
from mutants import MUTANTS, registered

from fuzz import run, tensors
from fuzz.calls import Call, build
from fuzz.check import check
from fuzz.draw import DTYPES, VECTOR_DTYPES, calls
from fuzz.judge import kept_groups, possible
from moe_routing.families import FAMILIES
from moe_routing_registry import RoutingSpec
from moe_routing_registry.routing_spec import SCORES, SELECTIONS

EAGER = 300
"""Calls that take some seconds."""
BIASED = RoutingSpec(family="f", selection="scores_plus_bias")
GROUPED = BIASED.replace(num_groups=2, topk_groups=1)
SMALL = {"seed": 1, "tokens": 3, "experts": 8, "topk": 2}
FOUND = {
    "more valid tokens than int64 holds": (
        "eager",
        Call(spec=RoutingSpec(family="f"), valid="int most", **SMALL),
    ),
    "and through the operator": (
        "eager",
        Call(spec=RoutingSpec(family="f"), valid="int most", training=True, **SMALL),
    ),
    "a softmax over many experts": (
        "eager",
        Call(
            spec=RoutingSpec(family="f"),
            seed=322697826,
            tokens=3,
            row=0,
            experts=1594,
            topk=1,
            dtype="float8_e5m2",
            values="spread",
        ),
    ),
    "scores of 1e-22 and an epsilon": (
        "triton",
        Call(
            spec=RoutingSpec(
                family="f", score="sqrtsoftplus", renormalize=True, renorm_epsilon=1e-20
            ),
            seed=2992701469,
            tokens=8,
            row=7,
            experts=6,
            topk=1,
            values="spread",
        ),
    ),
    "a bias in a format that Triton does not know": (
        "triton",
        Call(spec=BIASED, bias_dtype="float8_e8m0fnu", valid="int some", **SMALL),
    ),
    "a scale in a format that Triton reads on some devices": (
        "triton",
        Call(
            spec=RoutingSpec(family="f", per_expert_scale=True),
            scale_dtype="float8_e4m3fnuz",
            **SMALL,
        ),
    ),
    "subnormal bfloat16 numbers, which Triton's interpreter widens to others": (
        "triton",
        Call(
            spec=RoutingSpec(family="f"),
            seed=2822449404,
            tokens=2,
            row=1,
            experts=15,
            topk=4,
            dtype="bfloat16",
            values="wide",
        ),
    ),
    "a record in uint8, which has no -1 for the columns past K": (
        "triton",
        Call(spec=RoutingSpec(family="f"), seed=1, tokens=3, experts=3, topk=3, record="uint8"),
    ),
    "a softmax whose highest logit a bias keeps from being selected": (
        "triton",
        Call(
            spec=RoutingSpec(family="f", selection="logits_plus_bias"),
            seed=3663949731,
            tokens=3,
            row=0,
            experts=120,
            topk=4,
            dtype="float16",
            ids_dtype="int64",
            bias="beyond_in_twos",
        ),
    ),
}
"""Calls that a run has found to go wrong, and the backend; put right since."""
WRONG = {
    mutant.name: mutant
    for mutant in MUTANTS
    if mutant.factory.__module__ in ("mutants.selection", "mutants.weights")
    and not mutant.supports
    and not mutant.only_on
}
RARE = {
    "mutant-group-sums-in-float64": lambda call: call.spec.grouped and call.bias == "beyond_in_twos"
}
"""Mutants that few calls can tell: which ones."""
QUICK = (
    "mutant-tie-to-the-highest-id",
    "mutant-nan-first",
    "mutant-not-renormalized",
    "mutant-writes-behind-the-end",
)


def some(count, backend="eager"):
    return calls(backend, str(random.getrandbits(32)), count)


def command(*arguments):
    done = subprocess.run(
        [sys.executable, run.__file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stderr


def test_random_calls_of_eager_give_what_the_contract_says():
    found = {call.to_json(): check(call, "eager").problems for call in some(EAGER)}
    assert len(found) == EAGER
    assert not [f"{problems[0]}: {call}" for call, problems in found.items() if problems]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "count"), [("triton", 100), ("torch-compile", 20)])
def test_random_calls_of_other_backends_give_what_the_contract_says(backend, count):
    said = command(backend, "--count", count, "--seed", random.getrandbits(32))
    assert f"\n{count} calls in " in said


@pytest.mark.parametrize(
    ("backend", "call"),
    [
        pytest.param(*v, id=k, marks=[pytest.mark.slow] if v[0] == "triton" else [])
        for k, v in FOUND.items()
    ],
)
def test_calls_that_went_wrong_once_do_not_any_more(backend, call):
    if backend == "eager":
        assert not check(call, backend).problems
    else:
        assert "1 calls in " in command(backend, "--call", call.to_json())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in WRONG]
)
def test_random_calls_find_each_wrong_backend(name):
    """By a wrong output: a mutant that raises for some call proves nothing."""
    drawn = filter(RARE.get(name, bool), some(30_000))
    with registered(WRONG[name]):
        found = (
            problem
            for call in drawn
            for problem in check(call, name).problems
            if "Error: " not in problem
        )
        assert next(found, None)


def test_every_family_field_dtype_layout_and_kind_is_drawn():
    drawn = list(some(4000))
    specs = {call.spec.family: call.spec for call in drawn}
    assert set(FAMILIES) < set(specs)
    among = {
        "dtype": DTYPES, "bias_dtype": VECTOR_DTYPES, "scale_dtype": VECTOR_DTYPES,
        "layout": tensors.LAYOUTS, "vector_layout": tensors.VECTOR_LAYOUTS,
        "values": tensors.LOGITS, "bias": tensors.BIASES, "scale": tensors.SCALES,
        "table": tensors.TABLES, "ids_dtype": ("int32", "int64"),
        "integer_dtype": ("int32", "int64"), "valid": (None, *tensors.VALID),
        "record": (None, *tensors.RECORDS),
        "mapped": (None, *tensors.MAPS), "out": (None, *tensors.OUTPUTS), "training": (False, True),
        "counts": (None, *tensors.COUNTS), "replicas": (None, *tensors.REPLICAS),
    }  # fmt: skip
    for name, values in among.items():
        assert {getattr(call, name) for call in drawn} == set(values), name
    assert {call.spec.selection for call in drawn} == set(SELECTIONS)
    assert {call.spec.score for call in drawn} == set(SCORES)
    for field in dataclasses.fields(RoutingSpec):
        if field.init:
            assert len({getattr(call.spec, field.name) for call in drawn}) > 1, field.name
    for name, least, most in (("tokens", 0, 1000), ("experts", 1, 1000), ("topk", 1, 100)):
        sizes = {getattr(call, name) for call in drawn}
        assert min(sizes) == least, name
        assert max(sizes) > most, name


def test_a_line_says_all_of_a_call():
    for call in some(50):
        again = Call.from_json(call.to_json())
        assert again == call
        for ours, theirs in zip(
            build(call).given.values(), build(again).given.values(), strict=True
        ):
            assert torch.equal(
                ours.detach().float().nan_to_num(7.0), theirs.detach().float().nan_to_num(7.0)
            )


def test_the_command_prints_what_goes_wrong_as_a_command_that_repeats_it(monkeypatch, capsys):
    threads = torch.get_num_threads()
    name = "mutant-tie-to-the-highest-id"

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", [run.__file__, name, *arguments])
        with pytest.raises(SystemExit) as left:
            run.main()
        return left.value.code, capsys.readouterr().out

    try:
        with registered(WRONG[name]):
            code, said = main("--count", "20", "--seed", "5")
            problem, repeat, *_ = said.splitlines()
            assert (code, problem.split(" in ")[0]) == (1, "wrong ids")
            code, said = main("--json", "--call", shlex.split(repeat)[-1])
            assert (code, len(json.loads(said)["wrong"])) == (1, 1)
            code, said = main("--count", "0")
            assert (code, said) == (0, "")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("spec", "by", "ids", "right"),
    [
        (BIASED, [0.5, 0.5 + 1e-9, 0.1], [0, 1], True),
        (BIASED, [0.5, 0.5 + 1e-9, 0.1], [1, 0], True),
        (BIASED, [0.5, 0.5 + 1e-3, 0.1], [1, 0], True),
        (BIASED, [0.5, 0.5 + 1e-3, 0.1], [0, 1], False),
        (BIASED, [0.5, 0.1, 0.1 + 1e-3], [0, 1], False),
        (BIASED, [0.5, 0.1, 0.1 + 1e-9], [0, 1], True),
        (BIASED, [0.5, 0.1, 0.1], [0, 2], False),  # equal in any arithmetic: the lower id
        (BIASED, [0.5, 0.5, 0.1], [1, 0], False),
        (BIASED, [0.5, 0.5, 0.1], [0, 0], False),
        (GROUPED, [0.5, 0.1, 0.4, 0.3], [0, 1], True),
        (GROUPED, [0.5, 0.1, 0.4, 0.3], [0, 2], False),
        (GROUPED, [0.5, 0.1, 0.4, 0.3], [2, 3], False),
        (GROUPED, [0.5, 0.1, 0.5 + 1e-9, 0.3], [0, 1], True),
        (GROUPED.replace(group_sum=2), [0.5, 0.1, 0.4, 0.3], [2, 3], True),
        (GROUPED.replace(group_sum=2), [0.5, 0.1, 0.4, 0.3], [0, 1], False),
        (GROUPED.replace(group_sum=3), [0.5, 0.1, 0.4, 0.3], [2, 3], True),
        (GROUPED.replace(topk_per_group=True), [0.5, 0.1, 0.4, 0.3], [0, 2], True),
        (GROUPED.replace(topk_per_group=True), [0.5, 0.1, 0.4, 0.3], [2, 0], False),
        (GROUPED.replace(topk_per_group=True), [0.5, 0.45, 0.4, 0.3], [0, 1], False),
    ],
)
def test_another_order_is_right_only_where_float32_cannot_tell(spec, by, ids, right):
    by = torch.tensor(by, dtype=torch.float64)
    keys, off = [(number, 0.0) for number in by.tolist()], by.abs() * 1e-6
    assert possible(spec, by, off, keys, ids, kept_groups(spec, by, off)) is right
