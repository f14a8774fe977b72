"""``Case``: the machine, what was asked about it, and what the registry answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_routing.doctor._machine import Failure, look, quietly
from moe_routing.doctor._plugins import changed, leave_out_what_does_not_end, torch_state
from moe_routing_registry.containment import PluginFailure, contained

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_routing.doctor._machine import Machine
    from moe_routing_registry import BackendSpec, DeviceInfo, OperationSpec, ResolutionReport
    from moe_routing_registry.errors import DuplicateNameError
    from moe_routing_registry.report import Rejection

DEFAULT_ROUTER = "gemma4"
"""What backends are judged by where nobody names a router."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What the checks judge.

    :ivar machine: what is here.
    :ivar device: the device that was asked for, or ``None``.
    :ivar router: the router that backends are judged by.
    :ivar verify: whether available backends are to be compared with the oracle.
    :ivar backends: every backend's spec.
    :ivar distributions: who brought each.
    :ivar operations: every operation's spec.
    :ivar failures: plug-ins that failed.
    :ivar duplicates: names that two distributions claim.
    :ivar reports: the choice on each device for the router, by the device's name.
    :ivar others: the choice on each device for the example of each operation but ``route``, by
        operation and device.
    :ivar choosing_failure: why there are no reports, where that is not torch's fault.
    :ivar patched: what loading and asking the plug-ins changed of torch, a sentence each.
    """

    machine: Machine
    device: str | None
    router: str
    verify: bool
    backends: Mapping[str, BackendSpec]
    distributions: Mapping[str, str]
    operations: Mapping[str, OperationSpec]
    failures: tuple[Rejection, ...]
    duplicates: tuple[DuplicateNameError, ...]
    reports: Mapping[str, ResolutionReport]
    others: Mapping[str, Mapping[str, ResolutionReport]]
    choosing_failure: Failure | None
    patched: tuple[str, ...] = ()


def take(device: str | None, router: str | None, *, verify: bool) -> Case:
    """Look at the machine, load the plug-ins, and let the registry choose for every device."""
    from moe_routing._registry import registry

    machine = look(device)
    router = router or DEFAULT_ROUTER
    known = registry()
    leave_out_what_does_not_end(machine.devices)
    with quietly():  # a plug-in's failure is reported below, not as a warning
        torch_before = torch_state()
        backends = dict(
            sorted(known.backends.items(), key=lambda item: (-item[1].priority, item[0]))
        )
        reports: dict[str, ResolutionReport] = {}
        others: dict[str, dict[str, ResolutionReport]] = {}
        failure = None
        try:
            # `explain` never raises; importing it may, with a torch that is broken.
            with contained("choosing"):
                reports = {place(info): _choose(router, info) for info in machine.devices}
                others = {
                    name: _choose_for(name, machine) for name in known.operations if name != "route"
                }
        except PluginFailure as raised:
            failure = Failure.of(raised.error)
        patched = changed(torch_before, torch_state())
    return Case(
        machine=machine,
        device=device,
        router=router,
        verify=verify,
        backends=backends,
        distributions={name: known.distribution(name) for name in backends},
        operations=known.operations,
        failures=known.failures,
        duplicates=known.duplicates,
        reports=reports,
        others=others,
        choosing_failure=failure,
        patched=patched,
    )


def place(info: DeviceInfo) -> str:
    """Name a device as torch does: ``"cuda:0"``."""
    return info.type if info.index is None else f"{info.type}:{info.index}"


def _choose(router: str, info: DeviceInfo) -> ResolutionReport:
    import moe_routing

    num_experts, topk = model_size(router)
    return moe_routing.explain(router, device=place(info), num_experts=num_experts, topk=topk)


def _choose_for(operation: str, machine: Machine) -> dict[str, ResolutionReport]:
    """Let the registry choose for an operation's example.

    If that raises, the reports carry the error.
    """
    import moe_routing
    from moe_routing._registry import registry
    from moe_routing_registry import ResolutionReport

    try:
        with contained(f"the example of operation {operation!r}", PluginFailure):
            problem = registry().example(operation)
            return {
                place(info): moe_routing.explain(problem, device=place(info))
                for info in machine.devices
            }
    except PluginFailure as failure:
        return {
            place(info): ResolutionReport(device=info, error=failure.sentence)
            for info in machine.devices
        }


def model_size(router: str) -> tuple[int | None, int | None]:
    """Return E and K by the defaults of a model's configuration.

    ``None`` for a family, or where it has no default.

    >>> model_size("softmax_topk")
    (None, None)
    """
    from moe_routing.models import MODELS

    preset = MODELS.get(router)
    return (preset.num_experts, preset.topk) if preset else (None, None)
