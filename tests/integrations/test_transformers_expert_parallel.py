"""Models of transformers whose experts are on several ranks, through ``ExpertParallel``.

Real models in real processes over gloo, compared with the same model in one process. The processes
are started once for all cases; each case has a line of its own in what a test shows.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from moe_routing.distributed import Received
from moe_routing.integrations import transformers as integration
from moe_routing.integrations.transformers import expert_parallel

AGAINST = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("against.py"))))
NAME = "moe_routing"
needs_the_interface = pytest.mark.skipif(
    expert_parallel.EPImplementationInterface is None,
    reason="transformers has the interface from 5.23 on",
)

# Llama 4's experts take no plan.
TYPES = [name for name in AGAINST.WHOLE if name != "llama4_text"]
assert len(TYPES) >= 10
OWN_BATCHES = [name for name in TYPES if name != "gemma4_text"]
"""transformers' plan for Gemma 4 has FSDP shard experts over the ranks that share them already."""
RANDOM_IN_TRAINING = {"phimoe": {"train": False}}
"""A router that adds noise where ``training`` is set; its gradients are compared without."""
EXPERTS = ("eager", "grouped_mm", NAME)
PATCHES = ({}, {"gate": True}, {"experts": True}, {"experts": True, "gate": True})
SHARED = {"tp_size": 2, "ep_size": 2}
"""Both ranks hold the same batch."""
OWN = {"tp_size": 1, "fsdp_size": 2, "ep_size": 2}
"""Each rank has a batch, and FSDP shards what is no expert."""
TWO = [[2, 16], [1, 9]]
ONE_TOKEN = [[1, 1]]
PADDED = 20
"""The number of experts that only the transport of the plug-in below is for."""


def several_types():
    """Each type in inference and training, with experts, patches and layouts in turns."""
    for n, kind in enumerate(TYPES):
        said = {"model": kind, "experts": EXPERTS[n % 3]}
        patched = {"patch": PATCHES[n % 4]}
        trained = {"does": "training", **RANDOM_IN_TRAINING.get(kind, {})}
        yield f"{kind} infers", said | {"does": "inference", "config": SHARED}
        yield f"{kind} patched infers", said | patched | {"does": "inference", "config": SHARED}
        yield f"{kind} trains", said | trained | {"config": SHARED}
        if kind not in OWN_BATCHES:
            continue
        other = {"experts": EXPERTS[(n + 1) % 3], "config": OWN, "shapes": TWO}
        yield f"{kind} infers with fsdp", said | other | {"does": "inference"}
        yield f"{kind} patched trains with fsdp", said | trained | other | patched


def special_cases():
    """Ranks without tokens or rows, with each experts implementation, and what else is rare."""
    for experts in EXPERTS:
        said = {"model": "deepseek_v3", "does": "training", "experts": experts}
        for config, shapes in ((SHARED, [[2, 16]]), (OWN, TWO)):
            how = "fsdp" if config is OWN else "tp"
            starved = said | {"config": config, "shapes": shapes, "starved": True}
            yield f"{experts} no rows {how}", starved
            yield f"{experts} no rows checkpointed {how}", starved | {"checkpointing": True}
        yield f"{experts} one token", said | {"config": SHARED, "shapes": ONE_TOKEN}
        again = {"config": SHARED, "shapes": ONE_TOKEN, "checkpointing": True}
        yield f"{experts} one token checkpointed", said | again
        yield f"{experts} alone train", said | {"config": SHARED, "only": ".experts."}
        rare = {"config": SHARED, "only": ".experts.", "starved": True}
        yield f"{experts} alone train, no rows", said | rare
        yield f"{experts} padded", said | {"config": SHARED} | PLUGGED_IN
    mixtral = {"model": "mixtral", "experts": "grouped_mm"}
    yield "routers alone train", mixtral | {"does": "training", "config": SHARED, "only": ".gate."}
    batched = {"config": OWN, "shapes": TWO, "experts": "batched_mm"}
    yield "batched_mm padded", said | batched | PLUGGED_IN
    for experts in ("grouped_mm", NAME):
        said = {"model": "qwen3_moe", "experts": experts, "config": SHARED, "patch": {}}
        yield f"{experts} compiled", said | {"does": "inference", "compiled": True}
        yield f"{experts} compiled trains", said | {"does": "training", "compiled": True}
    yield "slices", {"does": "slices"}
    yield "example", {"model": "mixtral", "does": "example"}


PLUGGED_IN = {"settings": {"n_routed_experts": PADDED}}
PLUGIN = f"""
import dataclasses

from moe_routing_registry import ANY, BackendSpec, RejectCode, Target, Verdict, hookimpl


def supports(problem, device):
    if problem.ranks * problem.experts_per_rank != {PADDED} or problem.shared_batch:
        return Verdict.no(RejectCode.GROUP, "is for a test")
    return Verdict.yes()


def build(problem, device):
    # Pads what is sent, and leaves NaN in rows without an expert.
    import torch
    from moe_routing_backends.all_to_all.exchange import build

    made = build(dataclasses.replace(problem, max_tokens=64), device)

    class Padded:
        def __init__(self, group):
            self.inner = made(group)

        def dispatch(self, tokens):
            received = self.inner.dispatch(tokens)
            assert (received.ids < 0).any()
            rows = torch.where(received.ids < 0, torch.nan, received.rows)
            return received._replace(rows=rows)

        def combine(self, rows, received):
            return self.inner.combine(rows, received)

    return Padded


@hookimpl
def moe_routing_backends():
    return [
        BackendSpec(
            name="padded",
            factories={{"exchange": "moe_routing_padded:build"}},
            targets=(Target(ANY),),
            priority=90,
            supports=supports,
        )
    ]
"""
CASES = dict([*several_types(), *special_cases()])
FOUR = {
    f"{experts} on {name}": {
        "model": "deepseek_v3",
        "does": "training",
        "config": config,
        "experts": experts,
        "shapes": shapes,
        "starved": starved,
    }
    for experts, starved in (("eager", True), (NAME, False))
    for name, config, shapes in (
        ("fsdp 4, ep 2", {"fsdp_size": 4, "ep_size": 2}, [[2, 16], [1, 9], [1, 1], [2, 3]]),
        ("tp 2, fsdp 2, ep 4", {"tp_size": 2, "fsdp_size": 2, "ep_size": 4}, TWO),
        ("tp 2, fsdp 2, ep 2", {"tp_size": 2, "fsdp_size": 2, "ep_size": 2}, TWO),
    )
}


def run(folder, cases, number):
    """Run cases in new processes, and return what each process says of each case."""
    (folder / "moe_routing_padded.py").write_text(PLUGIN)
    info = folder / "moe_routing_padded-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moe-routing-padded\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[moe_routing.backends]\nmoe_routing_padded = moe_routing_padded\n"
    )
    (folder / "cases.json").write_text(json.dumps(cases))
    script = str(Path(__file__).with_name("parallelize_transformers.py"))
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", script, str(folder), str(rank), str(number)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(number)
    ]
    errors = [process.communicate()[1] for process in running]
    files = [folder / f"{rank}.json" for rank in range(number)]
    said = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    stopped = [
        f"{name}: {of['failed']}" for one in said for name, of in one.items() if "failed" in of
    ]
    if not stopped and any(process.returncode for process in running):
        stopped = errors
    results = {
        name: [one[name] for one in said]
        for name in cases
        if all("failed" not in one.get(name, {"failed": ""}) for one in said)
    }
    return Ran(results, "\n".join(stopped))


class Ran(NamedTuple):
    """What the processes said.

    :ivar results: of each case, what each process says.
    :ivar stopped: why they stopped before the last case.
    """

    results: dict[str, list[dict[str, Any]]]
    stopped: str

    def __getitem__(self, name):
        """Return the results of a case that ran, once they agree with one process."""
        assert name in self.results, f"{name} did not run: {self.stopped}"
        found = {rank: wrong(said) for rank, said in enumerate(self.results[name])}
        assert not any(found.values()), {name: found}
        return self.results[name]


def wrong(said):
    """Return what one process says of a case that no rounding explains."""
    found = []
    if "logits" in said and not (said["logits"] <= 1e-5 and said.get("tokens", True)):
        found.append(f"logits {said['logits']}, tokens {said.get('tokens')}")
    if said.get("distinct", 11) < 10:
        found.append("tokens all alike")
    if not all(loss <= 2e-5 for loss in said.get("losses", ())):
        found.append(f"losses {said['losses']}")
    gradients = said.get("gradients", {}).items()
    return found + [f"{name} {error}" for name, error in gradients if not error <= 5e-5]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), CASES, 2)


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    return run(tmp_path_factory.mktemp("four"), FOUR, 4)


@needs_the_interface
def test_importing_the_integration_registers_it():
    assert expert_parallel.EPImplementationInterface()[NAME] is expert_parallel.MoeRoutingEP
    assert integration.expert_parallel is expert_parallel


def test_an_older_transformers_gets_nothing_and_no_error(monkeypatch):
    registered = []
    if expert_parallel.EPImplementationInterface is not None:
        monkeypatch.setattr(
            expert_parallel.EPImplementationInterface, "register", lambda *a: registered.append(a)
        )
    assert runpy.run_path(expert_parallel.__file__)["MoeRoutingEP"]
    assert len(registered) == (expert_parallel.EPImplementationInterface is not None)
    registered.clear()
    monkeypatch.setitem(sys.modules, "transformers.distributed.expert_parallel", None)
    assert runpy.run_path(expert_parallel.__file__)["EPImplementationInterface"] is None
    assert not registered


def test_experts_get_the_id_and_the_weight_that_transformers_gives_slots_without_one():
    """Also those that look neither at the id nor at what a transport leaves in such a slot."""
    ids = torch.tensor([[3, -1], [-1, -1], [0, 2]], dtype=torch.int32)
    received = Received(
        rows=torch.ones(3, 8),
        ids=ids,
        weights=torch.full((3, 2), 0.5).masked_fill(ids < 0, torch.nan),
        scales=None,
        state=None,
    )
    ep = expert_parallel.MoeRoutingEP.__new__(expert_parallel.MoeRoutingEP)
    ep._experts, ep.num_local_experts = torch.nn.Module(), 4
    given = []
    ep.experts_forward = lambda *operands: given.extend(operands) or operands[0]
    ep._computed(received)
    assert given[1].dtype == torch.int64
    assert given[1].tolist() == [[3, 4], [4, 4], [0, 2]]
    assert given[2].tolist() == [[0.5, 0.0], [0.0, 0.0], [0.5, 0.5]]


@needs_the_interface
@pytest.mark.slow
@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
@pytest.mark.parametrize("kind", TYPES)
def test_ranks_that_share_a_batch_generate_as_one_process(kind, patched, on_two):
    for said in on_two[f"{kind} patched infers" if patched else f"{kind} infers"]:
        assert said["in_place"] == 2 * 13  # two layers; a pass for logits, 12 for tokens
        assert (said["moved"], said["transports"]) == (0, ["all-reduce"])  # of all layers


@needs_the_interface
@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_ranks_that_share_a_batch_train_as_one_process(kind, on_two):
    for said in on_two[f"{kind} trains"]:
        assert len(said["gradients"]) > 10
        assert (said["moved"], said["in_place"], said["transports"]) == (4, 0, ["all-to-all"])


@needs_the_interface
@pytest.mark.slow
@pytest.mark.parametrize("kind", OWN_BATCHES)
def test_ranks_with_their_own_batches_and_fsdp_infer_and_train_as_one_process(kind, on_two):
    assert all(said["moved"] == 2 for said in on_two[f"{kind} infers with fsdp"])
    for said in on_two[f"{kind} patched trains with fsdp"]:
        assert len(said["gradients"]) > 10
        assert (said["moved"], said["in_place"], said["transports"]) == (4, 0, ["all-to-all"])


@needs_the_interface
@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("experts", EXPERTS)
def test_a_rank_that_gets_no_row_takes_part_in_the_way_back(experts, checkpointed, on_two):
    for how in ("tp", "fsdp"):
        name = (
            f"{experts} no rows checkpointed {how}" if checkpointed else f"{experts} no rows {how}"
        )
        first, second = on_two[name]
        calls = 6 if checkpointed else 4  # of two layers and two passes, and of one again
        assert [said["no_rows"] for said in (first, second)] == [0, calls]


@needs_the_interface
@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("experts", EXPERTS)
def test_a_rank_whose_slice_has_no_token_takes_part(experts, checkpointed, on_two):
    name = f"{experts} one token checkpointed" if checkpointed else f"{experts} one token"
    assert [said["no_tokens"] > 0 for said in on_two[name]] == [False, True]


@needs_the_interface
@pytest.mark.slow
@pytest.mark.parametrize("experts", EXPERTS)
def test_experts_that_train_alone_get_gradients_where_no_token_moved(experts, on_two):
    """The first layer's tokens need no gradient, the second's do."""
    for name in (f"{experts} alone train", f"{experts} alone train, no rows"):
        for said in on_two[name]:
            assert said["gradients"]
            assert (said["in_place"], said["moved"]) == (2, 2)


@needs_the_interface
@pytest.mark.slow
def test_routers_that_train_alone_get_gradients(on_two):
    for said in on_two["routers alone train"]:
        assert sorted(said["gradients"]) == [f"model.layers.{n}.mlp.gate.weight" for n in range(2)]


@needs_the_interface
@pytest.mark.slow
@pytest.mark.parametrize("experts", [*EXPERTS, "batched_mm"])
def test_the_registry_may_choose_a_transport_that_pads(experts, on_two):
    assert all(said["transports"] == ["padded"] for said in on_two[f"{experts} padded"])


@needs_the_interface
@pytest.mark.slow
@pytest.mark.parametrize("experts", ["grouped_mm", NAME])
def test_a_model_whose_tokens_stay_compiles_as_one_graph(experts, on_two):
    assert all("logits" in said for said in on_two[f"{experts} compiled"])


@needs_the_interface
@pytest.mark.slow
@pytest.mark.parametrize("experts", ["grouped_mm", NAME])
def test_a_model_whose_tokens_move_compiles_in_parts_and_trains(experts, on_two):
    assert all(said["gradients"] for said in on_two[f"{experts} compiled trains"])


@needs_the_interface
@pytest.mark.slow
def test_slices_of_a_batch_have_its_gradients_of_every_order(on_two):
    assert [said["worst"] <= 1e-5 for said in on_two["slices"]] == [True, True]


@needs_the_interface
@pytest.mark.slow
def test_the_example_of_the_page_runs(on_two):
    assert all(said["transports"] for said in on_two["example"])


@needs_the_interface
@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_experts_that_fsdp_shards_train_with_tensor_parallel_groups_and_without(name, on_four):
    """Also where some ranks get no row: the others wait for their gradients."""
    results = on_four[name]
    assert all(len(said["gradients"]) > 10 and said["moved"] == 4 for said in results)
    assert any(said["no_rows"] for said in results) == FOUR[name]["starved"]
