"""The host side of ``gate``: one kernel for slices of H and one that adds and routes, or three."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton.language as tl
from triton import JITFunction

from moe_routing import RoutingOutput
from moe_routing.private_api import current_device, current_stream, empty, is_observed
from moe_routing_backends.triton.gating.kernels import moe_routing_gate_route, moe_routing_gate_sums
from moe_routing_backends.triton.gating.launches import launches_for, many_tokens, order_of
from moe_routing_backends.triton.kernels import VARIANTS, constants
from moe_routing_backends.triton.kernels.spec import Launch, next_power_of_two
from moe_routing_backends.triton.planning.launches import BLOCKS_OF_GROUP
from moe_routing_backends.triton.planning.planner import NOTHING, TritonPlanner
from moe_routing_backends.triton.runtime import router
from moe_routing_backends.triton.runtime.launcher import (
    ALIGNMENT,
    NEVER_CURRENT,
    Compiled,
    as_readable,
)
from moe_routing_backends.triton.tuning.choose import supports_pdl
from moe_routing_registry.device import INTERPRETER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from moe_routing.gating import GateProblem, Projection
    from moe_routing.planning import DispatchPlan, PlanKernel
    from moe_routing_backends.triton.gating.launches import GateLaunch, Order
    from moe_routing_backends.triton.planning.planner import ByRouter
    from moe_routing_backends.triton.runtime.router import TritonRouter
    from moe_routing_registry import DeviceInfo

ONE_WARP_UP_TO = 256
"""Experts up to which a warp adds and routes a row by itself."""
REGISTERS = 255
"""That a thread may take, the most that there are, unless a launch saves registers."""
DTYPES = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}


def build(problem: GateProblem, device: DeviceInfo) -> TritonGate:
    """Bind the problem to the device; nothing is compiled before the first call."""
    return TritonGate(problem, device, router.build(problem.routing, device))


class Shares(NamedTuple):
    """How programs share the columns of a row.

    :ivar takes: slices that a program takes.
    :ivar parts: programs, and partial sums, of a row.
    :ivar group: slices of a group.
    :ivar chunks: partial sums of squares of a row.
    """

    order: Order
    takes: int
    parts: int
    group: int
    chunks: int


class TritonGate:
    """A ``GateKernel`` that ``GatesAndRoutes`` and ``GatesAndPlans``."""

    def __init__(
        self,
        problem: GateProblem,
        device: DeviceInfo,
        routes: TritonRouter,
        launches: Sequence[GateLaunch] | None = None,
    ) -> None:
        """Compile nothing yet.

        :param routes: the kernel that routes logits of many tokens.
        :param launches: these instead of those for the device.
        """
        _check_interpreter(device)
        self._problem = problem
        self._index = NEVER_CURRENT if device.type == "cpu" else device.index or 0
        self._routes = routes
        self._arch = device.arch
        self._launches = launches_for(device, problem) if launches is None else launches
        self._limits = [launch.logits for launch in self._launches if launch.logits is not None]
        self._any_order = adds_in_any_order(problem, device)
        self._many = many_tokens(problem.num_experts)
        self._pdl = supports_pdl(device)
        self._cuda = device.platform == "cuda"
        where = "cpu" if device.type == "cpu" else f"{device.type}:{self._index}"
        self._shares_of: dict[tuple[Any, ...], Shares] = {}
        self._compiled = Compiled(problem, torch.device(where), self._advice)
        self._ready = self._compiled.launchers
        self._columns = problem.topk + problem.spec.shared_experts
        self._ids_dtype: torch.dtype = getattr(torch, problem.ids_dtype)
        self._logits_dtype: torch.dtype = getattr(torch, problem.logits_dtype)
        warps = 1 if problem.num_experts <= ONE_WARP_UP_TO else 4
        self._rows = Launch("cooperative", 1, 1, warps)
        self._constants = constants(problem.routing, self._rows)

    @property
    def notes(self) -> tuple[str, ...]:
        """Say whether launches take the slow way, which only a launch can tell."""
        why = self._compiled.indirect
        return (f"launches through Triton's own launcher: {why}",) if why else ()

    def __call__(self, projection: Projection, logits: Tensor) -> None:
        """Write the logits; see ``GateKernel``."""
        launch = self._launches[bisect_left(self._limits, logits.numel())]
        self._write(projection, launch, logits)

    def routed(  # noqa: PLR0913 -- see the protocol
        self,
        projection: Projection,
        logits: Tensor | None,
        *,
        per_expert_scale: Tensor | None = None,
        bias: Tensor | None = None,
        token_ids: Tensor | None = None,
        expert_table: Tensor | None = None,
        num_valid_tokens: int | Tensor | None = None,
        expert_map: Tensor | None = None,
        ids: Tensor | None = None,
        by_router: ByRouter = NOTHING,
    ) -> RoutingOutput:
        """Gate and route; see ``GatesAndRoutes``.

        :param by_router: what to do for a plan, where the kernel that adds partial sums routes.
        """
        hidden = projection.hidden
        # Not ``len``, which is a Python function of tensors and takes half a microsecond.
        T, E = hidden.shape[0], self._problem.num_experts
        launch = self._launches[bisect_left(self._limits, T * E)]
        if self._writes_logits(projection, launch):
            if logits is None:
                logits = self._empty((T, E), self._logits_dtype, hidden.device)
            self._write(projection, launch, logits)
            return self._routes(
                logits, per_expert_scale=per_expert_scale, bias=bias, token_ids=token_ids,
                expert_table=expert_table, num_valid_tokens=num_valid_tokens,
                expert_map=expert_map, ids=ids,
            )  # fmt: skip
        if ids is not None:
            expert_table = ids  # as ``route`` hands a record over
        shares = self._shares(projection, launch)
        in_slices, normed = shares.takes == 1, projection.eps is not None
        # Where partial sums are of slices, the kernel that routes adds the squares by itself.
        reads_row = in_slices and normed
        size = shares.parts * T * (E + shares.chunks * (normed and not in_slices))
        # The call's own memory: two streams, or two graphs, gate at once.
        partial = self._empty((size,), torch.float32, hidden.device)
        stride, aligned = self._add(projection, launch, shares, partial, by_router.counts)
        aligned = aligned and reads_row
        valid = num_valid_tokens if isinstance(num_valid_tokens, int) else T
        on_device = num_valid_tokens if isinstance(num_valid_tokens, torch.Tensor) else None
        out = RoutingOutput(
            self._empty((T, self._columns), torch.float32, hidden.device),
            self._empty((T, self._columns), self._ids_dtype, hidden.device),
        )
        multiplied = projection.multiplier != 1.0
        vectors = (projection.router_bias, per_expert_scale, bias)
        router_bias, scale, bias = map(as_readable, vectors)
        tensors = (
            hidden if reads_row else None, partial, router_bias, logits, *out, scale, bias,
            token_ids, expert_table, on_device, expert_map, by_router.counts, *by_router.plan,
        )  # fmt: skip
        vocabulary = 0 if expert_table is None else len(expert_table)
        self._launch(
            moe_routing_gate_route, T, tensors,
            (
                T, valid, vocabulary, stride, projection.eps or 0.0, projection.multiplier,
                *by_router.numbers,
            ),
            lambda: {
                **self._constants,
                "PLAN_SPEC": by_router.spec,
                "PLAN_SIZE": 0 if by_router.launch is None else by_router.launch.size,
                "PLAN_GROUP": BLOCKS_OF_GROUP,
                "HIDDEN_SIZE": self._problem.hidden_size,
                "SLICE": shares.order.slice,
                "STEP": shares.order.step if normed else 0,
                "PARTS": shares.parts,
                "GROUP": shares.group if in_slices else 1,
                "GROUPS_OF_ROW": next_power_of_two(-(-shares.parts // shares.group)),
                "CHUNKS": shares.chunks if normed else 1,
                "NORM": normed,
                "MULTIPLIED": multiplied,
                "ALIGNED": aligned,
                "DTYPE": DTYPES[self._problem.logits_dtype],
                "VALID_ON_DEVICE": on_device is not None,
                "PDL": self._pdl,
            },
            self._rows.num_warps,
            (
                in_slices, shares.order.step if normed else 0, multiplied, aligned, by_router.spec,
                by_router.launch,
            ),
        )  # fmt: skip
        return out

    def planned(
        self,
        projection: Projection,
        planner: PlanKernel,
        out: DispatchPlan,
        *,
        capacity: int | None = None,
        **operands: Any,  # noqa: ANN401 -- those of `routed`
    ) -> RoutingOutput | None:
        """Gate, route and plan; see ``GatesAndPlans``."""
        T, E = projection.hidden.shape[0], self._problem.num_experts
        launch = self._launches[bisect_left(self._limits, T * E)]
        if not isinstance(planner, TritonPlanner) or self._writes_logits(projection, launch):
            return None
        by_router = planner.by_router(T, out, capacity)
        if by_router is None:
            return None
        output = self.routed(projection, None, **operands, by_router=by_router)
        if by_router.launch is not None:
            planner.after_router(output.ids, out, by_router)
        return output

    def _writes_logits(self, projection: Projection, launch: GateLaunch) -> bool:
        """Tell whether logits are written to memory, and routed from there."""
        return launch.takes == "all" or self._multiplies(projection)

    def _write(self, projection: Projection, launch: GateLaunch, logits: Tensor) -> None:
        """Write the logits."""
        if self._multiplies(projection):
            weight = projection.router_weight.t()
            torch.mm(projection.hidden, weight, out_dtype=torch.float32, out=logits)
        else:
            launch = launch._replace(takes="all")
            self._add(projection, launch, self._shares(projection, launch), logits)

    def _multiplies(self, projection: Projection) -> bool:
        """Tell whether PyTorch's product makes the logits."""
        many = self._any_order and projection.hidden.shape[0] >= self._many
        return many and projection.multiplier == 1.0

    def _add(
        self,
        projection: Projection,
        launch: GateLaunch,
        shares: Shares,
        made: Tensor,
        pair_counts: Tensor | None = None,
    ) -> tuple[int, bool]:
        """Add the products.

        :param made: logits if a program takes all of a row, otherwise memory between the kernels.
        :param pair_counts: set to 0.
        :returns: the stride of hidden states, and whether all rows are aligned.
        """
        hidden, weight, router_bias, norm_weight, input_scale, eps, multiplier = projection
        T, E, size = hidden.shape[0], self._problem.num_experts, hidden.element_size()
        hidden_stride = hidden.stride(0)
        weight_stride = weight.stride(0)
        places = hidden.data_ptr() | weight.data_ptr()
        places |= hidden_stride * size | weight_stride * weight.element_size()
        for vector in (norm_weight, input_scale):
            places |= 0 if vector is None else vector.data_ptr()
        aligned = not places % ALIGNMENT
        order, takes, parts, group, _ = shares
        programs = -(-T // launch.block_t) * -(-E // launch.block_e)
        readable = [as_readable(vector) for vector in (router_bias, norm_weight, input_scale)]
        outputs = (None, made) if launch.takes == "all" else (made, None)
        self._launch(
            moe_routing_gate_sums, programs * parts,
            (hidden, weight, *readable, *outputs, pair_counts),
            (
                T, hidden_stride, weight_stride, eps or 0.0, multiplier,
                0 if pair_counts is None else pair_counts.numel(),
            ),
            lambda: {
                "E": E,
                "HIDDEN_SIZE": self._problem.hidden_size,
                "SLICE": order.slice,
                "GROUP": group,
                "STEP": order.step,
                "TAKES": takes,
                "NORM": eps is not None,
                "MULTIPLIED": multiplier != 1.0,
                "HIDDEN_PARTS": order.hidden_parts,
                "WEIGHT_PARTS": order.weight_parts,
                "SCALES_HIDDEN": order.scales_hidden,
                "PACKED": order.packed,
                "ALIGNED": aligned,
                "STAGES": launch.stages,
                "PDL": self._pdl,
                "BLOCK_E": launch.block_e,
                "BLOCK_T": launch.block_t,
            },
            launch.num_warps, (launch, aligned, multiplier != 1.0),
            saves_registers=launch.saves_registers,
        )  # fmt: skip
        return hidden_stride, aligned

    def _shares(self, projection: Projection, launch: GateLaunch) -> Shares:
        norm_weight, input_scale = projection.norm_weight, projection.input_scale
        key = (
            launch,
            None if norm_weight is None else norm_weight.dtype,
            None if input_scale is None else input_scale.dtype,
        )
        known = self._shares_of.get(key)
        if known is None:
            known = self._shares_of[key] = self._work_out(launch, [d for d in key[1:] if d])
        return known

    def _work_out(self, launch: GateLaunch, vectors: list[torch.dtype]) -> Shares:
        order, size = order_of(self._problem, vectors, self._arch), self._problem.hidden_size
        is_plain = not (order.hidden_parts or order.weight_parts or self._problem.norm)
        if launch.step is not None and is_plain:
            order = order._replace(step=launch.step)
        slices, group = order.slices_of(size), order.group_of(size)
        takes = {"slice": 1, "group": group, "all": slices}[launch.takes]
        dtype: torch.dtype = getattr(torch, self._problem.dtype)
        chunks = order.step * dtype.itemsize // ALIGNMENT
        return Shares(order, takes, -(-slices // takes), group, chunks)

    def _launch(  # noqa: PLR0913, PLR0917 -- what a launch is
        self,
        kernel: Any,  # noqa: ANN401 -- Triton's own object
        programs: int,
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[float, ...],
        constants_of: Callable[[], dict[str, Any]],
        num_warps: int,
        chosen: tuple[Any, ...],
        *,
        saves_registers: bool = False,
    ) -> None:
        """Launch a kernel, directly where it has been compiled.

        :param constants_of: returns the kernel's constants, where it has not been.
        :param chosen: what of the constants a call chooses.
        :param saves_registers: as in ``GateLaunch``.
        """
        key = (kernel.fn, *chosen, *[None if t is None else t.dtype for t in tensors])
        launcher = self._ready.get(key)
        if launcher is None or current_device() != self._index or is_observed():
            # Only Triton's own launch calls its hooks.
            fixed = constants_of()
            ordered = tuple(fixed[name] for name in kernel.arg_names if name in fixed)
            self._compiled.launch_and_keep(
                key, kernel, programs, (*tensors, *numbers), ordered, num_warps, pdl=self._pdl,
                registers=REGISTERS if self._cuda and not saves_registers else None,
            )  # fmt: skip
            return
        at = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        launcher(programs, current_stream(self._index), (*at, *numbers))

    def _empty(self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if current_device() != self._index:
            return torch.empty(size, dtype=dtype, device=device)
        made: Tensor = empty(size, (size[-1], 1)[-len(size) :], dtype)
        return made

    def _advice(self, _key: tuple[Any, ...]) -> str:
        return "gate as many tokens of the same kind once"


def adds_in_any_order(problem: GateProblem, device: DeviceInfo) -> bool:
    """Tell whether PyTorch's product of two matrices may make the logits of many tokens.

    Where it writes float32 logits of shorter matrices, which it does on CUDA, and the caller asks
    for no order.
    """
    plain = not (problem.norm or problem.input_scale or problem.router_bias)
    dtypes = problem.dtype != "float32" and not problem.float32_weight
    float32 = problem.logits_dtype == "float32"
    able = device.platform == "cuda" and hasattr(torch.ops.aten.mm, "dtype_out")
    return plain and dtypes and float32 and able and not problem.invariant


def _check_interpreter(device: DeviceInfo) -> None:
    kernel = VARIANTS["cooperative"].kernel
    if (device.type == "cpu") == isinstance(kernel, JITFunction):
        msg = (
            f"{INTERPRETER} was changed after Triton's kernels were imported: "
            "set or unset it before Python starts"
        )
        raise RuntimeError(msg)
