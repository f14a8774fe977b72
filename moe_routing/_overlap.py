"""Whether the outputs that a call brings share memory with each other or with inputs.

Only addresses tell. Two views of one storage may lie apart, and tensors of two storages may share
memory that somebody else owns, a NumPy array's for example. What is compared is the range from a
tensor's first byte to its last, which is exact for outputs, since they are contiguous.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from moe_routing.private_api import TRACED

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_routing.kernel import Operands

_INPUTS = 8
"""Fields of ``Operands`` before ``out``."""


def overlap(operands: Operands) -> str:
    """Say which output shares memory with what, ``""`` where none does or no output is given."""
    if operands.out is None:
        return ""
    weights, ids = operands.out
    inputs = {name: getattr(operands, name) for name in operands._fields[:_INPUTS]}
    pairs = [("weights and ids", weights, ids)]
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            pairs += [(f"weights and {name}", weights, value), (f"ids and {name}", ids, value)]
    return next(
        (f"{named} that overlap" for named, one, other in pairs if overlaps(one, other)), ""
    )


def overlaps(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors share memory, from the first byte of each to its last."""
    a, b = address(one), address(other)
    return a != 0 and b != 0 and -span(one) < a - b < span(other)


def address(tensor: Tensor) -> int:
    """Return the address where a tensor begins.

    It is 0 for a tensor without elements or memory, a fake or a meta tensor for example.
    """
    if isinstance(tensor, TRACED):
        return 0  # what asks a fake tensor for its address warns
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def span(tensor: Tensor) -> int:
    """Return the bytes from a tensor's first element to the end of its last; it has elements."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return (last + 1) * tensor.element_size()


def lies_apart(operands: Operands) -> Callable[[Operands], bool]:
    """Return a function that tells whether ``out`` overlaps nothing.

    It serves calls whose tensors have these types, shapes and strides.

    It costs an address for each tensor and two comparisons for each input: the spans are known. Of
    tensors without memory it says no.
    """
    assert operands.out is not None  # noqa: S101 -- for mypy: the caller has looked
    of_weights, of_ids = (span(tensor) for tensor in operands.out)
    spans = tuple(
        (n, span(value)) for n, value in enumerate(operands[:_INPUTS]) if isinstance(value, Tensor)
    )

    def apart(operands: Operands) -> bool:
        weights, ids = operands[_INPUTS]  # type: ignore[misc] # the calls bring outputs
        to_weights, to_ids = weights.data_ptr(), ids.data_ptr()
        if -of_weights < to_weights - to_ids < of_ids:
            return False
        for n, size in spans:
            address = operands[n].data_ptr()  # type: ignore[union-attr] # a tensor, as in the call that this was made for
            if -of_weights < to_weights - address < size or -of_ids < to_ids - address < size:
                return False
        return True

    return apart
