"""The ranks that check together: those of torchrun, or this process alone.

Every rank runs the same checks in the same order. What one finds is the outcome on all of them.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import distributed

from moe_routing.conformance.under_test import DeclinedError, NotApplicableError, NotRunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.distributed import ProcessGroup

Said = TypeVar("Said")
TIMEOUT = timedelta(seconds=120)
"""How long a rank waits for another: one that failed elsewhere ends the others by it."""
COMMAND = "torchrun --nproc-per-node {ranks} -m moe_routing conformance --distributed"


class Outcome(NamedTuple):
    """What a check came to on a rank; ``""`` is passed."""

    kind: str
    message: str


def initialise(device: torch.device) -> None:
    """Make the group of all ranks of torchrun, or of this process alone where there are none."""
    backends = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{_of(device)}"
    if distributed.is_torchelastic_launched():
        distributed.init_process_group(backends, timeout=TIMEOUT)
    else:
        store = distributed.HashStore()  # type: ignore[attr-defined] # public, but in no __all__
        distributed.init_process_group(backends, store=store, rank=0, world_size=1, timeout=TIMEOUT)


def _of(device: torch.device) -> str:
    return str(distributed.get_default_backend_for_device(device))


@contextlib.contextmanager
def group_on(device: torch.device) -> Iterator[ProcessGroup]:
    """Enter the group of all ranks: the one there is, or one of this process alone."""
    if distributed.is_initialized():
        yield _all_ranks()
        return
    initialise(device)
    try:
        yield _all_ranks()
    finally:
        distributed.destroy_process_group()


def _all_ranks() -> ProcessGroup:
    group = distributed.group.WORLD
    assert group is not None  # noqa: S101 -- for mypy: it was initialised
    return group


def need(ranks: int) -> None:
    """Require that many ranks.

    :raises NotRunError: there are fewer.
    """
    if distributed.get_world_size() < ranks:
        msg = f"needs {ranks} ranks: {COMMAND.format(ranks=ranks)}"
        raise NotRunError(msg)


def together(name: str, run: Callable[[], None]) -> None:
    """Run on every rank, and raise everywhere what went wrong on any.

    :param name: what is run, which must be the same on every rank.
    """
    names = _heard(name)
    if len(set(names)) > 1:
        msg = f"ranks run different cases: give all of them one seed; {names}"
        raise AssertionError(msg)
    mine = Outcome("", "")
    raised: Exception | None = None
    try:
        run()
    except Exception as error:  # noqa: BLE001 -- raised below, after the other ranks were told
        raised = error
        mine = Outcome(type(error).__name__, str(error))
    heard = _heard(mine)
    failed = [(rank, one) for rank, one in enumerate(heard) if one.kind and not _is_verdict(one)]
    try:
        if raised is not None and (not failed or not _is_verdict(mine)):
            raise raised
        if failed:
            rank, one = failed[0]
            msg = f"on rank {rank}: {one.kind}: {one.message}"
            raise AssertionError(msg)
        others = [one for one in heard if one.kind]
        if others:
            raise NotApplicableError(others[0].message)
    finally:
        raised = None  # a cycle with its frame would keep the group


def _heard(said: Said) -> list[Said]:
    """Return what every rank says, by rank."""
    heard = [said] * distributed.get_world_size()
    if len(heard) > 1:
        distributed.all_gather_object(heard, said)
    return heard


def _is_verdict(outcome: Outcome) -> bool:
    verdicts = (DeclinedError, NotApplicableError, NotRunError)
    return outcome.kind in {verdict.__name__ for verdict in verdicts}
