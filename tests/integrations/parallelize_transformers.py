"""A script of test_transformers_expert_parallel.py: one of the processes that share models' experts.

It takes a folder, its rank, the number of processes, and the cases to run as JSON. Each case is a
model, loaded by every process, and the same model in this process alone. What they differ by goes
to a file of the folder, for the test to judge. Where a case fails the process ends, so that the
others do not wait for it.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from moe_routing.integrations.transformers import expert_parallel, patch

AGAINST = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("against.py"))))
NAME = "moe_routing"


def one_process(model_type, **settings):
    """Build a model in float32 whose routers decide by more than a bias."""
    torch.manual_seed(sum(map(ord, model_type)))
    config = AGAINST.CONFIG_MAPPING[model_type](
        **AGAINST.SMALL
        | AGAINST.WHOLE[model_type]
        | {"initializer_range": 0.3, "output_router_logits": False}
        | settings
    )
    model = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm").eval()
    for module in model.modules():
        if type(module).__name__ == AGAINST.BY_MODEL[model_type].router.rpartition(".")[2]:
            AGAINST.randomize(module, AGAINST.BY_MODEL[model_type].bias)
    return model


def saved(model_type, folder, rank):
    """Build a model, and save it once for all processes."""
    path = folder / model_type
    model = one_process(model_type)
    if rank == 0 and not path.exists():
        model.save_pretrained(path)
    distributed.barrier()
    return model, path


def parallel(path, case):
    """Load the model as a user does; every process holds a part of it."""
    config = DistributedConfig(**{"ep_implementation": NAME} | case["config"])
    model = AutoModelForCausalLM.from_pretrained(
        path, distributed_config=config, experts_implementation=case.get("experts", "grouped_mm")
    ).eval()
    if "patch" in case:
        report = patch(model, **case["patch"])
        assert len(report.replaced) == len(report.layers) > 0, report
        assert all(layer.selected for layer in report.experts), report
        assert all(layer.gated for layer in report.gates), report
    return model


def batches(case):
    """Return the tokens of each batch."""
    generator = torch.Generator().manual_seed(7)
    of_each = case.get("lengths", [16])
    return [torch.randint(3, AGAINST.VOCABULARY, (2, n), generator=generator) for n in of_each]


def apart(mine, its):
    """Return the greatest difference, as a part of the greatest value."""
    return float((mine - its).abs().max() / its.abs().max().clamp(min=1e-6))


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def inference(alone, model, case, rank):
    """Compare logits, and tokens where the processes share the batch."""
    given = batches(case)
    own = given[rank % len(given)]
    with torch.no_grad():
        said = {
            "logits": apart(
                whole(model(own, use_cache=False).logits), alone(own, use_cache=False).logits
            )
        }
        if len(given) == 1:
            how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
            tokens = [one.generate(own, pad_token_id=0, **how) for one in (model, alone)]
            said["tokens"] = bool(torch.equal(*tokens))
            said["distinct"] = len(tokens[1].unique())
    return said


def training(alone, model, case, rank):
    """Compare losses and the gradients of every parameter, over two steps."""
    given = batches(case)
    own = given[rank % len(given)]
    for one in (alone, model):
        one.train()
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    steps = [torch.optim.SGD(one.parameters(), lr=0.05) for one in (alone, model)]
    losses, gradients = [], {}
    for _ in range(2):
        for step in steps:
            step.zero_grad()
        its = [alone(ids, labels=ids, use_cache=False).loss for ids in given]
        (sum(its) / len(its)).backward()
        mine = model(own, labels=own, use_cache=False).loss
        mine.backward()
        losses.append(apart(whole(mine.detach()), its[rank % len(given)].detach()))
        for (name, one), (_, other) in zip(
            model.named_parameters(), alone.named_parameters(), strict=True
        ):
            assert (one.grad is None) == (other.grad is None), name
            if one.grad is not None:
                error = apart(whole(one.grad), other.grad)
                gradients[name] = max(error, gradients.get(name, 0.0))
        for step in steps:
            step.step()
    return {"losses": losses, "gradients": gradients}


def counted(said):
    """Count how often tokens were moved, and how often they were not."""
    through = expert_parallel.MoeRoutingEP._through

    @functools.wraps(through)
    def counting(self, ep, *tokens):
        said["moved" if ep is self._exchange else "in place"] += 1
        said["empty"] += not len(tokens[0])
        return through(self, ep, *tokens)

    expert_parallel.MoeRoutingEP._through = counting


def main():
    """Run the cases."""
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=int(world))
    done, calls = {}, dict.fromkeys(("moved", "in place", "empty"), 0)
    counted(calls)
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        calls.update(dict.fromkeys(calls, 0))
        try:
            alone, path = saved(case["model"], folder, rank)
            model = parallel(path, case)
            does = {"inference": inference, "training": training}[case["does"]]
            done[name] = does(alone, model, case, rank) | calls
            exchanges = {id(v) for made in expert_parallel._EXCHANGES.values() for v in made.values()}
            done[name]["exchanges"] = len(exchanges)
        except Exception:  # noqa: BLE001 -- the test shows it
            done[name] = {"failed": traceback.format_exc()}
            break
        finally:
            (folder / f"{rank}.json").write_text(json.dumps(done))
        del model
    else:
        distributed.barrier()
        distributed.destroy_process_group()
        return
    os._exit(1)  # others wait in a collective; the end of this process ends it


if __name__ == "__main__":
    main()
