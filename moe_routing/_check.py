"""Every argument of a routing call, checked before anything is launched.

Errors name argument, value and expectation.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from itertools import product
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor
from torch.nn import UninitializedBuffer, UninitializedParameter

from moe_routing._overlap import overlap, overlaps
from moe_routing.kernel import RoutingOutput, by_name, is_mask, replaced
from moe_routing.private_api import is_zero_tensor
from moe_routing_registry.problem import OPTIONAL_OPERANDS
from moe_routing_registry.text import refusal, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from moe_routing.kernel import Operands
    from moe_routing_registry import RoutingSpec

LOGITS_DTYPES = frozenset(
    {
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    }
)
_LOGITS_DTYPES = ", ".join(sorted(map(str, LOGITS_DTYPES)))
IDS_DTYPES = frozenset({torch.int32, torch.int64})
RECORDED_DTYPES = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
PACKED = torch.float4_e2m1fn_x2
"""A float dtype with two numbers in an element: no vector of E numbers has E elements of it."""
_MATRIX = 2
_APART = "tensors that share no memory with each other or an operand"
_WITHOUT_SHAPE = (UninitializedParameter, UninitializedBuffer)


def _wrong(error: type[Exception], argument: str, expected: str, got: object) -> NoReturn:
    msg = f"{argument}: expected {expected}, got {shown(got) if isinstance(got, int) else got}"
    raise error(msg)


def integer(argument: str, value: object, expected: str = "an int") -> int:
    """Return an integer of any type (NumPy's for example) as Python's.

    A bool is refused, and a tensor too: its value may be on another device.

    >>> integer("topk", True)
    Traceback (most recent call last):
    ...
    TypeError: topk: expected an int, got True
    """
    if type(value) is int:
        return value
    if isinstance(value, (bool, Tensor)):
        raise TypeError(refusal(argument, expected, value))
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value] # inside a compiled function it stands for an int
    try:
        return int(operator.index(value))  # type: ignore[arg-type] # that is what is asked
    except Exception:  # noqa: BLE001 -- its `__index__` may raise anything
        raise TypeError(refusal(argument, expected, value)) from None


def check_columns(logits: Tensor) -> None:
    """Require no more experts than ids in int32 can count.

    Not asked where a call is traced: it would bound a dynamic E of an exported program.
    """
    if logits.shape[1] >= 2**31:
        _wrong(ValueError, "logits", "at most 2**31 - 1 columns", shown(logits))


def experts(num_experts: object) -> int:
    """Return a number of experts that ids in int32 can count."""
    number = integer("num_experts", num_experts)
    if not 1 <= number < 2**31:
        raise ValueError(refusal("num_experts", "an int from 1 to 2**31 - 1", number))
    return number


def flag(argument: str, value: object) -> bool:
    """Return a bool; nothing else says yes or no here."""
    if not isinstance(value, bool):
        raise TypeError(refusal(argument, "True or False", value))
    return value


def check_dtype(dtype: object) -> None:
    """Require a dtype that logits may have."""
    if not isinstance(dtype, torch.dtype) or dtype not in LOGITS_DTYPES:
        _wrong(TypeError, "dtype", f"one of {_LOGITS_DTYPES}", shown(dtype))


def check_operands(
    spec: RoutingSpec,
    operands: Operands,
    topk: int,
    ids_dtype: torch.dtype,
    *,
    num_experts: int | None = None,
) -> None:
    """Check all that a call brings.

    ``num_valid_tokens`` is ``counted``'s and ``out`` is ``as_output``'s already.

    :param num_experts: E as a configuration says it, if one does.
    """
    logits, scale, bias, token_ids, expert_table, valid, expert_map, recorded, out = operands
    check_dense(operands)
    check_logits(logits)
    num_tokens, columns = logits.shape
    if num_experts is not None and columns != num_experts:
        _wrong(
            ValueError,
            "logits",
            f"num_experts = {num_experts} columns, as the configuration says",
            columns,
        )
    spec.check_size(columns, topk)
    by_table = spec.selection == "token_table"
    if scale is not None or spec.per_expert_scale:
        check_vector("per_expert_scale", scale, columns, logits, wanted=spec.per_expert_scale)
    if bias is not None or spec.needs_bias:
        check_vector("bias", bias, columns, logits, wanted=spec.needs_bias)
    if token_ids is not None or expert_table is not None or by_table:
        check_vector("token_ids", token_ids, num_tokens, logits, integer=True, wanted=by_table)
        check_table(spec, expert_table, topk, logits)
    if is_mask(valid):
        check_mask(valid, logits)  # type: ignore[arg-type] # a tensor
    elif isinstance(valid, Tensor):
        check_valid_tokens(valid, logits)
    if expert_map is not None:
        check_vector("expert_map", expert_map, columns + spec.shared_experts, logits, integer=True)
    if recorded is not None:
        check_recorded(recorded, topk, logits)
    check_ids_dtype(ids_dtype, out)
    if out is not None:
        check_out(out, topk + spec.shared_experts, logits)


def check_dense(operands: Operands) -> None:
    """Require dense tensors.

    Sparse, nested and other layouts have no strides that a kernel could read by.
    """
    given = [*by_name(operands).items(), *(("out", tensor) for tensor in operands.out or ())]
    for argument, value in given:
        if isinstance(value, Tensor) and not is_dense(value):
            expected = "a dense tensor [..., E]" if argument == "logits" else "a dense tensor"
            _wrong(ValueError, argument, expected, shown(value) + layout(value))


def layout(tensor: Tensor) -> str:
    """Say of a tensor that is not dense what it is, as an error ends; ``""`` of others."""
    if is_dense(tensor) or isinstance(tensor, _WITHOUT_SHAPE):
        return ""
    return f", layout {'nested' if tensor.is_nested else tensor.layout}"


def is_dense(tensor: Tensor) -> bool:
    """Tell whether a tensor has a shape and strides; a lazy parameter has none yet."""
    return (
        tensor.layout is torch.strided
        and not tensor.is_nested
        and not isinstance(tensor, _WITHOUT_SHAPE)
    )


def matrix(name: str, value: object, shape: str) -> Tensor:
    """Require a dense matrix, of any dtype.

    :param shape: what the error calls it, ``"[T, H]"``.
    :raises TypeError: it is no tensor.
    :raises ValueError: it is no dense matrix.
    """
    if not isinstance(value, Tensor):
        raise TypeError(refusal(name, f"a tensor {shape}", value))
    if not is_dense(value) or value.dim() != _MATRIX:
        raise ValueError(refusal(name, f"a dense tensor {shape} of rank 2", value))
    return value


def is_dtensor(tensor: object) -> bool:
    """Tell DTensors, without importing their package for those who have none."""
    kind = type(tensor)
    return kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed")


def check_writable(argument: str, *tensors: Tensor) -> None:
    """Require tensors that may be written in this mode.

    Outside inference mode nothing writes what was made inside, and nobody writes a tensor that
    stands for zeros and has no memory.
    """
    if any(is_zero_tensor(tensor) for tensor in tensors):
        _wrong(
            ValueError, argument, "tensors that can be written", "tensors of zeros without memory"
        )
    if not torch.is_inference_mode_enabled() and any(tensor.is_inference() for tensor in tensors):
        _wrong(
            ValueError,
            argument,
            "tensors that can be written here",
            "inference tensors, outside torch.inference_mode()",
        )


def check_addresses(operands: Operands) -> None:
    """Require that ``out`` shares no memory, neither within itself nor with an operand."""
    if both := overlap(operands):
        _wrong(ValueError, "out", _APART, both)


def check_apart(written: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """Require that outputs share no memory with operands that are not among ``Operands``."""
    for output, operand in product(written, read):
        if overlaps(written[output], read[operand]):
            _wrong(ValueError, "out", _APART, f"{output} and {operand} that overlap")


def check_logits(logits: object) -> None:
    """Require a float tensor of rank 2."""
    if not isinstance(logits, Tensor):
        _wrong(TypeError, "logits", "a tensor [T, E]", shown(logits))
    if logits.dtype not in LOGITS_DTYPES:
        _wrong(TypeError, "logits", f"a dtype among {_LOGITS_DTYPES}", logits.dtype)
    if logits.dim() != _MATRIX:
        _wrong(
            ValueError,
            "logits",
            "a dense tensor [T, E] of rank 2",
            f"{shown(logits)}, layout {logits.layout}",
        )


def check_vector(  # noqa: PLR0913 -- said once for every vector operand
    argument: str,
    value: object,
    length: int,
    logits: Tensor,
    *,
    integer: bool = False,
    wanted: bool = True,
) -> None:
    """Require a one-dimensional operand of that length on the logits' device.

    Require ``None`` where the spec takes no such operand.
    """
    if value is None and not wanted:
        return
    kind = "an int32 or int64" if integer else "a float"
    if not wanted:
        _wrong(
            ValueError, argument, "None, because this router's spec does not take it", shown(value)
        )
    if not isinstance(value, Tensor):
        _wrong(TypeError, argument, f"{kind} tensor [{length}]", shown(value))
    if (
        (value.dtype not in IDS_DTYPES)
        if integer
        else (not value.dtype.is_floating_point or value.dtype == PACKED)
    ):
        _wrong(TypeError, argument, f"{kind} dtype", value.dtype)
    if value.dim() != 1 or value.shape[0] != length:
        _wrong(ValueError, argument, f"shape [{length}]", list(value.shape))
    if value.device != logits.device:
        _wrong(ValueError, argument, f"the logits' device {logits.device}", value.device)


def check_integers(
    argument: str,
    value: object,
    shape: str,
    device: torch.device,
    fits: Callable[[Sequence[int]], bool],
) -> Tensor:
    """Return an operand that is a dense int32 or int64 tensor on the logits' device.

    :param shape: what an error says of its shape, which ``fits`` tells right from wrong.
    """
    if not isinstance(value, Tensor) or value.dtype not in IDS_DTYPES:
        raise TypeError(refusal(argument, f"an int32 or int64 tensor {shape}", value))
    if not is_dense(value) or not fits(value.shape):
        raise ValueError(refusal(argument, f"a dense tensor {shape}", value))
    if value.device != device:
        raise ValueError(refusal(argument, f"a tensor on {device}, as the logits", value))
    return value


def check_table(spec: RoutingSpec, value: object, topk: int, logits: Tensor) -> None:
    """Require the table ``[vocabulary, K]`` of a token-table selection, and none elsewhere."""
    wanted = spec.selection == "token_table"
    if value is None and not wanted:
        return
    if not wanted:
        _wrong(
            ValueError,
            "expert_table",
            "None, because this router's spec does not take it",
            shown(value),
        )
    if not isinstance(value, Tensor):
        _wrong(
            TypeError,
            "expert_table",
            f"an int32 or int64 tensor [vocabulary, {topk}]",
            shown(value),
        )
    if value.dtype not in IDS_DTYPES:
        _wrong(TypeError, "expert_table", "dtype int32 or int64", value.dtype)
    if value.dim() != _MATRIX or value.shape[1] != topk:
        _wrong(ValueError, "expert_table", f"shape [vocabulary, {topk}]", list(value.shape))
    if value.shape[0] == 0:
        _wrong(ValueError, "expert_table", "a vocabulary of at least 1 token", list(value.shape))
    if value.device != logits.device:
        _wrong(ValueError, "expert_table", f"the logits' device {logits.device}", value.device)


def check_recorded(value: object, topk: int, logits: Tensor) -> None:
    """Require recorded ids ``[T, K]``: those of the selected, not of shared experts."""
    shape = (logits.shape[0], topk)
    if not isinstance(value, Tensor):
        _wrong(TypeError, "ids", f"an integer tensor [{shape[0]}, {topk}]", shown(value))
    if value.dtype not in RECORDED_DTYPES:
        expected = ", ".join(sorted(map(str, RECORDED_DTYPES)))
        _wrong(TypeError, "ids", f"a dtype among {expected}", value.dtype)
    if tuple(value.shape) != shape:
        _wrong(ValueError, "ids", f"shape [{shape[0]}, {topk}]", list(value.shape))
    if value.device != logits.device:
        _wrong(ValueError, "ids", f"the logits' device {logits.device}", value.device)


def optional_operands(operands: object) -> frozenset[str]:
    """Require names of operands that not every backend takes."""
    expected = f"names among {', '.join(OPTIONAL_OPERANDS)}"
    if isinstance(operands, str) or not isinstance(operands, Collection):
        raise TypeError(refusal("operands", expected, operands))
    for name in operands:
        if name not in OPTIONAL_OPERANDS:
            raise ValueError(refusal("operands", expected, name))
    return frozenset(operands)


def counted(operands: Operands) -> Operands:
    """Give a number of valid tokens that is no tensor the form in which kernels take it.

    That is an int from 0 to T: a larger number means all tokens. The logits have not been checked
    yet.
    """
    logits, valid = operands.logits, operands.num_valid_tokens
    if valid is None or isinstance(valid, Tensor):
        return operands
    number = integer("num_valid_tokens", valid, "an int or an integer tensor")
    if number < 0:
        _wrong(ValueError, "num_valid_tokens", "a number >= 0", number)
    rows = (
        logits.shape[0] if isinstance(logits, Tensor) and is_dense(logits) and logits.dim() else 0
    )
    return replaced(operands, num_valid_tokens=min(number, rows))


def one_padding(num_valid_tokens: int | Tensor | None, valid: object) -> int | Tensor | None:
    """Return what says which rows are padding: a number, or a mask in its place."""
    if valid is None:
        if is_mask(num_valid_tokens):
            expected = "an int, or an int32 or int64 tensor of shape [] or [1]; a mask is `valid`"
            _wrong(ValueError, "num_valid_tokens", expected, shown(num_valid_tokens))
        return num_valid_tokens
    if not isinstance(valid, Tensor) or valid.dtype is not torch.bool:
        _wrong(TypeError, "valid", "a bool tensor [T]", shown(valid))
    if num_valid_tokens is not None:
        _wrong(
            ValueError,
            "valid",
            "None with num_valid_tokens: one says what is padding",
            shown(valid),
        )
    return valid


def check_mask(value: Tensor, logits: Tensor) -> None:
    """Require a mask with an element for each row, on the logits' device."""
    if tuple(value.shape) != (logits.shape[0],):
        _wrong(ValueError, "valid", f"shape [{logits.shape[0]}]", list(value.shape))
    if value.device != logits.device:
        _wrong(ValueError, "valid", f"the logits' device {logits.device}", value.device)


def check_valid_tokens(value: Tensor, logits: Tensor) -> None:
    """Require an integer tensor of shape [] or [1] on the logits' device."""
    if value.dim() > 1 or value.numel() != 1 or value.dtype not in IDS_DTYPES:
        expected = "an int, or an int32 or int64 tensor of shape [] or [1]"
        _wrong(ValueError, "num_valid_tokens", expected, shown(value))
    if value.device != logits.device:
        _wrong(ValueError, "num_valid_tokens", f"the logits' device {logits.device}", value.device)


def check_ids_dtype(ids_dtype: object, out: RoutingOutput | None) -> None:
    """Require int32 or int64, and the dtype of ``out`` where that is given."""
    if not isinstance(ids_dtype, torch.dtype) or ids_dtype not in IDS_DTYPES:
        _wrong(TypeError, "ids_dtype", "torch.int32 or torch.int64", shown(ids_dtype))
    if out is not None and out.ids.dtype != ids_dtype:
        _wrong(ValueError, "out", f"ids of dtype {ids_dtype}, as ids_dtype says", out.ids.dtype)


def as_output(out: object) -> RoutingOutput:
    """Require a pair of tensors with the dtypes of an output."""
    if not isinstance(out, tuple) or len(out) != 2 or not all(isinstance(t, Tensor) for t in out):  # noqa: PLR2004 -- a pair
        _wrong(TypeError, "out", "a pair of tensors (weights, ids)", shown(out))
    weights, ids = out
    if weights.dtype is not torch.float32 or ids.dtype not in IDS_DTYPES:
        _wrong(
            TypeError,
            "out",
            "float32 weights and int32 or int64 ids",
            f"{weights.dtype} and {ids.dtype}",
        )
    return RoutingOutput(weights, ids)


def check_out(out: RoutingOutput, columns: int, logits: Tensor) -> None:
    """Require contiguous outputs of the right shape on the logits' device."""
    for tensor in out:
        if tuple(tensor.shape) != (logits.shape[0], columns) or not tensor.is_contiguous():
            _wrong(
                ValueError,
                "out",
                f"contiguous tensors of shape [{logits.shape[0]}, {columns}]",
                shown(tensor),
            )
        if tensor.device != logits.device:
            _wrong(ValueError, "out", f"the logits' device {logits.device}", tensor.device)
