"""The transport: what is kept for other ranks, and the launches.

Every rank keeps memory for what arrives from each other, for the most there can be. So a place is
known without a word from anybody: rows of a pair, or of a token, always go to the same one. With a
capacity there are fewer places. Then the sender plans which rows get one, and those that get none
are told of by a flag that travels with the signals.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
import triton
from torch import distributed

import moe_routing
from moe_routing import DispatchPlan
from moe_routing.distributed.collectives import alive
from moe_routing.distributed.kernel import CapacityError, Received
from moe_routing.private_api import timeout_of
from moe_routing_backends.symmetric import kernels
from moe_routing_backends.symmetric.kernels import (
    moe_routing_send,
    moe_routing_send_back,
    moe_routing_sum_back,
)
from moe_routing_backends.symmetric.layout import WEIGHT, Layout, Rows, State
from moe_routing_backends.symmetric.memory import of_gpus
from moe_routing_backends.symmetric.units import ALIGNMENT, Units

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from moe_routing.distributed import ExchangeProblem
    from moe_routing.distributed.kernel import Exchange, ExchangeKernel, Tokens
    from moe_routing_backends.symmetric.memory import Allocate, Memory
    from moe_routing_registry import DeviceInfo

SIGNAL = 8
"""Bytes of a signal."""
CHUNK = 512
"""Pairs whose experts a program tells at once."""
MOVED = 264, 8
"""Programs of a launch that moves rows, at most, and warps of each. All programs run at once, and
so do those of another stream."""
SUMMED = 528, 4
"""Likewise, where rows are summed."""
KEPT = 8192
"""Numbers that a launch of rows copies besides; more are faster copied by a launch of their own."""
INTERPRETED_PROGRAMS = 3
PIECES = 2 * MOVED[0]
"""Pieces of work of a launch, if slots can be split into so many. A piece has up to as many rows as
slots, so with fewer pieces some programs would have far more rows than others."""
GROUP = 8
"""The most places of a piece on the way back."""
ARGUMENTS = {"rows": "hidden", "weights": "weights", "scales": "scales", "back": "rows"}
"""Of what is kept, the arguments that it is for."""
STATE, SAID = 3, 2
"""Numbers of the device, and of those that it says to the host; ``kernels`` names them."""
LATE, FULL = kernels.LATE.value, kernels.FULL.value
PDL_FROM = (9, 0)
"""The compute capability from which a kernel may be placed while the one before still runs."""


class Symmetric:
    """The transport of one group."""

    def __init__(
        self,
        problem: ExchangeProblem,
        device: torch.device,
        group: ProcessGroup,
        allocate: Allocate,
    ) -> None:
        """Keep memory for signals: that shows whether other ranks are reached."""
        self._group, self._allocate, self.device = ref(group), allocate, device
        self.ranks, self._rank = problem.ranks, distributed.get_rank(group)
        self.sums, self.most = problem.reduce == "rank", problem.max_tokens
        self.capacity = problem.capacity
        self._per_rank = problem.experts_per_rank
        self._limit = int(timeout_of(group, device).total_seconds() * 1e9)
        self._interpreted = device.type == "cpu"
        self._pdl = not self._interpreted and torch.cuda.get_device_capability(device) >= PDL_FROM
        self._signals = self.allocated("group", 3 * SIGNAL * self.ranks)
        self._state = torch.zeros(STATE, dtype=torch.int64, device=device)
        self._said = torch.zeros(SAID, dtype=torch.int64, pin_memory=not self._interpreted)
        self._layouts: dict[int, Layout] = {}
        self._outgrown: list[Rows] = []

    def check(self) -> None:
        """Wait for the device, and raise what went wrong there."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:  # a kernel that was stopped fails there, and said why
            self._must_be_on_time()
        self._must_have_had_places()

    def dispatch(self, tokens: Tokens) -> Received:
        """Send each token once to each of its experts, or once to each rank that has any."""
        self._must_be_on_time()
        self._must_have_had_places()  # not on the way back, for which the other ranks wait
        hidden, weights, scales = tokens.hidden, tokens.weights, tokens.scales
        state = self._new_state(tokens.ids, None if self.sums else weights)
        moved = [
            part for part in (hidden, weights if self.sums else None, scales) if part is not None
        ]
        if torch.is_grad_enabled() and any(part.requires_grad for part in moved):
            # Ids first: then the rows of places move as any rows do, with gradients of every order.
            ids, its = self._told(tokens, state, hidden[:, :0])
            ids = ids.clone()
            way = self, state, ids
            rows = _there(_of_places(hidden, state), way, "rows")
            if self.sums:
                its = _there(_of_places(weights, state), way, "weights")
            if scales is not None:
                scales = _there(_of_places(scales, state), way, "scales")
            return Received(rows, ids, its, scales, state)
        ids, its = self._told(tokens, state, hidden)
        rows = self._arrived("rows", state.layout, hidden)
        if scales is not None:
            scales = self.there(_of_places(scales, state), state, "scales")
        return Received(rows, ids, its, scales, state, lent=True)

    def combine(self, rows: Tensor, received: Received) -> Tensor:
        """Send the results back, and sum them for each token, in the order of its slots."""
        return self._summed(rows, received, None)

    def combine_planned(self, rows: Tensor, plan: DispatchPlan, received: Received) -> Tensor:
        """Do the same with rows in the order of a plan of what arrived, not yet weighed."""
        return self._summed(rows, received, plan)

    def _summed(self, rows: Tensor, received: Received, plan: DispatchPlan | None) -> Tensor:
        self._must_be_on_time()
        state = self._own(received)
        recorded = torch.is_grad_enabled()
        if plan is not None and received.weights is not None:
            if recorded and (rows.requires_grad or received.weights.requires_grad):
                rows, plan = moe_routing.combine(rows, plan, received.weights), None
            else:
                return self._of_slots(self._sum_back(rows, plan, received.weights, state), state)
        if recorded and rows.requires_grad:
            ids = received.ids.clone() if received.lent else received.ids  # autograd keeps them
            return self._of_slots(_back(rows, (self, state, ids), plan), state)
        back = self.back(rows, state, received.ids, plan)
        if recorded and state.weights is not None and state.weights.requires_grad:
            back = back.clone()  # autograd keeps it
        return self._of_slots(back, state)

    def _own(self, received: Received) -> State:
        """Return what this transport knows of what it received.

        :raises ValueError: another one did: its places are no places here.
        """
        state = received.state
        if not isinstance(state, State) or state.layout not in self._layouts.values():
            msg = "received: expected what this ExpertParallel dispatched, got what another did"
            raise ValueError(msg)
        return state

    def __deepcopy__(self, memo: object) -> Symmetric:
        """Return itself: memory that other ranks write into cannot be copied by one.

        Copies of a layer may exchange through it, as its calls follow each other.
        """
        return self

    @staticmethod
    def _of_slots(back: Tensor, state: State) -> Tensor:
        """Sum what came back for each slot, or from each rank."""
        rows = back.unflatten(0, state.plan.order.shape)
        sums = moe_routing.combine(rows, state.plan, state.weights)
        return sums.masked_fill(state.lost, torch.nan) if state.layout.placed else sums

    def _must_be_on_time(self) -> None:
        if rank := int(self._said[LATE]):
            seconds = self._limit / 1e9
            expected = f"group: expected every rank to exchange within {seconds:g} s"
            msg = f"{expected}, rank {rank - 1} did not"
            raise TimeoutError(msg)

    def _must_have_had_places(self) -> None:
        if rank := int(self._said[FULL]):
            what = "tokens" if self.sums else "slots"
            expected = f"capacity: expected {self.capacity} {what} or fewer from a rank to another"
            msg = f"{expected}, got more from rank {rank - 1}: those tokens are NaN"
            raise CapacityError(msg)

    def _new_state(self, ids: Tensor, weights: Tensor | None) -> State:
        tokens, topk = ids.shape
        layout = self._layouts.get(topk)
        if layout is None:
            # What is made once serves calls in every mode: autograd keeps no inference tensors.
            with torch.inference_mode(mode=False):
                layout = self._layouts[topk] = Layout(topk, self)
        if layout.placed:
            to = self._ranks_of(ids)
            plan = moe_routing.plan(to, self.ranks, capacity=layout.places, masked=True)
            return State(layout, plan, to, weights)
        slots = self.ranks if self.sums else topk
        inverse, ranks = torch.empty(2, tokens, slots, dtype=torch.int32, device=self.device)
        order, counts, offsets, blocks, dropped = layout.order
        plan = DispatchPlan(order, inverse, counts, offsets, blocks, dropped)
        return State(layout, plan, ranks, weights)

    def _ranks_of(self, ids: Tensor) -> Tensor:
        """Return the rank of each slot, or with sums each rank that has one; else -1."""
        known = (ids >= 0) & (ids < self.ranks * self._per_rank)
        to = torch.where(known, ids // self._per_rank, -1).to(torch.int32)
        if not self.sums:
            return to
        ranks = torch.arange(self.ranks, dtype=torch.int32, device=self.device)
        return torch.where((to[:, :, None] == ranks).any(dim=1), ranks, -1)

    def allocated(self, argument: str, size: int) -> Memory:
        """Return memory that every rank makes at once.

        :param argument: what it is for.
        :raises RuntimeError: a CUDA graph is being captured.
        """
        with self._on_device(), torch.inference_mode(mode=False):
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                msg = (
                    f"{argument}: expected memory for it when a CUDA graph is captured, got none: "
                    "make the same calls once before, and go back through them if the graph does"
                )
                raise RuntimeError(msg)
            return self._allocate(size, self.device, alive(self._group))

    def _on_device(self) -> AbstractContextManager[object]:
        """Make the device current: allocations and launches are there."""
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.cuda.device(self.device)

    def _rows(self, name: str, layout: Layout, rows: Tensor) -> Rows:
        """Return memory for such rows."""
        size = rows.shape[1] * rows.element_size()
        if not size:
            return Rows(layout.told, ALIGNMENT)  # nothing is written
        found = layout.rows.get(name)
        if found is not None and size <= found.pitch:
            return found
        pitch = -(-size // ALIGNMENT) * ALIGNMENT
        made = Rows(self.allocated(ARGUMENTS[name], self._places(name, layout) * pitch), pitch)
        if found is not None:  # a graph may still write there
            self._outgrown.append(found)
        layout.rows[name] = made
        return made

    def _places(self, name: str, layout: Layout) -> int:
        """Return how many rows are kept: of the pairs of this rank alone if each comes back."""
        pairs = name == "back" and not self.sums and not layout.placed
        return layout.places if pairs else layout.arriving

    def _arrived(self, name: str, layout: Layout, like: Tensor) -> Tensor:
        """Return what arrived where other ranks write: ``[places, columns of like]``."""
        width = like.shape[1] * like.element_size()
        if not width:
            return like.new_empty(self._places(name, layout), 0)
        memory, pitch = layout.rows[name]
        return memory.own.view(-1, pitch)[:, :width].view(like.dtype)

    def _told(self, tokens: Tokens, state: State, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Send tokens and tell their experts; return those of what arrived.

        Without sums they lie where other ranks write. With sums weights come along, and both are
        copied: they are read again when the rows are combined.
        """
        layout, weights = state.layout, tokens.weights if self.sums else None
        pairs, shape = layout.arriving * layout.slots, (layout.arriving, layout.slots)
        told, kept = layout.told.own.view(torch.int32), None
        if weights is not None:
            told = told[: pairs + -(-pairs * weights.element_size() // WEIGHT)]
            kept = torch.empty_like(told)
        few = kept is not None and len(kept) <= KEPT
        self._send(
            "rows", hidden, tokens.ids, self._per_rank, state, weights, kept if few else None
        )
        if weights is None or kept is None:
            return told[:pairs].view(shape), None
        if not few:
            kept.copy_(told)
        its = kept[pairs:].view(weights.dtype)[:pairs]
        return kept[:pairs].view(shape), its.view(shape)

    def there(self, rows: Tensor, state: State, name: str) -> Tensor:
        """Send the row of each place to where the tokens went, and return what arrived."""
        self._send(name, rows, state.ranks, 1, state, tells=False)
        return self._arrived(name, state.layout, rows)

    def _send(  # noqa: PLR0913, PLR0917 -- what a kernel takes
        self,
        name: str,
        rows: Tensor,
        to: Tensor,
        per_rank: int,
        state: State,
        weights: Tensor | None = None,
        kept: Tensor | None = None,
        *,
        tells: bool = True,
    ) -> None:
        layout = state.layout
        memory, pitch = self._rows(name, layout, rows)
        units, places = Units.of(rows, pitch), layout.places
        tokens, topk = to.shape
        wanted = PIECES // max(1, tokens * self.ranks * units.parts)
        split = 1 if self.sums else max(1, min(topk, wanted))
        self._launch(
            moe_routing_send, units, tokens * self.ranks * split,
            to, to if weights is None else weights, state.plan.inverse, state.plan.order,
            state.plan.num_dropped, state.ranks,
            to if kept is None else kept,
            self._state, self._said, self._signals.addresses, layout.told.addresses,
            memory.addresses,
            tokens, topk, split, units.columns, units.stride, *to.stride(),
            *((0, 0) if weights is None else weights.stride()), units.of_bytes(pitch),
            self._rank, self.ranks * per_rank, per_rank, places,
            WEIGHT * layout.arriving * layout.slots, 0 if kept is None else len(kept), self._limit,
            SLOTS=triton.next_power_of_2(topk), SUMS=self.sums, PLACED=layout.placed,
            BY_PLACE=not tells, TELLS=tells, WEIGHS=weights is not None, KEEPS=kept is not None,
            CHUNK=CHUNK,
        )  # fmt: skip

    def back(self, rows: Tensor, state: State, ids: Tensor, plan: DispatchPlan | None) -> Tensor:
        """Send a row of each place that has an expert back, and return what arrived.

        :param ids: the places' experts.
        :param plan: of the places' experts, where the rows are in its order.
        """
        layout = state.layout
        memory, pitch = self._rows("back", layout, rows)
        units = Units.of(rows, pitch)
        inverse, offsets = (ids, ids) if plan is None else (plan.inverse, plan.offsets)
        by_rank = self.sums or layout.placed
        group = 1 if layout.slots > 1 else GROUP
        while group > 1 and layout.arriving * units.parts < PIECES * group:
            group //= 2
        self._launch(
            moe_routing_send_back, units, self.ranks * -(-layout.places // group),
            inverse, offsets, ids,
            self._state, self._said, self._signals.addresses, memory.addresses,
            layout.slots, units.columns, units.stride, units.of_bytes(pitch), self._rank,
            layout.places, 0 if plan is None else len(plan.counts), self._limit,
            SLOTS=triton.next_power_of_2(max(layout.slots, group)), GROUP=group, BY_RANK=by_rank,
            PLANNED=plan is not None,
        )  # fmt: skip
        return self._arrived("back", layout, rows)

    def _sum_back(self, rows: Tensor, plan: DispatchPlan, weights: Tensor, state: State) -> Tensor:
        """Send the weighted sums of rows in the order of a plan, and return what arrived."""
        layout = state.layout
        memory, pitch = self._rows("back", layout, rows)
        units = Units.of(rows, pitch, integers=False)
        self._launch(
            moe_routing_sum_back, units, layout.arriving,
            plan.inverse, plan.offsets, weights,
            self._state, self._said, self._signals.addresses, memory.addresses,
            layout.slots, units.columns, units.stride, units.of_bytes(pitch), self._rank,
            layout.places, len(plan.counts), self._limit,
            programs=SUMMED, SLOTS=triton.next_power_of_2(layout.slots),
        )  # fmt: skip
        return self._arrived("back", layout, rows)

    def _launch(
        self,
        kernel: Any,  # noqa: ANN401 -- Triton's
        units: Units,
        rows: int,
        *arguments: object,
        programs: tuple[int, int] = MOVED,
        **constants: object,
    ) -> None:
        """Launch a kernel on so many rows of the units.

        :param programs: the most of them, and their warps.
        """
        most, warps = programs
        most = INTERPRETED_PROGRAMS if self._interpreted else most
        launch = kernel[(max(1, min(units.parts * rows, most)),)]
        with self._on_device():
            launch(
                units.rows,
                *arguments,
                RANKS=self.ranks,
                LANES=triton.next_power_of_2(self.ranks),
                VEC=units.vector,
                WIDTH=units.width,
                PDL=self._pdl,
                INTERPRETED=self._interpreted,
                num_warps=warps,
                enable_fp_fusion=False,  # ``moe_routing.combine`` rounds products too
                **({"launch_pdl": True} if self._pdl else {}),
                **constants,
            )


def _of_places(rows: Tensor, state: State) -> Tensor:
    """Return the row of its token at each place of what comes back."""
    return moe_routing.permute(rows, state.plan).flatten(0, 1)


Way = tuple[Symmetric, State, "Tensor"]
"""What an exchange with gradients needs; the last are the experts of what arrived."""


def _there(rows: Tensor, way: Way, name: str) -> Tensor:
    """Send the rows of places to where the tokens went, with gradients."""
    arrived: Tensor = _There.apply(rows, way, name)  # type: ignore[no-untyped-call]
    return arrived


def _back(rows: Tensor, way: Way, plan: DispatchPlan | None) -> Tensor:
    """Send results back to the places, with gradients."""
    arrived: Tensor = _Back.apply(rows, way, plan)  # type: ignore[no-untyped-call]
    return arrived


class _There(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Way, name: str) -> Tensor:  # noqa: ANN401 -- a bag by design
        ctx.way = way
        transport, state, _ = way
        return transport.there(rows, state, name).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401 -- likewise
        return _back(grads[0], ctx.way, None), None, None


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Way, plan: DispatchPlan | None) -> Tensor:  # noqa: ANN401 -- likewise
        ctx.way, ctx.plan = way, plan
        transport, state, ids = way
        return transport.back(rows, state, ids, plan).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401 -- likewise
        rows = _there(grads[0], ctx.way, "rows")
        if ctx.plan is not None:
            return moe_routing.permute(rows, ctx.plan), None, None
        has_expert = (ctx.way[2] >= 0).any(dim=1, keepdim=True)
        return torch.where(has_expert, rows, 0), None, None


def build(
    problem: ExchangeProblem, device: DeviceInfo, allocate: Allocate = of_gpus
) -> ExchangeKernel:
    """Build what makes the transport of a group."""

    def kernel(group: ProcessGroup) -> Exchange:
        return Symmetric(problem, torch.device(device.type, device.index or 0), group, allocate)

    return kernel
