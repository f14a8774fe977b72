"""A plug-in that brings a family, its oracle and a backend for it is checked like any other."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from moe_routing.conformance.clauses import CLAUSES

PLUGIN = """
    from moe_routing_registry import (
        ANY, BackendSpec, FamilySpec, RejectCode, RoutingSpec, Target, Verdict, hookimpl
    )

    SPEC = RoutingSpec(family="softsign_topk", score="softsign")

    def supports(problem, device):
        if problem.spec.score != "softsign":
            return Verdict.no(RejectCode.FAMILY, "knows softsign only")
        if problem.training:
            return Verdict.no(RejectCode.TRAINING, "has no gradients")
        return Verdict.yes()

    @hookimpl
    def moe_routing_families():
        return [FamilySpec(spec=SPEC, source="this test", oracle="softsign_plugin:oracle")]

    @hookimpl
    def moe_routing_backends():
        factories = {"route": "softsign_plugin:build"}
        targets = (Target(ANY),)
        gaps = {"gradients": "nobody trains with softsign"}
        return [BackendSpec(name="softsign", factories=factories, targets=targets,
                            supports=supports, gaps=gaps)]

    def oracle(spec, logits, topk, **operands):
        from moe_routing.reference import oracle as kit
        plain = RoutingSpec(family="softmax_topk")
        ids = kit.select(plain, logits, topk)
        chosen = kit.clean(logits).gather(1, ids)
        weights = (1 + chosen / (1 + chosen.abs())) / 2
        finish = {name: operands.get(name) for name in ("num_valid_tokens", "expert_map")}
        return kit.finish(spec, weights, ids, logits.shape[1], **finish)

    def build(problem, device):
        import torch
        from moe_routing import RoutingOutput

        if problem.spec.score != "softsign":
            raise NotImplementedError(problem.spec.score)

        def route(logits, out=None, **operands):
            with torch.no_grad():
                weights, ids = oracle(problem.spec, logits, problem.topk, **operands)
            if out is None:
                ids = ids.to(getattr(torch, problem.ids_dtype))
                return RoutingOutput(weights.float().contiguous(), ids.contiguous())
            out.weights.copy_(weights)
            out.ids.copy_(ids)
            return out
        return route
"""


def conformance(site, *clauses):
    code = "from moe_routing.cli import main; main()"
    words = [
        sys.executable,
        "-c",
        code,
        "conformance",
        "softsign",
        "--json",
        *(f"--clause={clause}" for clause in clauses),
    ]
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert ran.stdout, ran.stderr
    return json.loads(ran.stdout)["results"]


@pytest.fixture
def results(install_plugin):
    return conformance(install_plugin("softsign_plugin", PLUGIN))


@pytest.mark.slow
def test_the_brought_family_is_checked_against_the_oracle_that_it_brings(results):
    theirs = [result for result in results if result["family"] == "softsign_topk"]
    assert [(r["case"], r["message"]) for r in theirs if r["status"] == "failed"] == []
    assert {r["clause"] for r in theirs if r["status"] == "passed"} == set(CLAUSES) - {15}
    assert {r["message"] for r in theirs if r["clause"] == 15} == {"has no gradients"}


@pytest.mark.slow
def test_a_backend_that_differs_from_the_brought_oracle_fails(install_plugin):
    body = textwrap.dedent(PLUGIN).replace(
        "with torch.no_grad():", "with torch.no_grad():\n            logits = logits.flip(1)"
    )
    failed = {
        r["check"]
        for r in conformance(install_plugin("softsign_plugin", body), 1)
        if r["status"] == "failed"
    }
    assert "ids_come_in_exact_order" in failed
