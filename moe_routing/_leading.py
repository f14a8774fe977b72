"""Logits of any leading shape ``[..., E]``: routed as rows ``[T, E]``, answered in that shape.

Kernels know rows only. A call of another rank is flattened to one of rows, which is checked and
cached like any other, so a call of rows pays nothing for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from moe_routing import _check
from moe_routing.kernel import RoutingOutput, is_mask, replaced
from moe_routing_registry.text import refusal, shown

if TYPE_CHECKING:
    from moe_routing.kernel import Operands

_ROWS = 2


def is_other_rank(logits: object) -> bool:
    """Tell dense logits of another rank than 2; the checks of a call refuse all else."""
    return isinstance(logits, Tensor) and _check.is_dense(logits) and logits.dim() != _ROWS


def flattened(operands: Operands, columns: int) -> Operands:
    """Return the operands of the same call of rows, as views where the strides allow it.

    :param columns: of the outputs.
    :raises ValueError: an operand has not the logits' leading shape.
    """
    logits, out = operands.logits, operands.out
    if not logits.dim():
        raise ValueError(refusal("logits", "a dense tensor [..., E] of rank 1 or more", logits))
    if _check.is_dtensor(logits):
        # PyTorch flattens some, moves rows between ranks for others, and refuses the rest.
        raise ValueError(refusal("logits", "[T, E], because they are a DTensor", logits))
    leading = list(logits.shape[:-1])
    padding = operands.num_valid_tokens
    if is_mask(padding):
        padding = _flattened("valid", padding, leading)  # type: ignore[arg-type] # a tensor
    elif padding is not None:
        expected = f"None, because rows of logits of shape {list(logits.shape)} have no one order"
        raise ValueError(refusal("num_valid_tokens", expected, padding))
    if out is not None:
        out = _flattened_out(_check.as_output(out), [*leading, columns])
        if not is_dynamo_compiling():  # where there are no addresses
            # Logits that are copied share no memory with anything, and would be refused as rows.
            _check.check_addresses(operands)
    return replaced(
        operands,
        logits=logits.flatten(0, -2) if leading else logits[None],
        token_ids=_flattened("token_ids", operands.token_ids, leading),
        num_valid_tokens=padding,
        ids=_flattened("ids", operands.ids, leading, columns=1),
        out=out,
    )


def _flattened(
    argument: str, value: Tensor | None, leading: list[int], columns: int = 0
) -> Tensor | None:
    """Flatten an operand of tokens.

    :param columns: dimensions that it has after the leading ones.
    """
    if not isinstance(value, Tensor) or not _check.is_dense(value):
        return value  # which the checks of the rows refuse, if it is not None
    last = len(leading)
    if list(value.shape[:last]) != leading or value.dim() != last + columns:
        shape = [*leading, "K"] if columns else leading
        expected = f"shape [{', '.join(map(str, shape))}], as the logits"
        raise ValueError(refusal(argument, expected, value))
    return value.reshape(-1, *value.shape[last:])


def _flattened_out(out: RoutingOutput, shape: list[int]) -> RoutingOutput:
    for tensor in out:
        if list(tensor.shape) != shape or not tensor.is_contiguous():
            msg = f"out: expected contiguous tensors of shape {shape}, got {shown(tensor)}"
            raise ValueError(msg)
    return RoutingOutput(*(tensor.view(-1, shape[-1]) for tensor in out))


def in_shape(output: RoutingOutput, logits: Tensor) -> RoutingOutput:
    """Return what a call of rows returned in the leading shape of the logits."""
    return RoutingOutput(*(tensor.view(*logits.shape[:-1], tensor.shape[-1]) for tensor in output))
