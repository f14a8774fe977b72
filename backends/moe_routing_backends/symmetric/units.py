"""Rows as what the kernels read, and how much of one a program takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 16
"""Of a row, in bytes: as much as a thread writes at once."""
UNITS = {4: torch.int32, 2: torch.int16, 1: torch.int8}
"""What rows are moved as, by bytes."""
WIDTHS = (128, 2048)
"""The least and most integers of a row that a program copies at once."""
SUMMED = (128, 1024)
"""The least and most columns that a program sums at once."""


class Units(NamedTuple):
    """Rows as what a kernel reads.

    :ivar vector: elements that are copied together; widths, strides and pitches are in those.
    :ivar width: elements that a program takes at once.
    """

    rows: Tensor
    vector: int
    width: int

    @classmethod
    def of(cls, rows: Tensor, pitch: int, *, integers: bool = True) -> Units:
        """Take rows as the widest integers that fit, or as the numbers that they are.

        :param pitch: bytes from a row to the next where they are written.
        """
        rows = rows.resolve_conj().resolve_neg()
        if rows.stride(1) != 1:  # a single column may have any, and count as contiguous
            rows = rows.clone(memory_format=torch.contiguous_format)
        size = rows.element_size()
        numbers = (rows.shape[1] * size, rows.stride(0) * size, rows.storage_offset() * size, pitch)
        if integers:
            unit = next(unit for unit in UNITS if not any(number % unit for number in numbers))
            rows = rows.view(UNITS[unit])
        aligned = not any(number % ALIGNMENT for number in (*numbers, rows.data_ptr()))
        least, most = WIDTHS if integers else SUMMED
        if not aligned:  # each element has an address in registers, of which there are too few
            most //= 2
        width = min(max(triton.next_power_of_2(rows.shape[1]), least), most)
        return cls(rows, ALIGNMENT // rows.element_size() if aligned else 1, width)

    @property
    def columns(self) -> int:
        """Vectors of a row."""
        return self.rows.shape[1] // self.vector

    @property
    def stride(self) -> int:
        """Vectors from a row to the next."""
        return self.rows.stride(0) // self.vector

    @property
    def parts(self) -> int:
        """Pieces of a row that programs take."""
        return max(1, -(-self.rows.shape[1] // self.width))

    def of_bytes(self, number: int) -> int:
        """Return how many vectors are so many bytes."""
        return number // self.rows.element_size() // self.vector
