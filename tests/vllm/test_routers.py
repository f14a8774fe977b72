"""vLLM's own router objects, those of its GPU path too, made on a CPU.

The tests compare what they answer once we compute for them.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig
from vllm.distributed.eplb.eplb_state import EplbLayerState
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe import layer
from vllm.model_executor.layers.fused_moe.router import (
    base_router,
    cpu_router,
    fused_topk_bias_router,
    grouped_topk_router,
    router_factory,
)
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter
from vllm.model_executor.models.gemma4 import Gemma4Router
from vllm.model_executor.models.llama4 import Llama4MoE

from moe_routing.integrations.vllm import register, report
from moe_routing.integrations.vllm._install import replace
from moe_routing.integrations.vllm._report import STATE
from moe_routing.integrations.vllm.patch_points import look

T, E, K = 64, 32, 4


@pytest.fixture(autouse=True)
def _a_process_that_did_nothing_yet(monkeypatch):
    monkeypatch.setattr(STATE, "sites", {})
    monkeypatch.setattr(STATE, "active", False)
    monkeypatch.setattr(layer, "create_fused_moe_router", router_factory.create_fused_moe_router)


@pytest.fixture
def logits():
    return torch.randn(T, E, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def bias():
    return torch.rand(E, generator=torch.Generator().manual_seed(1)) - 0.5


SCORES = {
    "softmax": lambda l: l.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda l: torch.nn.functional.softplus(l).sqrt(),
}


def expected(logits, score, *, bias=None, renormalize=True, scale=1.0, groups=1, kept=1):  # noqa: PLR0913 -- one argument a step
    """The routing in float64, as vLLM orders it: by descending score, the lower id first."""
    scores = SCORES[score](logits.double())
    chosen_by = scores if bias is None else scores + bias
    grouped = chosen_by.view(len(logits), groups, -1)
    of_group = (
        grouped.amax(-1) if bias is None else grouped.topk(min(2, grouped.shape[-1])).values.sum(-1)
    )
    best = of_group.sort(descending=True, stable=True).indices[:, :kept]
    open_ = (
        torch.zeros_like(of_group)
        .scatter(1, best, 1.0)
        .bool()
        .repeat_interleave(grouped.shape[-1], 1)
    )
    ids = (
        chosen_by.masked_fill(~open_, -torch.inf).sort(descending=True, stable=True).indices[:, :K]
    )
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return (weights * scale).float(), ids


def routed(router, logits, dtype=None, experts=E):
    """What the router answers after it was replaced."""
    replace(router, experts)
    return router.select_experts(torch.zeros(len(logits), 8), logits, dtype)


def with_bias(arguments, bias):
    """Put the bias where the arguments have an ellipsis."""
    return {name: bias if value is ... else value for name, value in arguments.items()}


def assert_same(result, wanted):
    torch.testing.assert_close(result[1].long(), wanted[1])
    torch.testing.assert_close(result[0], wanted[0])


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_top_k(logits, score, renormalize):
    router = FusedTopKRouter(K, E, scoring_func=score, renormalize=renormalize)
    assert_same(routed(router, logits), expected(logits, score, renormalize=renormalize))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_top_k_with_a_bias(logits, bias, score, renormalize):
    router = FusedTopKBiasRouter(K, E, bias, renormalize, 2.5, scoring_func=score)
    assert_same(
        routed(router, logits),
        expected(logits, score, bias=bias, renormalize=renormalize, scale=2.5),
    )


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_grouped_top_k(logits, bias, score, biased):
    bias = bias if biased else None
    router = GroupedTopKRouter(
        K, E, 8, 3, scoring_func=score, routed_scaling_factor=2.5, e_score_correction_bias=bias
    )
    assert_same(
        routed(router, logits), expected(logits, score, bias=bias, scale=2.5, groups=8, kept=3)
    )


def test_a_bias_that_is_loaded_later_is_used(logits, bias):
    parameter = torch.nn.Parameter(torch.zeros(E), requires_grad=False)
    router = FusedTopKBiasRouter(K, E, parameter)
    routed(router, logits)
    parameter.data.copy_(bias)
    assert_same(router.select_experts(logits, logits), expected(logits, "sigmoid", bias=bias))


@pytest.mark.parametrize("make", [CustomRoutingRouter, CPURouter])
def test_gemma4_whose_scale_is_read_at_every_call(logits, make):
    owner = Gemma4Router.__new__(Gemma4Router)
    torch.nn.Module.__init__(owner)
    owner.per_expert_scale = torch.nn.Parameter(torch.ones(E), requires_grad=False)
    router = make(top_k=K, global_num_experts=E, custom_routing_function=owner.routing_function)
    weights, ids = expected(logits, "softmax")
    assert_same(routed(router, logits), (weights, ids))
    owner.per_expert_scale.data.uniform_(0.5, 2.0)
    assert_same(router.select_experts(logits, logits), (weights * owner.per_expert_scale[ids], ids))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"renormalize": False},
        {"use_grouped_topk": True, "num_expert_group": 8, "topk_group": 3},
        {"use_grouped_topk": True, "num_expert_group": 8, "topk_group": 3,
         "scoring_func": "sigmoid", "e_score_correction_bias": ..., "routed_scaling_factor": 2.5},
    ],
    ids=["softmax", "not renormalised", "groups", "groups with a bias"],
)  # fmt: skip
def test_the_cpu_router_agrees_with_its_own_code(logits, bias, arguments):
    arguments = with_bias(arguments, bias)
    own, ours = CPURouter(K, E, **arguments), CPURouter(K, E, **arguments)
    assert_same_set(routed(ours, logits), own.select_experts(logits, logits))


@pytest.mark.skipif(
    not hasattr(torch.ops._C, "biased_topk_cpu"),
    reason=(
        "vLLM loads its build for CPUs without AVX-512 here, "
        "which lacks the kernel that is compared"
    ),
)
def test_the_cpu_router_agrees_with_its_own_kernel_for_deepseek_v4():
    logits, bias = torch.randn(2, T, 256, generator=torch.Generator().manual_seed(2))
    arguments = {
        "scoring_func": "sqrtsoftplus",
        "e_score_correction_bias": bias[0],
        "routed_scaling_factor": 1.5,
    }
    own, ours = CPURouter(6, 256, **arguments), CPURouter(6, 256, **arguments)
    assert_same_set(routed(ours, logits, experts=256), own.select_experts(logits, logits))


def assert_same_set(ours, theirs):
    assert [site.formula != "" for site in report().sites] == [True]
    for mine, its in zip(by_id(ours), by_id(theirs), strict=True):
        torch.testing.assert_close(mine, its)


def by_id(result):
    """vLLM's CPU code leaves the experts of a row in any order."""
    ids, order = result[1].sort(-1)
    return result[0].gather(1, order), ids


@pytest.mark.parametrize("dtype", [None, torch.int32, torch.int64, torch.uint32])
def test_the_ids_have_the_dtype_that_vllm_asks_for(logits, dtype):
    weights, ids = routed(FusedTopKRouter(K, E), logits, dtype)
    assert (weights.dtype, ids.dtype) == (torch.float32, dtype or torch.int32)
    assert_same((weights, ids), expected(logits, "softmax"))


def test_int64_ids_are_written_at_once_not_cast(logits):
    router = FusedTopKRouter(K, E)
    replace(router, E)
    weights, ids = router._compute_routing(logits, logits, torch.int64)
    assert ids.dtype == torch.int64
    assert ids.is_contiguous()  # kernels of the experts look at no strides
    assert weights.is_contiguous()


def test_ids_become_physical_and_the_captured_ones_stay_logical(logits, monkeypatch):
    to_physical = torch.arange(E).flip(0).unsqueeze(1)

    def map_and_record(
        topk_ids, expert_load_view, logical_to_physical_map, **_others
    ):  # on a CPU vLLM's does nothing
        expert_load_view += torch.bincount(topk_ids.flatten(), minlength=E)
        return logical_to_physical_map[topk_ids.long(), 0].to(topk_ids.dtype)

    monkeypatch.setattr(base_router, "eplb_map_to_physical_and_record", map_and_record)
    load = torch.zeros(E, dtype=torch.long)
    state = EplbLayerState(load, to_physical, torch.ones(E), torch.tensor(True), [torch.tensor(T)])  # noqa: FBT003 -- vLLM's
    router = FusedTopKRouter(K, E, eplb_state=state)
    captured, replay = [], torch.zeros(T, K, dtype=torch.int16)
    router.set_capture_fn(captured.append)
    router._routing_replay_out = replay
    weights, ids = routed(router, logits)
    wanted, logical = expected(logits, "softmax")
    assert_same((weights, captured[0]), (wanted, logical))
    assert torch.equal(ids.long(), E - 1 - logical)
    assert torch.equal(replay.long(), ids.long())
    assert torch.equal(load, torch.bincount(logical.flatten(), minlength=E))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", ["top_k", "bias", "grouped"])
def test_rows_that_pad_a_graph_get_ids_of_minus_one_and_no_weight(logits, bias, kind, dtype):
    router = {
        "top_k": lambda: FusedTopKRouter(K, E),
        "bias": lambda: FusedTopKBiasRouter(K, E, bias),
        "grouped": lambda: GroupedTopKRouter(K, E, 8, 3, skip_padding=True),
    }[kind]()
    replace(router, E)
    for count in (1, 5, T):
        rows = logits[:count]
        plain = router.select_experts(rows, rows, dtype)
        padding = torch.arange(T + 9) % 5 == 3  # any rows, not only the last
        with set_forward_context(None, VllmConfig(), is_padding=padding):
            weights, ids = router.select_experts(rows, rows, dtype)
        pads = padding[:count]
        assert torch.all(ids[pads] == -1)
        assert torch.all(weights[pads] == 0)
        assert_same((weights[~pads], ids[~pads]), (plain[0][~pads], plain[1][~pads].long()))
        assert (weights.dtype, ids.dtype) == (torch.float32, dtype)
        assert weights.is_contiguous()
        assert ids.is_contiguous()
        assert ids.data_ptr() % 64 == 0  # as far as torch aligns on a CPU


def test_grouped_top_k_blanks_padding_only_where_vllm_would(logits):
    router = GroupedTopKRouter(K, E, 8, 3, skip_padding=False)
    with set_forward_context(None, VllmConfig(), is_padding=torch.ones(T, dtype=torch.bool)):
        assert torch.all(routed(router, logits)[1] >= 0)


def test_what_vllm_picks_kernels_for_the_experts_by_is_unchanged(bias):
    for make in (
        lambda: FusedTopKRouter(K, E),
        lambda: FusedTopKBiasRouter(K, E, bias),
        lambda: GroupedTopKRouter(K, E, 8, 3, scoring_func="sigmoid", e_score_correction_bias=bias),
    ):
        own, ours = make(), make()
        replace(ours, E)
        assert type(ours) is type(own)
        assert ours.routing_method_type == own.routing_method_type


OWN = type("Own", (FusedTopKRouter,), {})
KEPT = [
    (
        ZeroExpertRouter,
        {"e_score_correction_bias": ..., "num_logical_experts": E - 4, "zero_expert_type": "x"},
        "zero experts",
    ),
    (
        CustomRoutingRouter,
        {"custom_routing_function": Llama4MoE.custom_routing_function},
        "knows some by identity",
    ),
    (FusedTopKBiasRouter, {"hash_indices_table": torch.zeros(9, K, dtype=torch.int32)}, "table"),
    (
        FusedTopKBiasRouter,
        {"e_score_correction_bias": ..., "num_fused_shared_experts": 1},
        "shared experts",
    ),
    (GroupedTopKRouter, {"num_expert_group": E, "topk_group": 8}, "ignores the groups"),
    (GroupedTopKRouter, {"num_expert_group": 5, "topk_group": 2}, "a divisor of num_experts"),
    (CPURouter, {"e_score_correction_bias": ...}, "otherwise on a CPU"),
    (OWN, {}, "not known"),
]


@pytest.mark.parametrize(("kind", "arguments", "because"), KEPT)
def test_what_cannot_be_replaced_is_left_alone_and_logged_once(
    bias, caplog, kind, arguments, because
):
    for _ in range(2):
        router = kind(K, E, **with_bias(arguments, bias))
        with caplog.at_level("INFO", logger="vllm.moe_routing"):
            replace(router, E)
        assert "_compute_routing" not in vars(router)
    (site,) = report().sites
    assert (site.formula, site.layers, site.calls) == ("", 2, 0)
    assert because in site.reason
    assert sum("is left alone" in record.getMessage() for record in caplog.records) == 1


def test_aiters_fused_routing_is_left_alone(monkeypatch):
    from vllm._aiter_ops import rocm_aiter_ops

    monkeypatch.setattr(rocm_aiter_ops, "is_fused_moe_enabled", lambda: True)
    replace(FusedTopKRouter(K, E), E)
    assert report().sites[0].reason.startswith("AITER")


def test_a_second_bias_that_a_model_attaches_later_is_vllms_business(logits, bias, monkeypatch):
    router = FusedTopKBiasRouter(K, E, bias)
    own = SimpleNamespace(calls=0)

    def compute(*_arguments, **_named):
        own.calls += 1
        return torch.ones(T, K), torch.zeros(T, K, dtype=torch.int32)

    replace(router, E)
    monkeypatch.setattr(fused_topk_bias_router, "fused_topk_bias", compute)
    router.select_experts(logits, logits)
    router.bias_vl = bias
    router.select_experts(logits, logits)
    assert (own.calls, report().sites[0].calls) == (1, 1)


def test_the_installed_vllm_is_one_whose_code_was_read():
    assert look().unknown == ()


def wrapped(function):
    @functools.wraps(function)
    def other(*arguments, **named):
        return function(*arguments, **named)

    return other


def assert_same_bits(ours, theirs):
    assert all(map(torch.equal, ours, theirs))


REPLACED = {
    "method of the class": (
        CPURouter,
        "_compute_routing",
        "cpu_router.CPURouter._compute_routing was replaced, by ",
    ),
    "constructor": (CPURouter, "__init__", "cpu_router.CPURouter.__init__ was replaced, by "),
    "helper": (cpu_router, "_softmax_topk", "cpu_router._softmax_topk was replaced, by "),
    "caller": (
        base_router.BaseRouter,
        "_select_experts",
        "BaseRouter._select_experts was replaced, by ",
    ),
}


@pytest.mark.parametrize(("owner", "name", "because"), REPLACED.values(), ids=REPLACED)
def test_a_router_of_which_another_plug_in_replaced_a_function_is_left_and_the_report_names_it(
    logits, monkeypatch, owner, name, because
):
    monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))
    router = CPURouter(K, E)
    assert_same_bits(routed(router, logits), router.select_experts(logits, logits))
    (site,) = report().sites
    assert (site.formula, site.calls) == ("", 0)
    assert because in site.reason
    assert site.reason.endswith(".wrapped.<locals>.other")


def test_a_router_whose_instance_another_plug_in_changed_is_left():
    router = FusedTopKRouter(K, E)
    router._compute_routing = mine = wrapped(router._compute_routing)
    replace(router, E)
    assert router._compute_routing is mine
    assert report().sites[0].reason.startswith("its _compute_routing was replaced before, by ")


def test_a_function_that_only_looks_like_gemma4s_is_left():
    owner = Gemma4Router.__new__(Gemma4Router)
    router = CustomRoutingRouter(K, E, wrapped(owner.routing_function))
    replace(router, E)
    assert "is the model's own function" in report().sites[0].reason


def test_functions_that_torch_compiled_count_as_vllms_own(bias):
    assert grouped_topk_router.grouped_topk.__code__.co_filename != grouped_topk_router.__file__
    replace(GroupedTopKRouter(K, E, 8, 3, scoring_func="sigmoid", e_score_correction_bias=bias), E)
    assert report().sites[0].reason == ""


def test_the_factory_is_wrapped_once_however_often_vllm_calls_the_plug_in(monkeypatch, logits):
    monkeypatch.setenv("MOE_ROUTING_VLLM", "1")
    register()
    wrapped = layer.create_fused_moe_router
    register()
    assert layer.create_fused_moe_router is wrapped
    assert wrapped.__wrapped__ is router_factory.create_fused_moe_router
    assert_same(
        wrapped(top_k=K, global_num_experts=E).select_experts(logits, logits),
        expected(logits, "softmax"),
    )
    assert report().sites[0].calls == 1


def test_redundant_experts_do_not_count(monkeypatch, logits):
    monkeypatch.setenv("MOE_ROUTING_VLLM", "1")
    register()
    groups = {"use_grouped_topk": True, "num_expert_group": 8, "topk_group": 3}
    router = layer.create_fused_moe_router(K, E + 5, num_logical_experts=E, **groups)
    assert_same(
        router.select_experts(logits, logits), expected(logits, "softmax", groups=8, kept=3)
    )
    assert report().sites[0].calls == 1


def test_it_traces_as_one_graph_because_vllm_compiles_its_cpu_path(logits):
    router = CPURouter(K, E)
    replace(router, E)
    compiled = torch.compile(router.select_experts, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            assert_same(compiled(logits, logits), expected(logits, "softmax"))
            router.select_experts(logits, logits)  # counts, which no trace may depend on
