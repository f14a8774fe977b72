"""Capture the experts that vLLM routes a checkpoint to, and write what ``from_vllm`` makes of them.

The command is ``record.py FOLDER RESULT.json``. vLLM 0.32 returns routed experts by a model runner
that needs Triton. On a CPU its capturer is bound here as that runner binds it, and read after each
step, as that runner reads it; ``OutputProcessor`` then concatenates what the steps gave.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from checkpoints import NEW_TOKENS, PROMPT, build
from serve import start

SETTINGS = {"num_hidden_layers": 3, "mlp_only_layers": [1]}
MOE = [0, 2]
E = 16


def served(folder):
    """Return vLLM's new tokens, and its routed experts ``[T, hidden layers, K]``."""
    import numpy as np
    from vllm import SamplingParams
    from vllm.model_executor.layers.fused_moe import routed_experts_capturer

    engine = start({"checkpoints": {"qwen3_moe": folder}}, "qwen3_moe")
    config = engine.llm_engine.vllm_config
    capturer = routed_experts_capturer.RoutedExpertsCapturer(128, config)
    engine.apply_model(
        lambda model: routed_experts_capturer.bind_routed_experts_capturer(model, capturer)
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False
    )
    engine.llm_engine.add_request("0", {"prompt_token_ids": PROMPT}, sampling)
    chunks, rows = [], len(PROMPT)
    while engine.llm_engine.has_unfinished_requests():
        (output,) = engine.llm_engine.step()
        chunks.append(capturer.snapshot_routing_data(rows).numpy())
        rows = 1
    return list(output.outputs[0].token_ids), np.concatenate(chunks, axis=0)


def main(folder, result_file):
    import torch
    from vllm.utils.serial_utils import numpy2base64

    from moe_routing.integrations.transformers import patch, recording, replaying
    from moe_routing.replay import from_vllm, to_vllm

    model = build("qwen3_moe", **SETTINGS)
    model.save_pretrained(folder)
    tokens, routed = served(folder)
    record = from_vllm(routed, num_experts=E, layers=MOE)
    patch(model)
    whole = torch.tensor([PROMPT + tokens[:-1]])
    with torch.no_grad(), recording(model) as records:
        model(input_ids=whole, use_cache=False)
    with torch.no_grad(), replaying(model, record):
        logits = model(input_ids=whole, use_cache=False).logits[0, len(PROMPT) - 1 :]
    written = to_vllm(record, num_experts=E, layers=MOE, num_layers=3)
    result = {
        "tokens": tokens,
        "replayed tokens": logits.argmax(-1).tolist(),
        "shape": routed.shape,
        "dtype": str(routed.dtype),
        "dense": routed[:, 1].tolist(),
        "record": record.sort(-1).values.tolist(),
        "recorded": records.ids.sort(-1).values.tolist(),
        "written again": written.dtype == routed.dtype and (written == routed).all().item(),
        "over HTTP": torch.equal(
            from_vllm(numpy2base64(routed), num_experts=E, layers=MOE), record
        ),
    }
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
