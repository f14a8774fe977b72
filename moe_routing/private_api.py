"""Interfaces of PyTorch and Triton that neither documents.

Each is used here alone, with what happens where it is missing.

Nothing here belongs to this package's interface. Every entry has a test in
``tests/test_private_api.py``, which fails first when an upgrade changes one of them.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch._C import _dispatch_keys as dispatch_keys
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad, profiler
from torch.nn.modules import module as _modules

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import timedelta

    from torch import Tensor
    from torch.distributed import ProcessGroup

    Launcher = Callable[[int, int, tuple[Any, ...]], object]
    """``launcher(blocks, stream, arguments)``.

    The arguments are the kernel's own before its constants.
    """

FunctionT = TypeVar("FunctionT", bound=type)

__all__ = [
    "TRACED", "backward_number", "carries_tangents", "compile_by_inductor", "count_modes",
    "current_device", "current_stream", "dispatch_keys", "empty", "has_tangent", "is_batched",
    "is_fake_mode", "is_functorch_wrapped_tensor", "is_in_backward",
    "is_observed", "is_profiling", "is_zero_tensor", "knows_its_signature", "launcher_of",
    "next_number",
    "privateuse1_name",
    "runs_hooks", "tensor_guard", "timeout_of", "unset_fake_temporarily", "why_not_direct",
]  # fmt: skip

NO_DEVICE = -1
TRACED = (FakeTensor, FunctionalTensor)
"""Classes of the tensors that stand for plain ones while torch traces."""

if torch.cuda.is_available():
    # What torch.cuda.current_device and Inductor's generated code call; the public functions take
    # ten times as long.
    current_device = torch._C._cuda_getDevice  # noqa: SLF001 -- this file's purpose
    current_stream = torch._C._cuda_getCurrentRawStream  # noqa: SLF001 -- likewise
    empty = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]  # noqa: SLF001 -- likewise; no stub has it
else:  # without CUDA no device is current, so nothing asks for its stream or its memory

    def current_device() -> int:
        """Return no device's index."""
        return NO_DEVICE

    def current_stream(device: int) -> int:
        """Say that there is none."""
        raise AssertionError(device)

    def empty(size: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Say that there is none."""
        raise AssertionError(size, strides, dtype)


def tensor_guard(examples: Sequence[Tensor]) -> Callable[..., bool] | None:
    """Return a check that as many tensors are like these.

    Dispatch keys and ``requires_grad`` are compared too. The check is the guard with which Dynamo's
    compiled functions begin.

    :returns: ``None`` if this PyTorch has no such guard, or one that takes other arguments. Only
        host time is lost then: the caller describes a call that it cannot recognise.

    >>> alike = tensor_guard([torch.zeros(2, 3)])
    >>> others = torch.ones(2, 3), torch.ones(3, 2).t(), torch.ones(2, 3, requires_grad=True)
    >>> [alike(other) for other in others]
    [True, False, False]
    """
    sizes, strides = [list(t.shape) for t in examples], [list(t.stride()) for t in examples]
    try:
        from torch._C._dynamo.guards import TensorGuards

        return TensorGuards(*examples, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check  # type: ignore[arg-type] # the stub says one flat list
    except (AttributeError, ImportError, TypeError):
        return None


def carries_tangents() -> bool:
    """Tell whether a forward-mode derivative is being computed."""
    return forward_ad._current_level >= 0  # noqa: SLF001 -- this file's purpose


def has_tangent(tensor: Tensor) -> bool:
    """Tell whether a forward-mode derivative is being computed by this tensor."""
    return carries_tangents() and forward_ad.unpack_dual(tensor).tangent is not None


def is_in_backward() -> bool:
    """Tell whether this thread is inside a backward pass, where checkpoints compute layers again.

    >>> is_in_backward()
    False
    """
    return bool(torch._C._current_graph_task_id() != -1)  # noqa: SLF001 -- this file's purpose


def softmax_backward(upstream: Tensor, scores: Tensor) -> Tensor:
    """Return the gradient of a softmax over the last dimension, by the kernel of PyTorch's own.

    One pass over the rows, where a formula of documented operations takes three.

    :param scores: what the softmax returned.
    """
    return torch._softmax_backward_data(upstream, scores, -1, scores.dtype)  # noqa: SLF001 -- documented nowhere


def knows_its_signature(function: FunctionT) -> FunctionT:
    """Decorate a ``torch.autograd.Function`` that has a ``setup_context``, for faster calls.

    PyTorch asks for the signature of ``forward`` in each call, and ``inspect`` works it out anew
    unless the attribute is there.
    """
    forward: Any = function.forward  # type: ignore[attr-defined] # of its subclasses
    forward.__signature__ = inspect.signature(forward)
    return function


def is_zero_tensor(tensor: Tensor) -> bool:
    """Tell whether a tensor stands for zeros and has no memory."""
    return tensor._is_zerotensor()  # noqa: SLF001 -- this file's purpose


count_modes = torch._C._len_torch_dispatch_stack  # noqa: SLF001 -- this file's purpose
"""How many modes see every operator; mostly there is none, which takes less time to ask."""


def is_fake_mode() -> bool:
    """Tell whether operators compute with fake tensors at the moment."""
    return (
        count_modes() > 0
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None  # noqa: SLF001 -- likewise
    )


def runs_hooks(module: torch.nn.Module) -> bool:
    """Tell whether a call of a module runs hooks, its own or those of all modules."""
    return bool(
        module._forward_hooks  # noqa: SLF001 -- this file's purpose
        or module._forward_pre_hooks  # noqa: SLF001 -- likewise
        or module._backward_hooks  # noqa: SLF001 -- likewise
        or module._backward_pre_hooks  # noqa: SLF001 -- likewise
        or _modules._global_forward_hooks  # noqa: SLF001 -- likewise
        or _modules._global_forward_pre_hooks  # noqa: SLF001 -- likewise
        or _modules._global_backward_hooks  # noqa: SLF001 -- likewise
        or _modules._global_backward_pre_hooks  # noqa: SLF001 -- likewise
    )


def next_number() -> int:
    """Return the number that the next node of this thread's autograd graph will have.

    Numbers only grow.
    """
    return torch.autograd._get_sequence_nr()  # type: ignore[attr-defined] # noqa: SLF001 -- this file's purpose


def is_batched(tensor: Tensor) -> bool:
    """Tell what ``torch.vmap`` batches, at any level of ``torch.func``'s transforms."""
    while is_functorch_wrapped_tensor(tensor):
        if is_batchedtensor(tensor):
            return True
        tensor = get_unwrapped(tensor)
    return False


def backward_number() -> int | None:
    """Return the number of the node whose backward is running, ``None`` outside of backward.

    Activation checkpointing recomputes a forward while the backward of a node runs that this
    forward made, or, where it is reentrant or compiled, of the node that it was made in.
    """
    node = torch._C._current_autograd_node()  # noqa: SLF001 -- this file's purpose
    return None if node is None else node._sequence_nr()  # noqa: SLF001 -- likewise


def privateuse1_name() -> str:
    """Return the name of the device type that a foreign backend registered.

    Without one, it is PyTorch's own name.
    """
    return torch._C._get_privateuse1_backend_name()  # noqa: SLF001 -- this file's purpose


def compile_by_inductor(module: Any, inputs: Any, **options: Any) -> Any:  # noqa: ANN401 -- Inductor's own
    """Compile a graph as the backend "inductor" of ``torch.compile`` does.

    Return the function, which takes a list.
    """
    from torch._inductor.compile_fx import compile_fx_inner

    return compile_fx_inner(module, inputs, **options)


def is_profiling() -> bool:
    """Tell whether ``torch.profiler`` or ``emit_nvtx`` records ranges."""
    return profiler._is_profiler_enabled  # noqa: SLF001 -- this file's purpose


_runtime: Any = None


def is_observed() -> bool:
    """Tell whether a profiler of PyTorch, or a launch hook of Triton, watches launches.

    Proton, for example, sets such hooks. Every launch asks, so this is one function, and takes less
    than 0.1 us.
    """
    try:
        return bool(
            profiler._is_profiler_enabled  # noqa: SLF001 -- this file's purpose
            or _runtime.launch_enter_hook.calls
            or _runtime.launch_exit_hook.calls
        )
    except AttributeError:  # Triton's settings were not asked for yet, or its chain was replaced
        return _has_replaced_hook()


def _has_replaced_hook() -> bool:
    """Look Triton's settings up, and count what is in place of its chains of hooks as a hook."""
    global _runtime  # noqa: PLW0603 -- imported by the first launch
    from triton import knobs

    _runtime = knobs.runtime
    hooks = (_runtime.launch_enter_hook, _runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


NEEDED = (
    "launch",
    "launch_cooperative_grid",
    "launch_pdl",
    "global_scratch_size",
    "profile_scratch_size",
)


def launcher_of(compiled: Any, constants: tuple[Any, ...]) -> tuple[Launcher, str]:  # noqa: ANN401 -- Triton's own object
    """Return the cheapest launcher for a kernel that Triton compiled, and a reason.

    The reason says why the launcher is not the direct one, and is ``""`` if it is. The direct
    launcher calls the C function that Triton's own launcher calls in the end. Its arguments have
    one of two known shapes (Triton 3.6, and 3.7 to 3.9). For any other shape the compiled kernel's
    ``run`` is called, whose arguments are the same in all of these versions.
    """
    run = compiled.run
    function, metadata = compiled.function, compiled.packed_metadata
    reason = why_not_direct(run)
    if reason:
        hooks = (None, None, None)
        return (
            lambda blocks, stream, arguments: run(
                blocks, 1, 1, stream, function, metadata, *hooks, *arguments, *constants
            ),
            reason,
        )  # fmt: skip
    launch = run.launch
    head: tuple[Any, ...]
    if hasattr(run, "kernel_signature"):
        head = (
            function,
            run.launch_cooperative_grid,
            run.launch_pdl,
            metadata,
            None,
            None,
            None,
            None,
            None,
        )
        head = (*head, run.arg_annotations, run.kernel_signature)
        return lambda blocks, stream, arguments: launch(
            blocks, 1, 1, stream, *head, arguments + constants
        ), ""
    head = (
        function,
        run.launch_cooperative_grid,
        run.launch_pdl,
        None,
        None,
        metadata,
        None,
        None,
        None,
    )
    return lambda blocks, stream, arguments: launch(
        blocks, 1, 1, stream, *head, *arguments, *constants
    ), ""


def why_not_direct(run: Any) -> str:  # noqa: ANN401 -- Triton's own object
    """Say what is unusual about a compiled kernel's launcher, or return ``""``."""
    if type(run).__name__ != "CudaLauncher":
        return f"{type(run).__name__} is not CUDA's launcher"
    missing = [name for name in NEEDED if not hasattr(run, name)]
    if missing:
        return f"Triton's CudaLauncher has no {', '.join(missing)}"
    if run.global_scratch_size or run.profile_scratch_size:
        return "the kernel asks for scratch memory"
    if hasattr(run, "arg_annotations") != hasattr(run, "kernel_signature"):
        return "Triton's CudaLauncher is of no known shape"
    if getattr(run, "gsan_enabled", False):
        return "Triton's sanitizer is on"
    return ""


def timeout_of(group: ProcessGroup, device: torch.device) -> timedelta:
    """Return how long a collective of the group waits for other ranks, on such devices."""
    options = group._get_backend(device).options  # noqa: SLF001 -- this file's purpose
    found: timedelta = options._timeout  # noqa: SLF001 -- likewise
    return found
