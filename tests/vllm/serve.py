"""Serve each checkpoint with vLLM's engine and write what it generated: ``serve.py JOB.json RESULT.json``.

The job names the checkpoints by model type, the prompt and the number of new tokens; ``prefer`` a backend of ours to
generate a second time with, in the same engine; and ``apart`` a checkpoint to serve once more from an engine core in a
process of its own, with the plug-in switched on there only.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

# One thread each, bound to no core: two of these run side by side, and the models are tiny.
os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

ARCHITECTURES = {
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "gpt_oss": ("gpt_oss", "GptOssForCausalLM"),
    "deepseek_v3": ("deepseek_v2", "DeepseekV3ForCausalLM"),
    "gemma4_text": ("gemma4", "Gemma4ForCausalLM"),
}


def start(folder):
    from vllm import LLM

    return LLM(
        model=folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=2,
        max_num_batched_tokens=128, enable_prefix_caching=False,
    )  # fmt: skip


def generate(engine, job):
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False)
    (request,) = engine.generate([{"prompt_token_ids": job["prompt"]}], sampling, use_tqdm=False)
    return list(request.outputs[0].token_ids)


def stop(engine):
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def main(job_file, result_file):
    from vllm import ModelRegistry

    import moe_routing
    from moe_routing.doctor import examine
    from moe_routing.integrations.vllm import report

    job = json.loads(Path(job_file).read_text())
    result = {"tokens": {}, "preferred": {}, "calls": {}}
    for model_type, folder in job["checkpoints"].items():
        module, name = ARCHITECTURES[model_type]
        # A class, not a name: vLLM would import the module in yet another process to look at it.
        ModelRegistry.register_model(name, getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name))
        before = sum(site.calls for site in report().sites)
        engine = start(folder)
        result["tokens"][model_type] = generate(engine, job)
        result["calls"][model_type] = sum(site.calls for site in report().sites) - before
        with moe_routing.prefer(job["prefer"]) if job["prefer"] else nullcontext():
            result["preferred"][model_type] = generate(engine, job)
        stop(engine)
        del engine
    result["report"] = report().to_dict()
    result["doctor"] = examine(device="cpu", checks=["vllm"])["checks"]
    if job["apart"]:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "MOE_ROUTING_VLLM": "1"} | job["environment"]
        engine = start(job["checkpoints"][job["apart"]])
        result["apart"] = generate(engine, job)
        result["replaced_here"] = report().to_dict()
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
