"""The routing families that are built in: one row of data each, no code. Free of torch.

>>> FAMILIES["gemma4"].spec.formula
'ids = topk(l); w = softmax(l[ids]) * per_expert_scale[ids]'
>>> FAMILIES["grouped_softmax"].spec.formula
'ids = topk(l) in the best 3 of 8 groups by max; w = softmax(l)[ids]'
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from moe_routing_registry import FamilySpec, RoutingSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

_ROWS = (
    FamilySpec(
        spec=RoutingSpec(family="softmax_topk"),
        source="Shazeer et al. 2017 (arXiv:1701.06538), Switch Transformer; "
        "Qwen2-MoE and OLMoE as it stands, Mixtral and Qwen3-MoE with renormalize=True",
    ),
    FamilySpec(
        spec=RoutingSpec(family="topk_softmax", renormalize=True),
        source="GPT-OSS, Granite-MoE, JetMoE, Aria: softmax over the selected logits only, "
        "which is softmax_topk with renormalize=True",
    ),
    FamilySpec(
        spec=RoutingSpec(family="gemma4", renormalize=True, per_expert_scale=True),
        source="Gemma 4 26B-A4B and DiffusionGemma: topk_softmax, "
        "then a learned scale of each expert",
    ),
    FamilySpec(
        spec=RoutingSpec(family="softmax_bias_topk", selection="scores_plus_bias"),
        source="Ernie 4.5 (with a renormalisation bounded below), "
        "LongCat-Flash (arXiv:2509.01322, with zero experts)",
    ),
    FamilySpec(
        spec=RoutingSpec(family="sigmoid_topk", score="sigmoid"),
        source="Flint and Cohere2-MoE (with renormalize=True); selected on the logits, "
        "because sigmoid is monotonic and its float32 value saturates",
    ),
    FamilySpec(
        spec=RoutingSpec(
            family="sigmoid_bias_topk",
            score="sigmoid",
            selection="scores_plus_bias",
            renormalize=True,
        ),
        source="loss-free balancing (Wang et al. 2024, arXiv:2408.15664) without groups: "
        "MiniMax-M2, AFMoE, LFM2-MoE, GLM-4.5, Kimi-K2",
    ),
    FamilySpec(
        spec=RoutingSpec(
            family="grouped_sigmoid_bias",
            score="sigmoid",
            selection="scores_plus_bias",
            renormalize=True,
            renorm_epsilon=1e-20,
            num_groups=8,
            topk_groups=4,
            group_sum=2,
        ),
        source="DeepSeek-V3 (arXiv:2412.19437, section 2.1.2), 'noaux_tc'; its c is 2.5",
    ),
    FamilySpec(
        spec=RoutingSpec(family="grouped_softmax", num_groups=8, topk_groups=3),
        source="DeepSeek-V2 (arXiv:2405.04434, section 2.2), 'group_limited_greedy'; its c is 16",
    ),
    FamilySpec(
        spec=RoutingSpec(
            family="sqrtsoftplus_bias",
            score="sqrtsoftplus",
            selection="scores_plus_bias",
            renormalize=True,
        ),
        source="DeepSeek-V4; its c is 1.5",
    ),
    FamilySpec(
        spec=RoutingSpec(
            family="hash_sqrtsoftplus",
            score="sqrtsoftplus",
            selection="token_table",
            renormalize=True,
        ),
        source="first layers of DeepSeek-V4, after hash layers "
        "(Roller et al. 2021, arXiv:2106.04426); its c is 1.5",
    ),
    FamilySpec(
        spec=RoutingSpec(family="topk_sigmoid", score="sigmoid"),
        source="Llama 4: the weights scale the experts' input there, "
        "which is the caller's business",
    ),
    FamilySpec(
        spec=RoutingSpec(family="sparsemixer", selection="sparsemixer"),
        source="SparseMixer-v2 as Phi-3.5-MoE uses it (arXiv:2409.12136), evaluation mode",
    ),
    FamilySpec(
        spec=RoutingSpec(
            family="partitioned_softmax", renormalize=True, num_groups=8, topk_per_group=True
        ),
        source="Intern-S1-Pro: the same number of experts from each group",
    ),
    FamilySpec(
        spec=RoutingSpec(
            family="logit_bias_sigmoid", score="sigmoid", selection="logits_plus_bias"
        ),
        source="Kolibri 1: the bias is added to the logit, not to the score",
    ),
)

FAMILIES: Mapping[str, FamilySpec] = MappingProxyType({row.spec.family: row for row in _ROWS})
"""Every built-in family by its name.

A row has the maths, with the defaults below, and the source of the formula.

A yes/no that models of one family answer differently (``renormalize`` of ``softmax_topk``) is no
here, and the factor ``c`` is 1: a model name, or ``RoutingSpec.replace``, says otherwise.
"""
