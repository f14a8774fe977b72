"""A family that the fields of RoutingSpec cannot express.

A plug-in brings the family's spec, oracle and backend.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

PLUGIN = """
from moe_routing_registry import BackendSpec, FamilySpec, RoutingSpec, Target, hookimpl

SPEC = RoutingSpec(family="acme_square", score="square")

@hookimpl
def moe_routing_families():
    return [FamilySpec(spec=SPEC, source="ACME, 2026", models={"acme_moe": SPEC},
                       oracle="acme_square:oracle")]

@hookimpl
def moe_routing_backends():
    return [BackendSpec(name="acme", factories={"route": "acme_square:build"},
                        targets=(Target("cpu"),), priority=10,
                        families=frozenset({"acme_square"}))]

def square(logits, topk):
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return values[:, :topk] ** 2, ids[:, :topk]

def oracle(spec, logits, topk, **operands):
    from moe_routing import RoutingOutput
    return RoutingOutput(*square(logits.double(), topk))

def build(problem, device):
    import torch
    from moe_routing import RoutingOutput
    def bound(logits, **operands):
        weights, ids = square(logits.float(), problem.topk)
        return RoutingOutput(weights * WRONG, ids.to(getattr(torch, problem.ids_dtype)))
    return bound

WRONG = 1.0
"""

SCRIPT = """
import torch, moe_routing, acme_square
route = moe_routing.get_router("acme_moe", verify=True)
logits = torch.randn(5, 8)
weights, ids = route(logits, 2)
assert route.backend == "acme", route.report
assert route.report.rejection("eager").verdict.code.value == "family"
assert torch.equal(weights, logits.sort(descending=True).values[:, :2] ** 2)
assert route.health().ok and route.health().compared == 1, route.health()
acme_square.WRONG = 1.5
route(logits, 2)
assert not route.health().ok
assert "its oracle says" in route.health().latest, route.health().latest
assert moe_routing.list_routers()["acme_square"] is moe_routing.list_routers()["acme_moe"]
print("routed")
"""


def test_a_third_partys_family_is_routed_by_its_backend_and_held_to_its_oracle(install_plugin):
    site = install_plugin("acme_square", PLUGIN)
    script = f"import sys; sys.path.insert(0, {str(site)!r})\n{SCRIPT}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "routed\n", done.stderr


CONFIGURATION = """
import moe_routing
from moe_routing.models import from_config
sizes = {"num_experts": 8, "num_experts_per_tok": 2}
route = moe_routing.get_router({"model_type": "acme_moe", **sizes})
spec = moe_routing.get_router("acme_moe").spec
assert (route.spec, route.num_experts, route.topk) == (spec, 8, 2), route
text = {"model_type": "acme_moe", "n_routed_experts": 8, "moe_top_k": 2}
assert from_config({"model_type": "acme_vision", "llm_config": text}).model == "acme_moe"
for said, name in (({}, "num_experts"), ({"num_experts": 8}, "num_experts_per_tok"),
                   (sizes | {"norm_topk_prob": True}, "norm_topk_prob")):
    try:
        from_config({"model_type": "acme_moe", **said})
    except ValueError as error:
        assert str(error).startswith(name), error
    else:
        raise AssertionError(said)
try:
    from_config({"model_type": "acme_mo"})
except ValueError as error:
    assert "did you mean 'acme_moe'" in str(error), error
print("read")
"""


@pytest.mark.slow
def test_the_configuration_of_a_plugins_model_is_read(install_plugin):
    site = install_plugin("acme_square", PLUGIN)
    script = f"import sys; sys.path.insert(0, {str(site)!r})\n{CONFIGURATION}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "read\n", done.stderr


KNOWN_SCORE = """
from moe_routing_registry import BackendSpec, FamilySpec, RoutingSpec, Target, hookimpl

@hookimpl
def moe_routing_families():
    spec = RoutingSpec(family="acme_lowest")
    return [FamilySpec(spec=spec, source="ACME, 2026", oracle="acme_lowest:oracle")]

def oracle(spec, logits, topk, **operands):
    from moe_routing.reference import oracle
    return oracle.route(RoutingSpec(family="softmax_topk"), -logits, topk, **operands)
"""
OWN_BACKEND = """
@hookimpl
def moe_routing_backends():
    return [BackendSpec(name="lowest", factories={"route": "acme_lowest:build"},
                        targets=(Target("cpu"),), priority=1)]

def build(problem, device):
    import torch
    from moe_routing import RoutingOutput
    def kernel(logits, **operands):
        weights, ids = oracle(problem.spec, logits, problem.topk)
        return RoutingOutput(weights.float(), ids.to(getattr(torch, problem.ids_dtype)))
    return kernel
"""
NO_BACKEND = """
import moe_routing, torch
report = moe_routing.explain("acme_lowest")
assert report.winner is None, report
ours = [r for r in report.rejected if r.name in ("eager", "torch-compile")]
assert {r.verdict.code.value for r in ours} == {"family"}, report
assert "'acme_lowest' has an oracle of its own" in report.rejection("eager").verdict.reason
for backend in (None, "eager"):
    try:
        moe_routing.get_router("acme_lowest", backend=backend)(torch.randn(2, 8), 2)
    except moe_routing.BackendUnavailableError as error:
        assert "oracle of its own" in str(error)
    else:
        raise AssertionError(backend)
print("refused")
"""
WITH_BACKENDS = """
import moe_routing, torch
from moe_routing._registry import registry
from moe_routing_registry import BackendSpec, Target
route = moe_routing.get_router("acme_lowest", verify=True)
assert route(torch.tensor([[3.0, 1.0, 2.0]]), 2).ids.tolist() == [[1, 2]]
assert (route.backend, route.health().wrong) == ("lowest", 0), route.report
named = frozenset({"acme_lowest"})
for name, families in (("names_it", named), ("names_nothing", None)):
    factories = {"route": "acme_lowest:build"}
    registry().register(
        BackendSpec(name=name, factories=factories, targets=(Target("cpu"),), families=families)
    )
report = moe_routing.explain("acme_lowest")
assert report.rejection("names_it").verdict.code.value == "explicit_only"
assert report.rejection("names_nothing").verdict.code.value == "family"
print("routed")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "script", "said"), [("", NO_BACKEND, "refused"), (OWN_BACKEND, WITH_BACKENDS, "routed")]
)
def test_a_family_with_an_oracle_of_its_own_is_routed_by_backends_that_know_of_it_alone(
    install_plugin, own, script, said
):
    site = install_plugin("acme_lowest", KNOWN_SCORE + own)
    script = f"import sys; sys.path.insert(0, {str(site)!r})\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == f"{said}\n", done.stderr
