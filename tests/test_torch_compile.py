"""The torch-compile backend.

The tests name it on the CPU, and run where the accelerator is unknown or nothing compiles.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.output_code import CompiledFxGraph

import moe_routing
from moe_routing import Operands, Router
from moe_routing._registry import registry
from moe_routing.families import FAMILIES
from moe_routing.formula import by_narrow_rounds, by_sort
from moe_routing.formula.select import finite
from moe_routing.reference import oracle
from moe_routing_backends.torch_compile import compile as compile_
from moe_routing_registry import DeviceInfo, RejectCode, Request, RoutingProblem, Toolchain

GEMMA4 = FAMILIES["gemma4"].spec
GROUPED = FAMILIES["grouped_sigmoid_bias"].spec.replace(num_groups=4, topk_groups=2)


def run(script, **environment):
    import os

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True, text=True, env={**os.environ, **environment}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def choose(device):
    problem = RoutingProblem(
        spec=FAMILIES["gemma4"].spec, num_experts=128, topk=8, dtype="bfloat16"
    )
    return registry().resolve(problem, device, Request())


def test_on_the_cpu_it_is_used_only_when_named():
    report = moe_routing.explain("mixtral", device="cpu")
    assert report.winner == "eager"
    assert report.rejection("torch-compile").verdict.code is RejectCode.EXPLICIT_ONLY
    assert (
        moe_routing.explain("mixtral", device="cpu", backend="torch-compile").winner
        == "torch-compile"
    )


@pytest.mark.parametrize("platform", ["mps", "hpu", "acmenpu"])
def test_an_accelerator_without_a_backend_of_its_own_gets_it(platform):
    assert choose(DeviceInfo(type=platform, platform=platform)).winner == "torch-compile"


def test_cuda_without_triton_gets_it():
    torch_only = (
        Toolchain(name="torch", version="2.13.0", usable=True),
        Toolchain(name="triton", version=None, usable=False),
    )
    report = choose(
        DeviceInfo(type="cuda", index=0, platform="cuda", arch="sm_90", toolchains=torch_only)
    )
    assert report.winner == "torch-compile"
    assert report.missed == "triton"
    assert report.rejection("triton").verdict.code is RejectCode.TOOLCHAIN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_keys_select_as_a_stable_sort_does_among_all_16_bit_numbers(dtype):
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(
        dtype
    )  # NaN and infinities included
    for experts in (8192, 60, 7):
        order = torch.randperm(2**16, generator=generator)[: 2**16 // experts * experts]
        t = finite(every[order].view(-1, experts))
        t = torch.cat([t, t.flip(0)[:, : experts // 2].repeat(1, 3)[:, :experts]])  # and ties
        assert torch.equal(torch.cat(by_narrow_rounds(GEMMA4, t, 5, t), -1), by_sort(t, 5))


@pytest.mark.slow
def test_seven_batch_sizes_take_at_most_three_graphs_and_route_right(caplog):
    route = Router(GROUPED, backend="torch-compile")
    torch.manual_seed(0)
    bias = torch.randn(16)
    counters.clear()
    for tokens in (1, 0, 2, 256, 4096, 300, 7):
        logits = torch.randn(tokens, 16)
        if tokens > 6:
            logits[0], logits[1], logits[2, 3], logits[3] = torch.nan, 0.0, torch.inf, -torch.inf
        weights, ids = route(logits, 4, bias=bias)
        expected = oracle.route(GROUPED, logits, 4, bias=bias)
        assert torch.equal(ids.long(), expected.ids)
        torch.testing.assert_close(weights.double(), expected.weights, rtol=2e-6, atol=1e-12)
    assert counters["stats"]["unique_graphs"] <= 3
    assert [
        r
        for r in caplog.records
        if "compiled grouped_sigmoid_bias E=16 K=4 float32 for cpu in" in r.getMessage()
    ]
    padded = route(torch.randn(5, 16), 4, bias=bias, num_valid_tokens=2)
    assert (padded.ids[2:] == -1).all()
    assert (padded.weights[2:] == 0).all()


@pytest.mark.slow
def test_the_second_call_of_a_kind_goes_past_dynamo_and_routes_what_it_is_given():
    spec = FAMILIES["sigmoid_bias_topk"].spec.replace(per_expert_scale=True)
    route = Router(spec, backend="torch-compile")
    bound = route.resolve("cpu", torch.float32, 16, 4).kernel
    for seed in range(3):
        torch.manual_seed(seed)
        logits, bias, scale = torch.randn(5, 16), torch.randn(16), torch.rand(16)
        given = {
            "bias": bias,
            "per_expert_scale": bias if seed == 0 else scale,
        }  # one tensor in two places, then two
        weights, ids = route(logits, 4, **given)
        expected = oracle.route(spec, logits, 4, **given)
        assert torch.equal(ids.long(), expected.ids)
        torch.testing.assert_close(weights.double(), expected.weights, rtol=2e-6, atol=1e-12)
        assert ((5, 16, 16, 1) in {kind[:4] for kind in bound._direct}) is (seed > 0)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_prepared_call_hands_its_tensors_to_what_inductor_made_and_routes_right(tokens):
    spec = FAMILIES["gemma4"].spec
    route = Router(spec, backend="torch-compile")
    bound = route.resolve("cpu", torch.bfloat16, 16, 4).kernel
    first = torch.randn(tokens, 16).bfloat16(), torch.rand(16)
    assert (
        bound.prepared(Operands(torch.randn(7, 16).bfloat16(), first[1])) is None
    )  # no call of this kind came
    for _ in range(2):
        bound(first[0], per_expert_scale=first[1])
    assert {type(direct.function) for direct in bound._direct.values()} == {CompiledFxGraph}
    prepared = bound.prepared(Operands(*first))
    logits, scale = torch.randn(tokens, 16).bfloat16(), torch.rand(16)
    out = moe_routing.RoutingOutput(
        torch.zeros(tokens, 4), torch.zeros(tokens, 4, dtype=torch.int32)
    )
    assert prepared(Operands(logits, scale, out=out)) is out
    fresh = prepared(Operands(logits, scale))
    expected = oracle.route(spec, logits, 4, per_expert_scale=scale)
    assert torch.equal(fresh.ids.long(), expected.ids)
    torch.testing.assert_close(fresh.weights.double(), expected.weights, rtol=2e-6, atol=1e-12)
    assert all(map(torch.equal, out, fresh))


@pytest.mark.slow
def test_the_formula_that_is_compiled_conforms():
    """Every case of the contract, uncompiled, which takes seconds; compiled it would take hours."""
    script = "from moe_routing.cli import main; main(['conformance', 'torch-compile'])"
    assert "torch-compile conforms: " in run(script, TORCHDYNAMO_DISABLE="1")


def test_the_tensors_of_a_caller_bear_no_mark_of_dynamo():
    route = Router(FAMILIES["hash_sqrtsoftplus"].spec, backend="torch-compile")
    table = torch.arange(2)[None].expand(3, 2).contiguous()
    given = {
        "token_ids": torch.zeros(33, dtype=torch.int64),
        "expert_table": table,
        "valid": torch.ones(33, dtype=torch.bool),
        "ids": torch.zeros(33, 2, dtype=torch.int32),
    }
    logits = torch.randn(33, 8)
    route(logits, 2, **given)
    assert [vars(tensor) for tensor in (logits, *given.values())] == [{}] * 5


@pytest.mark.slow
def test_16_bit_logits_are_routed_by_one_kernel():
    own = GEMMA4.replace(family="in_one_kernel")  # whose kernel no other test has called
    bound = Router(own, backend="torch-compile").resolve("cpu", torch.bfloat16, 16, 4).kernel
    for tokens in (1, 5):
        bound(torch.randn(tokens, 16).bfloat16(), per_expert_scale=torch.rand(16))
    sources = {direct.function.source_code for direct in bound._direct.values()}
    assert len(sources) == 2
    assert {source.count("async_compile.cpp") for source in sources} == {1}


@pytest.mark.slow
def test_a_token_id_that_the_table_lacks_is_padding_and_no_memory_of_others():
    route = Router(FAMILIES["hash_sqrtsoftplus"].spec, backend="torch-compile")
    table = torch.arange(8)[None].expand(3, 8).contiguous()
    for stray in (3, -1, 2**40):
        weights, ids = route(
            torch.randn(2, 16), 8, token_ids=torch.tensor([0, stray]), expert_table=table
        )
        assert ids[0].tolist() == list(range(8))
        assert ids[1].tolist() == [-1] * 8
        assert weights[1].tolist() == [0.0] * 8


@pytest.mark.slow
def test_operands_that_do_not_compile_later_are_a_sentence_that_names_them(monkeypatch):
    route = Router(FAMILIES["sigmoid_topk"].spec, backend="torch-compile")
    route(torch.randn(5, 16), 4)
    bound = route.resolve("cpu", torch.float32, 16, 4).kernel

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bound, "_inductor", broken)
    with pytest.raises(
        RuntimeError,
        match=r"cannot compile sigmoid_topk E=16 .* with expert_map: OSError: .*No space left",
    ):
        route(torch.randn(5, 16), 4, expert_map=torch.arange(16))
    route(torch.randn(5, 16), 4)


@pytest.mark.slow
def test_a_warning_while_it_compiles_late_is_no_error(monkeypatch):
    route = Router(
        FAMILIES["sigmoid_topk"].spec.replace(scale=1.125), backend="torch-compile"
    )  # no other test's kernel
    bound = route.resolve("cpu", torch.float32, 16, 4).kernel
    compile_graph = bound._inductor

    def with_a_remark(*args):
        warnings.warn("Online softmax is disabled on the fly", UserWarning, stacklevel=1)
        return compile_graph(*args)

    monkeypatch.setattr(bound, "_inductor", with_a_remark)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch's own
        route(torch.randn(5, 16), 4, expert_map=torch.arange(16))
    assert [str(w.message) for w in shown] == ["Online softmax is disabled on the fly"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_have_the_same_bits_in_every_order(dtype):
    torch.manual_seed(0)
    logits = torch.randn(50, 1024, dtype=dtype) * 3
    order = torch.randperm(1024)
    weights = compile_._softmax(logits, -1, half_to_float=False)
    assert weights.dtype == dtype
    assert torch.equal(
        weights[:, order], compile_._softmax(logits[:, order], -1, half_to_float=False)
    )
    torch.testing.assert_close(weights.double(), logits.double().softmax(-1), rtol=2e-6, atol=1e-12)


@pytest.mark.slow
def test_rows_that_lie_apart_and_experts_that_do_too_route_right_in_a_few_graphs():
    spec = FAMILIES["softmax_topk"].spec
    route = Router(spec, backend="torch-compile")
    torch.manual_seed(0)
    plain = torch.randn(16, 16)
    route(plain, 2)
    counters.clear()
    wider = [
        torch.randn(tokens, 16 + more)[:, :16]
        for more, tokens in enumerate((5, 17, 18, 19, 6, 7, 8, 9, 4, 3), start=1)
    ]
    for logits in (
        *wider,
        torch.randn(1, 16).expand(9, 16),
        torch.randn(16, 9).t(),
        torch.randn(9, 1).expand(9, 16),
    ):
        weights, ids = route(logits, 2)
        expected = oracle.route(spec, logits, 2)
        assert torch.equal(ids.long(), expected.ids)
        torch.testing.assert_close(weights.double(), expected.weights, rtol=2e-6, atol=1e-12)
    assert (
        counters["stats"]["unique_graphs"] <= 5
    )  # apart: one stride, then any; repeated; and those of the strided problem


@pytest.mark.slow
def test_without_a_compiler_naming_it_is_a_clear_error():
    said = run(
        """
        import torch, moe_routing
        route = moe_routing.get_router("mixtral", backend="torch-compile")
        try:
            route(torch.randn(2, 8), 2)
        except moe_routing.BackendUnavailableError as error:
            verdict = error.report.rejection("torch-compile").verdict
            print(verdict.code.value, verdict.reason)
        """,
        CXX="/no/such/compiler",
        TORCHINDUCTOR_FORCE_DISABLE_CACHES="1",
    )
    assert said.startswith("factory_failed its factory raised InductorError: InvalidCxxCompiler")


@pytest.mark.slow
def test_a_device_that_inductor_does_not_know_falls_to_eager_said_once_with_the_reason():
    said = run(
        """
        import warnings
        import torch
        from torch.utils import _pytree as pytree

        # An accelerator of two dozen lines: its tensors are CPU tensors behind torch's privateuse1
        # device type.
        torch.utils.backend_registration._setup_privateuseone_for_python_backend("acmenpu")

        def to_npu(cpu):
            tensor = torch._C._acc.create_empty_tensor(tuple(cpu.shape), cpu.dtype)
            tensor.on_cpu = cpu
            return tensor

        def run(func, *args, **kwargs):
            def inside(x):
                if isinstance(x, torch.Tensor) and x.device.type == "acmenpu":
                    return x.on_cpu
                if isinstance(x, torch.device) and x.type == "acmenpu":
                    return torch.device("cpu")
                return x

            if func.name() == "aten::_copy_from":
                args[1].on_cpu.copy_(inside(args[0]))
                return args[1]
            out = func(*pytree.tree_map(inside, args), **pytree.tree_map(inside, kwargs))
            return pytree.tree_map(lambda x: to_npu(x) if isinstance(x, torch.Tensor) else x, out)

        library = torch.library.Library("_", "IMPL")
        library.fallback(run, "PrivateUse1")

        import moe_routing
        route = moe_routing.get_router("mixtral")
        cpu = torch.randn(3, 8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            weights, ids = route(to_npu(cpu), 2)
            route(to_npu(cpu), 2)
        said = [w for w in caught if isinstance(w.message, moe_routing.DowngradeWarning)]
        assert len(said) == 1, said
        words = str(said[0].message)
        assert "acmenpu:0 routes with 'eager', not with 'torch-compile'" in words, words
        assert ids.device.type == "acmenpu"
        assert torch.equal(ids.on_cpu, route(cpu, 2).ids)
        assert route.backend == "eager"
        route(to_npu(cpu), 2)
        rejection = route.report.rejection("torch-compile")
        print(rejection.verdict.code.value, route.report.device.platform)
        """
    )
    assert said.split() == ["factory_failed", "acmenpu"]
