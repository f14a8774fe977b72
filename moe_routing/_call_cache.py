"""The call cache of a router.

A call like one that passed the checks skips the checks and the choice of a kernel.

Most calls are like the one before, and one comparison of all their tensors recognises them: the
guard with which Dynamo's compiled functions begin. It is private to PyTorch. If this PyTorch has
another, or none, a call is described by a tuple and looked up instead; a call unlike the one before
is looked up in any case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from moe_routing._overlap import lies_apart, overlap, span
from moe_routing.private_api import (
    count_modes,
    dispatch_keys,
    is_fake_mode,
    is_functorch_wrapped_tensor,
    is_zero_tensor,
    tensor_guard,
)
from moe_routing_registry.request import preference

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_routing._dispatch import Resolved
    from moe_routing.kernel import Operands, RoutingOutput
    from moe_routing.planning.routed import Planned

    Matches = Callable[[Operands, int | None, torch.dtype | None], bool]


class _Absent(Tensor):
    """A type of tensor that no caller brings.

    The guard tells it from an empty tensor by its type.
    """


ABSENT = tuple(torch.empty(0, device="cpu").as_subclass(_Absent) for _ in range(10))
"""Stand for operands that a call does not bring."""
UNREADABLE = Exception
"""What reading a wrong argument raises.

A list has no dtype, a sparse tensor no strides, a set no hash, and an object's own ``__getattr__``
may raise anything. The checks of a first call then name the argument.
"""
ORDINARY = (Tensor, torch.nn.Parameter)
"""Types of tensors that kernels take.

Others (DTensor, fake tensors) know themselves what an operator does with them.
"""


def is_plain(*tensors: Tensor | None) -> bool:
    """Tell whether a kernel may be called: nothing is traced, transformed or differentiated."""
    if is_dynamo_compiling() or is_fake_mode():
        return False
    recording = is_grad_enabled()
    return all(
        tensor is None
        or (
            type(tensor) in ORDINARY
            and not (recording and tensor.requires_grad)
            and not is_functorch_wrapped_tensor(tensor)
            and not is_zero_tensor(tensor)
        )
        for tensor in tensors
    )


class CachedCall(NamedTuple):
    """Calls that passed the checks, and what serves them.

    :ivar matches: tells whether a call is like these; it may say no to one that is.
    :ivar route: serves a call that matches. It takes the operands, and, if such calls ask for more
        than routing, that too (``moe_routing._after.After``).
    :ivar resolved: the kernel, and how it was chosen; ``None`` if the operator chose.
    :ivar plans: what serves the plans of their ids (``Router.with_plan``), by the arguments of the
        plan.
    """

    matches: Matches
    route: Callable[..., RoutingOutput]
    resolved: Resolved | None
    plans: dict[tuple[object, ...], Planned]


def is_ordinary(tensor: Tensor) -> bool:
    """Tell whether a tensor is memory that a kernel may read, as its shape and strides say."""
    return (
        type(tensor) in ORDINARY
        and not is_functorch_wrapped_tensor(tensor)
        and not tensor.is_neg()
        and not is_zero_tensor(tensor)
        and not is_fake_mode()
    )


def never(_operands: Operands, _topk: int | None, _ids_dtype: torch.dtype | None) -> bool:
    """Match no call."""
    return False


def matcher(operands: Operands, topk: int | None, ids_dtype: torch.dtype | None) -> Matches:
    """Return a function that tells whether a call is like this one.

    Such a call has the same types, dtypes, devices, shapes and strides of tensors, wants gradients
    or not as this one does, and its ``out``, if it has one, overlaps nothing.

    :param topk: as the caller wrote it, like ``ids_dtype``.
    """
    extras = any(operand is not None for operand in operands[3:8])
    return (
        _with_extras(operands, topk, ids_dtype)
        if extras
        else _without_extras(operands, topk, ids_dtype)
    )


def _without_extras(operands: Operands, topk: int | None, ids_dtype: torch.dtype | None) -> Matches:
    """Match calls of logits, scale, bias and out alone: the fewest comparisons."""
    logits, scale, bias, *_, out = operands
    no_scale, no_bias, *nowhere = ABSENT[:4]
    alike = tensor_guard(
        [
            logits,
            no_scale if scale is None else scale,
            no_bias if bias is None else bias,
            *(out or nowhere),
        ]
    )
    if alike is None:
        return never
    form, preferred, grads = type(out), preference.get(), _grad_mode(operands)
    weights_span, ids_span = (0, 0) if out is None else map(span, out)
    logits_span, scale_span, bias_span = (
        0 if t is None else span(t) for t in (logits, scale, bias)
    )

    seen = [scale, bias]

    def matches(operands: Operands, wanted: int | None, ids: torch.dtype | None) -> bool:
        logits, scale, bias, token_ids, table, valid, expert_map, recorded, out = operands
        if (
            wanted is not topk
            or ids is not ids_dtype
            or type(out) is not form
            or token_ids is not None
            or table is not None
            or valid is not None
            or expert_map is not None
            or recorded is not None
            or preference.get() != preferred
            or (grads is not None and is_grad_enabled() is not grads)
            or forward_ad._current_level >= 0  # noqa: SLF001 -- nothing public tells whether tangents are carried
            or (count_modes() and is_fake_mode())  # the guard does not see this mode
            or logits.is_nested
            or (scale is not seen[0] and _is_nested(scale, 0, seen))
            or (bias is not seen[1] and _is_nested(bias, 1, seen))
        ):
            return False
        scale_, bias_ = no_scale if scale is None else scale, no_bias if bias is None else bias
        if out is None:
            return alike(logits, scale_, bias_, *nowhere)
        weights, places = out
        if (
            weights.is_nested
            or places.is_nested
            or not alike(logits, scale_, bias_, weights, places)
        ):
            return False
        # As `_overlap.lies_apart`, written out: calls with outputs are made by those who count
        # microseconds.
        a, b, x = weights.data_ptr(), places.data_ptr(), logits.data_ptr()
        return not (
            -weights_span < a - b < ids_span
            or -weights_span < a - x < logits_span
            or -ids_span < b - x < logits_span
            or (
                scale is not None
                and (
                    -weights_span < a - (x := scale.data_ptr()) < scale_span
                    or -ids_span < b - x < scale_span
                )
            )
            or (
                bias is not None
                and (
                    -weights_span < a - (x := bias.data_ptr()) < bias_span
                    or -ids_span < b - x < bias_span
                )
            )
        )

    return matches


def _is_nested(tensor: Tensor | None, index: int, seen: list[Tensor | None]) -> bool:
    """Tell whether a tensor is nested, and must not reach the guard.

    The guard asks for strides, and ends the process.

    :param seen: the vectors that came last, which mostly come again: they are not asked again.
    """
    if tensor is None or not tensor.is_nested:
        seen[index] = tensor
        return False
    return True


def _with_extras(operands: Operands, topk: int | None, ids_dtype: torch.dtype | None) -> Matches:
    """Match calls with any operands.

    The number of valid tokens, if it is an int, may have any value from 0 to T.
    """
    alike = tensor_guard(_tensors(operands))
    if alike is None:
        return never
    form, preferred, grads = type(operands.out), preference.get(), _grad_mode(operands)
    apart = None if operands.out is None else lies_apart(operands)
    # None, an int or a tensor: `_check.counted` left nothing else.
    kind, tokens = type(operands.num_valid_tokens), operands.logits.shape[0]
    counted = kind is int
    seen: list[Tensor | None] = [None] * len(_tensors(operands))

    def matches(operands: Operands, wanted: int | None, ids: torch.dtype | None) -> bool:
        valid = operands.num_valid_tokens
        if (
            wanted is not topk
            or ids is not ids_dtype
            or type(operands.out) is not form
            or type(valid) is not kind
            or (counted and not 0 <= valid <= tokens)  # type: ignore[operator] # an int, as the line above says
            or preference.get() != preferred
            or (grads is not None and is_grad_enabled() is not grads)
            or forward_ad._current_level >= 0  # noqa: SLF001 -- likewise
            or (count_modes() and is_fake_mode())
        ):
            return False
        tensors = _tensors(operands)
        for index, tensor in enumerate(tensors):
            if tensor is not seen[index] and _is_nested(tensor, index, seen):
                return False
        return alike(*tensors) and (apart is None or apart(operands))

    return matches


def _tensors(operands: Operands) -> tuple[Tensor, ...]:
    """Return ten tensors, one for each that a call can bring."""
    logits, scale, bias, token_ids, table, valid, expert_map, recorded, out = operands
    return (
        logits,
        ABSENT[0] if scale is None else scale,
        ABSENT[1] if bias is None else bias,
        ABSENT[2] if token_ids is None else token_ids,
        ABSENT[3] if table is None else table,
        valid if isinstance(valid, Tensor) else ABSENT[4],
        ABSENT[5] if expert_map is None else expert_map,
        ABSENT[6] if recorded is None else recorded,
        *(ABSENT[7:9] if out is None else out),
    )


def _grad_mode(operands: Operands) -> bool | None:
    """Return the grad mode if the call depends on it.

    It does if gradients are wanted, or if an output could not be written.
    """
    logits, scale, *_, out = operands
    needed = (
        logits.requires_grad
        or (scale is not None and scale.requires_grad)
        or (out is not None and out[0].requires_grad)
    )
    return is_grad_enabled() if needed else None


def described(
    operands: Operands, topk: int | None, ids_dtype: torch.dtype | None
) -> tuple[object, ...]:
    """Describe a call, for looking it up.

    :raises UNREADABLE: an argument is not what it should be.
    """
    *given, valid, expert_map, recorded, out = operands
    return (
        *map(_described, (
            *given, valid if isinstance(valid, Tensor) else None, expert_map, recorded,
        )),
        None if out is None else (type(out), *map(_described, out), overlap(operands)),
        type(topk), topk, ids_dtype, type(valid), preference.get(), is_grad_enabled(),
        forward_ad._current_level >= 0, torch.is_inference_mode_enabled(), is_fake_mode(),  # noqa: SLF001 -- as above
    )  # fmt: skip


def _described(operand: Tensor | None) -> tuple[object, ...] | None:
    if operand is None:
        return None
    # The dispatch keys tell lazy negation, functorch's wrappers and all else that is no plain
    # memory.
    keys = dispatch_keys(operand).raw_repr()
    shape, strides = operand.shape, operand.stride()
    return (
        type(operand),
        operand.dtype,
        operand.device,
        operand.layout,
        shape,
        strides,
        keys,
        operand.requires_grad,
    )
