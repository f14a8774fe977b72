"""What the ranks of a group tell each other when an ``ExpertParallel`` is made."""

from __future__ import annotations

import json
import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed

from moe_routing_registry.text import line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.distributed import ProcessGroup

Made = TypeVar("Made")

_BYTES = 4096
"""Of the message of a rank; all are as long, so that nobody need know the others' lengths."""
_LONGEST = 500
"""Characters of an error that other ranks are told."""


def agreed(
    attempt: Callable[[], tuple[Made, Mapping[str, Any]]],
    group: ProcessGroup,
    device: torch.device,
    seconds: float,
) -> tuple[Made, int]:
    """Attempt something on every rank, and require the same outcome on all of them.

    :param attempt: returns what it made, and what must be the same everywhere: a few plain JSON
        values by name.
    :returns: what was made, and on how many hosts.
    :raises ValueError: the attempt failed on another rank, or outcomes differ. What the attempt
        itself raises is raised here, after the other ranks were told.
    :raises TimeoutError: a rank said nothing in that time.
    """
    refused: Exception | None = None
    made: Made | None = None
    said: Mapping[str, Any] = {}
    try:
        made, said = attempt()
    except Exception as error:  # noqa: BLE001 -- raised below
        refused = error
    why = "" if refused is None else line(f"{type(refused).__name__}: {refused}", _LONGEST)
    message = {"said": dict(said), "refused": why, "host": socket.gethostname()}
    heard = _told(message, group, device, seconds)
    if refused is not None:
        try:
            raise refused
        finally:
            # The error holds this frame. As a cycle that would keep the group past its end.
            del refused
    for rank, other in enumerate(heard):
        if other["refused"]:
            msg = (
                f"group: expected every rank to be served, got from rank {rank} {other['refused']}"
            )
            raise ValueError(msg)
    _require_the_same([other["said"] for other in heard])
    return made, len({other["host"] for other in heard})  # type: ignore[return-value] # nothing was refused


def _told(
    message: Mapping[str, Any], group: ProcessGroup, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """Tell the other ranks, and return what each rank says, by rank."""
    text = json.dumps(message, ensure_ascii=False).encode().ljust(_BYTES)
    sent = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    heard = [torch.empty_like(sent) for _ in range(distributed.get_world_size(group))]
    try:
        work = distributed.all_gather(heard, sent, group, async_op=True)
        finished = work.wait(timedelta(seconds=seconds))
    except RuntimeError as error:  # of torch.distributed; a rank that died ends the wait sooner
        raise _silence(seconds, f"; {line(str(error), _LONGEST)}") from error
    if not finished:
        raise _silence(seconds)
    return [json.loads(bytes(part.tolist())) for part in heard]


def _silence(seconds: float, more: str = "") -> TimeoutError:
    return TimeoutError(
        f"group: expected every rank to make an ExpertParallel within {seconds:g} s, got no word "
        f"from one{more}"
    )


def _require_the_same(said: list[dict[str, Any]]) -> None:
    for name in said[0]:
        values = [other[name] for other in said]
        if any(value != values[0] for value in values):
            by_rank = ", ".join(f"{value!r} on rank {rank}" for rank, value in enumerate(values))
            msg = line(f"{name}: expected the same on every rank, got {by_rank}")
            raise ValueError(msg)
