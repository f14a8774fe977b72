"""Which launch table applies to a problem on a device, and how its numbers came about.

``tables/<arch>.json`` is shipped, measured where its provenance says: the table of ``route``, and
in its section ``plans`` that of ``plan``. What ``moe-routing tune``
measured stands in the user's own table (``store.py``). An arch without a table gets one that is
derived from that of sm_90.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moe_routing_backends.triton.kernels import VARIANTS
from moe_routing_backends.triton.kernels.spec import APPROXIMATED, WARP, Launch
from moe_routing_backends.triton.planning.table import PlanTable
from moe_routing_backends.triton.tuning.store import own_table
from moe_routing_backends.triton.tuning.table import Step, Table, parse, usable

if TYPE_CHECKING:
    from moe_routing.planning import PlanProblem
    from moe_routing_registry import DeviceInfo, RoutingProblem

PDL_FROM = (9, 0)
"""Least compute capability that can start a kernel while the previous kernel still runs."""
SHIPPED = Path(__file__).parents[1] / "tables"
DERIVED = "the derived table"
T = TypeVar("T", Table, PlanTable)


def table_for(device: DeviceInfo, problem: RoutingProblem) -> Table:
    """Return the table whose rule is nearest to the problem.

    The user's own where it is as near as the other.
    """
    return _nearest(own_table(device), shipped(device), problem)


def plan_table_for(device: DeviceInfo, problem: PlanProblem) -> PlanTable:
    """Return the table of ``plan`` whose rule is nearest to the problem, likewise."""
    own = own_table(device)
    return _nearest(None if own is None else own.plans, shipped_plans(device), problem)


def _nearest(own: T | None, other: T, problem: Any) -> T:  # noqa: ANN401 -- of the table's operation
    tables = (other,) if own is None else (own, other)
    near = [
        (found[0], index)
        for index, table in enumerate(tables)
        if (found := table.nearest(problem)) is not None
    ]
    return tables[min(near)[1]] if near else other


def describe_table(device: DeviceInfo, problem: RoutingProblem) -> str:
    """Say which table applies, and how its numbers came about; recorded ids have a rule."""
    if "ids" in problem.operands:
        return (
            "launch parameters from a rule for recorded ids, the same on every device, unmeasured"
        )
    return _described(table_for(device, problem))


def describe_plan_table(device: DeviceInfo, problem: PlanProblem) -> str:
    """Say which table of ``plan`` applies, and how its numbers came about."""
    return _described(plan_table_for(device, problem))


def _described(table: Table | PlanTable) -> str:
    return f"launch parameters from {table.source} ({table.provenance})"


@cache
def shipped(device: DeviceInfo) -> Table:
    """Return the table that comes with this package for the device's arch or platform.

    Without one, return the table that is derived from sm_90's.
    """
    for name in (device.arch, device.platform):
        table = usable(SHIPPED / f"{name}.json")
        if table is not None:
            return table
    return derived(device)


def derived(device: DeviceInfo) -> Table:
    """Derive a table from that of sm_90.

    Rows enough for the device's warps, and only variants that it has.
    """
    measured = _of_sm_90()
    filters = VARIANTS["filter"].runs_on(device)
    rules = {
        key: tuple(Step(s.tokens, _fitted(s.launch, device)) for s in steps)
        for key, steps in measured.rules.items()
        if key[0] != APPROXIMATED or filters
    }
    return Table(DERIVED, _derived_from(measured, device), rules)


@cache
def shipped_plans(device: DeviceInfo) -> PlanTable:
    """Return the table of ``plan`` that comes with this package for the device.

    Without one, return that of sm_90: what it says of warps holds on every device.
    """
    plans = shipped(device).plans
    if plans is not None:
        return plans
    measured = _of_sm_90().plans
    assert measured is not None  # noqa: S101 -- for mypy: the file that ships has one
    return PlanTable(DERIVED, _derived_from(measured, device), measured.rules)


def _of_sm_90() -> Table:
    return parse((SHIPPED / "sm_90.json").read_text(encoding="utf-8"), "tables/sm_90.json")


def _derived_from(measured: Table | PlanTable, device: DeviceInfo) -> str:
    return (
        f"from the table of sm_90 ({measured.provenance}), unmeasured on "
        f"{device.arch or 'this device'}"
    )


def supports_pdl(device: DeviceInfo) -> bool:
    """Tell whether the device can start a kernel while the previous kernel still runs.

    ``device/pdl.py`` says how.
    """
    return (
        device.platform == "cuda"
        and device.capability is not None
        and device.capability >= PDL_FROM
    )


def _fitted(launch: Launch, device: DeviceInfo) -> Launch:
    """Fit a launch to another device.

    ``block_t * threads_per_row`` threads are ``num_warps`` warps, of 32 on the one measured.
    """
    if launch.variant == "cooperative":
        return launch
    wide = max(device.warp_sizes, default=WARP) // WARP
    variant = launch.variant if VARIANTS[launch.variant].runs_on(device) else "thread_per_row"
    return Launch(variant, launch.block_t * wide, launch.threads_per_row, launch.num_warps)
