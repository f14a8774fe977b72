"""Records of selected experts, read from and written in the layouts of engines and trainers.

A record here is ``[layers, T, K]``: layer-major, logical ids in the dtype of ``least_dtype``,
contiguous. -1 says that there is no record. ``route(ids=)`` takes a layer of it, and
``integrations.transformers.replaying`` all. The layouts were read in the code of vLLM 0.32 and
0.33, SGLang 0.5.23 and Megatron-Core 0.16; ``docs/rl_replay.md`` has them side by side.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from tokenize import TokenError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_routing._check import RECORDED_DTYPES, experts, integer, is_dense, layout
from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_READ_DTYPES = RECORDED_DTYPES | {torch.uint16}
_DIMENSIONS = 3
_OF_A_LAYER = 2
_OF_BYTES = 256
"""Experts whose ids vLLM returns in uint8; more are in uint16."""
_OF_WORDS = 2**16


def least_dtype(num_experts: int) -> torch.dtype:
    """Return the least integer dtype that holds -1 and every id of so many experts.

    :raises TypeError: ``num_experts`` is no int.
    :raises ValueError: it is not from 1 to 2**31 - 1.

    >>> [least_dtype(number) for number in (128, 129, 32769)]
    [torch.int8, torch.int16, torch.int32]
    """
    largest = experts(num_experts) - 1
    for dtype in (torch.int8, torch.int16):
        if largest <= torch.iinfo(dtype).max:
            return dtype
    return torch.int32


def from_vllm(
    routed_experts: npt.NDArray[Any] | Tensor | str,
    *,
    num_experts: int,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Read what vLLM returns with ``enable_return_routed_experts``.

    :param routed_experts: ``CompletionOutput.routed_experts``, ``[T, hidden layers, K]``, of any
        integer dtype (vLLM's is uint8 for up to 256 experts, else uint16); or the string of its
        HTTP API, that array as a ``.npy`` file in base64.
    :param num_experts: E, which decides the dtype of the record.
    :param layers: which hidden layers have routers, in order. vLLM fills the rows of a dense layer
        with 0. ``None``: all.
    :returns: ``[layers, T, K]``.
    :raises TypeError: an argument has the wrong type or dtype.
    :raises ValueError: a shape, a layer or an id is wrong, or the string is none of vLLM's.

    >>> tokens = torch.tensor([[[0, 0], [2, 1]], [[0, 0], [3, 0]]], dtype=torch.uint8)
    >>> from_vllm(tokens, num_experts=4, layers=[1])
    tensor([[[2, 1],
             [3, 0]]], dtype=torch.int8)
    """
    number = experts(num_experts)
    if isinstance(routed_experts, str):
        return _from_tokens(_of_npy(routed_experts), number, layers)
    return _from_tokens(_tensor("routed_experts", routed_experts), number, layers)


def to_vllm(
    records: Tensor,
    *,
    num_experts: int,
    layers: Sequence[int] | None = None,
    num_layers: int | None = None,
) -> npt.NDArray[Any]:
    """Write a record as vLLM's ``CompletionOutput.routed_experts``.

    :param records: ``[layers, T, K]``, ids in [0, E): vLLM's dtypes have no -1.
    :param num_experts: E, which decides the dtype, at most 65,536.
    :param layers: which of the ``num_layers`` hidden layers the record is of; the others get 0.
        ``None``: all.
    :returns: ``[T, hidden layers, K]``, uint8 or uint16.
    :raises TypeError: an argument has the wrong type or dtype.
    :raises ValueError: a shape, a layer or an id is wrong.

    >>> to_vllm(torch.tensor([[[2, 1], [3, 0]]]), num_experts=4, layers=[1], num_layers=2).tolist()
    [[[0, 0], [2, 1]], [[0, 0], [3, 0]]]
    """
    number = experts(num_experts)
    if number > _OF_WORDS:
        raise ValueError(refusal("num_experts", f"at most {_OF_WORDS}", number))
    dtype = torch.uint8 if number <= _OF_BYTES else torch.uint16
    made: np.ndarray[Any, Any] = (
        _to_tokens(records, number, 0, layers, num_layers).to("cpu", dtype).numpy()
    )
    return made


def from_sglang(
    routed_experts: str,
    *,
    num_experts: int,
    topk: int,
    num_layers: int,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Read what SGLang returns for a request with ``return_routed_experts``.

    :param routed_experts: ``meta_info["routed_experts"]``: base64 of int32 ``[T, hidden layers,
        K]``, without its shape.
    :param num_experts: E, which decides the dtype of the record.
    :param topk: K, ``num_experts_per_tok`` of the configuration.
    :param num_layers: ``num_hidden_layers`` of the configuration.
    :param layers: which hidden layers have routers, in order. SGLang fills the rows of a dense
        layer with 0. ``None``: all.
    :returns: ``[layers, T, K]``.
    :raises TypeError: an argument has the wrong type.
    :raises ValueError: a size, a layer or an id is wrong, or the string is none of SGLang's.

    >>> from_sglang("AQAAAAMAAAAAAAAAAgAAAA==", num_experts=4, topk=2, num_layers=1)
    tensor([[[1, 3],
             [0, 2]]], dtype=torch.int8)
    """
    number, k = experts(num_experts), _positive("topk", topk)
    depth = _positive("num_layers", num_layers)
    content = _decoded(routed_experts)
    if len(content) % (4 * depth * k):
        expected = f"int32 [T, {depth}, {k}], a multiple of {4 * depth * k} bytes"
        raise ValueError(refusal("routed_experts", expected, len(content)))
    flat = torch.frombuffer(bytearray(content), dtype=torch.int32) if content else torch.zeros(0)
    return _from_tokens(flat.int().view(-1, depth, k), number, layers)


def to_sglang(
    records: Tensor,
    *,
    num_experts: int,
    layers: Sequence[int] | None = None,
    num_layers: int | None = None,
) -> str:
    """Write a record as SGLang's ``meta_info["routed_experts"]``.

    :param records: ``[layers, T, K]``, ids in [-1, E).
    :param num_experts: E.
    :param layers: which of the ``num_layers`` hidden layers the record is of; the others get 0.
        ``None``: all.
    :returns: base64 of int32 ``[T, hidden layers, K]``.
    :raises TypeError: an argument has the wrong type or dtype.
    :raises ValueError: a shape, a layer or an id is wrong.

    >>> to_sglang(torch.tensor([[[1, 3], [0, 2]]]), num_experts=4)
    'AQAAAAMAAAAAAAAAAgAAAA=='
    """
    tokens = _to_tokens(records, experts(num_experts), -1, layers, num_layers)
    return base64.b64encode(tokens.to("cpu", torch.int32).numpy().tobytes()).decode("ascii")


def from_megatron(recorded: Sequence[Tensor], *, num_experts: int) -> Tensor:
    """Read what Megatron-Core's ``RouterReplay.get_recorded_data()`` returns.

    :param recorded: a tensor ``[T, K]`` for each router, in the order of the routers; int64 there.
        The rows of a batch are position by position, as Megatron's hidden states ``[S, B, H]``.
    :param num_experts: E, which decides the dtype of the record.
    :returns: ``[layers, T, K]``, on the device of the first.
    :raises TypeError: an argument has the wrong type or dtype.
    :raises ValueError: there is no router, a shape or an id is wrong.

    >>> from_megatron([torch.tensor([[2, 1]]), torch.tensor([[0, 3]])], num_experts=4)
    tensor([[[2, 1]],
    <BLANKLINE>
            [[0, 3]]], dtype=torch.int8)
    """
    number = experts(num_experts)
    if not isinstance(recorded, (list, tuple)):
        raise TypeError(refusal("recorded", "a list of tensors [T, K]", recorded))
    of_layers = [_tensor("recorded", ids) for ids in recorded]
    if not of_layers:
        raise ValueError(refusal("recorded", "a tensor for each router", "none"))
    for ids in of_layers:
        if ids.dim() != _OF_A_LAYER or ids.shape != of_layers[0].shape:
            expected = f"tensors [T, K], of one shape {list(of_layers[0].shape)}"
            raise ValueError(refusal("recorded", expected, ids))
    made = torch.stack([ids.to(of_layers[0].device, torch.int64) for ids in of_layers])
    return _checked("recorded", made, number, -1).to(least_dtype(number))


def to_megatron(records: Tensor, *, num_experts: int) -> list[Tensor]:
    """Write a record for Megatron-Core's ``RouterReplay.set_replay_data``.

    :param records: ``[layers, T, K]``, ids in [0, E): Megatron-Core gathers scores by them. The
        rows must be position by position, as its hidden states ``[S, B, H]``.
    :param num_experts: E.
    :returns: an int64 tensor ``[T, K]`` for each layer.
    :raises TypeError: an argument has the wrong type or dtype.
    :raises ValueError: a shape or an id is wrong.

    >>> to_megatron(torch.tensor([[[2, 1]], [[0, 3]]], dtype=torch.int8), num_experts=4)
    [tensor([[2, 1]]), tensor([[0, 3]])]
    """
    number = experts(num_experts)
    return list(_checked("records", _record("records", records), number, 0).long())


def _from_tokens(tokens: Tensor, num_experts: int, layers: Sequence[int] | None) -> Tensor:
    """Turn ``[T, hidden layers, K]`` into a record of some of the layers."""
    if tokens.dim() != _DIMENSIONS:
        raise ValueError(refusal("routed_experts", "shape [T, hidden layers, K]", tokens))
    chosen = tokens.to(torch.int64).transpose(0, 1)
    if layers is not None:
        chosen = chosen[_indices(layers, tokens.shape[1])]
    return (
        _checked("routed_experts", chosen, num_experts, -1)
        .to(least_dtype(num_experts))
        .contiguous()
    )


def _to_tokens(
    records: Tensor,
    num_experts: int,
    least: int,
    layers: Sequence[int] | None,
    num_layers: int | None,
) -> Tensor:
    """Turn a record into int64 ``[T, hidden layers, K]``."""
    ids = _checked("records", _record("records", records), num_experts, least).long()
    if (layers is None) != (num_layers is None):
        expected = "a number together with layers, or neither"
        raise ValueError(refusal("num_layers", expected, num_layers))
    if layers is not None and num_layers is not None:
        indices = _indices(layers, _positive("num_layers", num_layers))
        if len(indices) != len(ids):
            raise ValueError(refusal("layers", f"{len(ids)} layers, as records has", list(layers)))
        of_all = ids.new_zeros(num_layers, *ids.shape[1:])
        of_all[indices] = ids
        ids = of_all
    return ids.transpose(0, 1).contiguous()


def _tensor(argument: str, value: Any) -> Tensor:  # noqa: ANN401 -- whatever came
    """Return a dense integer tensor of a tensor or a NumPy array."""
    if isinstance(value, Tensor):
        made = value
    elif type(value).__module__ == "numpy" and hasattr(value, "shape"):
        try:
            made = torch.tensor(value.copy())  # which has no negative strides, as a view may
        except (TypeError, ValueError):
            raise TypeError(refusal(argument, "an integer array or tensor", value)) from None
    else:
        raise TypeError(refusal(argument, "an integer array or tensor", value))
    if made.dtype not in _READ_DTYPES or not is_dense(made):
        expected = ", ".join(sorted(map(str, _READ_DTYPES)))
        said = refusal(argument, f"a dense tensor of {expected}", value)
        raise TypeError(said + layout(made))
    return made


def _record(argument: str, value: object) -> Tensor:
    """Return a record ``[layers, T, K]``."""
    if not isinstance(value, Tensor) or value.dtype not in RECORDED_DTYPES or not is_dense(value):
        expected = ", ".join(sorted(map(str, RECORDED_DTYPES)))
        said = refusal(argument, f"a dense tensor [layers, T, K] of {expected}", value)
        raise TypeError(said + (layout(value) if isinstance(value, Tensor) else ""))
    if value.dim() != _DIMENSIONS:
        raise ValueError(refusal(argument, "shape [layers, T, K]", value))
    return value


def _checked(argument: str, ids: Tensor, num_experts: int, least: int) -> Tensor:
    """Require ids in [least, E); reads the ids on the host."""
    if ids.is_meta:
        raise ValueError(refusal(argument, "ids with data", ids))
    # Widened: PyTorch compares narrow integers with what E becomes in their dtype, 128 with -128.
    wide = ids.long()
    if ids.numel() and not bool(((wide >= least) & (wide < num_experts)).all()):
        raise ValueError(refusal(argument, f"ids in [{least}, {num_experts})", ids))
    return ids


def _indices(layers: object, depth: int) -> list[int]:
    expected = f"different numbers of layers from 0 to {depth - 1}"
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(refusal("layers", expected, layers))
    indices = [integer("layers", layer) for layer in layers]
    if len(set(indices)) < len(indices) or not all(0 <= layer < depth for layer in indices):
        raise ValueError(refusal("layers", expected, list(layers)))
    return indices


def _positive(argument: str, value: object) -> int:
    number = integer(argument, value)
    if not 1 <= number < 2**31:
        raise ValueError(refusal(argument, "a number from 1 to 2**31 - 1", number))
    return number


def _decoded(text: object) -> bytes:
    if not isinstance(text, str):
        raise TypeError(refusal("routed_experts", "a base64 string", text))
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        msg = f"routed_experts: expected a base64 string, got one of {len(text)} other characters"
        raise ValueError(msg) from None


def _of_npy(text: str) -> Tensor:
    import numpy as np

    content = _decoded(text)
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (EOFError, MemoryError, OSError, SyntaxError, TokenError, ValueError):
        msg = f"routed_experts: expected a .npy file in base64, got {len(content)} other bytes"
        raise ValueError(msg) from None
    return _tensor("routed_experts", array)
