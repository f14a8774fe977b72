"""Correct backends that permute and combine, and the table of their mutants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing.formula.permutation import combined, permuted, quantized
from mutants._mutant import Mutant

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing.permutation import CombineProblem, PermuteProblem
    from moe_routing.planning import DispatchPlan
    from moe_routing_registry import DeviceInfo

MUTANTS: list[Mutant] = []


class Permutes:
    """A correct backend. Mutants change what it reads, what it moves or what it writes."""

    def __init__(self, problem: PermuteProblem, device: DeviceInfo) -> None:
        self.problem = problem
        del device

    def __call__(
        self, hidden: Tensor, plan: DispatchPlan, out: Tensor, *, scales: Tensor | None = None
    ) -> None:
        """Fill the outputs."""
        rows = self.read(hidden)
        if scales is None:
            self.write(self.move(rows, plan), out)
            return
        values, of_rows = self.quantize(rows)
        self.write(self.move(values, plan), out)
        self.write(self.move(of_rows, plan), scales)

    def read(self, rows: Tensor) -> Tensor:
        """Return the rows where they lie."""
        return rows

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return quantized rows and their scales."""
        return quantized(rows)

    def move(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        """Return the row of its token at each place."""
        return permuted(rows, plan)

    def write(self, made: Tensor, out: Tensor) -> None:
        """Write the rows."""
        out.copy_(made)


class Combines:
    """A correct backend. Mutants change what it reads, what it adds or what it writes."""

    def __init__(self, problem: CombineProblem, device: DeviceInfo) -> None:
        self.problem = problem
        del device

    def __call__(
        self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None, out: Tensor
    ) -> None:
        """Fill the output."""
        self.write(self.add(self.read(rows), plan, weights), out)

    def read(self, rows: Tensor) -> Tensor:
        """Return the rows where they lie."""
        return rows

    def add(self, rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
        """Return the sums."""
        return combined(rows, plan, weights)

    def write(self, made: Tensor, out: Tensor) -> None:
        """Write the sums."""
        out.copy_(made)


def caught_by(check: str, *, saying: str, **more: Any) -> Any:
    """Enter a mutant into the table, of the operation of the class that it changes.

    :param check: the check that must catch it.
    :param saying: what the check must say, a regular expression.
    :param more: other fields of ``Mutant``.
    """

    def enter(factory: Callable[..., Any]) -> Callable[..., Any]:
        operation = "permute" if issubclass(factory, Permutes) else "combine"
        MUTANTS.append(Mutant(factory, check, saying, operation=operation, **more))
        return factory

    return enter


def memory_before(rows: Tensor, count: int) -> bool:
    """Tell whether that many elements lie in the same memory before a tensor."""
    return rows.storage_offset() >= count


def memory_after(rows: Tensor, count: int) -> bool:
    """Tell whether that many elements lie in the same memory after contiguous rows."""
    end = rows.storage_offset() + rows.numel() + count
    return bool(rows.untyped_storage().nbytes() // rows.itemsize >= end)


def overrun(out: Tensor) -> None:
    """Write zeros to the element after a tensor, if its storage has one."""
    if memory_after(out, 1):
        after = out.as_strided((1,), (1,), out.storage_offset() + out.numel())
        after.copy_(torch.zeros(1).to(out.dtype))
