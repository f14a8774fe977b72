"""Every argument of ``ExpertParallel``, checked before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, distributed

from moe_routing import _check
from moe_routing.distributed.kernel import Received
from moe_routing.distributed.problem import REDUCE, ExchangeProblem
from moe_routing.permutation.problem import ANY_FLOAT, FLOATS
from moe_routing.planning.problem import MAX_EXPERTS, MAX_TOPK
from moe_routing_registry.text import refusal, require_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from moe_routing.distributed.kernel import Tokens


_MATRIX = 2
_WEIGHTS = (torch.bfloat16, torch.float16, torch.float32)
TIMEOUT = 60.0
"""Seconds that ranks wait for each other when an ``ExpertParallel`` is made."""
LEAST_TIMEOUT = 1e-3
"""A millisecond: torch.distributed counts in them, and takes 0 for no limit."""
MOST_TIMEOUT = 1e9
_OUTSIDE = "group: expected one that this process is in, got one that it is not in"


class Placement(NamedTuple):
    """Which rank has which experts.

    :ivar ranks: the rank of each expert.
    :ivar of_each_rank: the experts of each rank, ascending.
    :ivar experts_per_rank: the most that a rank has.
    """

    ranks: tuple[int, ...]
    of_each_rank: tuple[tuple[int, ...], ...]
    experts_per_rank: int

    @property
    def places(self) -> list[int]:
        """The number of each expert where rank r has those from r * experts_per_rank on."""
        places = [0] * len(self.ranks)
        for rank, experts in enumerate(self.of_each_rank):
            for n, expert in enumerate(experts):
                places[expert] = rank * self.experts_per_rank + n
        return places

    @property
    def is_even(self) -> bool:
        """Whether the experts are numbered so already, and every such number is an expert."""
        every = len(self.of_each_rank) * self.experts_per_rank
        return self.places == list(range(every))


def check_group(group: object) -> ProcessGroup:
    """Require a group of torch.distributed that this process is in; ``None`` is all ranks.

    :raises TypeError: it is something else.
    :raises ValueError: there is no group, or this process is not in it.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        fix = "call torch.distributed.init_process_group first"
        msg = f"group: expected a group of torch.distributed, got none; {fix}"
        raise ValueError(msg)
    if group is None:
        group = distributed.group.WORLD
    if group is distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(_OUTSIDE)
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(refusal("group", "a ProcessGroup, or None for all ranks", group))
    if distributed.get_rank(group) < 0:
        raise ValueError(_OUTSIDE)
    return group


def check_device(device: object, group: ProcessGroup) -> torch.device:
    """Return the device of the tokens: the accelerator's if the group can use it, else the CPU.

    :raises TypeError: it is no device.
    :raises ValueError: the group's backend does not communicate on it.
    """
    kinds = [
        pair.partition(":")[0]
        for pair in str(distributed.distributed_c10d.get_backend_config(group)).split(",")
    ]
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        kind = "cpu" if accelerator is None or accelerator.type not in kinds else accelerator.type
        if kind not in kinds:
            raise ValueError(refusal("group", "a group that communicates on the CPU", kinds))
    else:
        if not isinstance(device, (str, torch.device)):
            raise TypeError(refusal("device", "a torch.device, a str or None", device))
        expected = f"one that is here and that the group communicates on: {', '.join(kinds)}"
        try:
            made = torch.device(device)
            found = torch.empty(0, device=made if made.type in kinds else None).device
        except (RuntimeError, AssertionError) as error:  # of torch, about a device that is not here
            raise ValueError(refusal("device", expected, str(device))) from error
        if made.type not in kinds:
            raise ValueError(refusal("device", expected, str(device)))
        return torch.device("cpu") if found.type == "cpu" else found
    return torch.empty(0, device=kind).device


def to_agree_with(
    timeout: object, device: object, group: ProcessGroup
) -> tuple[float, torch.device]:
    """Return seconds and a device for the agreement, in which wrong ones of this rank are told."""
    try:
        seconds = check_timeout(timeout)
    except (TypeError, ValueError):
        seconds = TIMEOUT
    try:
        return seconds, check_device(device, group)
    except (TypeError, ValueError):
        return seconds, check_device(None, group)


def check_placement(num_experts: object, placement: object, ranks: int) -> Placement:
    """Return which rank has which experts: as many on each, or as the map says.

    :raises TypeError: an argument has the wrong type.
    :raises ValueError: experts cannot be split evenly, or the map is not one of these experts.
    """
    number = _check.experts(num_experts)
    if number > MAX_EXPERTS:
        raise ValueError(refusal("num_experts", f"an int from 1 to {MAX_EXPERTS}", number))
    if placement is None:
        if number % ranks:
            expected = f"a multiple of the group's {ranks} ranks, or a placement"
            raise ValueError(refusal("num_experts", expected, number))
        each = number // ranks
        of_each = tuple(tuple(range(r * each, (r + 1) * each)) for r in range(ranks))
        return Placement(tuple(e // each for e in range(number)), of_each, each)
    expected = f"a rank from 0 to {ranks - 1} for each of {number} experts"
    if isinstance(placement, Tensor):
        if placement.dtype not in _check.RECORDED_DTYPES or placement.dim() != 1:
            raise TypeError(refusal("placement", f"{expected}, integers", placement))
        placement = placement.tolist()
    if not isinstance(placement, Sequence) or isinstance(placement, str):
        raise TypeError(refusal("placement", expected, placement))
    of = tuple(_check.integer("placement", rank, expected) for rank in placement)
    if len(of) != number or not all(0 <= rank < ranks for rank in of):
        raise ValueError(refusal("placement", expected, placement))
    of_each = tuple(
        tuple(expert for expert, at in enumerate(of) if at == rank) for rank in range(ranks)
    )
    most = max(map(len, of_each))
    if most * ranks > MAX_EXPERTS:
        expected = f"{MAX_EXPERTS // ranks} experts or fewer on each of {ranks} ranks"
        raise ValueError(refusal("placement", expected, most))
    return Placement(of, of_each, most)


def check_problem(  # noqa: PLR0913 -- the arguments of `ExpertParallel`
    placement: Placement,
    *,
    reduce: object,
    shared_batch: object,
    max_tokens: object,
    capacity: object,
    topk: object,
    hidden_size: object,
    dtype: object,
) -> ExchangeProblem:
    """Return the problem, as of one host.

    :raises TypeError: an argument has the wrong type.
    :raises ValueError: an argument has the wrong value.
    """
    if not isinstance(reduce, str) or reduce not in REDUCE:
        raise ValueError(refusal("reduce", "'none' or 'rank'", reduce))
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(refusal("dtype", "a torch.dtype or None", dtype))
    ranks = len(placement.of_each_rank)
    columns = _stated("topk", topk, MAX_TOPK)
    # The pairs that a rank receives, padded, are counted in int32.
    most = (2**31 - 1) // (ranks * max(1, columns))
    tokens = _stated("max_tokens", max_tokens, most)
    if capacity is not None and not tokens:
        raise ValueError(refusal("capacity", "None, or max_tokens too", capacity))
    return ExchangeProblem(
        ranks=ranks,
        experts_per_rank=placement.experts_per_rank,
        reduce="rank" if reduce == "rank" else "none",
        shared_batch=_check.flag("shared_batch", shared_batch),
        max_tokens=tokens,
        capacity=_stated("capacity", capacity, (2**31 - 1) // ranks),
        topk=columns,
        hidden_size=_stated("hidden_size", hidden_size, 2**31 - 1),
        dtype="" if dtype is None else str(dtype).removeprefix("torch."),
    )


def _stated(name: str, value: object, most: int) -> int:
    if value is None:
        return 0
    expected = f"an int from 1 to {most}, or None"
    number = _check.integer(name, value, expected)
    if not 1 <= number <= most:
        raise ValueError(refusal(name, expected, number))
    return number


def check_timeout(timeout: object) -> float:
    """Require a number of seconds that torch.distributed can wait.

    :raises TypeError: it is no number.
    :raises ValueError: it is too short or too long.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, Real):
        raise TypeError(refusal("timeout", "a number of seconds", timeout))
    if not LEAST_TIMEOUT <= timeout <= MOST_TIMEOUT:  # type: ignore[operator] # what is real compares
        expected = f"from {LEAST_TIMEOUT:g} to {MOST_TIMEOUT:g} seconds"
        raise ValueError(refusal("timeout", expected, timeout))
    return float(timeout)


def check_transport(transport: object) -> None:
    """Require the name of a backend, or ``None``; whether there is one, the registry says.

    :raises TypeError: it is no string.
    :raises ValueError: no backend can have that name.
    """
    if transport is not None:
        if not isinstance(transport, str):
            raise TypeError(refusal("transport", "a name, or None", transport))
        require_name("transport", transport)


def check_tokens(problem: ExchangeProblem, device: torch.device, tokens: Tokens) -> Tokens:
    """Require tokens that fit each other, and what was stated.

    :raises TypeError: an argument has the wrong type or dtype.
    :raises ValueError: an argument has the wrong shape or device.
    """
    hidden = _check.matrix("hidden", tokens.hidden, "[T, H]")
    _check_stated(problem, hidden)
    _check_ids(tokens.ids, hidden.shape[0], problem.topk)
    _check_weights(tokens.weights, list(tokens.ids.shape))
    if tokens.scales is not None:
        scales = _check.matrix("scales", tokens.scales, "[T, S]")
        if scales.shape[0] != hidden.shape[0]:
            raise ValueError(refusal("scales", f"{hidden.shape[0]} rows, as hidden has", scales))
    for name, part in tokens._asdict().items():
        if part is not None:
            _check_device(name, part, device)
    return tokens


def _check_device(name: str, part: Tensor, device: torch.device) -> None:
    if _check.is_dtensor(part):
        raise TypeError(refusal(name, "a tensor of this rank, .to_local() perhaps", part))
    if part.device != device:
        raise ValueError(refusal(name, f"device {device}, on which the ranks exchange", part))


def check_results(name: str, rows: object, device: torch.device) -> Tensor:
    """Require rows that experts computed.

    :raises TypeError: they are no tensor, or of another dtype.
    :raises ValueError: they are no dense matrix, or on another device.
    """
    rows = _check.matrix(name, rows, "[P, H]")
    if str(rows.dtype).removeprefix("torch.") not in FLOATS:
        raise TypeError(refusal(name, f"dtype {ANY_FLOAT}", rows))
    _check_device(name, rows, device)
    return rows


def check_received(received: object) -> Received:
    """Require what a transport's ``dispatch`` returned.

    :raises TypeError: it is something else.
    """
    if not isinstance(received, Received):
        raise TypeError(refusal("received", "what dispatch_rows returned", received))
    return received


def _check_stated(problem: ExchangeProblem, hidden: Tensor) -> None:
    if problem.dtype not in ("", str(hidden.dtype).removeprefix("torch.")):
        raise TypeError(refusal("hidden", f"dtype {problem.dtype}, as was stated", hidden))
    if problem.hidden_size not in (0, hidden.shape[1]):
        raise ValueError(refusal("hidden", f"{problem.hidden_size} columns, as was stated", hidden))
    if problem.max_tokens and hidden.shape[0] > problem.max_tokens:
        expected = f"max_tokens={problem.max_tokens} rows or fewer"
        raise ValueError(refusal("hidden", expected, hidden))


def _check_ids(ids: object, tokens: int, topk: int) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in _check.IDS_DTYPES:
        raise TypeError(refusal("ids", "an int32 or int64 tensor [T, K]", ids))
    if not _check.is_dense(ids) or ids.dim() != _MATRIX or ids.shape[0] != tokens:
        raise ValueError(refusal("ids", f"a dense tensor [{tokens}, K]", ids))
    if ids.shape[1] != topk if topk else not 1 <= ids.shape[1] <= MAX_TOPK:
        raise ValueError(refusal("ids", f"{topk or f'1 to {MAX_TOPK}'} columns", ids))


def _check_weights(weights: object, shape: list[int]) -> None:
    if not isinstance(weights, Tensor) or weights.dtype not in _WEIGHTS:
        expected = f"a tensor {shape} of {ANY_FLOAT}"
        raise TypeError(refusal("weights", expected, weights))
    if not _check.is_dense(weights) or list(weights.shape) != shape:
        raise ValueError(refusal("weights", f"a dense tensor of shape {shape}", weights))
