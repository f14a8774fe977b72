"""What an operation brings to be measured, and what is the same for all of them.

An operation brings the functions of ``Operation``. The clock knows ``Implementation`` and
``Inputs``.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

import moe_routing
from moe_routing_registry import BackendUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_routing.bench._result import AnyCase
    from moe_routing_registry import DeviceInfo, ResolutionReport

CPU_CACHE = 64 << 20
"""Bytes; torch does not say how large a CPU's last cache is."""
FEWEST_SETS, MOST_SETS = 4, 256
_GIB = 2**30


class Implementation(NamedTuple):
    """One implementation that computes a case.

    ``call`` allocates its outputs; ``into`` writes those that it is given, where it can.
    ``not_captured`` says why a CUDA graph cannot hold it; ``""`` where one can.
    """

    name: str
    is_backend: bool
    call: Callable[[torch.Tensor], tuple[Any, ...]]
    into: Callable[[torch.Tensor, Any], object] | None = None
    not_captured: str = ""


class Inputs(Protocol):
    """Sets of inputs of a case, each with outputs to write to."""

    @property
    def case(self) -> AnyCase:
        """What is computed."""

    @property
    def given(self) -> list[torch.Tensor]:
        """The input of each set."""

    @property
    def outs(self) -> list[Any]:
        """The outputs of each set."""

    @property
    def bytes(self) -> int:
        """Bytes that one call must move."""


class Operation(NamedTuple):
    """What an operation brings; each function takes cases and inputs of that operation.

    :ivar check_memory: raises ``ValueError`` for a case that the device cannot hold.
    :ivar explain: which backend gets a case on a device, or whether this one can have it.
    :ivar make: makes the inputs of a case, for a cache of so many bytes.
    :ivar backend: computes by the backend of this name.
    :ivar comparison: computes as others do; raises ``NotMeasuredError`` where they do not.
    :ivar problems: says what an implementation computes wrong, a sentence each.
    """

    check_memory: Callable[[Any, DeviceInfo], None]
    explain: Callable[[Any, str, str | None], ResolutionReport]
    make: Callable[[Any, torch.device, int], Any]
    backend: Callable[[str, Any], Implementation]
    comparison: Callable[[str, Any], Implementation]
    problems: Callable[[Implementation, Any], list[str]]


class NotMeasuredError(Exception):
    """This implementation does not serve this case here; says why."""


def fitting(asked: tuple[str, ...], explain: Callable[[str | None], ResolutionReport]) -> list[str]:
    """Name the backends to measure.

    Those asked for, every one that fits (``"all"``), or the one that the device gets.

    :param explain: reports which backend a case gets if this one is named, or none is.
    :raises BackendUnavailableError: none fits, or one that was named does not.
    """
    names: list[str | None] = (
        [*moe_routing.list_backends()] if "all" in asked else [*asked] or [None]
    )
    found = []
    for name in names:
        report = explain(name)
        if report.winner is not None:
            found.append(report.winner)
        elif name in asked or name is None:
            raise BackendUnavailableError(report.why, report)
    return found


def refuse_beyond_memory(case: AnyCase, device: DeviceInfo, needed: int) -> None:
    """Refuse a case that needs more bytes than the device has.

    :raises ValueError: it does.
    """
    if device.total_memory and needed > device.total_memory:
        has = f"{device.total_memory / _GIB:,.0f} GiB, which {device} has"
        msg = (
            f"tokens: expected a problem that fits {has}, got {case}, "
            f"which needs {needed / _GIB:,.0f}"
        )
        raise ValueError(msg)


def sets_for(cache: int, moved: int) -> int:
    """Return how many sets are twice the cache, where that takes no more than 256.

    A few rows are in a cache always.
    """
    return min(max(FEWEST_SETS, -(-2 * cache // moved)), MOST_SETS)


def turns(inputs: Inputs) -> itertools.cycle[tuple[torch.Tensor, Any]]:
    """Go round the sets for ever."""
    return itertools.cycle(list(zip(inputs.given, inputs.outs, strict=True)))


def cache_of(device: torch.device) -> int:
    """Return the bytes that the device's last cache may hold."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return CPU_CACHE
