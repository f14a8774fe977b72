"""Tiny checkpoints with random weights, saved by transformers.

The file also has the tokens that transformers itself generates from them.
"""

from __future__ import annotations

import torch
import transformers

NEW_TOKENS = 24
PROMPT = list(range(5, 21))
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 4,
}
HYBRID = {
    "head_dim": 32,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"],
}
MODELS = {
    "qwen3_moe": {
        "head_dim": 32,
        "moe_intermediate_size": 32,
        "num_experts": 16,
        "norm_topk_prob": True,
    },
    "gpt_oss": {**HYBRID, "num_local_experts": 16},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "n_routed_experts": 16,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 0,
        "q_lora_rank": 32,
        # vLLM's latent attention has a CPU kernel for these two alone.
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "topk_method": "noaux_tc",  # published checkpoints say so, and vLLM looks for it
        "scoring_func": "sigmoid",
    },
    "gemma4_text": {
        **HYBRID,
        "moe_intermediate_size": 32,
        "num_experts": 16,
        "top_k_experts": 4,
        "enable_moe_block": True,
        "global_head_dim": 32,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    },
}


def build(model_type, **settings):
    """Return a model of that type in float32, with weights large enough that its tokens vary."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        model_type, **(SIZES | MODELS[model_type] | settings)
    )
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
            elif name.endswith("per_expert_scale"):
                parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.3, 0.3)
    return model


def save(folder):
    """Save every model below the folder.

    Return, by model type, the tokens that transformers generates from it.
    """
    tokens = {}
    for model_type in MODELS:
        model = build(model_type)
        model.save_pretrained(folder / model_type)
        made = model.generate(
            torch.tensor([PROMPT]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens[model_type] = made[0, len(PROMPT) :].tolist()
    return tokens
