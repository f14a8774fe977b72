"""Kinds of calls: what of a call the checks and the choice of a kernel look at, so that the next of its kind is not checked.

Most calls are of the kind of the one before, and are recognised by one look at all of their tensors: the guard that Dynamo's
compiled functions begin with. It is private to PyTorch; where it is not as it was, calls are described and looked up instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from moe_routing_registry import preference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from moe_routing._backend import RoutingOutput
    from moe_routing._binding import Binding

    Outputs = tuple[Tensor, Tensor]

ABSENT = tuple(torch.empty(0, device="cpu") for _ in range(4))
"""Stand for scale, bias and outputs that a call does not bring. One is like no operand, whose dimensions are never 0."""
INDESCRIBABLE = (AttributeError, RuntimeError, TypeError, ValueError)
"""What looking at a wrong argument raises: a list has no dtype, a sparse tensor no strides, a set no hash."""


class Kind(NamedTuple):
    """A kind of calls that passed the checks, and what serves it.

    :ivar serves: tells whether a call is of this kind; it may say no to one that is.
    :ivar call: the kernel, made ready for this kind where it can be.
    """

    serves: Callable[..., bool]
    call: Callable[..., RoutingOutput]
    binding: Binding


class Asked(NamedTuple):
    """What a call asked for, beside its tensors.

    :ivar form: the type of ``out``.
    """

    topk: int | None
    ids_dtype: torch.dtype | None
    form: type

    def of_tensors_like(self, logits: Tensor, *others: Tensor | None) -> Callable[..., bool]:
        """Return what tells whether a call asks for the same, of tensors alike in type, dtype, device, shape and strides.

        :param others: scale, bias, and the two outputs.
        """
        alike = guard([logits, *(absent if t is None else t for t, absent in zip(others, ABSENT, strict=True))])
        if alike is None:
            return lambda *_call: False
        (topk, ids_dtype, form), preferred = self, preference.get()
        no_scale, no_bias, *nowhere = ABSENT

        def serves(  # noqa: PLR0913, PLR0917 -- the operands of a call
            logits: Tensor,
            wanted: int | None,
            scale: Tensor | None,
            bias: Tensor | None,
            out: Outputs | None,
            ids: torch.dtype | None,
        ) -> bool:
            if wanted is not topk or ids is not ids_dtype or type(out) is not form or preference.get() != preferred:
                return False
            weights, places = nowhere if out is None else out
            return alike(logits, no_scale if scale is None else scale, no_bias if bias is None else bias, weights, places)

        return serves


def guard(examples: Sequence[Tensor]) -> Callable[..., bool] | None:
    """Return what tells whether as many tensors are like these, dispatch keys and ``requires_grad`` included.

    :returns: ``None`` where this PyTorch has no such guard, or one that takes other arguments: it is private. Nothing is lost
        but host time, for a call that is not recognised is described.

    >>> alike = guard([torch.zeros(2, 3)])
    >>> alike(torch.ones(2, 3)), alike(torch.ones(3, 2).t()), alike(torch.ones(2, 3, requires_grad=True))
    (True, False, False)
    """
    sizes, strides = [list(t.shape) for t in examples], [list(t.stride()) for t in examples]
    try:
        from torch._C._dynamo.guards import TensorGuards

        return TensorGuards(*examples, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check  # type: ignore[arg-type] # the stub says one flat list
    except (AttributeError, ImportError, TypeError):
        return None


def described(  # noqa: PLR0913, PLR0917 -- the operands of a call
    logits: Tensor,
    topk: int | None,
    scale: Tensor | None,
    bias: Tensor | None,
    out: Outputs | None,
    ids_dtype: torch.dtype | None,
) -> tuple[object, ...]:
    """Describe a call, for looking its kind up."""
    return (
        type(logits), logits.dtype, logits.device, logits.layout, logits.shape, logits.stride(), type(topk), topk,
        None if scale is None else _operand(scale), None if bias is None else _operand(bias),
        None if out is None else (type(out), *map(_operand, out)),
        ids_dtype, preference.get(), torch.is_inference_mode_enabled(),
    )  # fmt: skip


def _operand(operand: Tensor) -> tuple[object, ...]:
    return type(operand), operand.dtype, operand.device, operand.shape, operand.is_contiguous()
