"""Holding what was made against what is right: by bits, or between two values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.reference.permutation_oracle import Between


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor on the CPU, a byte each."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def rows_of_bytes(rows: Tensor) -> Tensor:
    """Return the bits of rows ``[N, H]`` on the CPU: ``[N, H * itemsize]``."""
    return as_bytes(rows).view(len(rows), rows.shape[1] * rows.itemsize)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors of one dtype hold the same bits."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(as_bytes(a), as_bytes(b))


def must_be_like(name: str, made: Tensor, like: Tensor, device: torch.device) -> None:
    """Require a contiguous tensor of the shape and dtype of ``like``, on the device.

    :raises AssertionError: it is another one.
    """
    got = (list(made.shape), made.dtype, made.device, made.is_contiguous())
    expected = (list(like.shape), like.dtype, device, True)
    if got != expected:
        msg = f"{name}: expected shape, dtype, device and contiguity {expected}, got {got}"
        raise AssertionError(msg)


def must_have_bits(
    name: str, made: Tensor, right: Tensor, *, only: Tensor | None = None, any_nan: bool = False
) -> None:
    """Require the bits of ``right``, a matrix, in every row or in those of the mask ``only``.

    :param any_nan: let every NaN equal every other.
    :raises AssertionError: some differ.
    """
    made = made.detach().cpu().reshape(right.shape)
    sizes = (*right.shape, right.itemsize)
    wrong = (as_bytes(made) != as_bytes(right)).view(sizes).any(-1)
    if any_nan:
        wrong &= ~(made.float().isnan() & right.float().isnan())
    if only is not None:
        wrong &= only[:, None]
    _refuse(name, wrong, made, right)


def must_lie_between(name: str, made: Tensor, right: Between) -> None:
    """Require a value between two, or NaN where both are.

    :raises AssertionError: some lie elsewhere.
    """
    made = made.detach().cpu().reshape(right.least.shape)
    value, least, greatest = (t.double() for t in (made, *right))
    either, both = least.isnan() | greatest.isnan(), least.isnan() & greatest.isnan()
    inside = torch.where(either, value.isnan() | ~both, (least <= value) & (value <= greatest))
    _refuse(name, ~inside, made, right.least, right.greatest)


def _refuse(name: str, wrong: Tensor, made: Tensor, *right: Tensor) -> None:
    if not wrong.any():
        return
    places = wrong.nonzero()
    where = tuple(places[0].tolist())
    expected = " to ".join(dict.fromkeys(str(some[where].item()) for some in right))
    msg = (
        f"{name}: {len(places)} of {wrong.numel()} are wrong, the first at {list(where)}: "
        f"expected {expected}, got {made[where].item()}"
    )
    raise AssertionError(msg)
