"""A script of test_transformers_expert_parallel.py: a process that has a part of models' experts.

It takes a folder with cases, its rank, and the number of processes. A case is a model that every
process loads a part of, and the same model in this process alone. What they differ by goes to a
file of the folder, for the test to judge. If a case fails the process ends, and so do the others,
which wait for it.
"""

from __future__ import annotations

import functools
import json
import os
import re
import runpy
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import distributed
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from moe_routing.integrations.transformers import _slices, expert_parallel, patch

AGAINST = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("against.py"))))
NAME = "moe_routing"
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
"""The kind of device that transformers puts a distributed model on."""
STARVED = -100.0
"""Added to a score by which a router selects; no other is as low."""


def alone(case):
    """Build a model in float32 whose routers are random.

    If the case says so, they select none of the second half of the experts.
    """
    kind = case["model"]
    torch.manual_seed(sum(map(ord, kind)))
    sizes = AGAINST.SMALL | AGAINST.WHOLE[kind] | case.get("settings", {})
    config = AGAINST.CONFIG_MAPPING[kind](**sizes, initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm").eval()
    for module in model.modules():
        if type(module).__name__ == AGAINST.BY_MODEL[kind].router.rpartition(".")[2]:
            AGAINST.randomize(module, AGAINST.BY_MODEL[kind].bias)
            if case.get("starved"):
                bias = module.e_score_correction_bias
                bias.data[len(bias) // 2 :] = STARVED
    return model


def parallel(path, case):
    """Load the model as a user does."""
    config = DistributedConfig(**{"ep_implementation": NAME} | case["config"])
    model = AutoModelForCausalLM.from_pretrained(
        path, distributed_config=config, experts_implementation=case["experts"]
    ).eval()
    if "patch" in case:
        report = patch(model, **case["patch"])
        assert len(report.replaced) == len(report.layers) > 0, report
        assert all(layer.selected for layer in report.experts), report
        assert all(layer.gated for layer in report.gates), report
    return model


def batches(case):
    """Return the batches; as many as there are different ones."""
    generator = torch.Generator().manual_seed(7)
    shapes = case.get("shapes", [[2, 16]])
    drawn = [torch.randint(3, AGAINST.VOCABULARY, shape, generator=generator) for shape in shapes]
    return [ids.to(DEVICE) for ids in drawn]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def apart(mine, its):
    """Return the greatest difference, as a part of the greatest value."""
    return float((whole(mine) - its).abs().max() / its.abs().max().clamp(min=1e-6))


def logits(model, ids):
    return whole(model(ids, use_cache=False).logits)


def inference(one, model, given, mine, *, compiled=False):
    """Compare logits, and tokens where the processes have the same batch."""
    with torch.no_grad():
        said = {"logits": apart(logits(model, given[mine]), logits(one, given[mine]))}
        if len(given) == 1 and not compiled:
            how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
            ours, its = (m.generate(given[0], pad_token_id=0, **how) for m in (model, one))
            said |= {"tokens": bool(torch.equal(ours, its)), "distinct": len(its.unique())}
    return said


def training(one, model, given, mine, case):
    """Compare the loss and all gradients of a step, and the loss after it."""

    def loss(model, ids):
        return cross_entropy(logits(model, ids).flatten(0, 1), ids.roll(1).flatten())

    for each in (one, model):
        each.train(case.get("train", True))
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(case.get("only", "") in name)
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    losses, gradients = [], {}
    for step in range(2):
        its = [loss(one, ids) for ids in given]
        ours = loss(model, given[mine])
        losses.append(apart(ours.detach(), its[mine].detach()))
        if step:
            break
        (sum(its) / len(its)).backward()
        ours.backward()
        pairs = zip(model.named_parameters(), one.named_parameters(), strict=True)
        for (name, parameter), (_, other) in pairs:
            assert (parameter.grad is None) == (other.grad is None), name
            if other.grad is not None:
                gradients[name] = apart(parameter.grad, other.grad)
        for each in (one, model):
            trained = [p for p in each.parameters() if p.grad is not None]
            # On GPUs the default takes all at once, which fails where only some are DTensors.
            torch.optim.SGD(trained, 0.1, foreach=False).step()
    return {"losses": losses, "gradients": gradients}


def example(path, one, given):
    """Run what the page on integrations says, with this model."""
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    blocks = re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if "ep_size" in block)
    names = {}
    code = re.sub(r'from_pretrained\(\s*"[^"]+"', f'from_pretrained("{path}"', block)
    assert code != block
    exec(code, names)  # noqa: S102 -- running it is the test
    with torch.no_grad():
        return {"logits": apart(logits(names["model"], given[0]), logits(one, given[0]))}


def slices():
    """Compare the slices of a batch and their gradients, also of second order, with the batch's."""
    group = distributed.group.WORLD
    worst = 0.0
    for rows in (0, 1, 2, 5, 8):
        generator = torch.Generator().manual_seed(rows)
        drawn = (torch.randn(rows, 3, generator=generator) for _ in range(2))
        batch, scale = (each.to(DEVICE) for each in drawn)
        batch.requires_grad_()
        part = _slices.sliced(batch, group)
        assert len(part) <= -(-rows // distributed.get_world_size())
        ours = _slices.gathered(part**3, rows, group) * scale
        its = batch**3 * scale
        for _ in range(3):
            assert ours.shape == its.shape
            worst = max(worst, apart(ours, its) if rows else 0.0)
            ours, its = (
                torch.autograd.grad(value.square().sum(), batch, create_graph=True)[0]
                for value in (ours, its)
            )
    return {"worst": worst}


class Calls:
    """What the exchanges of a model were asked."""

    def __init__(self):
        """Watch every call from now on."""
        self.clear()
        computed = expert_parallel.MoeRoutingEP._computed
        through = expert_parallel.MoeRoutingEP._through

        @functools.wraps(through)
        def watched(ep, exchange, *tokens):
            if torch.compiler.is_compiling():
                return through(ep, exchange, *tokens)
            self.moved += exchange is ep._exchange
            self.in_place += exchange is ep._in_place
            self.no_tokens += not len(tokens[0])
            self.exchanges[id(exchange)] = exchange.report.winner
            return through(ep, exchange, *tokens)

        @functools.wraps(computed)
        def counted(ep, received):
            if not torch.compiler.is_compiling():
                self.no_rows += not len(received.rows)
            return computed(ep, received)

        expert_parallel.MoeRoutingEP._through = watched
        expert_parallel.MoeRoutingEP._computed = counted

    def clear(self):
        self.moved = self.in_place = self.no_tokens = self.no_rows = 0
        self.exchanges = {}

    def to_dict(self):
        names = ("moved", "in_place", "no_tokens", "no_rows")
        transports = list(self.exchanges.values())
        return {name: getattr(self, name) for name in names} | {"transports": transports}


def done(case, path, rank):
    """Run a case."""
    if case["does"] == "slices":
        return slices()
    one = alone(case)
    if rank == 0:
        one.save_pretrained(path)
    one.to(DEVICE)
    distributed.barrier()
    given = batches(case)
    if case["does"] == "example":
        return example(path, one, given)
    model = parallel(path, case)
    if case.get("compiled"):
        whole_graph = case["does"] == "inference"
        model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=whole_graph)
    of_each = case["config"].get("tp_size", 1)  # these have the same batch
    mine = rank // of_each % len(given)
    if case["does"] == "training":
        return training(one, model, given, mine, case)
    return inference(one, model, given, mine, compiled=case.get("compiled", False))


def main():
    """Run the cases."""
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world)
    store = f"file://{folder / 'store'}"
    backends = "gloo"
    if DEVICE.type != "cpu":
        torch.accelerator.set_device_index(rank)
        backends += f",{DEVICE.type}:{distributed.get_default_backend_for_device(DEVICE)}"
        backends = backends.replace("gloo", "cpu:gloo", 1)
    distributed.init_process_group(backends, init_method=store, rank=rank, world_size=int(world))
    calls, said = Calls(), {}
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        calls.clear()
        try:
            said[name] = done(case, folder / name.replace(" ", "_"), rank) | calls.to_dict()
        except Exception:  # noqa: BLE001 -- the test shows it
            said[name] = {"failed": traceback.format_exc()}
        (folder / f"{rank}.json").write_text(json.dumps(said))
        if "failed" in said[name]:
            os._exit(1)
    distributed.barrier()
    distributed.destroy_process_group()
    # A group that something still holds may abort the process while Python ends, which is torch's
    # own affair: everything has been written. (The example's test ends as scripts do.)
    os._exit(0)


if __name__ == "__main__":
    main()
