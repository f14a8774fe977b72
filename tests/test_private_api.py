"""What PyTorch and Triton do not document, and we use.

Each entry of ``moe_routing.private_api``, against what it stands for.
"""

import inspect
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from moe_routing import private_api


def test_every_entry_has_a_test_here():
    asked = inspect.getsource(inspect.getmodule(test_every_entry_has_a_test_here))
    assert [name for name in private_api.__all__ if f"private_api.{name}" not in asked] == []


def test_a_guard_tells_tensors_of_another_shape_stride_dtype_or_requires_grad():
    alike = private_api.tensor_guard([torch.zeros(4, 3), torch.zeros(2)])
    assert alike(torch.ones(4, 3), torch.ones(2))
    for other in (
        torch.ones(3, 4).t(),
        torch.ones(5, 3),
        torch.ones(4, 3, dtype=torch.float64),
        torch.ones(4, 3).requires_grad_(),
    ):
        assert not alike(other, torch.ones(2))
    assert not alike(torch._neg_view(torch.ones(4, 3)), torch.ones(2))


def test_a_pytorch_without_the_guard_gives_none(monkeypatch):
    monkeypatch.delattr("torch._C._dynamo.guards.TensorGuards")
    assert private_api.tensor_guard([torch.zeros(1)]) is None


def test_dispatch_keys_tell_lazy_negation():
    plain, negative = torch.ones(2), torch._neg_view(torch.ones(2))
    assert (
        private_api.dispatch_keys(plain).raw_repr()
        != private_api.dispatch_keys(negative).raw_repr()
    )


def test_functorchs_wrappers_are_known():
    seen = []
    torch.func.vmap(lambda x: seen.append(private_api.is_functorch_wrapped_tensor(x)) or x)(
        torch.ones(2, 2)
    )
    assert seen == [True]
    assert not private_api.is_functorch_wrapped_tensor(torch.ones(2))


def test_is_batched():
    seen = []

    def f(x):
        seen.append(private_api.is_batched(x))
        return x.sum()

    x = torch.ones(2, 2)
    for call in (f, torch.func.grad(f), torch.vmap(f), torch.vmap(torch.func.grad(f))):
        call(x)
    torch.func.grad(lambda x: torch.vmap(f)(x).sum())(x)
    assert seen == [False, False, True, True, True]


def test_tensors_that_stand_for_plain_ones_while_torch_traces_are_known():
    seen = []

    class Look(torch.nn.Module):
        def forward(self, x):
            seen.append(isinstance(x, private_api.TRACED))
            return x + 1

    torch.export.export(Look(), (torch.ones(2),), strict=False)
    assert all(seen)
    assert seen
    with FakeTensorMode():
        assert isinstance(torch.ones(2), private_api.TRACED)
    assert not isinstance(torch.ones(2), private_api.TRACED)


HOOKS = {
    "register_forward_hook": "register_module_forward_hook",
    "register_forward_pre_hook": "register_module_forward_pre_hook",
    "register_full_backward_hook": "register_module_full_backward_hook",
    "register_full_backward_pre_hook": "register_module_full_backward_pre_hook",
}


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_of_a_module_and_of_all_modules_are_known(register):
    module = torch.nn.Linear(2, 2)
    for add in (getattr(module, register), getattr(torch.nn.modules.module, HOOKS[register])):
        assert not private_api.runs_hooks(module)
        handle = add(lambda *_: None)
        assert private_api.runs_hooks(module)
        handle.remove()
    assert not private_api.runs_hooks(module)


def test_fake_mode_is_known_and_can_be_left():
    assert not private_api.is_fake_mode()
    assert not private_api.count_modes()
    with FakeTensorMode():
        assert private_api.is_fake_mode()
        assert private_api.count_modes() == 1
        with private_api.unset_fake_temporarily():
            assert not private_api.is_fake_mode()
            assert type(torch.empty(1)) is torch.Tensor


def test_tangents_are_known():
    assert not private_api.carries_tangents()
    with forward_ad.dual_level():
        assert private_api.carries_tangents()


def test_a_tensor_with_a_tangent_is_told_from_others():
    plain = torch.ones(2)
    assert not private_api.has_tangent(plain)
    with forward_ad.dual_level():
        assert private_api.has_tangent(forward_ad.make_dual(plain, plain))
        assert not private_api.has_tangent(plain)


def test_zero_tensors_are_known():
    assert private_api.is_zero_tensor(torch._efficientzerotensor(3))
    assert not private_api.is_zero_tensor(torch.zeros(3))


def test_the_name_of_a_foreign_backend_is_pytorchs_own_where_none_is_registered():
    assert private_api.privateuse1_name() == "privateuseone"


@pytest.mark.slow
def test_inductor_compiles_a_graph_to_a_function_of_a_list():
    graph = torch.fx.symbolic_trace(lambda x: torch.ops.aten.add.Tensor(x, 1))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.zeros(3))
        for node in graph.graph.nodes:
            node.meta["val"] = fake if node.op != "output" else (fake,)
    output = next(node for node in graph.graph.nodes if node.op == "output")
    output.args = ((output.args[0],),)
    graph.recompile()
    (found,) = private_api.compile_by_inductor(graph, [fake])([torch.zeros(3)])
    assert found.tolist() == [1, 1, 1]


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="with CUDA these are PyTorch's own; test_on_a_gpu.py launches with them",
)
def test_without_cuda_no_device_is_current_and_nothing_asks_for_more():
    assert private_api.current_device() == -1
    with pytest.raises(AssertionError):
        private_api.current_stream(0)
    with pytest.raises(AssertionError):
        private_api.empty((1, 1), (1, 1), torch.float32)


def test_a_profiler_is_seen():
    assert not private_api.is_profiling()
    with torch.profiler.profile(acc_events=True):  # torch 2.11 warns without
        assert private_api.is_profiling()
        assert private_api.is_observed()
    assert not private_api.is_profiling()
    assert not private_api.is_observed()


def test_a_launch_hook_of_triton_is_seen():
    knobs = pytest.importorskip("triton").knobs
    assert not private_api.is_observed()

    def hook(_metadata):
        raise AssertionError

    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(hook)
        assert private_api.is_observed()
        chain.remove(hook)
    assert not private_api.is_observed()


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_node_whose_backward_runs_tells_which_forward_is_computed_again(reentrant):
    forwards, again = [], []

    def layer(x):
        y = x.sin()
        number = private_api.backward_number()
        (forwards if number is None else again).append(
            private_api.next_number() if number is None else number
        )
        return y * y

    losses = [
        torch.utils.checkpoint.checkpoint(
            layer, torch.ones(2, requires_grad=True) * 2, use_reentrant=reentrant
        ).sum()
        for _ in range(3)
    ]
    for index in (1, 2, 0):
        losses[index].backward()
    assert private_api.backward_number() is None
    assert forwards == sorted(set(forwards))
    assert [sum(begun <= number + 1 for begun in forwards) for number in again] == [2, 3, 1]


def test_a_function_in_place_of_tritons_chain_is_a_hook(monkeypatch):
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda _metadata: None)
    assert private_api.is_observed()


class CudaLauncher:
    """A launcher of a shape that nobody knows; the name is what counts."""

    def __init__(self, **fields):
        usual = dict.fromkeys(private_api.NEEDED, 0) | {"launch": self.never}
        self.__dict__.update(usual | fields)
        self.called = []

    def __call__(self, *arguments):
        self.called.append(arguments)

    @staticmethod
    def never(*_arguments):
        raise AssertionError


class OtherLauncher(CudaLauncher):
    """ROCm's, say."""


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (OtherLauncher(), "OtherLauncher is not CUDA's launcher"),
        (CudaLauncher(global_scratch_size=8), "the kernel asks for scratch memory"),
        (CudaLauncher(profile_scratch_size=8), "the kernel asks for scratch memory"),
        (CudaLauncher(arg_annotations=()), "Triton's CudaLauncher is of no known shape"),
        (CudaLauncher(gsan_enabled=True), "Triton's sanitizer is on"),
    ],
)
def test_a_launcher_of_unknown_shape_is_called_as_triton_calls_it_and_why_is_said(run, reason):
    loaded = SimpleNamespace(run=run, function="function", packed_metadata="metadata")
    launcher, why = private_api.launcher_of(loaded, ("constant",))
    assert why == reason
    launcher(3, 5, (1, 2))
    assert run.called == [(3, 1, 1, 5, "function", "metadata", None, None, None, 1, 2, "constant")]


def test_a_launcher_without_a_field_that_is_needed_is_not_launched_directly():
    run = CudaLauncher()
    del run.launch_pdl
    assert private_api.why_not_direct(run) == "Triton's CudaLauncher has no launch_pdl"


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_that_computes_a_checkpoint_again_is_known(reentrant):
    seen = []

    def layer(x):
        seen.append(private_api.is_in_backward())
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert seen == [False, True]
    assert not private_api.is_in_backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_softmax_is_autograds(dtype):
    x, upstream = torch.randn(5, 7, dtype=dtype).requires_grad_(), torch.randn(7, dtype=dtype)
    scores = x.softmax(-1)
    scores.backward(upstream.expand(5, 7))
    found = private_api.softmax_backward(upstream.expand(5, 7), scores.detach())
    assert found.equal(x.grad)


def test_the_time_that_collectives_of_a_group_wait_is_the_one_it_was_made_with():
    distributed.init_process_group(
        "gloo", store=distributed.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=77)
    )
    try:
        found = private_api.timeout_of(distributed.group.WORLD, torch.device("cpu"))
    finally:
        distributed.destroy_process_group()
    assert found == timedelta(seconds=77)


def test_the_signature_of_a_function_of_autograd_is_asked_for_and_not_worked_out(monkeypatch):
    @private_api.knows_its_signature
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(x, by=2.0):
            return x * by

        @staticmethod
        def setup_context(ctx, inputs, output):  # noqa: ARG004 -- torch's protocol
            ctx.by = inputs[1]

        @staticmethod
        def backward(ctx, upstream):
            return upstream * ctx.by, None

    worked_out = []
    real = inspect._signature_from_function
    monkeypatch.setattr(
        inspect, "_signature_from_function", lambda *a, **k: worked_out.append(a) or real(*a, **k)
    )
    x = torch.ones(2, requires_grad=True)
    Doubled.apply(x).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]
    assert not worked_out
