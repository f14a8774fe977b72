"""Where torchrun starts several processes: each examines itself, and rank 0 shows what all found.

A rank whose examination raises takes part all the same, so that the others do not wait for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from moe_routing.doctor._check import Check
from moe_routing.doctor._differences import judged
from moe_routing.doctor._machine import look, quietly
from moe_routing_registry.containment import PluginFailure, contained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from moe_routing.doctor._case import Case

SECONDS = 180
"""How long ranks wait for each other after their examinations."""
SECONDS_VERIFYING = 900
"""The same where they compare backends with the oracle, which may take minutes."""
_QUIET = 10
"""Seconds after which rank 0 says that it waits."""
_HEAD_START = 0.5
"""Seconds that rank 0 has to say what its examination raised.

It says so after the others were told, and torchrun ends every rank when the first one fails.
"""
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, or who does its work, sets for each process."""


def launched() -> bool:
    """Tell whether this process is one of several ranks, which torchrun started."""
    return all(os.environ.get(name) for name in VARIABLES)


def ranks(_case: Case) -> list[Check]:
    """Judge whether ranks agree, which an examination of one process cannot."""
    return [Check(name="ranks", status="skipped", summary="torchrun did not start this process")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """What the ranks found.

    :ivar rank: this rank.
    :ivar report: what this rank's examination returned; on rank 0 with what every rank found.
    :ivar ok: whether no rank found a problem, and all agree.
    :ivar unmet: why this rank did not meet the others, ``""`` where it did.
    """

    rank: int
    report: dict[str, Any]
    ok: bool
    unmet: str


@contextlib.contextmanager
def examined_by_ranks(
    examination: Callable[[str | None], dict[str, Any]],
    *,
    device: str | None = None,
    seconds: float = SECONDS,
    say: Callable[[str], object] = lambda _text: None,
) -> Iterator[Examined]:
    """Examine on every rank, and tell all; no rank leaves the block before rank 0.

    torchrun ends every rank when one of them fails, so none may end while rank 0 shows what was
    found. What the examination raises on rank 0 is raised here, after the others were told.

    :param examination: ``examine`` of a device; of everything that is here where it is ``None``, as
        on rank 0.
    :param device: the device that was asked for, on every rank. Without it each rank but 0 examines
        its own alone.
    :param seconds: how long ranks wait for each other.
    :param say: is told, on rank 0, of a wait that takes longer than a few seconds.
    """
    rank = _number("RANK")
    report, failure = dict[str, Any](), None
    finding = _nothing(rank)
    try:
        with contained("its examination"):
            only = device or (_own_device() if rank else None)
            report = examination(only)
            finding |= _finding(report, only)
    except PluginFailure as raised:
        failure = raised
        finding |= {"error": raised.sentence, "traceback": raised.trace}
    found = list[dict[str, Any]]()
    with contextlib.ExitStack() as stack:
        unmet = _without_torch()
        try:
            with contained("meeting the others"), _waiting(seconds, rank, say):
                if not unmet:
                    stack.enter_context(_group(seconds))
                    found = _told_to_all(finding)
                    stack.callback(_wait_for_all)
        except PluginFailure as raised:
            unmet = raised.sentence
        if failure is not None and rank == 0:
            raise failure.error
        checks = [_alone(seconds, unmet)] if unmet else judged(found, asked=device is not None)
        problems = [one for other in found for one in other["findings"]]
        problems += [check.to_dict() for check in checks]
        ok = all(one["status"] != "problem" for one in problems)
        if rank == 0:
            kept = [check for check in report["checks"] if check["name"] != "ranks"]
            kept += [check.to_dict() for check in checks]
            ok = ok and report["ok"]
            report |= {"ok": ok, "ranks": found, "checks": kept}
        yield Examined(rank=rank, report=report, ok=ok, unmet=unmet)
    if rank and found and found[0]["error"]:
        time.sleep(_HEAD_START)


def _number(variable: str) -> int:
    """Read a number of torchrun's; 0 where there is none, which joining the group then says."""
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else 0


def _without_torch() -> str:
    """Say why torch, by which ranks meet, cannot be used; ``""`` where it can.

    To import it here without a look may kill the process.
    """
    failure = look("cpu").torch_failure
    return "" if failure is None else f"torch cannot be used: {failure.sentence}"


def _own_device() -> str | None:
    """Name the device that this rank would use; ``None`` where torch cannot tell."""
    from moe_routing.probing import device_names

    if _without_torch():
        return None
    with quietly():
        return _own_of(device_names())


def _own_of(here: Sequence[str]) -> str:
    """Choose this rank's among the devices that are here, the CPU first.

    It is the accelerator with the index ``LOCAL_RANK``, here or not; the only one, where a rank
    sees one; or the CPU.
    """
    kinds = [name.partition(":")[0] for name in here]
    if len(kinds) <= 1:
        return "cpu"
    alike = [name for name, kind in zip(here, kinds, strict=True) if kind == kinds[1]]
    return alike[0] if len(alike) == 1 else f"{kinds[1]}:{_number('LOCAL_RANK')}"


@contextlib.contextmanager
def _group(seconds: float) -> Iterator[None]:
    """Join the group of all ranks, on their CPUs."""
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    timeout = timedelta(seconds=seconds)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    # With keys of its own: who started these processes may keep a store there that others use.
    store = distributed.PrefixStore("moe_routing_doctor", store)  # type: ignore[attr-defined] # a public name
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _told_to_all(finding: dict[str, Any]) -> list[dict[str, Any]]:
    """Tell the other ranks, and return what each found, by rank.

    Their hosts come first: a transport is chosen by how many there are.
    """
    hosts = _gathered(finding["host"])
    try:
        with contained("choosing a transport"):
            finding |= _transports(finding["device"], len(hosts), len(set(hosts)))
    except PluginFailure as failure:  # the others wait for what this rank says
        finding |= {"error": failure.sentence, "traceback": failure.trace}
    return _gathered(finding)


def _gathered(value: Any) -> list[Any]:  # noqa: ANN401 -- plain JSON values
    from torch import distributed

    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def _wait_for_all() -> None:
    """Let no rank go on before the last is here, or has ended."""
    from torch import distributed

    with contextlib.suppress(RuntimeError):  # a rank ended: there is nobody to wait for
        distributed.barrier()


@contextlib.contextmanager
def _waiting(seconds: float, rank: int, say: Callable[[str], object]) -> Iterator[None]:
    if rank:
        yield
        return
    text = f"rank 0 waits for the other ranks, for {seconds:g} s at most{_by_itself()}"
    timer = threading.Timer(_QUIET, lambda: say(text))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _by_itself() -> str:
    """Say how to examine one process, where it may be that there are no others."""
    return (
        "" if "TORCHELASTIC_RUN_ID" in os.environ else "; `unset RANK` has it examine itself only"
    )


def _alone(seconds: float, unmet: str) -> Check:
    summary = f"ranks did not meet (they wait {seconds:g} s), so this is of rank 0 only: {unmet}"
    fix = "unset RANK" if _by_itself() and not unmet.startswith("torch") else ""
    return Check(name="ranks", status="problem", summary=summary, fix=fix)


def _nothing(rank: int) -> dict[str, Any]:
    """Return what is told of a rank of which nothing was found out; plain JSON values."""
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "device": "",
        "name": "",
        "platform": "",
        "arch": "",
        "backend": None,
        "transport": None,
        "shared_batch_transport": None,
        "versions": {},
        "plugins": {},
        "environment": {},
        "findings": [],
        "error": "",
        "traceback": "",
    }


def _finding(report: dict[str, Any], only: str | None) -> dict[str, Any]:
    """Return what a rank tells of its examination.

    :param only: the device that was examined, ``None`` for everything that is here.
    """
    here = {_place(info): info for info in report["devices"]}
    own = next(iter(here), only or "") if only else _own_of([*here])
    info = here.get(own, {})
    toolchains = {one["name"]: one["version"] for one in report["toolchains"]}
    return {
        "device": own,
        **{key: info.get(key, "") for key in ("name", "platform", "arch")},
        "backend": report["reports"].get(own, {}).get("winner"),
        "versions": {
            "moe-routing": report["versions"]["moe-routing"],
            "torch": toolchains.get("torch"),
            "triton": toolchains.get("triton"),
        },
        "plugins": {
            backend["name"]: backend["distribution"]
            for backend in report["backends"]
            if not backend["distribution"].startswith("moe-routing ")
        },
        "environment": {one["name"]: one["value"] for one in report["environment"]},
        "findings": [
            check for check in report["checks"] if check["status"] in ("problem", "warning")
        ],
    }


def _place(info: dict[str, Any]) -> str:
    return info["type"] if info["index"] is None else f"{info['type']}:{info['index']}"


def _transports(device: str, ranks: int, hosts: int) -> dict[str, str | None]:
    """Let the registry choose for a group of so many ranks, as ``ExpertParallel`` would."""
    import moe_routing
    from moe_routing.distributed.problem import EXCHANGE_EXAMPLE

    each = max(1, EXCHANGE_EXAMPLE.experts_per_rank * EXCHANGE_EXAMPLE.ranks // ranks)
    own = dataclasses.replace(EXCHANGE_EXAMPLE, ranks=ranks, hosts=hosts, experts_per_rank=each)
    shared = dataclasses.replace(own, shared_batch=True, reduce="rank")
    return {
        "transport": moe_routing.explain(own, device=device).winner,
        "shared_batch_transport": moe_routing.explain(shared, device=device).winner,
    }
