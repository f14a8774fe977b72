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
    from collections.abc import Callable

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
        self._all_ranks = torch.arange(self._ranks, device=device)
        own = torch.arange(self._experts, dtype=torch.int32, device=device)
        self._own_of_every_rank = own.repeat(self._ranks)
        # By number: expert e is number e + 1, and 0 and the last are of no expert.
        first, none = distributed.get_rank(group) * self._experts, self._ranks * self._experts + 1
        self._own = pad(own, (first + 1, none - first - self._experts), value=-1)
        ranks = self._all_ranks.int().repeat_interleave(self._experts)
        self._rank_of = pad(ranks, (1, 1), value=-1)
        self._forms: dict[Form, Tensor] = {}

    def dispatch(self, tokens: Tokens) -> Received:
        """Send each token once to each of its experts, or once to each rank that has any."""
        if self._problem.reduce == "rank":
            return self._to_ranks(tokens)
        return self._padded(tokens) if self._problem.max_tokens else self._to_experts(tokens)

    def _to_experts(self, tokens: Tokens) -> Received:
        """Send a row for each slot, by expert: then counts say what arrives, and how much of it."""
        plan = moe_routing.plan(tokens.ids, self._ranks * self._experts)
        splits, counts = self._sizes(plan.counts.view(self._ranks, -1), self._form(tokens))
        places = sum(splits.receive or ())
        ids = self._own_of_every_rank.repeat_interleave(counts.flatten(), output_size=places)
        send = self._sender(splits, places)
        return self._received(tokens, plan, splits, send, ids[:, None], None)

    def _padded(self, tokens: Tokens) -> Received:
        """Send a row for each slot, as many to each rank; ids say which are of an expert."""
        numbers = self._numbers(tokens.ids)
        # All experts of all tokens may be on one rank.
        places = self._problem.max_tokens * numbers.shape[1]
        plan = moe_routing.plan(self._rank_of[numbers], self._ranks, capacity=places, masked=True)
        send = self._sender(EVEN, self._ranks * places)
        # An empty place has the number of pairs, and reads what is appended.
        sent = pad(numbers.reshape(-1, 1), _ONE_MORE)[plan.order.flatten()]
        return self._received(tokens, plan, EVEN, send, self._own[send(sent)], None)

    def _to_ranks(self, tokens: Tokens) -> Received:
        """Send a row, its ids and weights to each rank that has one of its experts."""
        numbers = self._numbers(tokens.ids)
        reached = (self._rank_of[numbers][:, :, None] == self._all_ranks).any(dim=1)
        slots = torch.where(reached, self._all_ranks, -1)
        if most := self._problem.max_tokens:
            plan = moe_routing.plan(slots, self._ranks, capacity=most, masked=True)
            splits, places = EVEN, self._ranks * most
        else:
            plan = moe_routing.plan(slots, self._ranks)
            splits, _ = self._sizes(plan.counts[:, None], self._form(tokens))
            places = sum(splits.receive or ())
        send = self._sender(splits, places)
        # The token of each place; an empty one has the number of tokens: it reads what is appended.
        token = plan.order.flatten().div(self._ranks, rounding_mode="floor")
        # Numbers travel with the weights, as bits of floats that nobody computes with: so
        # gradients flow through the matrix, and there is one exchange instead of two.
        both = torch.cat((tokens.weights.float(), numbers.view(torch.float32)), dim=1)
        weights, heard = send(pad(both, _ONE_MORE)[token]).split(numbers.shape[1], dim=1)
        here = self._own[heard.detach().view(torch.int32)]
        weights = weights.to(tokens.weights.dtype)
        return self._received(tokens, plan, splits, send, here, weights)

    def _received(  # noqa: PLR0913, PLR0917 -- what arrives, and how
        self,
        tokens: Tokens,
        plan: DispatchPlan,
        splits: Splits,
        send: Callable[[Tensor], Tensor],
        ids: Tensor,
        weights: Tensor | None,
    ) -> Received:
        """Send rows and scales in the order of the plan."""
        scales = tokens.scales
        return Received(
            rows=send(moe_routing.permute(tokens.hidden, plan)),
            ids=ids,
            weights=weights,
            scales=None if scales is None else send(moe_routing.permute(scales, plan)),
            state=State(plan, splits, tokens.weights if weights is None else None),
        )

    def _sender(self, splits: Splits, places: int) -> Callable[[Tensor], Tensor]:
        """Return what exchanges rows, which may lie in a matrix for each rank."""
        group = alive(self._group)
        return lambda rows: all_to_all(rows.flatten(0, -2), splits, places, group)

    def _numbers(self, ids: Tensor) -> Tensor:
        """Return the number of each id's expert, in int32: 0 or the last if it has none.

        The greatest integer wraps around to the least.
        """
        return (ids + 1).clamp(0, self._ranks * self._experts + 1).int()

    def combine(self, rows: Tensor, received: Received) -> Tensor:
        """Send the results back, and sum them for each token, in the order of its slots."""
        plan, splits, weights = cast("State", received.state)
        back = all_to_all(rows, splits.reversed, plan.order.numel(), alive(self._group))
        return moe_routing.combine(back.unflatten(0, plan.order.shape), plan, weights)

    def _sizes(self, counts: Tensor, form: Form) -> tuple[Splits, Tensor]:
        """Exchange counts, and hold every rank's rows to the form of this one's.

        :param counts: ``[ranks, C]``: how many rows of each of C kinds go to each rank.
        :returns: how many rows go where, and the counts of what comes from each rank.
        :raises ValueError: another rank's rows have another form.
        """
        if form not in self._forms:
            numbers = [
                part if isinstance(part, int) else zlib.crc32(part.encode()) >> 1 for part in form
            ]
            row = torch.tensor(numbers, dtype=torch.int32, device=counts.device)
            row = row.expand(self._ranks, -1)
            self._forms[form] = row
        said = torch.cat((counts, self._forms[form]), dim=1)
        heard = all_to_all(said, EVEN, self._ranks, alive(self._group))
        mine, others = torch.stack((said, heard)).tolist()  # the one synchronisation
        kinds = counts.shape[1]
        for rank, other in enumerate(others):
            pairs = zip(Form._fields, mine[0][kinds:], other[kinds:], strict=True)
            unlike = [name for name, here, there in pairs if here != there]
            if unlike:
                words = ", ".join(f"{name}={value}" for name, value in form._asdict().items())
                msg = (
                    f"hidden: expected the same {' and '.join(unlike)} on every rank, got {words} "
                    f"here and others on rank {rank}"
                )
                raise ValueError(msg)
        send, receive = (tuple(sum(row[:kinds]) for row in rows) for rows in (mine, others))
        return Splits(send, receive), heard[:, :kinds]

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


def build(problem: ExchangeProblem, device: DeviceInfo) -> ExchangeKernel:
    """Build what makes the transport of a group."""

    def kernel(group: ProcessGroup) -> Exchange:
        return AllToAll(problem, torch.device(device.type, device.index or 0), group)

    return kernel
