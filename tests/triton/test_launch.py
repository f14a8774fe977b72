"""The host side of the Triton backend, as far as it goes without a device.

The tests say what is compiled, and when nothing may be.
"""

import json
from pathlib import Path

import pytest
import torch
from scripts import printed

from moe_routing import Operands, RoutingOutput
from moe_routing._dispatch import Resolved
from moe_routing_backends.triton.runtime import launcher
from moe_routing_backends.triton.runtime import router as runtime
from moe_routing_registry import DeviceInfo, ResolutionReport, RoutingProblem, RoutingSpec

GEMMA4 = RoutingSpec(family="gemma4", renormalize=True, per_expert_scale=True)
SIGMOID = RoutingSpec(family="f", score="sigmoid")
CPU = DeviceInfo(type="cpu", platform="cpu")


def router(spec=SIGMOID, **fields):
    """Return a kernel on a CPU that stands for a GPU.

    No driver is needed as long as nothing is launched.
    """
    problem = RoutingProblem(
        **{"spec": spec, "num_experts": 8, "topk": 2, "dtype": "float32", **fields}
    )
    return runtime.TritonRouter(problem, CPU)


@pytest.fixture
def keys(monkeypatch):
    """Note what each kernel would be compiled for, instead of compiling it."""
    seen = []
    monkeypatch.setattr(
        launcher.Compiled,
        "launch_and_keep",
        lambda _self, key, *_rest, **_options: seen.append(key),
    )
    return seen


def test_nothing_compiles_while_a_graph_is_captured_and_the_error_says_what_to_call(monkeypatch):
    monkeypatch.setattr(launcher, "capturing", lambda: True)
    wanted = r"route\.warmup\(8, 2, dtype=torch\.float32, device='cpu'\)"
    with pytest.raises(
        RuntimeError, match=f"nothing compiles while a CUDA graph is captured.*{wanted}"
    ):
        router()(torch.randn(3, 8))


def test_the_backward_kernel_does_not_compile_either_and_its_warmup_is_one_for_training(
    monkeypatch,
):
    monkeypatch.setattr(launcher, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"device='cpu', training=True\)"):
        router(training=True).backward(
            torch.randn(3, 2), torch.randn(3, 8), torch.zeros(3, 2, dtype=torch.int32), None
        )


def test_a_kernel_that_is_compiled_may_be_launched_while_a_graph_is_captured(monkeypatch):
    kernels = launcher.Compiled(
        RoutingProblem(spec=SIGMOID, num_experts=8, topk=2, dtype="float32"),
        torch.device("cpu"),
        lambda key: f"compile {key}",
    )
    kernels.launchers["key",] = lambda *_: None
    monkeypatch.setattr(launcher, "capturing", lambda: True)
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_arguments, **_options: launched.append(grid)

    kernels.launch_and_keep(("key",), Kernel(), 3, (), (), 1)
    assert launched == [(3,)]


@pytest.mark.parametrize("crooked", [0, 1, 2])
def test_a_kernel_is_compiled_for_the_alignment_of_each_of_its_three_tensors(keys, crooked):
    def made(offsets):
        storage = [torch.zeros(64), torch.zeros(64), torch.zeros(64, dtype=torch.int32)]
        logits, weights, ids = (
            s[o : o + n].view(-1, c)
            for s, o, n, c in zip(storage, offsets, (24, 6, 6), (8, 2, 2), strict=True)
        )
        router()(logits, out=RoutingOutput(weights, ids))

    made([0, 0, 0])
    for which in (crooked, (crooked + 1) % 3):
        made([int(i == which) for i in range(3)])
    assert len(set(keys)) == 3


def test_warmup_compiles_for_vectors_in_float32_and_in_the_models_dtype(keys):
    router(GEMMA4, dtype="bfloat16").warmup()
    assert {torch.float32, torch.bfloat16} <= {part for key in keys for part in key}


def test_warmup_for_training_compiles_the_backward_kernel_too(keys):
    kernel = router(GEMMA4)
    kernel.warmup()
    assert not any("backward" in key for key in keys)
    problem = RoutingProblem(spec=GEMMA4, num_experts=8, topk=2, dtype="bfloat16", training=True)
    resolved = Resolved(
        kernel, ResolutionReport(problem=problem, device=CPU), problem, kernel.backward
    )
    resolved.warm_up_backward()
    assert {key[-1] for key in keys if "backward" in key} == {torch.float32, torch.bfloat16}


@pytest.fixture
def launched(monkeypatch):
    """A device of this test's: launches are noted, memory is the CPU's."""
    seen = []
    monkeypatch.setattr(runtime, "current_device", lambda: launcher.NEVER_CURRENT)
    monkeypatch.setattr(runtime, "current_stream", lambda index: 77 + index)
    monkeypatch.setattr(
        runtime,
        "empty",
        lambda size, strides, dtype: torch.empty_strided(size, strides, dtype=dtype),
    )

    def keep(compiled, key, *_rest, **_options):
        compiled.launchers[key] = lambda *launch_of: seen.append((key, *launch_of))

    monkeypatch.setattr(launcher.Compiled, "launch_and_keep", keep)
    return seen


@pytest.mark.parametrize("tokens", [1, 5, 3000])
def test_a_prepared_call_launches_what_any_call_would(launched, tokens):
    bound = router(GEMMA4, num_experts=16)
    logits, scale = torch.randn(tokens, 16), torch.rand(16)
    bound(logits, per_expert_scale=scale)
    out = bound(logits, per_expert_scale=scale)
    prepared = bound.prepared(Operands(logits, scale))
    assert prepared(Operands(logits, scale, out=out)) is out
    bound(logits, per_expert_scale=scale, out=out)
    (_, *_first), by_preparation, by_any = launched
    assert by_preparation == by_any
    fresh = prepared(Operands(logits, scale))
    assert (fresh.weights.shape, fresh.ids.dtype) == ((tokens, 2), torch.int32)


def test_a_prepared_call_with_crooked_memory_or_on_another_device_takes_the_general_way(
    launched, monkeypatch
):
    bound = router(num_experts=16)
    logits = torch.randn(3, 16)
    bound(logits)
    prepared = bound.prepared(Operands(logits))
    crooked = torch.randn(49)[1:].view(3, 16)
    for _ in range(2):
        prepared(Operands(crooked))
    assert launched[-1][0][1] is False
    monkeypatch.setattr(runtime, "current_device", lambda: 1)
    before = len(launched)
    prepared(Operands(logits))
    assert len(launched) == before


def test_nothing_is_prepared_for_rows_that_begin_anywhere():
    bound = router(num_experts=16)
    assert bound.prepared(Operands(torch.randn(3, 17)[:, :16])) is None


@pytest.mark.slow
def test_the_direct_launch_hands_over_what_the_installed_tritons_own_launcher_does():
    """`make triton-versions` runs the same for every other version from 3.6 to 3.9."""
    script = Path(__file__).with_name("launched.py")
    assert len(json.loads(printed(script, interprets=False))["kernels"]) == 19


def test_the_slow_way_on_cuda_is_said_once_and_the_router_notes_it():
    launcher._say_once.cache_clear()
    bound = router()
    bound._compiled.indirect = "no known shape"
    assert bound.notes == ("launches through Triton's own launcher: no known shape",)
    with pytest.warns(
        RuntimeWarning, match="moe-routing launches through Triton's own launcher.*no known shape"
    ):
        launcher._say_once("no known shape")
    launcher._say_once("no known shape")  # warned already: warnings are errors here
    launcher._say_once.cache_clear()
