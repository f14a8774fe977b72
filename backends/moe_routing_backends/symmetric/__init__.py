"""Tokens between the GPUs of a host through symmetric memory: no host synchronisation, in graphs.

This file stays free of torch and triton.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from moe_routing_registry import BackendSpec, RejectCode, Target, Verdict, hookimpl
from moe_routing_registry.device import INTERPRETER, triton_interprets

if TYPE_CHECKING:
    from moe_routing.distributed import ExchangeProblem
    from moe_routing_registry import DeviceInfo

MOST_RANKS = 16
"""Of a host."""


def supports(problem: ExchangeProblem, device: DeviceInfo) -> Verdict:
    """Accept what fits, where Triton and PyTorch can do it."""
    return fits(problem) and _kernels_run(device) and _reaches(device)


def fits(problem: ExchangeProblem) -> Verdict:
    """Accept ranks of one host that say how many tokens they have at most."""
    if problem.shared_batch:
        return Verdict.no(
            RejectCode.GROUP,
            "exchanges the tokens of ranks that hold different ones; here every rank holds all",
        )
    if problem.ranks == 1:
        return Verdict.no(RejectCode.GROUP, "writes into the memory of other ranks; there are none")
    if problem.hosts > 1 or problem.ranks > MOST_RANKS:
        of_hosts = f" on {problem.hosts} hosts" if problem.hosts > 1 else ""
        where = f"{problem.ranks} ranks{of_hosts}"
        return Verdict.no(
            RejectCode.GROUP,
            f"writes into the memory of up to {MOST_RANKS} ranks of one host, not of {where}",
        )
    if not problem.max_tokens:
        return Verdict.no(
            RejectCode.GROUP,
            "keeps memory for the most tokens of a rank, which was not stated",
            fix="pass max_tokens=",
        )
    return Verdict.yes()


def _kernels_run(device: DeviceInfo) -> Verdict:
    if triton_interprets() and device.platform != "cpu":
        return Verdict.no(
            RejectCode.TOOLCHAIN,
            f"{INTERPRETER} is set: Triton compiles no kernels",
            fix=f"unset {INTERPRETER}",
        )
    toolchain = device.toolchain("triton")
    if toolchain is None or not toolchain.usable:
        detail = (toolchain.detail if toolchain else "") or "there is none"
        return Verdict.no(
            RejectCode.TOOLCHAIN,
            f"needs a Triton that compiles for {device.platform}: {detail}",
            fix=(toolchain.fix if toolchain else "") or "pip install 'moe-routing[triton]'",
        )
    if importlib.util.find_spec("torch.distributed._symmetric_memory") is None:
        return Verdict.no(
            RejectCode.TOOLCHAIN,
            "needs a PyTorch with symmetric memory",
            fix="pip install -U torch",
        )
    return Verdict.yes()


def _reaches(device: DeviceInfo) -> Verdict:
    """Accept a device that reaches the others of this host, as far as this process sees them."""
    if device.index is None:
        return Verdict.yes()
    from moe_routing_backends.symmetric.memory import why_unreached

    reason = why_unreached(device.index)
    return Verdict.no(RejectCode.GROUP, reason) if reason else Verdict.yes()


def notes(problem: ExchangeProblem, _device: DeviceInfo) -> tuple[str, ...]:
    """Say what is kept."""
    each = " for each slot" if problem.reduce == "none" else ""
    rows = f"{problem.ranks * problem.max_tokens} rows that arrive{each}"
    if problem.capacity:
        of = "slots" if problem.reduce == "none" else "tokens"
        rows += f", or {problem.ranks * problem.capacity} {of} if those are fewer"
    return (f"no host synchronisation: keeps memory for {rows}",)


@hookimpl
def moe_routing_backends() -> list[BackendSpec]:
    """Register the backend."""
    return [
        BackendSpec(
            name="symmetric",
            factories={"exchange": "moe_routing_backends.symmetric.exchange:build"},
            targets=(Target("cuda"),),
            priority=70,
            supports=supports,
            notes=notes,
            gaps={"group": "writes into memory of GPUs of one host, whose size is known before"},
            summary="tokens between the GPUs of a host through symmetric memory",
        )
    ]
