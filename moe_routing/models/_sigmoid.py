"""Models whose experts are scored one by one.

Each source names transformers' router, which the preset follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_routing.models._preset import ANYTHING_ELSE, row

if TYPE_CHECKING:
    from moe_routing.models._preset import Changes, Choices, ModelPreset, Reads

EXPERTS: Reads = {
    "num_experts": ("num_experts", "num_local_experts"),
    "topk": "num_experts_per_tok",
}
ROUTED: Reads = {
    "num_experts": ("n_routed_experts", "num_local_experts"),
    "topk": "num_experts_per_tok",
}
LOCAL: Reads = {"num_experts": ("num_local_experts", "num_experts"), "topk": "num_experts_per_tok"}

DEEPSEEK: Reads = {
    **ROUTED,
    "num_groups": "n_group",
    "topk_groups": "topk_group",
    "scale": "routed_scaling_factor",
    "renormalize": "norm_topk_prob",
}
DEEPSEEK_EXPERTS: Reads = {**DEEPSEEK, "num_experts": ("num_experts", "num_local_experts")}
KIMI_LINEAR: Reads = {
    "num_experts": ("num_experts", "num_local_experts"),
    "topk": ("num_experts_per_token", "num_experts_per_tok"),
    "num_groups": ("num_expert_group", "n_group"),
    "topk_groups": "topk_group",
    "scale": "routed_scaling_factor",
    "renormalize": ("moe_renormalize", "norm_topk_prob"),
}
UNGROUPED: Changes = {
    "family": "sigmoid_bias_topk",
    "num_groups": 1,
    "topk_groups": 1,
    "group_sum": 1,
}
GROUPED: Changes = {"family": "grouped_sigmoid_bias", "group_sum": 2}
GROUPS: Choices = {"n_group": {None: UNGROUPED, 1: UNGROUPED, ANYTHING_ELSE: GROUPED}}
KIMI_GROUPS: Choices = {"num_expert_group": {None: UNGROUPED, 1: UNGROUPED, ANYTHING_ELSE: GROUPED}}

INKLING_SCORE: Choices = {
    "scoring_func": {
        "sigmoid": {"family": "sigmoid_bias_topk", "score": "sigmoid"},
        "sqrtsoftplus": {"family": "sqrtsoftplus_bias", "score": "sqrtsoftplus"},
    }
}
BAILING: Reads = {
    "num_experts": "num_experts",
    "topk": "num_experts_per_tok",
    "num_groups": "n_group",
    "topk_groups": "topk_group",
    "scale": "routed_scaling_factor",
    "renormalize": "norm_topk_prob",
}
BAILING_SCORE: Choices = {
    **GROUPS,
    "score_function": {
        "sigmoid": {"score": "sigmoid", "selection": "scores_plus_bias", "renorm_epsilon": 1e-20},
        "softmax": {
            "family": "softmax_topk",
            "score": "softmax",
            "selection": "logits",
            "num_groups": 1,
            "topk_groups": 1,
            "group_sum": 1,
            "renorm_epsilon": 0.0,
        },
    },
}
BAILING_DEFAULTS: Changes = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}


def grouped(
    *names: str,
    size: tuple[int | None, int | None],
    scale: float,
    source: str,
    reads: Reads = DEEPSEEK,
    choices: Choices = GROUPS,
) -> list[ModelPreset]:
    """Write a row for DeepSeek-V3's router as it was released: 8 groups, of which 4 are kept."""
    return row(
        *names,
        family="grouped_sigmoid_bias",
        size=size,
        reads=reads,
        choices=choices,
        scale=scale,
        source=source,
    )


def ungrouped(  # noqa: PLR0913 -- the columns of the table
    *names: str,
    size: tuple[int | None, int | None],
    source: str,
    scale: float = 1.0,
    renormalize: bool = True,
    reads: Reads = DEEPSEEK,
    choices: Choices = GROUPS,
) -> list[ModelPreset]:
    """Write a row for DeepSeek-V3's router with one group by default."""
    return row(
        *names,
        family="sigmoid_bias_topk",
        size=size,
        reads=reads,
        choices=choices,
        scale=scale,
        renormalize=renormalize,
        renorm_epsilon=1e-20,
        source=source,
    )


DEEPSEEK_ROUTERS: list[ModelPreset] = [
    *grouped(
        "deepseek_v3",
        size=(256, 8),
        scale=2.5,
        source="DeepseekV3TopkRouter. Experts outside the kept groups are out of the running "
        "(-inf); older transformers gave them the score 0, to which a biased score below 0 loses.",
    ),
    *grouped("deepseek_v32", size=(256, 8), scale=2.5, source="DeepseekV32TopkRouter."),
    *grouped("axk1", size=(192, 8), scale=2.5, source="AXK1TopkRouter."),
    *grouped(
        "beam",
        size=(256, 8),
        scale=2.5,
        reads=DEEPSEEK_EXPERTS,
        source="BeamTopKRouter; BeamMoE scales its sum by c.",
    ),
    *grouped(
        "bailing_hybrid",
        size=(512, 8),
        scale=2.5,
        reads=KIMI_LINEAR,
        choices=KIMI_GROUPS,
        source="BailingHybridTopkRouter.",
    ),
    *row(
        "bailing_moe",
        family="softmax_topk",
        size=(64, 6),
        reads=BAILING,
        choices=BAILING_SCORE,
        defaults={**BAILING_DEFAULTS, "score_function": "softmax"},
        renormalize=True,
        source="the released configurations of Ling and Ring, and vLLM's BailingMoE (transformers "
        "has no model of that name). Ling 1 takes a softmax and has no score_function; Ling 2, of "
        "the same name, takes a sigmoid and adds expert_bias.",
    ),
    *row(
        "bailing_moe_v2",
        "bailing_moe_v2_5",
        "bailing_moe_v3",
        "bailing_moe_linear",
        "bailing_moe_linear_v2",
        family="grouped_sigmoid_bias",
        size=(256, 8),
        reads=BAILING,
        choices=BAILING_SCORE,
        defaults={**BAILING_DEFAULTS, "score_function": "sigmoid"},
        scale=2.5,
        source="the released configurations of Ling 2, Ring 2 and later, and vLLM's BailingMoE "
        "(transformers has no model of that name); the operand bias is the gate's expert_bias.",
    ),
    *ungrouped(
        "axk2",
        size=(128, 8),
        scale=2.5,
        source="AXK2TopkRouter. It gives experts outside the kept groups the score 0, to which a "
        "biased score below 0 loses; here, as in vLLM, they are out of the running.",
    ),
    *ungrouped("dots1", size=(None, None), renormalize=False, source="Dots1TopkRouter."),
    *ungrouped("dots3_note", "dots3_note_text", size=(256, 8), source="Dots3NoteTextTopkRouter."),
    *ungrouped(
        "exaone_moe", size=(64, 8), scale=2.5, reads=DEEPSEEK_EXPERTS, source="ExaoneMoeTopkRouter."
    ),
    *ungrouped("glm4_moe", size=(128, 8), source="Glm4MoeTopkRouter."),
    *ungrouped("glm4_moe_lite", size=(64, 4), scale=1.8, source="Glm4MoeLiteTopkRouter."),
    *ungrouped("glm4v_moe", "glm4v_moe_text", size=(128, 8), source="Glm4vMoeTextTopkRouter."),
    *ungrouped(
        "glm5_next", "glm5_next_text", size=(288, 8), scale=2.5, source="Glm5NextTextTopkRouter."
    ),
    *ungrouped("glm_moe_dsa", size=(256, 8), scale=2.5, source="GlmMoeDsaTopkRouter."),
    *ungrouped("hy_v4", size=(256, 8), scale=2.827, source="HYV4TopkRouter."),
    *ungrouped("hy_v4_vl", "hy_v4_vl_text", size=(256, 8), scale=2.827, source="HYV4VLTopkRouter."),
    *ungrouped(
        "kimi_linear",
        size=(256, 8),
        scale=2.446,
        reads=KIMI_LINEAR,
        choices=KIMI_GROUPS,
        source="KimiLinearTopkRouter.",
    ),
    *ungrouped(
        "kimi_k2",
        "kimi_k25",
        size=(384, 8),
        scale=2.827,
        choices={**GROUPS, "scoring_func": {"sigmoid": {}}, "topk_method": {"noaux_tc": {}}},
        source="the released configuration of Kimi-K2 over DeepSeek-V3's router (transformers has "
        "no model of that name, and reads Kimi-K2.5's text model as 'deepseek_v3').",
    ),
    *ungrouped("mimo_v2_flash", size=(256, 8), source="MiMoV2FlashTopkRouter."),
    *ungrouped("nemotron_h", "nemotron_h_omni", size=(8, 2), source="NemotronHTopkRouter."),
    *ungrouped(
        "sarvam_mla",
        size=(128, 8),
        scale=2.5,
        source="DeepseekV3TopkRouter, which transformers builds for it.",
    ),
    *ungrouped(
        "sarvam_moe",
        size=(128, 6),
        scale=2.5,
        source="Glm4MoeTopkRouter, which transformers builds for it.",
    ),
    *ungrouped("solar_open", size=(128, 8), source="SolarOpenTopkRouter."),
]

BIASED: list[ModelPreset] = [
    *row(
        "afmoe",
        family="sigmoid_bias_topk",
        size=(64, 6),
        reads={**EXPERTS, "scale": "route_scale"},
        renorm_epsilon=1e-20,
        source="AfmoeTokenChoiceRouter; the operand bias is AfmoeSparseMoeBlock.expert_bias.",
    ),
    *row(
        "minimax_m2",
        family="sigmoid_bias_topk",
        size=(256, 8),
        reads=LOCAL,
        source="MiniMaxM2TopKRouter.",
    ),
    *row(
        "minimax_m3_vl",
        "minimax_m3_vl_text",
        family="sigmoid_bias_topk",
        size=(128, 4),
        reads={**LOCAL, "scale": "routed_scaling_factor"},
        scale=2.0,
        source="MiniMaxM3VLTopKRouter; MiniMaxM3VLSparseMoeBlock scales the experts' sum by c, "
        "here it is in the weights.",
    ),
    *row(
        "step3p7",
        "step3p5",
        family="sigmoid_bias_topk",
        size=(288, 8),
        reads={
            "num_experts": ("n_routed_experts", "moe_num_experts"),
            "topk": ("num_experts_per_tok", "moe_top_k"),
            "scale": "moe_router_scaling_factor",
        },
        source="Step3p7TopKRouter; Step3p7SparseMoeBlock scales the experts' sum by c, here it is "
        "in the weights.",
    ),
    *row(
        "laguna",
        family="sigmoid_bias_topk",
        size=(256, 8),
        reads={
            **EXPERTS,
            "scale": "moe_routed_scaling_factor",
            "logit_softcap": "moe_router_logit_softcapping",
        },
        choices={"moe_router_logit_softcapping": {0: {"logit_softcap": None}, ANYTHING_ELSE: {}}},
        source="LagunaTopKRouter; LagunaSparseMoeBlock scales the experts' sum by c, here it is in "
        "the weights.",
    ),
    *row(
        "lfm2_moe",
        family="sigmoid_bias_topk",
        size=(32, 4),
        reads={**EXPERTS, "scale": "routed_scaling_factor", "renormalize": "norm_topk_prob"},
        choices={
            "use_expert_bias": {
                True: {"family": "sigmoid_bias_topk", "selection": "scores_plus_bias"},
                False: {"family": "sigmoid_topk", "selection": "logits"},
            }
        },
        renorm_epsilon=1e-6,
        source="Lfm2MoeTopKRouter, whose sigmoid is in the logits' dtype; here it is in float32. "
        "The operand bias is Lfm2MoeSparseMoeBlock.expert_bias.",
    ),
    *row(
        "hy_v3",
        family="sigmoid_bias_topk",
        size=(192, 8),
        reads={**EXPERTS, "scale": "router_scaling_factor"},
        scale=2.826,
        renorm_epsilon=1e-20,
        source="HYV3TopKRouter; the operand bias is HYV3MoE.e_score_correction_bias.",
    ),
    *row(
        "dots3_note_vision_encoder",
        family="sigmoid_bias_topk",
        size=(64, 2),
        reads={**LOCAL, "scale": "router_scaling_factor"},
        renorm_epsilon=1e-20,
        source="Dots3NoteVisionTopKRouter; the operand bias is "
        "Dots3NoteVisionMoE.e_score_correction_bias.",
    ),
    *row(
        "muse_spark",
        "muse_spark_text",
        family="sigmoid_bias_topk",
        size=(256, 8),
        reads={**LOCAL, "scale": "routed_scaling_factor", "logit_multiplier": "output_multiplier"},
        logit_multiplier=0.1767766952966369,
        renorm_epsilon=1e-15,
        source="MuseSparkTopkRouter, which multiplies its logits by output_multiplier; here they "
        "come unmultiplied.",
    ),
    *row(
        "inkling2",
        "inkling2_text",
        family="sigmoid_bias_topk",
        size=(384, 8),
        reads={**ROUTED, "scale": ("routed_scaling_factor", "route_scale")},
        choices=INKLING_SCORE,
        scale=8.0,
        renorm_epsilon=1e-20,
        source="Inkling2TopKRouter.",
    ),
    *row(
        "inkling2_loop",
        "inkling2_loop_text",
        family="sigmoid_bias_topk",
        size=(128, 8),
        reads={**ROUTED, "scale": ("routed_scaling_factor", "route_scale")},
        choices=INKLING_SCORE,
        scale=8.0,
        renorm_epsilon=1e-20,
        source="Inkling2LoopTopKRouter.",
    ),
    *row(
        "deepseek_v4",
        family="sqrtsoftplus_bias",
        size=(256, 6),
        reads={**ROUTED, "scale": "routed_scaling_factor"},
        choices={
            "scoring_func": {
                "sqrtsoftplus": {"family": "sqrtsoftplus_bias", "score": "sqrtsoftplus"},
                "sigmoid": {"family": "sigmoid_bias_topk", "score": "sigmoid"},
            },
            "norm_topk_prob": {True: {}},
        },
        scale=1.5,
        renorm_epsilon=1e-20,
        source="DeepseekV4TopKRouter, which renormalises whatever norm_topk_prob says: False is "
        "refused here. Layers whose mlp_layer_types is 'hash_moe' are 'deepseek_v4_hash'.",
    ),
    *row(
        "deepseek_v4_hash",
        family="hash_sqrtsoftplus",
        size=(256, 6),
        reads={**ROUTED, "scale": "routed_scaling_factor"},
        choices={
            "scoring_func": {
                "sqrtsoftplus": {"score": "sqrtsoftplus"},
                "sigmoid": {"score": "sigmoid"},
            },
            "norm_topk_prob": {True: {}},
        },
        scale=1.5,
        renorm_epsilon=1e-20,
        source="DeepseekV4HashRouter, of the first layers; the operand expert_table is its buffer "
        "tid2eid.",
    ),
]

UNBIASED: list[ModelPreset] = [
    *row(
        "flint",
        family="sigmoid_topk",
        size=(256, 6),
        reads={**EXPERTS, "renormalize": "norm_topk_prob"},
        renormalize=True,
        source="FlintTopKRouter, which selects on the sigmoid; here it is on the logits, which is "
        "the same where the sigmoid does not saturate.",
    ),
    *row(
        "llama4",
        "llama4_text",
        family="topk_sigmoid",
        size=(16, 1),
        reads={"num_experts": "num_local_experts", "topk": "num_experts_per_tok"},
        source="Llama4Router: its dense scores [T, E] are these weights at these ids, and 0 "
        "elsewhere.",
    ),
    *row(
        "phimoe",
        family="sparsemixer",
        size=(16, 2),
        reads={
            "num_experts": "num_local_experts",
            "topk": "num_experts_per_tok",
            "jitter": "router_jitter_noise",
        },
        source="sparsemixer of PhimoeTopKRouter in evaluation mode, which always selects 2.",
    ),
    *row(
        "kolibri1",
        family="logit_bias_sigmoid",
        size=(384, 6),
        reads={**LOCAL, "renormalize": "norm_topk_prob"},
        source="Kolibri1TopKRouter.",
    ),
]
