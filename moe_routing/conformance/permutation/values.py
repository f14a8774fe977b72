"""What the rows and weights of a case hold, and how they lie in memory."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Generator, Tensor

DTYPES = (
    "bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu",
    "uint8", "int8", "int16", "int32", "int64", "bool", "complex64", "complex128",
)  # fmt: skip
"""Dtypes of rows that are moved."""


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By their size in bytes."""


def bits(rows: int, columns: int, dtype: torch.dtype, generator: Generator) -> Tensor:
    """Return rows of random bits, NaN of every payload among them."""
    if dtype == torch.bool:
        return torch.randint(2, (rows, columns), generator=generator).bool()
    sizes = (rows, columns * dtype.itemsize)
    return torch.randint(256, sizes, generator=generator, dtype=torch.uint8).view(dtype)


def _normal(rows: int, columns: int, dtype: torch.dtype, generator: Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator).to(dtype)


def _cancelling(rows: int, columns: int, dtype: torch.dtype, generator: Generator) -> Tensor:
    """Return values of many magnitudes, the large ones few, so that the order of sums shows."""
    few = torch.tensor([4096.0, -4096.0, 1.0, -1.0, 0.37, 2.0**-12])
    which = torch.randint(len(few), (rows, columns), generator=generator)
    return (few[which] * (1 + torch.rand(rows, columns, generator=generator) / 64)).to(dtype)


def _some_of(*values: float) -> Callable[[int, int, torch.dtype, Generator], Tensor]:
    """Return a function that puts those values into every tenth column of half of the rows."""

    def draw(rows: int, columns: int, dtype: torch.dtype, generator: Generator) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator)
        place = torch.randint(columns, (rows, 1 + columns // 10), generator=generator)
        which = torch.randint(len(values), place.shape, generator=generator)
        changed = drawn.scatter(1, place, torch.tensor(values)[which])
        return torch.where(torch.arange(rows)[:, None] % 2 == 0, changed, drawn).to(dtype)

    return draw


def _largest(rows: int, columns: int, dtype: torch.dtype, generator: Generator) -> Tensor:
    sign = torch.randint(2, (rows, columns), generator=generator) * 2 - 1
    part = 1 - torch.rand(rows, columns, generator=generator) / 4
    return (sign * part * min(torch.finfo(dtype).max, 3e38)).to(dtype)


def _tiny(rows: int, columns: int, dtype: torch.dtype, generator: Generator) -> Tensor:
    exponent = -torch.randint(20, 150, (rows, columns), generator=generator).double()
    return (exponent.exp2() * torch.randn(rows, columns, generator=generator)).to(dtype)


def _zeros(rows: int, columns: int, dtype: torch.dtype, generator: Generator) -> Tensor:
    sign = torch.randint(2, (rows, columns), generator=generator)
    return torch.where(sign == 0, 0.0, -0.0).to(dtype)


def _levels(rows: int, columns: int, dtype: torch.dtype, generator: Generator) -> Tensor:
    """Return values half-way between two that float8_e4m3fn has, where the largest is 448."""
    drawn = torch.randint(-447, 448, (rows, columns), generator=generator).to(torch.float32)
    drawn[:, ::64] = 448.0
    return drawn.to(dtype)


ROWS: Mapping[str, Callable[[int, int, torch.dtype, Generator], Tensor]] = MappingProxyType(
    {
        "bits": bits,
        "normal": _normal,
        "cancelling": _cancelling,
        "not_finite": _some_of(torch.nan, -torch.nan, torch.inf, -torch.inf),
        "infinite": _some_of(torch.inf),
        "largest": _largest,
        "tiny": _tiny,
        "zeros": _zeros,
        "levels": _levels,
    }
)
"""Rows ``[N, H]`` by kind; but for ``bits``, of floats."""


def _bounded(rows: int, columns: int, dtype: torch.dtype, generator: Generator) -> Tensor:
    """Return weights as a router has them: between 0 and 1."""
    return torch.rand(rows, columns, generator=generator).to(dtype)


WEIGHTS: Mapping[str, Callable[[int, int, torch.dtype, Generator], Tensor]] = MappingProxyType(
    {
        "random": _bounded,
        "negative": lambda *sizes: -_bounded(*sizes),
        "zeros": _zeros,
        "large": lambda *sizes: _bounded(*sizes) * 1024,
        "not_finite": _some_of(torch.nan, torch.inf, -torch.inf),
    }
)
"""Weights ``[T, K]`` by kind."""


def around(like: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return memory whose every bit is set: NaN in every dtype that has one."""
    size = torch.Size(shape).numel() * like.itemsize
    value = 1 if like.dtype == torch.bool else 255
    filled = torch.full((size,), value, dtype=torch.uint8, device=device)
    return filled.view(like.dtype).view(shape)


def put(rows: Tensor, within: Tensor) -> Tensor:
    """Copy the bits of rows into a part of memory."""
    integers = _INTEGERS.get(rows.itemsize)
    if integers is None:
        within.copy_(rows)
    else:  # no operation takes every dtype
        within.view(integers).copy_(rows.view(integers))
    return within


def _sliced(rows: Tensor) -> Tensor:
    count, columns = rows.shape
    return put(rows, around(rows, (count, columns + 5), rows.device)[:, 3 : columns + 3])


def between_others(rows: Tensor) -> Tensor:
    """Return rows that lie between two others, which hold NaN."""
    count, columns = rows.shape
    return put(rows, around(rows, (count + 2, columns), rows.device)[1:-1])


def _every_second_row(rows: Tensor) -> Tensor:
    count, columns = rows.shape
    return put(rows, around(rows, (2 * count, columns), rows.device)[::2])


def _every_second_column(rows: Tensor) -> Tensor:
    count, columns = rows.shape
    return put(rows, around(rows, (count, 2 * columns), rows.device)[:, ::2])


def _transposed(rows: Tensor) -> Tensor:
    count, columns = rows.shape
    return put(rows, around(rows, (columns, count), rows.device).t())


MEMORY: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "contiguous": lambda rows: rows,
        "sliced": _sliced,
        "between_others": between_others,
        "every_second_row": _every_second_row,
        "every_second_column": _every_second_column,
        "transposed": _transposed,
        "one_row": lambda rows: rows[:1].expand(rows.shape),
        "one_column": lambda rows: rows[:, :1].expand(rows.shape),
    }
)
"""Ways in which rows lie in memory. The last two repeat the first row or column: a stride is 0."""
