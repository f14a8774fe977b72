"""The transport: an order by rank, an all-to-all there, and one back.

With the most tokens of a rank known, every rank sends as many rows to every rank, padded, and the
host waits for nothing. Without, the sizes are exchanged first, and read on the host.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, NamedTuple, cast
from weakref import ref

import torch
from torch import distributed
from torch.nn.functional import pad

import moe_routing
from moe_routing.distributed.collectives import EVEN, Splits, alive, all_to_all
from moe_routing.distributed.kernel import Received

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from moe_routing import DispatchPlan
    from moe_routing.distributed import ExchangeProblem
    from moe_routing.distributed.kernel import Exchange, ExchangeKernel, Tokens
    from moe_routing_registry import DeviceInfo

_ONE_MORE = (0, 0, 0, 1)
"""Pads a matrix with a row."""


class State(NamedTuple):
    """What the way back needs.

    :ivar plan: the rows that this rank sent, by rank, of the slots of its tokens.
    :ivar weights: of the slots, for sums that are made here; ``None`` where each rank made its own.
    """

    plan: DispatchPlan
    splits: Splits
    weights: Tensor | None


class Form(NamedTuple):
    """What must be the same on every rank.

    :ivar gradients: what requires them; a rank without would not take part in the way back.
    """

    hidden_size: int
    topk: int
    scales: int
    dtypes: str
    gradients: str


class AllToAll:
    """The transport of one group."""

    def __init__(self, problem: ExchangeProblem, device: torch.device, group: ProcessGroup) -> None:
        """Keep what the calls need."""
        self._problem = problem
        self._group = ref(group)
        self._ranks, self._experts = problem.ranks, problem.experts_per_rank
        self._first = distributed.get_rank(group) * self._experts
        self._all_ranks = torch.arange(self._ranks, device=device)
        self._forms: dict[Form, Tensor] = {}

    def dispatch(self, tokens: Tokens) -> Received:
        """Send each token once to each of its experts, or once to each rank that has any."""
        by_rank = self._problem.reduce == "rank"
        slots = tokens.ids.div(self._experts, rounding_mode="floor")
        if by_rank:
            reached = (slots[:, :, None] == self._all_ranks).any(dim=1)
            slots = torch.where(reached, self._all_ranks, -1)
        plan, splits, places = self._ordered(slots, tokens)

        group = alive(self._group)

        def sent(rows: Tensor) -> Tensor:
            return all_to_all(rows.flatten(0, -2), splits, places, group)

        # The token of each place; the number of tokens (or of pairs) at an empty one, which reads
        # the row that is appended.
        index = plan.order.flatten()
        if by_rank:
            index = index.div(self._ranks, rounding_mode="floor")
        known = (tokens.ids >= 0) & (tokens.ids < self._ranks * self._experts)
        ids = torch.where(known, tokens.ids, -1).int()  # an int64 beyond int32 would wrap around
        ids = ids if by_rank else ids.reshape(-1, 1)
        rows = moe_routing.permute(tokens.hidden, plan)
        return Received(
            rows=sent(rows),
            ids=self._local(sent(pad(ids, _ONE_MORE, value=-1)[index])),
            weights=sent(pad(tokens.weights, _ONE_MORE)[index]) if by_rank else None,
            scales=None
            if tokens.scales is None
            else sent(moe_routing.permute(tokens.scales, plan)),
            state=State(plan, splits, None if by_rank else tokens.weights),
        )

    def combine(self, rows: Tensor, received: Received) -> Tensor:
        """Send the results back, and sum them for each token, in the order of its slots."""
        plan, splits, weights = cast("State", received.state)
        back = all_to_all(rows, splits.reversed, plan.order.numel(), alive(self._group))
        return moe_routing.combine(back.unflatten(0, plan.order.shape), plan, weights)

    def _ordered(self, slots: Tensor, tokens: Tokens) -> tuple[DispatchPlan, Splits, int]:
        """Order slots by rank; return also how many rows go where, and how many are received."""
        if self._problem.max_tokens:
            capacity = self._problem.max_tokens
            if self._problem.reduce == "none":
                capacity *= slots.shape[1]  # all experts of all tokens may be on one rank
            plan = moe_routing.plan(slots, self._ranks, capacity=capacity, masked=True)
            return plan, EVEN, self._ranks * capacity
        plan = moe_routing.plan(slots, self._ranks)
        splits = self._sizes(plan.counts, self._form(tokens))
        return plan, splits, sum(splits.receive or ())

    def _sizes(self, counts: Tensor, form: Form) -> Splits:
        """Exchange the sizes, and hold every rank's rows to the form of this one's.

        :raises ValueError: another rank's rows have another form.
        """
        if form not in self._forms:
            numbers = [
                part if isinstance(part, int) else zlib.crc32(part.encode()) for part in form
            ]
            row = torch.tensor(numbers, device=counts.device).expand(self._ranks, -1)
            self._forms[form] = row
        said = torch.cat((counts[:, None], self._forms[form]), dim=1)
        heard = all_to_all(said, EVEN, self._ranks, alive(self._group))
        mine, others = torch.stack((said, heard)).tolist()  # the one synchronisation
        for rank, other in enumerate(others):
            pairs = zip(Form._fields, mine[0][1:], other[1:], strict=True)
            unlike = [name for name, here, there in pairs if here != there]
            if unlike:
                words = ", ".join(f"{name}={value}" for name, value in form._asdict().items())
                msg = (
                    f"hidden: expected the same {' and '.join(unlike)} on every rank, got {words} "
                    f"here and others on rank {rank}"
                )
                raise ValueError(msg)
        return Splits(tuple(row[0] for row in mine), tuple(row[0] for row in others))

    def _form(self, tokens: Tokens) -> Form:
        parts = {name: part for name, part in tokens._asdict().items() if part is not None}
        sent = parts.keys() - {"ids"} - ({"weights"} if self._problem.reduce == "none" else set())
        going_back = [name for name in sorted(sent) if parts[name].requires_grad]
        return Form(
            hidden_size=tokens.hidden.shape[1],
            topk=tokens.ids.shape[1],
            scales=0 if tokens.scales is None else tokens.scales.shape[1],
            dtypes=" ".join(str(parts[name].dtype) for name in sorted(parts.keys() - {"ids"})),
            gradients=" ".join(going_back) if torch.is_grad_enabled() else "",
        )

    def _local(self, ids: Tensor) -> Tensor:
        """Return ids that count this rank's experts from 0; -1 stands for all others."""
        ids = ids - self._first
        return torch.where((ids >= 0) & (ids < self._experts), ids, -1)


def build(problem: ExchangeProblem, device: DeviceInfo) -> ExchangeKernel:
    """Build what makes the transport of a group."""

    def kernel(group: ProcessGroup) -> Exchange:
        return AllToAll(problem, torch.device(device.type, device.index or 0), group)

    return kernel
