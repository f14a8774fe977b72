"""The host side of ``plan``: which launches serve this number of pairs, and making them."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from triton import JITFunction

from moe_routing.formula.plan import without_least_weight
from moe_routing.planning import DispatchPlan
from moe_routing.planning.problem import MOST
from moe_routing.private_api import current_device, current_stream, empty, is_observed
from moe_routing_backends.triton import BATTLEMAGE, HOPPER
from moe_routing_backends.triton.kernels.spec import next_power_of_two
from moe_routing_backends.triton.planning.kernels import (
    moe_routing_plan,
    moe_routing_plan_count,
    moe_routing_plan_place,
    moe_routing_plan_place_counted,
    moe_routing_plan_scan,
    plan_spec,
)
from moe_routing_backends.triton.planning.launches import (
    BLOCKS_OF_GROUP,
    FILLED_AT_A_TIME,
    MOST_PLACES_OF_ROW,
    WIDEST_BY_ROUTER,
    counted_launch,
)
from moe_routing_backends.triton.runtime.launcher import NEVER_CURRENT, Compiled
from moe_routing_backends.triton.tuning.choose import plan_table_for, supports_pdl
from moe_routing_registry.device import INTERPRETER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from moe_routing.planning import PlanProblem
    from moe_routing_backends.triton.planning.kernels import PlanSpec
    from moe_routing_backends.triton.planning.launches import CountedLaunch, PlanLaunch, PlanStep
    from moe_routing_registry import DeviceInfo

SUB_GROUP = 32
"""Lanes of a sub-group on Intel's GPUs: for 16, Triton-XPU 3.3 cannot compile a histogram.

Nor can it compile a look-up of fewer elements than lanes.
"""
FEWEST_WARPS = 4
"""Sub-groups a program on Intel's GPUs: in two, counting spills registers."""
SCAN_WARPS = 4
MOST_SCANNED = 4096
"""Groups that a program of the scan takes at a time."""
MOST_SUMMED = 4096
"""Counts a warp that a program adds up at a time where there is no scan."""
MOST_GROUPS = 32
"""Groups of counted blocks that a program adds up at a time."""
_BYTES = 4
"""Of a count."""
_TENSORS = (
    "ids", "order", "inverse", "counts", "offsets", "block_experts", "num_dropped", "partial",
    "within",
)  # fmt: skip
"""The tensors of a call, in the order of ``_Turn.takes``: ids, the plan's, and scratch memory."""


def _taken(kernel: Any) -> tuple[int, ...]:  # noqa: ANN401 -- Triton's own object
    """Return which tensors a kernel takes: its first arguments."""
    return tuple(_TENSORS.index(name) for name in kernel.arg_names if name in _TENSORS)


_OF_PLAN, _OF_COUNT, _OF_SCAN, _OF_PLACE, _OF_COUNTED = map(
    _taken,
    (
        moe_routing_plan, moe_routing_plan_count, moe_routing_plan_scan, moe_routing_plan_place,
        moe_routing_plan_place_counted,
    ),
)  # fmt: skip


def in_whole_sub_groups(launch: PlanLaunch, problem: PlanProblem) -> PlanLaunch:
    """Return a launch of which every program places at least a sub-group of pairs at a time.

    Three launches take the place of two, whose sums over all groups spill registers there, and of
    one for masked rows, whose look-ups are wider than what they look up in.
    """
    size, step = max(launch.size, SUB_GROUP), max(launch.step, SUB_GROUP)
    one = launch.launches == 1 and problem.layout != "masked"
    warps = max(launch.num_warps, FEWEST_WARPS)
    return launch._replace(
        launches=1 if one else 3, size=size, step=min(size, step), num_warps=warps
    )


class _Turn(NamedTuple):
    """One launch of a plan.

    :ivar key: what its kernel is compiled for.
    :ivar takes: which of ``_TENSORS`` it takes, in order; after them come ``numbers``.
    """

    key: tuple[Any, ...]
    kernel: Any
    programs: int
    takes: tuple[int, ...]
    numbers: tuple[int, ...]
    constants: tuple[Any, ...]
    num_warps: int


class _Work(NamedTuple):
    """The launches of a plan, in order, and its scratch memory.

    :ivar rows: rows of counts.
    :ivar within: the first row of ``within``.
    """

    turns: tuple[_Turn, ...]
    rows: int
    within: int


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


class ByRouter(NamedTuple):
    """What a kernel that makes ids does for their plan: all of one row, or it counts the pairs.

    :ivar spec: of the plan, ``None`` where there is none.
    :ivar launch: of what places the pairs, where they are counted.
    :ivar counts: ``[groups + blocks, width]``, to be zeroed, then to count the pairs of each.
    :ivar plan: the parts of the plan of one row, ``None`` for those that it does not have.
    :ivar numbers: groups, places, blocks of places, and the capacity or 0.
    """

    spec: PlanSpec | None = None
    launch: CountedLaunch | None = None
    counts: Tensor | None = None
    plan: tuple[Tensor | None, ...] = (None,) * len(DispatchPlan._fields)
    numbers: tuple[int, int, int, int] = (0, 0, 0, 0)


NOTHING = ByRouter()


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
        self._launches = [
            in_whole_sub_groups(step.launch, problem) if device.platform == "xpu" else step.launch
            for step in steps
        ]
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
        if max(ids.stride()) > MOST:  # the kernels take strides of 32 bits
            ids = ids.contiguous()
        work = self._work(ids, out, capacity)
        # The call's own memory: two streams, or two graphs, plan at once.
        partial = torch.empty(work.rows, self._spec.width, dtype=torch.int32, device=ids.device)
        tensors = (ids, *out, partial, partial[work.within :])
        direct = current_device() == self._index and not is_observed()
        for turn in work.turns:
            self._turn(turn, tensors, direct=direct)

    def _turn(self, turn: _Turn, tensors: tuple[Tensor | None, ...], *, direct: bool) -> None:
        """Launch a kernel.

        :param tensors: of which it takes some.
        :param direct: not through Triton, if the kernel is compiled.
        """
        taken = [tensors[place] for place in turn.takes]
        launcher = self._ready.get(turn.key)
        if launcher is None or not direct:  # only Triton's own launch calls its hooks
            self._compiled.launch_and_keep(
                turn.key, turn.kernel, turn.programs, (*taken, *turn.numbers), turn.constants,
                turn.num_warps, SUB_GROUP, pdl=self._pdl,
            )  # fmt: skip
        else:
            at = [None if tensor is None else tensor.data_ptr() for tensor in taken]
            launcher(turn.programs, current_stream(self._index), (*at, *turn.numbers))

    def prepared(
        self, ids: Tensor, out: DispatchPlan, capacity: int | None
    ) -> Callable[[Tensor, DispatchPlan], None] | None:
        """Return what fills plans of ids like these in less host time, which have been planned.

        ``None`` where such calls are not launched directly.
        """
        if self._problem.drop == "least_weight" or max(ids.stride()) > MOST:
            return None
        work, index, width = self._work(ids, out, capacity), self._index, self._spec.width
        launchers = [self._ready.get(turn.key) for turn in work.turns]
        if None in launchers:
            return None
        bound = [
            (launcher, turn.programs, turn.takes, turn.numbers)
            for launcher, turn in zip(launchers, work.turns, strict=True)
            if launcher is not None
        ]
        size, strides = (work.rows, width), (width, 1)
        within = work.within * width * _BYTES

        def fill(ids: Tensor, out: DispatchPlan) -> None:
            if current_device() != index or is_observed():
                self(ids, out, capacity=capacity)
                return
            at = [ids.data_ptr(), *[None if part is None else part.data_ptr() for part in out]]
            stream = current_stream(index)
            if len(bound) == 1:
                launcher, programs, _, numbers = bound[0]
                launcher(programs, stream, (*at, *numbers))
                return
            # Held until all is launched: what is freed earlier, another thread's launches may get.
            partial = empty(size, strides, torch.int32)
            counts = partial.data_ptr()
            at += [counts, counts + within]
            for launcher, programs, takes, numbers in bound:
                launcher(programs, stream, (*[at[place] for place in takes], *numbers))

        return fill

    def by_router(self, tokens: int, out: DispatchPlan, capacity: int | None) -> ByRouter | None:
        """Say what the kernel that makes the ids should do for their plan, with memory for it.

        ``None`` where that would take longer than a plan of ids in memory.
        """
        pairs, width = tokens * self._problem.topk, self._spec.width
        blocks = 0 if out.block_experts is None else out.block_experts.shape[0]
        sizes = (out.order.numel(), blocks, capacity or 0)
        if tokens == 1:
            fits = width <= WIDEST_BY_ROUTER and sizes[0] <= MOST_PLACES_OF_ROW
            return ByRouter(self._spec, plan=out, numbers=(0, *sizes)) if fits else None
        launch = counted_launch(pairs, width)
        if launch is None:
            return None
        parts = -(-pairs // launch.size)
        groups = -(-parts // BLOCKS_OF_GROUP)
        counts = torch.empty(groups + parts, width, dtype=torch.int32, device=out.order.device)
        return ByRouter(self._spec, launch, counts, numbers=(groups, *sizes))

    def after_router(self, ids: Tensor, out: DispatchPlan, done: ByRouter) -> None:
        """Place pairs whose ids are contiguous, and have been counted."""
        pairs, launch, (groups, *sizes) = ids.numel(), done.launch, done.numbers
        assert launch is not None  # noqa: S101 -- for mypy: they have been counted
        rows = min(next_power_of_two(groups), MOST_GROUPS)
        constants = (
            self._spec, launch.size, BLOCKS_OF_GROUP, rows, FILLED_AT_A_TIME, self._pdl,
        )  # fmt: skip
        turn = _Turn(
            ("counted", launch, rows), moe_routing_plan_place_counted, -(-pairs // launch.size),
            _OF_COUNTED, (pairs, groups, *sizes), constants, launch.num_warps,
        )  # fmt: skip
        direct = current_device() == self._index and not is_observed()
        self._turn(turn, (ids, *out, done.counts, None), direct=direct)

    def _work(self, ids: Tensor, out: DispatchPlan, capacity: int | None) -> _Work:
        """Return the launches that plan such ids."""
        T, K = ids.shape
        pairs = T * K
        strides = ids.stride()
        flat = strides == (K, 1)
        number = bisect_left(self._limits, pairs)
        launch = self._launches[number]
        blocks = 0 if out.block_experts is None else out.block_experts.shape[0]
        sizes = (pairs, out.order.numel(), blocks)
        last = (capacity or 0, *strides)
        programs = -(-pairs // launch.size)
        warps, width, group = launch.num_warps, self._spec.width, launch.group
        if launch.launches == 1:
            several = programs > 1
            constants = (self._spec, flat, launch.size, launch.tile, several, self._pdl)
            key = (number, flat, several)
            turn = _Turn(
                key, moe_routing_plan, programs, _OF_PLAN, (*sizes, *last), constants, warps
            )
            return _Work((turn,), 0, 0)
        groups = -(-programs // group)
        rows = next_power_of_two(groups)
        scanned = launch.launches > 2  # noqa: PLR2004 -- count, scan, place
        turns = [
            _Turn(
                (number, flat, "count"), moe_routing_plan_count, groups, _OF_COUNT,
                (*sizes, *strides), (self._spec, flat, launch.size, group, self._pdl), warps,
            )
        ]  # fmt: skip
        if scanned:
            rows = min(rows, MOST_SCANNED)
            turns.append(
                _Turn(
                    ("scan", rows), moe_routing_plan_scan, width, _OF_SCAN, (groups,),
                    (self._spec, rows, self._pdl), SCAN_WARPS,
                )
            )  # fmt: skip
            rows = 1
        else:
            rows = min(rows, max(1, MOST_SUMMED * warps // width))
        turns.append(
            _Turn(
                (number, flat, rows), moe_routing_plan_place, programs, _OF_PLACE,
                (pairs, groups, *last),
                (self._spec, flat, launch.size, launch.step, group, rows, scanned, self._pdl),
                warps,
            )
        )  # fmt: skip
        in_groups = groups * group if group > 1 else 0
        return _Work(tuple(turns), groups + 1 + in_groups, groups + 1 if group > 1 else 0)

    def _advice(self, _key: tuple[Any, ...]) -> str:
        return "plan as many ids of the same kind once"
