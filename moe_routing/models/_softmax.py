"""Models whose experts are scored by a softmax.

Each source names transformers' router, which the preset follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.models._preset import ANYTHING_ELSE, row

if TYPE_CHECKING:
    from moe_routing.models._preset import Choices, ModelPreset, Reads

# Some classes keep the attribute under another name than their published configuration files do.
EXPERTS: Reads = {
    "num_experts": ("num_experts", "num_local_experts"),
    "topk": "num_experts_per_tok",
}
LOCAL: Reads = {"num_experts": ("num_local_experts", "num_experts"), "topk": "num_experts_per_tok"}
NORM: Reads = {**EXPERTS, "renormalize": "norm_topk_prob"}
DEEPSEEK_V2: Reads = {
    "num_experts": ("n_routed_experts", "num_experts"),
    "topk": "num_experts_per_tok",
    "num_groups": "n_group",
    "topk_groups": "topk_group",
    "scale": "routed_scaling_factor",
}
GREEDY_OR_GROUPED: Choices = {
    "topk_method": {
        "greedy": {"family": "softmax_topk", "num_groups": 1, "topk_groups": 1},
        "group_limited_greedy": {"family": "grouped_softmax"},
    }
}
MISTRAL: Reads = {**DEEPSEEK_V2, "num_experts": ("n_routed_experts", "num_local_experts")}
# A group's score is the sum of two probabilities, which no order of the logits gives: select on
# scores plus a bias of 0.
MISTRAL_GROUPS: Choices = {
    "n_group": {
        1: {
            "family": "softmax_topk",
            "num_groups": 1,
            "topk_groups": 1,
            "selection": "logits",
            "group_sum": 1,
        },
        ANYTHING_ELSE: {
            "family": "grouped_softmax",
            "selection": "scores_plus_bias",
            "group_sum": 2,
        },
    }
}
ERNIE: Reads = {
    "num_experts": ("moe_num_experts", "num_experts"),
    "topk": ("moe_k", "num_experts_per_tok"),
    "renorm_floor": "moe_norm_min",
}

PLAIN: list[ModelPreset] = [
    *row(
        "mixtral",
        family="softmax_topk",
        size=(8, 2),
        reads=LOCAL,
        renormalize=True,
        source="MixtralTopKRouter.",
    ),
    *row(
        "minimax",
        family="softmax_topk",
        size=(8, 2),
        reads=LOCAL,
        renormalize=True,
        source="MiniMaxTopKRouter.",
    ),
    *row(
        "qwen2_moe", family="softmax_topk", size=(60, 4), reads=NORM, source="Qwen2MoeTopKRouter."
    ),
    *row(
        "qwen3_moe",
        family="softmax_topk",
        size=(128, 8),
        reads=NORM,
        source="Qwen3MoeTopKRouter. The class's default does not renormalise, the released "
        "checkpoints do.",
    ),
    *row(
        "qwen3_next",
        family="softmax_topk",
        size=(512, 10),
        reads=NORM,
        renormalize=True,
        source="Qwen3NextTopKRouter.",
    ),
    *row(
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        family="softmax_topk",
        size=(256, 8),
        reads=EXPERTS,
        renormalize=True,
        source="Qwen3_5MoeTopKRouter, which always renormalises.",
    ),
    *row(
        "qwen3_vl_moe",
        "qwen3_vl_moe_text",
        family="softmax_topk",
        size=(60, 4),
        reads=EXPERTS,
        renormalize=True,
        source="Qwen3VLMoeTextTopKRouter, which always renormalises.",
    ),
    *row(
        "qwen3_omni_moe",
        "qwen3_omni_moe_thinker",
        "qwen3_omni_moe_text",
        family="softmax_topk",
        size=(128, 8),
        reads=NORM,
        renormalize=True,
        source="Qwen3OmniMoeThinkerTextTopKRouter. The talker is 'qwen3_omni_moe_talker_text'.",
    ),
    *row(
        "qwen3_omni_moe_talker_text",
        family="softmax_topk",
        size=(128, 8),
        reads=NORM,
        source="Qwen3OmniMoeTalkerTextTopKRouter.",
    ),
    *row(
        "qwen4_exp",
        "qwen4_exp_text",
        family="softmax_topk",
        size=(512, 10),
        reads=NORM,
        renormalize=True,
        source="Qwen4ExpTextTopKRouter.",
    ),
    *row("olmoe", family="softmax_topk", size=(64, 8), reads=NORM, source="OlmoeTopKRouter."),
    *row("flex_olmo", family="softmax_topk", size=(7, 5), reads=NORM, source="FlexOlmoTopKRouter."),
    *row(
        "mellum",
        family="softmax_topk",
        size=(64, 8),
        reads=NORM,
        renormalize=True,
        source="MellumTopKRouter.",
    ),
    *row(
        "lara_mini",
        family="softmax_topk",
        size=(128, 4),
        reads=NORM,
        renormalize=True,
        source="LaraMiniTopKRouter.",
    ),
    *row(
        "jamba",
        family="softmax_topk",
        size=(16, 2),
        reads=EXPERTS,
        source="JambaTopKRouter, which never renormalises.",
    ),
    *row(
        "hunyuan_v1_moe",
        family="softmax_topk",
        size=(1, 1),
        reads={
            "num_experts": ("num_experts", "num_local_experts"),
            "topk": ("moe_topk", "num_experts_per_tok"),
        },
        renormalize=True,
        source="HunYuanMoEV1Gate. Lists with a number for each layer are read where all layers "
        "agree.",
    ),
    *row(
        "dbrx",
        family="softmax_topk",
        size=(4, 1),
        reads={"num_experts": "ffn_config.moe_num_experts", "topk": "ffn_config.moe_top_k"},
        choices={
            "ffn_config.moe_normalize_expert_weights": {
                1: {"renormalize": True},
                None: {"renormalize": False},
            }
        },
        renormalize=True,
        source="DbrxFFN, which rounds the softmax to the logits' dtype before it selects (here: "
        "selection on the logits). Its weights may be divided by any p-norm; p = 1, as released, "
        "or no norm at all can be expressed.",
    ),
    *row(
        "deepseek_v2",
        family="softmax_topk",
        size=(64, None),
        reads=DEEPSEEK_V2,
        choices={**GREEDY_OR_GROUPED, "norm_topk_prob": {False: {}}},
        source="DeepseekV2TopkRouter. With norm_topk_prob=True, which no released checkpoint has, "
        "vLLM renormalises, DeepSeek's own code renormalises and does not scale, and transformers "
        "does neither: such a configuration is refused.",
    ),
    *row(
        "deepseek_ocr2",
        "deepseek_ocr2_text",
        family="softmax_topk",
        size=(64, None),
        reads=DEEPSEEK_V2,
        choices=GREEDY_OR_GROUPED,
        source="DeepseekOcr2TextTopkRouter.",
    ),
    *row(
        "unlimited_ocr",
        "unlimited_ocr_text",
        family="softmax_topk",
        size=(64, 6),
        reads=DEEPSEEK_V2,
        choices=GREEDY_OR_GROUPED,
        source="UnlimitedOcrTextTopkRouter.",
    ),
    *row(
        "mistral4",
        family="softmax_topk",
        size=(128, 4),
        reads={**MISTRAL, "renormalize": "norm_topk_prob"},
        choices=MISTRAL_GROUPS,
        renormalize=True,
        source="Mistral4TopkRouter, whose 1e-20 added to a sum of at least 1/E changes no float32. "
        "With more than one group give `bias` zeros. The softmax is in the logits' dtype there, in "
        "float32 here.",
    ),
    *row(
        "mistral_large4",
        "mistral_large4_text",
        family="softmax_topk",
        size=(128, 4),
        reads=MISTRAL,
        choices=MISTRAL_GROUPS,
        renormalize=True,
        source="MistralLarge4TextTopkRouter: Mistral 4 that always renormalises. With more than "
        "one group give `bias` zeros.",
    ),
    *row(
        "interns1_pro",
        "interns1_pro_text",
        family="partitioned_softmax",
        size=(512, 8),
        reads={
            "num_experts": "num_experts",
            "topk": "num_experts_per_tok",
            "renormalize": "norm_topk_prob",
            "num_groups": "router_n_groups",
        },
        source="vLLM's InternS1Pro and the released configuration (transformers has no such "
        "model). vLLM leaves the ids group after group, here they are ordered by descending logit.",
    ),
]

SELECTED_FIRST: list[ModelPreset] = [
    *row(
        "gpt_oss",
        family="topk_softmax",
        size=(128, 4),
        reads=LOCAL,
        source="GptOssTopKRouter, whose softmax is in the logits' dtype; vLLM's and this one's are "
        "in float32.",
    ),
    *row(
        "openai_privacy_filter",
        family="topk_softmax",
        size=(128, 4),
        reads=LOCAL,
        source="OpenAIPrivacyFilterTopKRouter divides by K, OpenAIPrivacyFilterMLP multiplies by K "
        "again: neither is done.",
    ),
    *row(
        "aria",
        "aria_text",
        family="topk_softmax",
        size=(8, 2),
        reads={"num_experts": "moe_num_experts", "topk": "moe_topk"},
        source="AriaTextTopKRouter.",
    ),
    *row(
        "granitemoe",
        "granitemoe_swa",
        "granitemoehybrid",
        "granitemoeshared",
        family="topk_softmax",
        size=(8, 2),
        reads={"num_experts": "num_local_experts", "topk": "num_experts_per_tok"},
        source="GraniteMoeTopKRouter and its copies.",
    ),
    *row(
        "jetmoe",
        family="topk_softmax",
        size=(8, 2),
        reads={"num_experts": "num_local_experts", "topk": "num_experts_per_tok"},
        source="JetMoeTopKGating, for the experts and for the mixture of attention heads.",
    ),
    *row(
        "cohere2_moe",
        family="topk_softmax",
        size=(8, 2),
        reads={**EXPERTS, "renormalize": "norm_topk_prob"},
        choices={
            "expert_selection_fn": {
                "softmax": {"family": "topk_softmax", "score": "softmax", "renormalize": True},
                "sigmoid": {"family": "sigmoid_topk", "score": "sigmoid"},
            }
        },
        source="Cohere2MoeTopKRouter: norm_topk_prob is looked at for sigmoid only.",
    ),
    *row(
        "gemma4",
        "gemma4_text",
        family="gemma4",
        size=(None, None),
        reads={"num_experts": "num_experts", "topk": "top_k_experts"},
        choices={"enable_moe_block": {True: {}}},
        source="Gemma4TextRouter; the operand per_expert_scale is its parameter of that name.",
    ),
    *row(
        "diffusion_gemma",
        "diffusion_gemma_text",
        family="gemma4",
        size=(None, None),
        reads={"num_experts": "num_experts", "topk": "top_k_experts"},
        source="DiffusionGemmaTextRouter; the operand per_expert_scale is its parameter of that "
        "name.",
    ),
]

BIASED: list[ModelPreset] = [
    *row(
        "ernie4_5_moe",
        family="softmax_bias_topk",
        size=(64, 6),
        reads=ERNIE,
        renormalize=True,
        renorm_floor=1e-12,
        source="Ernie4_5_MoeTopKRouter; the operand bias is moe_statics.e_score_correction_bias.",
    ),
    *row(
        "ernie4_5_vl_moe",
        "ernie4_5_vl_moe_text",
        family="softmax_bias_topk",
        size=(64, 6),
        reads=ERNIE,
        renormalize=True,
        renorm_floor=1e-12,
        source="Ernie4_5_VLMoeMoeTopKRouter, the same for the text experts and the vision experts.",
    ),
    *row(
        "longcat_flash",
        family="softmax_bias_topk",
        size=(768, 12),
        reads={
            "num_experts": ("n_routed_experts", "num_local_experts"),
            "topk": ("moe_topk", "num_experts_per_tok"),
            "zero_experts": "zero_expert_num",
            "scale": "routed_scaling_factor",
        },
        scale=6.0,
        zero_experts=256,
        source="LongcatFlashTopkRouter. It leaves the zero experts their weights, which then scale "
        "the identity; here, as in vLLM's fused path, they get weight 0, and "
        "spec.replace(zero_experts=0) gives those weights too.",
    ),
    *row(
        "zaya",
        family="softmax_bias_topk",
        size=(17, 1),
        reads=EXPERTS,
        zero_experts=1,
        source="ZayaRouter, whose last logit is an expert that skips; it renames that id to 0, "
        "here it stays E - 1. The softmax is in the logits' dtype there, in float32 here.",
    ),
]
