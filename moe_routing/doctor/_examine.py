"""``examine``: the whole examination as plain JSON values; showing it is ``render``'s business."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

from moe_routing.doctor import _checks
from moe_routing.doctor._case import take
from moe_routing.doctor._check import Check
from moe_routing.doctor._environment import variables
from moe_routing.doctor._ranks import ranks
from moe_routing.doctor._vllm import vllm
from moe_routing_registry.containment import PluginFailure, contained

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from moe_routing.doctor._case import Case
    from moe_routing_registry import BackendSpec, OperationSpec, ResolutionReport

SCHEMA_VERSION = 1
"""Grows whenever a key of the report is renamed, removed or changes its meaning.

New keys may come at any time.
"""

CHECKS: dict[str, Callable[[Case], list[Check]]] = {
    check.__name__: check
    for check in (
        _checks.python,
        _checks.torch,
        _checks.devices,
        _checks.triton,
        _checks.rocm,
        _checks.xpu,
        _checks.ipex,
        _checks.plugins,
        _checks.environment,
        _checks.backend,
        vllm,
        _checks.verify,
        ranks,
    )
}
"""Every check by name, in the order in which they are shown."""


def examine(
    *,
    device: str | None = None,
    router: str | None = None,
    verify: bool = False,
    checks: Collection[str] | None = None,
) -> dict[str, Any]:
    """Examine the machine; nothing on it that is missing, broken or raises stops this.

    :param device: look at this device only, and count it as a problem if it is not here.
    :param router: judge backends by this model or family name, with its usual E and K; ``"gemma4"``
        where ``None``.
    :param verify: compare every available backend with the oracle.
    :param checks: names of the checks to run; all of them where ``None``.
    :returns: plain JSON values: ``schema_version``, ``ok`` (no check found a problem),
        ``versions``, ``router``, ``devices``, ``toolchains``, ``backends``, ``operations``,
        ``plugin_failures``, ``environment``, ``reports``, ``ranks`` (none; who examines
        several adds them), ``checks``.

    :raises UnknownDeviceError: ``device`` is nothing that torch knows; a ``ValueError``.

    >>> report = examine(device="cpu", checks=["backend"])
    >>> report["ok"], [check["name"] for check in report["checks"]]
    (True, ['backend'])
    """
    case = take(device, router, verify=verify)
    found = [
        result for name in CHECKS if checks is None or name in checks for result in _run(name, case)
    ]
    known = {*case.backends, *(failure.name for failure in case.failures)}
    return {
        "schema_version": SCHEMA_VERSION,
        "ok": all(check.status != "problem" for check in found),
        "versions": {
            "moe-routing": _own_version(),
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "router": case.router,
        "devices": [_plain(info.to_dict()) for info in case.machine.devices],
        "toolchains": [_plain(_fields(t)) for t in case.machine.toolchains],
        "backends": [_backend(case, backend) for backend in case.backends.values()],
        "operations": [_operation(case, spec) for spec in case.operations.values()],
        "plugin_failures": [failure.to_dict() for failure in case.failures],
        "environment": [variable._asdict() for variable in variables(known)],
        "reports": {name: _plain(report.to_dict()) for name, report in case.reports.items()},
        "ranks": [],
        "checks": [check.to_dict() for check in found],
    }


def _run(name: str, case: Case) -> list[Check]:
    """Run a check; one that raises is a finding, not the end of the examination."""
    try:
        with contained("this check itself"):
            return CHECKS[name](case)
    except PluginFailure as failure:
        return [Check(name=name, status="problem", summary=failure.sentence, details=failure.trace)]


def _backend(case: Case, backend: BackendSpec) -> dict[str, Any]:
    return {
        "name": backend.name,
        "summary": backend.summary,
        "distribution": case.distributions[backend.name],
        "priority": backend.priority,
        "operations": list(backend.factories),
        "targets": [str(target) for target in backend.targets],
        "requirements": list(backend.requirements),
        "devices": {name: _state(backend.name, report) for name, report in case.reports.items()},
    }


def _operation(case: Case, spec: OperationSpec) -> dict[str, Any]:
    reports = case.reports if spec.name == "route" else case.others.get(spec.name, {})
    return {
        "name": spec.name,
        "summary": spec.summary,
        "backends": [
            backend.name for backend in case.backends.values() if spec.name in backend.factories
        ],
        "devices": {
            name: {"problem": str(report.problem or ""), "winner": report.winner, "why": report.why}
            for name, report in reports.items()
        },
    }


def _state(name: str, report: ResolutionReport) -> dict[str, Any]:
    """Say how a backend fared on a device: selected, available, or rejected with the reason."""
    state: dict[str, Any] = {"state": "unknown", "code": None, "reason": report.error, "fix": ""}
    if name == report.winner:
        return state | {"state": "selected", "reason": report.why}
    if any(candidate.name == name for candidate in report.eligible):
        return state | {"state": "available", "reason": ""}
    rejection = report.rejection(name)
    if rejection is None:
        return state
    verdict = rejection.verdict
    code = verdict.code.value if verdict.code else None
    return {"state": "rejected", "code": code, "reason": verdict.reason, "fix": verdict.fix}


def _own_version() -> str:
    from moe_routing import __version__

    return __version__


def _fields(value: Any) -> dict[str, Any]:  # noqa: ANN401 -- any dataclass
    import dataclasses

    return dataclasses.asdict(value)


def _plain(value: Any) -> Any:  # noqa: ANN401 -- JSON has no type
    """Turn tuples into lists, so that the report equals what its JSON reads back as."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
