"""Route through SGLang's own ``TopK`` layers on a CPU, by SGLang and by us.

The script prints the differences as JSON.

``python route_sglang.py`` with sglang 0.5.23, the packages that it imports, and ``sglang_adapter``
on the path. SGLang is installed without torchvision, whose published builds do not load with a
torch for CPUs ("operator torchvision::nms does not exist"): SGLang's image processors, which are
imported on the way, get an empty module instead. SGLang's CPU engine needs kernels that are not in
its wheel (``sgl_kernel``), so the layers route by ``forward_native``: plain torch, through the same
``select_experts``.
"""

from __future__ import annotations

import base64
import json
import sys
from types import ModuleType

import torch
from transformers.utils import is_torchvision_available

T, H, E, K = 33, 16, 16, 4


class Empty(ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Empty(f"{self.__name__}.{name}")


def import_sglang():
    # transformers remembers the answer, so that it does not take the empty module for a real one.
    is_torchvision_available()
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules.setdefault(name, Empty(name))
    from sglang.srt.configs.shared_experts import SharedExpertsConfig
    from sglang.srt.layers.moe.topk import TopK
    from sglang.srt.runtime_context import get_context, get_model

    return TopK, SharedExpertsConfig, get_context, get_model


def routed(layer, logits, **arguments):
    weights, ids, _ = layer.forward_native(torch.zeros(T, H), logits, **arguments)
    return weights, ids


def recorded():
    """Capture by SGLang's own cache, and decode by its own function and by ours.

    The detokenizer, which imports more packages, encodes as here.
    """
    from sglang.srt.state_capturer.base import BaseDeviceCache
    from sglang.srt.state_capturer.routed_experts import extract_routed_experts_from_meta_info

    from moe_routing.replay import from_sglang, to_sglang

    record, of_moe, depth = torch.randint(E, (2, T, K)), [0, 2], 3
    cache = BaseDeviceCache(T, depth, K, "cpu", "routed_experts")
    for layer, ids in zip(of_moe, record, strict=True):
        cache.capture(layer, ids)
    text = base64.b64encode(cache.buffer.numpy().tobytes()).decode("utf-8")
    read = from_sglang(text, num_experts=E, topk=K, num_layers=depth, layers=of_moe)
    written = to_sglang(record, num_experts=E, layers=of_moe, num_layers=depth)
    decoded = extract_routed_experts_from_meta_info({"meta_info": {"routed_experts": written}})
    return {
        "read": torch.equal(read.long(), record),
        "written": decoded.tolist() == cache.buffer.flatten().tolist(),
    }


def main():
    TopK, SharedExpertsConfig, get_context, get_model = import_sglang()
    import sglang_adapter

    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(0))
    scaled = {"routed_scaling_factor": 2.5, "apply_routed_scaling_factor_on_output": True}
    plain = {"renormalized": {}, "not renormalized": {"renormalize": False}, "scaled": scaled}
    others = {
        "grouped": {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2},
        "biased": {"correction_bias": torch.zeros(E)},
        "sigmoid": {"scoring_func": "sigmoid"},
        "packed": {"fused_gate_packed_ids": True},
        "custom": {"custom_routing_function": lambda **_: None},
    }
    said = {"differences": {}, "equal ids": {}, "dtypes": {}, "padding": {}, "left": {}}
    said["recorded"] = recorded()
    with get_context().override_server_args(device="cpu"):
        layers = {
            name: TopK(K, layer_id=0, **arguments) for name, arguments in (plain | others).items()
        }
        with get_model().override(shared_experts=SharedExpertsConfig(num_fused_shared_experts=1)):
            layers["shared"] = TopK(K, layer_id=0)
        functions = {
            name: layer.topk_config.custom_routing_function for name, layer in layers.items()
        }
        calls = {"plain": {}, "padded": {"num_token_non_padded": torch.tensor(20)}}
        theirs = {
            (name, how): routed(layers[name], logits, **given)
            for name in plain
            for how, given in calls.items()
        }
        said["adapted"] = sglang_adapter.adapt(torch.nn.ModuleList(layers.values()), "qwen3_moe")
        for (name, how), (weights, ids) in theirs.items():
            ours, our_ids = routed(layers[name], logits, **calls[how])
            key = f"{name}, {how}"
            said["differences"][key] = (
                ((ours - weights) / weights.clamp_min(1e-30)).abs().max().item()
            )
            said["equal ids"][key] = torch.equal(our_ids, ids)
            said["dtypes"][key] = [str(ours.dtype), str(our_ids.dtype)]
            said["padding"][key] = [(found[20:] == -1).all().item() for found in (our_ids, ids)]
        for name in (*others, "shared"):
            said["left"][name] = layers[name].topk_config.custom_routing_function is functions[name]
        for name in plain:
            assert layers[name].topk_config.custom_routing_function is not None, name
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main()
