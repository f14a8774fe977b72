"""The ranks that check together: those of torchrun, or this process alone.

Every rank runs the same checks in the same order. What one finds is the outcome on all of them.
"""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import distributed

from moe_routing._registry import registry
from moe_routing.conformance import drawn, runner
from moe_routing.conformance.contract import contract_of
from moe_routing.conformance.under_test import DeclinedError, NotApplicableError, NotRunError
from moe_routing_registry import RejectCode, Verdict
from moe_routing_registry.report import Rejection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch.distributed import ProcessGroup

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.runner import Report, Result

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


class Here(NamedTuple):
    """This process among the ranks of torchrun.

    :ivar rank: its number; rank 0 reports.
    :ivar device: the device that it checks on.
    :ivar seed: draws the cases that are in no list, the same on every rank.
    """

    rank: int
    device: torch.device
    seed: int


@contextlib.contextmanager
def of_torchrun(device: str | None, seed: int | None) -> Iterator[Here]:
    """Enter the group of all ranks, each on its own accelerator if the machine has any.

    :param device: instead of that: ``"cpu"``.
    :param seed: draws the cases; a new one, which rank 0 draws, where ``None``.
    """
    found = _device(device)
    initialise(found)
    try:
        rank = distributed.get_rank()
        seeds = [drawn.new_seed() if seed is None else seed]
        distributed.broadcast_object_list(seeds, src=0, device=torch.device("cpu"))
        yield Here(rank, found, seeds[0])
    finally:
        distributed.destroy_process_group()


def _device(named: str | None) -> torch.device:
    """Return this rank's device, and make it the current one."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if named == "cpu" or (named is None and kind is None):
        return torch.device("cpu")
    device = torch.device(named or kind.type)  # type: ignore[union-attr] # one of them is there
    index = int(os.environ["LOCAL_RANK"]) if device.index is None else device.index
    torch.accelerator.set_device_index(index)
    return torch.device(device.type, index)


def transports() -> list[str]:
    """Return the names of all backends that have a factory for ``exchange``, in one order."""
    return sorted(n for n, spec in registry().backends.items() if "exchange" in spec.factories)


def run(
    here: Here,
    transport: str,
    profile: Profile,
    clauses: Iterable[int] | None,
    on_result: Callable[[Result, int, int], None] | None = None,
) -> Report:
    """Check a transport together with the other ranks, which all call this.

    :raises NotUsableError: it cannot be used on some rank.
    """
    _require_usable(here, transport)
    report = runner.run(
        transport,
        here.device,
        operation="exchange",
        profile=profile,
        clauses=clauses,
        seed=here.seed,
        on_result=on_result,
    )
    report.device = f"{report.device}, {distributed.get_world_size()} ranks"
    return report


def _require_usable(here: Here, transport: str) -> None:
    """Require of every rank that it can use the transport: a check needs all of them."""
    under_test = runner.backend_under_test(transport, here.device)
    rejection = under_test.why_not(contract_of("exchange").problems())
    for rank, reason in enumerate(heard("" if rejection is None else rejection.verdict.reason)):
        if reason and rejection is None:
            verdict = Verdict.no(RejectCode.GROUP, f"cannot be used on rank {rank}: it {reason}")
            distribution = registry().distribution(transport)
            rejection = Rejection(name=transport, verdict=verdict, distribution=distribution)
    if rejection is not None:
        raise runner.NotUsableError(under_test, rejection)


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
    names = heard(name)
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
    every = heard(mine)
    failed = [(rank, one) for rank, one in enumerate(every) if one.kind and not _is_verdict(one)]
    try:
        if raised is not None and (not failed or not _is_verdict(mine)):
            raise raised
        if failed:
            rank, one = failed[0]
            msg = f"on rank {rank}: {one.kind}: {one.message}"
            raise AssertionError(msg)
        others = [one for one in every if one.kind]
        if others:
            raise NotApplicableError(others[0].message)
    finally:
        raised = None  # a cycle with its frame would keep the group


@contextlib.contextmanager
def to_the_end() -> Iterator[Callable[..., None]]:
    """Yield what holds a part of a check; what it finds wrong is raised at the end of the block.

    A rank that stopped between two exchanges would leave the others waiting in the second.
    """
    found: list[str] = []

    def hold(part: Callable[..., object], *arguments: object) -> None:
        try:
            part(*arguments)
        except AssertionError as error:
            found.append(str(error))

    yield hold
    if found:
        raise AssertionError(found[0])


def heard(said: Said) -> list[Said]:
    """Return what every rank says, by rank."""
    every = [said] * distributed.get_world_size()
    if len(every) > 1:
        distributed.all_gather_object(every, said)
    return every


def _is_verdict(outcome: Outcome) -> bool:
    verdicts = (DeclinedError, NotApplicableError, NotRunError)
    return outcome.kind in {verdict.__name__ for verdict in verdicts}
