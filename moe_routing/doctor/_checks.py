"""The checks, one function each: from a ``Case`` to its findings."""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING

from moe_routing.doctor._case import place
from moe_routing.doctor._check import Check
from moe_routing.doctor._environment import HIDING, variables
from moe_routing.doctor._machine import backend_autoloaders, gpus_without_torch, quietly
from moe_routing.probing import toolchains
from moe_routing_registry.containment import PluginFailure, contained
from moe_routing_registry.device import INTERPRETER, triton_interprets

if TYPE_CHECKING:
    from moe_routing.doctor._case import Case
    from moe_routing.doctor._check import Status
    from moe_routing_registry import ResolutionReport

PYTHON_RANGE = ((3, 10), (3, 13))
"""Oldest and newest Python that is tested."""
_VENDORS = {"cuda": {"NVIDIA"}, "hip": {"AMD"}, "xpu": {"Intel"}}
"""Whose GPUs a build of torch is for."""


def python(_case: Case) -> list[Check]:
    """Judge whether this Python is one that is tested."""
    here = ".".join(map(str, sys.version_info[:3]))
    oldest, newest = (".".join(map(str, end)) for end in PYTHON_RANGE)
    if sys.version_info[:2] <= PYTHON_RANGE[1]:
        return [Check(name="python", status="ok", summary=f"Python {here}")]
    return [
        Check(
            name="python",
            status="warning",
            summary=f"Python {here} is untested; {oldest} to {newest} are tested",
        )
    ]


def torch(case: Case) -> list[Check]:
    """Judge whether torch can be imported, is new enough, and was built for the GPUs here."""
    machine = case.machine
    failure = machine.torch_failure
    found = machine.toolchains[0]
    if failure is not None:
        fix = found.fix
        culprits = backend_autoloaders()
        if culprits and "TORCH_DEVICE_BACKEND_AUTOLOAD" in failure.traceback:
            # torch imports these, and they raised.
            fix = f"pip uninstall --yes {shlex.join(culprits)}"
        unreadable = [
            f.verdict.fix
            for f in case.failures
            if f.verdict.reason.startswith("reading its entry_points.txt")
        ]
        if unreadable and "entry_points" in failure.traceback:
            fix = unreadable[0]  # torch reads all of them at its import
        missing = failure.sentence.startswith("ModuleNotFoundError: No module named 'torch'")
        summary = (
            "torch is not installed" if missing else f"torch cannot be imported: {failure.sentence}"
        )
        return [
            Check(
                name="torch", status="problem", summary=summary, fix=fix, details=failure.traceback
            )
        ]
    details = "\n".join(machine.remarks)
    summary = f"torch {found.version}, {found.detail}"
    if not found.usable:
        return [
            Check(name="torch", status="problem", summary=summary, fix=found.fix, details=details)
        ]
    unseen = _unseen_gpus(case)
    if not unseen:
        return [Check(name="torch", status="ok", summary=summary, details=details)]
    shown = " and ".join(f"{vendor}'s driver is loaded ({evidence})" for vendor, evidence in unseen)
    why, fix = _why_unseen(case, {vendor for vendor, _ in unseen})
    return [
        Check(
            name="torch",
            status="warning",
            summary=f"{summary}; it sees no GPU, but {shown}{why}",
            fix=fix,
            details=details,
        )
    ]


def _unseen_gpus(case: Case) -> list[tuple[str, str]]:
    if case.device is not None or any(info.is_accelerator for info in case.machine.devices):
        return []
    return gpus_without_torch()


def _why_unseen(case: Case, vendors: set[str]) -> tuple[str, str]:
    """Say why torch sees none of the GPUs of these vendors, and how to fix it.

    Hidden, another build, or the driver.
    """
    hidden = [name for name in HIDING if name in os.environ]
    build = case.machine.build
    if build is None or not vendors & _VENDORS.get(build.kind, set()):
        return "", "uv pip install --reinstall torch --torch-backend=auto"
    if hidden:
        return f"; {' and '.join(hidden)} may hide it", f"unset {' '.join(hidden)}"
    return "".join(f": {remark}" for remark in case.machine.remarks[:1]), ""


def devices(case: Case) -> list[Check]:
    """Judge whether every device can be probed, and whether the one that was asked for is here."""
    if case.machine.build is None:
        return [
            Check(
                name="devices",
                status="problem" if case.device else "skipped",
                summary="unknown without torch",
            )
        ]
    found = [Check(name="devices", status="ok", summary=str(info)) for info in case.machine.devices]
    for name, failure in case.machine.device_failures.items():
        sentence = failure.sentence.removeprefix("AbsentDeviceError: ")
        summary = sentence if name in sentence else f"{name}: {sentence}"
        found.append(
            Check(name="devices", status="problem", summary=summary, details=failure.traceback)
        )
    return found


def triton(case: Case) -> list[Check]:
    """Judge whether triton carries what the accelerators here need."""
    found = _toolchain(case, "triton", platforms=("cuda", "rocm", "xpu"))
    if not triton_interprets():
        return found
    summary = (
        f"{INTERPRETER} is set: Triton interprets kernels on the CPU, "
        "for those who name one of its backends"
    )
    if not any(info.is_accelerator for info in case.machine.devices):
        return [*found, Check(name="triton", status="ok", summary=summary)]
    summary += ", and compiles none"
    return [
        *found,
        Check(name="triton", status="warning", summary=summary, fix=f"unset {INTERPRETER}"),
    ]


def rocm(case: Case) -> list[Check]:
    """Judge whether torch's ROCm is there for the AMD devices."""
    return _toolchain(case, "rocm", platforms=("rocm",))


def xpu(case: Case) -> list[Check]:
    """Judge whether torch's XPU is there for the Intel devices."""
    return _toolchain(case, "xpu", platforms=("xpu",))


def ipex(case: Case) -> list[Check]:
    """Judge whether an installed IPEX fits torch; a missing one is not missed."""
    found = case.machine.toolchains[-1]
    if found.version is None:
        return [Check(name="ipex", status="skipped", summary=found.detail)]
    return [
        Check(
            name="ipex",
            status="ok" if found.usable else "warning",
            summary=found.detail,
            fix=found.fix,
        )
    ]


def _toolchain(case: Case, name: str, *, platforms: tuple[str, ...]) -> list[Check]:
    """Judge a toolchain for each platform that is here and could use it.

    Two cards of a kind need one line.
    """
    here = {info.platform: info for info in case.machine.devices if info.platform in platforms}
    if not here:
        found = next(
            t
            for t in toolchains("cpu", case.machine.build, case.machine.installed)
            if t.name == name
        )
        broken = found.version is not None and not found.usable
        summary = f"{found.version or ''} {found.detail}".strip() + "; no device here needs it"
        return [
            Check(
                name=name, status="warning" if broken else "skipped", summary=summary, fix=found.fix
            )
        ]
    checks = []
    for platform, info in here.items():
        found = next(t for t in info.toolchains if t.name == name)
        status: Status = "ok" if found.usable else "warning"
        summary = f"{name} {found.version or ''}".strip() + f" for {platform}: {found.detail}"
        checks.append(Check(name=name, status=status, summary=summary, fix=found.fix))
    return checks


def plugins(case: Case) -> list[Check]:
    """Judge whether every plug-in loaded, and whether the names that they brought are unique."""
    found = []
    for failure in case.failures:
        summary = (
            f"plug-in {failure.name} of {failure.distribution}: "
            f"{failure.verdict.reason} [{_code(failure.verdict.code)}]"
        )
        found.append(
            Check(
                name="plugins",
                status="warning",
                summary=summary,
                fix=failure.verdict.fix,
                details=failure.traceback,
            )
        )
    for duplicate in case.duplicates:
        # Never advise to remove this package itself, or "(this process)".
        removable = [
            d.partition(" ")[0]
            for d in duplicate.distributions
            if not d.startswith(("moe-routing ", "("))
        ]
        fix = f"pip uninstall {shlex.quote(removable[-1])}" if removable else ""
        found.append(Check(name="plugins", status="problem", summary=str(duplicate), fix=fix))
    found += [
        Check(name="plugins", status="warning", summary=sentence) for sentence in case.patched
    ]
    names = ", ".join(case.backends) or "none"
    return found or [
        Check(name="plugins", status="ok", summary=f"every plug-in loaded; backends: {names}")
    ]


def environment(case: Case) -> list[Check]:
    """Judge whether the variables in force are spelt right, and their values possible."""
    known = {*case.backends, *(failure.name for failure in case.failures)}
    found = variables(known)
    wrong = [
        Check(
            name="environment",
            status="problem",
            summary=f"{v.name}={v.value}: {v.problem}",
            fix=f"unset {v.name}",
        )
        for v in found
        if v.problem
    ]
    said = ", ".join(f"{v.name}={v.value}" for v in found) or "no variable is set"
    return wrong or [Check(name="environment", status="ok", summary=said)]


def backend(case: Case) -> list[Check]:
    """Name the backend that would route on each device.

    Judge whether it is the best that the device could have.
    """
    if case.choosing_failure is not None:
        failure = case.choosing_failure
        summary = f"no backend can be chosen: {failure.sentence}"
        return [Check(name="backend", status="problem", summary=summary, details=failure.traceback)]
    if not case.reports:
        return [
            Check(
                name="backend", status="skipped", summary="none can run without torch and a device"
            )
        ]
    main = case.machine.main_device
    return [
        _choice(case, name, report, asked=name == (main and place(main)))
        for name, report in case.reports.items()
    ]


def _choice(case: Case, name: str, report: ResolutionReport, *, asked: bool) -> Check:
    if report.winner is None:
        refused = report.rejection(report.requested) if report.requested else None
        summary = f"{name}: {report.why}" + (
            f": {refused.verdict.reason} [{_code(refused.verdict.code)}]" if refused else ""
        )
        fix = refused.verdict.fix if refused else ""
        return Check(
            name="backend",
            status="problem" if asked else "warning",
            summary=summary,
            fix=fix,
            details=str(report),
        )
    missed = report.rejection(report.missed) if report.missed else None
    if missed is None:
        summary = "; ".join(
            (f"{name} routes {case.router} with {report.winner}: {report.why}", *report.notes)
        )
        return Check(name="backend", status="ok", summary=summary, details=str(report))
    summary = (
        f"{name} routes {case.router} with {report.winner}, not with {missed.name}, which "
        f"{missed.verdict.reason} [{_code(missed.verdict.code)}]"
    )
    status: Status = "problem" if _strict() else "warning"
    return Check(
        name="backend", status=status, summary=summary, fix=missed.verdict.fix, details=str(report)
    )


def _strict() -> bool:
    from moe_routing_registry.request import STRICT_VARIABLE, flag

    try:
        return flag(STRICT_VARIABLE)
    except ValueError:  # the check "environment" says so
        return False


def verify(case: Case) -> list[Check]:
    """Judge whether every backend that is available computes what the oracle computes."""
    if not case.verify:
        return [Check(name="verify", status="skipped", summary="not asked for (--verify)")]
    pairs = [(c.name, name) for name, report in case.reports.items() for c in report.eligible]
    return [_verified(name, device) for name, device in pairs] or [
        Check(name="verify", status="problem", summary="no backend is available")
    ]


def _verified(name: str, device: str) -> Check:
    with quietly() as said:
        from moe_routing.conformance.quick import verify as quick

        try:
            with contained("comparing it"):
                findings = quick(name, device)
        except PluginFailure as failure:
            summary = f"{name} on {device} could not be compared: {failure.sentence}"
            return Check(name="verify", status="problem", summary=summary, details=failure.trace)
    if not findings:
        return Check(
            name="verify",
            status="problem",
            summary=f"{name} on {device}: nothing could be compared in time",
        )
    wrong = [finding for finding in findings if not finding.ok]
    details = "\n".join(
        f"{'right' if f.ok else 'WRONG'}: clause {f.clause}, {f.name}: {f.sentence}"
        for f in findings
    )
    if wrong:
        summary = (
            f"{name} on {device}: {len(wrong)} of {len(findings)} checks failed; "
            f"first: {wrong[0].sentence}"
        )
        return Check(name="verify", status="problem", summary=summary, details=details)
    summary = f"{name} on {device} agrees with the oracle in {len(findings)} checks"
    ours = [remark for remark in said if remark.startswith("moe-routing")]
    return Check(
        name="verify",
        status="warning" if ours else "ok",
        summary="; ".join((summary, *ours)),
        details=details,
    )


def _code(code: object) -> str:
    return str(getattr(code, "value", code))
