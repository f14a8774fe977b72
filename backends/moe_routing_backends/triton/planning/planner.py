"""The host side of ``plan``: which launches serve this number of pairs, and making them."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triton import JITFunction

from moe_routing.formula.plan import without_least_weight
from moe_routing.planning.problem import MOST
from moe_routing.private_api import current_device, current_stream, empty, is_observed
from moe_routing_backends.triton import BATTLEMAGE, HOPPER
from moe_routing_backends.triton.kernels.spec import next_power_of_two
from moe_routing_backends.triton.planning.kernels import (
    moe_routing_plan,
    moe_routing_plan_count,
    moe_routing_plan_place,
    moe_routing_plan_scan,
    plan_spec,
)
from moe_routing_backends.triton.runtime.launcher import NEVER_CURRENT, Compiled
from moe_routing_backends.triton.tuning.choose import plan_table_for, supports_pdl
from moe_routing_registry.device import INTERPRETER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_routing.planning import DispatchPlan, PlanProblem
    from moe_routing_backends.triton.planning.launches import PlanStep
    from moe_routing_registry import DeviceInfo

SCAN_WARPS = 4
MOST_SCANNED = 4096
"""Groups that a program of the scan takes at a time."""
MOST_SUMMED = 4096
"""Counts a warp that a program adds up at a time where there is no scan."""


def build(problem: PlanProblem, device: DeviceInfo) -> TritonPlanner:
    """Bind the problem to the device; nothing is compiled before the first call or ``warmup``."""
    return _built(problem, device, HOPPER)


def build_for_xpu(problem: PlanProblem, device: DeviceInfo) -> TritonPlanner:
    """Bind the problem to an Intel GPU, likewise."""
    return _built(problem, device, BATTLEMAGE)


def _built(problem: PlanProblem, device: DeviceInfo, interpreted_as: DeviceInfo) -> TritonPlanner:
    on_cpu = device.type == "cpu"
    if on_cpu == isinstance(moe_routing_plan, JITFunction):
        msg = (
            f"{INTERPRETER} was changed after Triton's kernels were imported: "
            "set or unset it before Python starts"
        )
        raise RuntimeError(msg)
    table = plan_table_for(interpreted_as if on_cpu else device, problem)
    return TritonPlanner(problem, device, table.steps(problem))


class TritonPlanner:
    """A ``PlanKernel`` of one to three Triton kernels."""

    def __init__(
        self, problem: PlanProblem, device: DeviceInfo, steps: Sequence[PlanStep] | None = None
    ) -> None:
        """Look up the launches for the problem, or take the given.

        :param steps: launches by rising number of pairs; the last has no end.
        """
        self._problem = problem
        self._index = NEVER_CURRENT if device.type == "cpu" else device.index or 0
        self._device = torch.device(
            "cpu" if device.type == "cpu" else f"{device.type}:{self._index}"
        )
        self._spec = plan_spec(problem)
        steps = plan_table_for(device, problem).steps(problem) if steps is None else steps
        self._limits = [step.pairs for step in steps if step.pairs is not None]
        self._launches = [step.launch for step in steps]
        self._pdl = supports_pdl(device)
        self._compiled = Compiled(problem, self._device, self._advice)
        self._ready = self._compiled.launchers

    @property
    def notes(self) -> tuple[str, ...]:
        """Say whether launches take the slow way, which only a launch can tell."""
        why = self._compiled.indirect
        return (f"launches through Triton's own launcher: {why}",) if why else ()

    def __call__(
        self,
        ids: Tensor,
        out: DispatchPlan,
        *,
        capacity: int | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Fill ``out``; see ``PlanKernel``."""
        if self._problem.drop == "least_weight":
            assert capacity is not None and weights is not None and out.num_dropped is not None  # noqa: S101, PT018 -- for mypy: the problem says so
            ids, num_dropped = without_least_weight(self._problem, ids, capacity, weights)
            out.num_dropped.copy_(num_dropped)
        T, K = ids.shape
        pairs = T * K
        row_stride, slot_stride = ids.stride()
        flat = slot_stride == 1 and row_stride == K
        if not flat and max(row_stride, slot_stride) > MOST:  # the kernels take strides of 32 bits
            ids, row_stride, slot_stride, flat = ids.contiguous(), K, 1, True
        number = bisect_left(self._limits, pairs)
        launch = self._launches[number]
        here = current_device() == self._index
        blocks = 0 if out.block_experts is None else out.block_experts.shape[0]
        sizes = (pairs, out.order.numel(), blocks, capacity or 0, row_stride, slot_stride)
        programs = (pairs + launch.size - 1) // launch.size
        if launch.launches == 1:
            several = programs > 1
            self._launch(
                here, (number, flat, several), moe_routing_plan, programs, (ids, *out, *sizes),
                (self._spec, flat, launch.size, launch.tile, several, self._pdl), launch.num_warps,
            )  # fmt: skip
            return
        width, group = self._spec.width, launch.group
        groups = (programs + group - 1) // group
        scratch = groups + 1 + (groups * group if group > 1 else 0)
        # The call's own memory: two streams, or two graphs, plan at once.
        if here:
            partial = empty((scratch, width), (width, 1), torch.int32)
        else:
            partial = torch.empty((scratch, width), dtype=torch.int32, device=ids.device)
        within = partial[groups + 1 :] if group > 1 else partial
        self._launch(
            here, (number, flat, "count"), moe_routing_plan_count, groups,
            (ids, partial, within, pairs, row_stride, slot_stride),
            (self._spec, flat, launch.size, group, self._pdl), launch.num_warps,
        )  # fmt: skip
        rows = next_power_of_two(groups)
        scanned = launch.launches > 2  # noqa: PLR2004 -- count, scan, place
        if scanned:
            rows = min(rows, MOST_SCANNED)
            self._launch(
                here, ("scan", rows), moe_routing_plan_scan, width, (partial, groups),
                (self._spec, rows, self._pdl), SCAN_WARPS,
            )  # fmt: skip
            rows = 1
        else:
            rows = min(rows, max(1, MOST_SUMMED * launch.num_warps // width))
        self._launch(
            here, (number, flat, rows), moe_routing_plan_place, programs,
            (ids, partial, within, *out, *sizes[:3], groups, *sizes[3:]),
            (
                self._spec, flat, launch.size, launch.step, group, launch.tile, rows, scanned,
                self._pdl,
            ), launch.num_warps,
        )  # fmt: skip

    def _launch(  # noqa: PLR0913, PLR0917 -- what a launch is
        self,
        here: bool,  # noqa: FBT001 -- likewise
        key: tuple[Any, ...],
        kernel: Any,  # noqa: ANN401 -- Triton's own object
        programs: int,
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        num_warps: int,
    ) -> None:
        ready = self._ready.get(key)
        if ready is None or not here or is_observed():  # only Triton's own launch calls its hooks
            self._compiled.launch_and_keep(
                key, kernel, programs, arguments, constants, num_warps, pdl=self._pdl
            )
            return
        pointers = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        ready(programs, current_stream(self._index), tuple(pointers))

    def _advice(self, _key: tuple[Any, ...]) -> str:
        return "plan as many ids of the same kind once"
