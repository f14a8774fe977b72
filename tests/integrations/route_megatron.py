"""Route by the installed megatron-core on a CPU, by its own function and by ours.

The script prints as JSON how far probabilities and gradients are apart, and what is equal; the same
of the functions that balance experts.

``python route_megatron.py`` with megatron-core and ``megatron_adapter`` on the path. Routers are
called by ``TopKRouter.routing``, as their ``forward`` calls it: in front of it ``forward`` computes
the logits, which it does on a GPU only.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import balance_megatron
import megatron_adapter
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_routing.replay import from_megatron, to_megatron

T, E = 64, 16
SETTINGS = {
    "softmax after": {},
    "softmax before, scaled": {
        "moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5,
    },
    "one of softmax before": {"moe_router_pre_softmax": True, "moe_router_topk": 1},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "one sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_topk": 1},
    "sigmoid with a bias": {"moe_router_score_function": "sigmoid", "biased": True},
    **{
        f"{name}, groups by the best {6 // kept}": {
            **settings,
            "moe_router_topk": 6,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": kept,
        }
        for name, settings in {
            "softmax after": {},
            "softmax before": {"moe_router_pre_softmax": True},
            "sigmoid": {"moe_router_score_function": "sigmoid"},
            "sigmoid with a bias": {"moe_router_score_function": "sigmoid", "biased": True},
        }.items()
        for kept in (2, 3, 4)
    },
}  # fmt: skip
"""4 groups of 4; 6 // 4 is 1."""


def made(settings):
    """Return a router of these settings; its bias and counts lie on a GPU if it makes them."""
    settings = {"moe_router_topk": 4, "moe_token_dispatcher_type": "alltoall", **settings}
    biased = settings.pop("biased", False)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        num_moe_experts=E,
        moe_router_load_balancing_type="none",
        moe_enable_routing_replay=True,
        **settings,
    )
    groups = ProcessGroupCollection(tp=None, cp=None, tp_cp=None, tp_dp_cp=None)
    router = TopKRouter(config, pg_collection=groups)
    if biased:
        router.enable_expert_bias = True
        router.expert_bias = torch.linspace(-0.3, 0.3, E)
        router.local_tokens_per_expert = torch.zeros(E)
    return router


def passed(settings, logits, action=None, targets=None):
    """Return what a fresh router makes of the logits, forwards, backwards and in its records."""
    RouterReplay.clear_global_router_replay_instances()
    router = made(settings)
    if action is not None:
        RouterReplay.set_global_router_replay_action(action)
    if targets is not None:
        RouterReplay.set_replay_data([targets])
    logits = logits.clone().requires_grad_()
    probs, routing_map = router.routing(logits)
    upstream = torch.randn(probs.shape, generator=torch.Generator().manual_seed(1))
    (probs * upstream).sum().backward()
    (recorded,) = RouterReplay.get_recorded_data()
    counts = router.local_tokens_per_expert
    return {
        "probs": probs.detach(),
        "map": routing_map,
        "gradient": logits.grad,
        "recorded": recorded,
        "counts": counts,
    }


def both(*arguments):
    """Pass through our routing and through theirs, and see to it that each was called."""
    before = calls_of_ours()
    theirs = passed(*arguments)
    assert calls_of_ours() == before
    megatron_adapter.install()
    ours = passed(*arguments)
    megatron_adapter.uninstall()
    assert calls_of_ours() == before + 1
    return ours, theirs


def calls_of_ours():
    asked = megatron_adapter._router.cache_info()
    return asked.hits + asked.misses


def equal(ours, theirs, name):
    if theirs[name] is None:
        return ours[name] is None
    return ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])


def compared(ours, theirs):
    return {
        "apart": max(
            float((ours[name] - theirs[name]).abs().max()) for name in ("probs", "gradient")
        ),
        "largest": min(float(theirs[name].abs().max()) for name in ("probs", "gradient")),
        "equal": {name: equal(ours, theirs, name) for name in ("map", "recorded", "counts")},
        "dtypes": [str(ours[name].dtype) for name in ("probs", "map")],
        "selected": int(ours["map"].sum()),
    }


def main():
    generator = torch.Generator().manual_seed(0)
    said = {"version": version("megatron-core"), "cases": {}}
    for name, settings in SETTINGS.items():
        logits = torch.randn(T // 2, 2, E, generator=generator) * 2
        cases = said["cases"]
        cases[name] = compared(*both(settings, logits))
        ours, theirs = both(settings, logits, RouterReplayAction.RECORD)
        cases[f"{name}, recorded"] = compared(ours, theirs)
        record = from_megatron([ours["recorded"]], num_experts=E)
        (targets,) = to_megatron(record, num_experts=E)
        # Replayed for other logits, so that the ids are not those that would be selected.
        logits = torch.randn(T // 2, 2, E, generator=generator) * 2
        for action in (RouterReplayAction.REPLAY_FORWARD, RouterReplayAction.REPLAY_BACKWARD):
            replayed = both(settings, logits, action, targets)
            cases[f"{name}, {action.value}"] = compared(*replayed)
    said["balancing"] = balance_megatron.compared()
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main()
