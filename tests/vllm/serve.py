"""Serve each checkpoint with vLLM's engine and write what it generated.

The command is ``serve.py JOB.json RESULT.json``.

The job names the checkpoints by model type, the prompt and the number of new tokens; ``prefer`` a
backend of ours to generate a second time with, in the same engine; ``parallel`` the checkpoints to
serve once more, split between two worker processes; and ``apart`` a checkpoint to serve once more
from an engine core in a process of its own, with the plug-in switched on there only. With ``amx``
torch says that this CPU has AMX tiles, so that vLLM decides as it does on such a CPU.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

# One thread each, bound to no core: two of these run next to each other, and the models are tiny.
os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

ARCHITECTURES = {
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "gpt_oss": ("gpt_oss", "GptOssForCausalLM"),
    "deepseek_v3": ("deepseek_v2", "DeepseekV3ForCausalLM"),
    "gemma4_text": ("gemma4", "Gemma4ForCausalLM"),
}


# Where a CPU has AMX, vLLM's latent attention takes bfloat16 only, unless the other one is asked
# for.
ATTENTION = {"deepseek_v3": "CPU_MLA"}


def start(job, model_type, workers=1):
    from vllm import LLM, ModelRegistry

    module, name = ARCHITECTURES[model_type]
    # A class, not a name: vLLM would import the module in yet another process to look at it.
    ModelRegistry.register_model(
        name, getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    )
    return LLM(
        model=job["checkpoints"][model_type], skip_tokenizer_init=True, dtype="float32",
        enforce_eager=True, max_model_len=128, max_num_seqs=2, max_num_batched_tokens=128,
        enable_prefix_caching=False, tensor_parallel_size=workers,
        attention_backend=ATTENTION.get(model_type),
    )  # fmt: skip


def generate(engine, job):
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False
    )
    (request,) = engine.generate([{"prompt_token_ids": job["prompt"]}], sampling, use_tqdm=False)
    return list(request.outputs[0].token_ids)


def stop(engine):
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def said(_worker):
    from moe_routing.integrations.vllm import report

    return report().to_dict()


def main(job_file, result_file):
    import torch

    import moe_routing
    from moe_routing.doctor import examine
    from moe_routing.integrations.vllm import report

    job = json.loads(Path(job_file).read_text())
    if job["amx"]:
        torch.cpu._is_amx_tile_supported = lambda: True
    result = {"tokens": {}, "preferred": {}, "calls": {}, "parallel": {}, "workers": {}}
    for model_type in job["checkpoints"]:
        before = sum(site.calls for site in report().sites)
        engine = start(job, model_type)
        result["tokens"][model_type] = generate(engine, job)
        result["calls"][model_type] = sum(site.calls for site in report().sites) - before
        with moe_routing.prefer(job["prefer"]) if job["prefer"] else nullcontext():
            result["preferred"][model_type] = generate(engine, job)
        stop(engine)
        del engine
    result["report"] = report().to_dict()
    result["doctor"] = examine(device="cpu", checks=["vllm"])["checks"]
    for model_type in job["parallel"]:
        engine = start(job, model_type, workers=2)
        result["parallel"][model_type] = generate(engine, job)
        result["workers"][model_type] = engine.collective_rpc(said)
        stop(engine)
        del engine
    if job["apart"]:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "MOE_ROUTING_VLLM": "1"} | job[
            "environment"
        ]
        engine = start(job, job["apart"])
        result["apart"] = generate(engine, job)
        result["replaced_here"] = report().to_dict()
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
