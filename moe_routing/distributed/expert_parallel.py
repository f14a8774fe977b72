"""``ExpertParallel``: the experts of one MoE layer on the ranks of a group."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast, overload
from weakref import ref

import torch
from torch import Tensor, distributed
from torch.compiler import is_dynamo_compiling

import moe_routing
from moe_routing._dispatch import chosen
from moe_routing.distributed import _agreement, _check
from moe_routing.distributed.collectives import alive, joined
from moe_routing.distributed.kernel import Checks, CombinesPlanned, Tokens
from moe_routing.distributed.request import transport_request
from moe_routing.probing import probe
from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed import ProcessGroup

    from moe_routing.distributed._check import Placement
    from moe_routing.distributed.kernel import Exchange, ExchangeKernel, Received
    from moe_routing.distributed.problem import ExchangeProblem, Reduce
    from moe_routing.permutation.kernel import PermutedRows
    from moe_routing.planning.kernel import DispatchPlan
    from moe_routing_registry import ResolutionReport


F = TypeVar("F", bound="Callable[..., Any]")


def _traced_if_shared(function: F) -> F:
    """Let Dynamo break the graph where tokens move, and call the function as it is.

    The sizes of what arrives are known on the host, which no graph can hold. A shared batch has the
    same sizes everywhere.
    """

    @functools.wraps(function)
    def called(self: ExpertParallel, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- as F says
        if is_dynamo_compiling() and not self.problem.shared_batch:
            from moe_routing.distributed._untraced import call

            return call(function, self, *args, **kwargs)
        return function(self, *args, **kwargs)

    return cast("F", called)


class Dispatched(NamedTuple):
    """What a rank's experts compute: rows in the order of a plan over this rank's experts.

    :ivar rows: ``[P, H]``, by expert, then by source rank, token and slot. P may be more than there
        are rows of experts: ``plan.offsets[-1]``.
    :ivar plan: the plan over the experts of this rank, in the order of ``local_experts``.
    """

    rows: Tensor
    plan: DispatchPlan


class DispatchedWithScales(NamedTuple):
    """The same for rows that came with scales."""

    rows: PermutedRows
    plan: DispatchPlan


class _Sent(NamedTuple):
    """What ``combine`` needs of ``dispatch``."""

    received: Received
    plan: DispatchPlan


class ExpertParallel:
    """The experts of a layer, split over the ranks of a group of torch.distributed.

    Every rank makes one with the same arguments, and makes the same calls in the same order: they
    communicate. The ranks tell each other their arguments when it is made, and an argument that is
    not the same everywhere is an error on every rank.

    The registry chooses the transport; ``report`` says which, and why no other.

    :param group: a ``ProcessGroup`` that this process is in; ``None`` is all ranks.
    :param num_experts: E. As many are on each rank, in order, unless ``placement`` says otherwise.
    :param placement: the rank of each expert ``[E]``. A rank may have none.
    :param reduce: ``"none"``: a token goes once to each of its experts, K rows come back, and are
        summed on the token's rank, in float32 and in the order of its slots: the result has the
        same bits for any number of ranks. ``"rank"``: a token goes once to each rank that has one
        of its experts, and comes back as that rank's sum, in the rows' dtype; these are added in
        the order of ranks. Where K experts are on fewer than K ranks that moves fewer bytes.
    :param shared_batch: every rank calls with the same tokens.
    :param max_tokens: the most tokens of a rank. With it sizes need not be exchanged: no call waits
        for the device, each can be captured in a CUDA graph, and rows are sent as if every rank had
        that many tokens.
    :param capacity: the most rows that a rank keeps for each other, where a transport keeps memory
        for them: of slots (``reduce="none"``), or of tokens (``"rank"``). ``None``: as many as
        there can be. Tokens whose rows find no place become NaN, and ``check`` raises. Needs
        ``max_tokens``.
    :param topk: K, if it is known; ranks and calls are held to it.
    :param hidden_size: H, likewise.
    :param dtype: of the rows, likewise.
    :param device: of the tokens; ``None``: the current accelerator, if the group's backend
        communicates on it, else the CPU.
    :param transport: the name of one: this or none. Without it the registry chooses.
        ``MOE_ROUTING_BLOCK`` leaves some out; ``MOE_ROUTING_BACKEND`` and ``prefer``, which name
        who computes, are not asked.
    :param timeout: seconds that this rank waits for the others here, unless the group's own time is
        over before. Calls wait as long as that (``init_process_group(timeout=)``).
    :raises TypeError: an argument has the wrong type.
    :raises ValueError: an argument has a wrong value, here or on another rank, or ranks differ.
    :raises TimeoutError: a rank did not make one. The group is of no use after that.
    :raises BackendUnavailableError: no transport fits here; a rank that has one raises
        ``ValueError``.

    :ivar rank: this process's, in the group.
    :ivar device: where the tokens are.
    :ivar problem: what the transport was asked for.
    :ivar local_experts: the experts of this rank, ascending.
    :ivar report: the choice of the transport, a ``ResolutionReport``.

    >>> import torch, torch.distributed
    >>> torch.distributed.init_process_group(
    ...     "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    ... )
    >>> ep = ExpertParallel(None, num_experts=4)
    >>> ids, weights = torch.tensor([[3, 0], [0, 1]]), torch.full((2, 2), 0.5)
    >>> rows, plan = ep.dispatch(torch.tensor([[1.0], [3.0]]), ids, weights)
    >>> plan.counts.tolist(), rows.flatten().tolist()
    ([2, 1, 0, 1], [1.0, 3.0, 3.0, 1.0])
    >>> ep.combine(10 * rows).flatten().tolist()
    [10.0, 30.0]
    >>> ep.report.winner
    'all-to-all'
    >>> torch.distributed.destroy_process_group()
    """

    rank: int
    device: torch.device
    problem: ExchangeProblem
    local_experts: tuple[int, ...]
    report: ResolutionReport

    def __init__(  # noqa: PLR0913 -- what ranks must agree on
        self,
        group: ProcessGroup | None,
        num_experts: int,
        *,
        placement: Sequence[int] | Tensor | None = None,
        reduce: Reduce = "none",
        shared_batch: bool = False,
        max_tokens: int | None = None,
        capacity: int | None = None,
        topk: int | None = None,
        hidden_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        transport: str | None = None,
        timeout: float = _check.TIMEOUT,
    ) -> None:
        """Agree with the other ranks, and choose the transport."""
        found = _check.check_group(group)
        self._group = ref(found)
        self.rank = distributed.get_rank(found)
        self._last: _Sent | None = None
        seconds, self.device = _check.to_agree_with(timeout, device, found)

        def asked() -> tuple[tuple[Placement, ExchangeProblem], dict[str, object]]:
            _check.check_timeout(timeout)
            at = _check.check_device(device, found)
            _check.check_transport(transport)
            ranks = distributed.get_world_size(found)
            placed = _check.check_placement(num_experts, placement, ranks)
            problem = _check.check_problem(
                placed,
                reduce=reduce,
                shared_batch=shared_batch,
                max_tokens=max_tokens,
                capacity=capacity,
                topk=topk,
                hidden_size=hidden_size,
                dtype=dtype,
            )
            map_of = hashlib.sha256(repr(placed.ranks).encode()).hexdigest()[:16]
            named = {"num_experts": len(placed.ranks), **problem.to_dict(), "placement": map_of}
            return (placed, problem), named | {"transport": transport, "device": at.type}

        (placed, problem), hosts = _agreement.agreed(asked, found, self.device, seconds)
        self.problem = dataclasses.replace(problem, hosts=hosts)
        self.local_experts = placed.of_each_rank[self.rank]
        self._places = None if placed.is_even else torch.tensor(placed.places, device=self.device)
        (kernel, self.report), _ = _agreement.agreed(
            lambda: self._chosen(transport), found, self.device, seconds
        )
        self._exchange: Exchange
        self._exchange, _ = _agreement.agreed(
            lambda: (kernel(found), {}), found, self.device, seconds
        )

    @property
    def group(self) -> ProcessGroup:
        """The group, unless it was destroyed."""
        return alive(self._group)

    def check(self) -> None:
        """Wait for the device, and raise what went wrong there in the calls before.

        Such errors are seen when the device got so far: a later ``dispatch`` raises them too, on
        each rank as soon as it sees them. Here every rank raises, if all made the same calls.

        :raises CapacityError: ``capacity`` was too small for the rows of some rank.
        :raises TimeoutError: this rank waited too long for another.
        """
        if isinstance(self._exchange, Checks):
            self._exchange.check()

    def _chosen(
        self, transport: str | None
    ) -> tuple[tuple[ExchangeKernel, ResolutionReport], dict[str, object]]:
        """Choose on this rank; the other ranks must find the same."""
        request = transport_request(transport)
        kernel, report = chosen(self.problem, probe(self.device), request)
        return (kernel, report), {"transport": report.winner}

    @overload
    def dispatch(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, *, scales: None = None
    ) -> Dispatched: ...
    @overload
    def dispatch(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, *, scales: Tensor
    ) -> DispatchedWithScales: ...
    @_traced_if_shared
    def dispatch(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, *, scales: Tensor | None = None
    ) -> Dispatched | DispatchedWithScales:
        """Send tokens to the ranks of their experts, and order what arrives by expert.

        :param hidden: ``[T, H]``, of any dtype and strides; T may differ between ranks, and be 0.
        :param ids: int32 or int64 ``[T, K]``. An id outside ``[0, num_experts)``, -1 of padding for
            example, has no expert: nothing is sent for it, and it adds nothing.
        :param weights: bfloat16, float16 or float32 ``[T, K]``.
        :param scales: ``[T, S]`` of any dtype, of fp8 rows for example, moved with the rows.
        :returns: the rows of this rank's experts and their plan. With ``scales`` the rows are a
            ``PermutedRows``. Gradients flow back to ``hidden``:
            on every rank or on none, since the way back communicates too.
        :raises TypeError: an argument has the wrong type or dtype.
        :raises ValueError: an argument has the wrong shape or device, or the ranks' rows differ in
            columns, K, dtype or ``requires_grad`` (of which ranks that exchange no sizes learn
            nothing).
        """
        received = self._arrived(Tokens(hidden, ids, weights, scales))
        plan = moe_routing.plan(received.ids, max(1, len(self.local_experts)))
        self._last = _Sent(received, plan)
        if received.scales is None:
            return Dispatched(moe_routing.permute(received.rows, plan), plan)
        rows = moe_routing.permute(received.rows, plan, scales=received.scales)
        return DispatchedWithScales(rows, plan)

    @_traced_if_shared
    def combine(self, rows: Tensor) -> Tensor:
        """Return the experts' results to the tokens of the last ``dispatch``, and sum them.

        Once: nothing of that call is kept after it.

        :param rows: bfloat16, float16 or float32 ``[P, H']``, a result for each row that
            ``dispatch`` returned. H' and dtype are the same on every rank, with rows or without.
        :returns: ``[T, H']``, of the rows' dtype: for each token the sum over its slots of weight
            times result, with gradients to rows and weights.
        :raises TypeError: the rows are of another type or dtype.
        :raises ValueError: they have another shape or device, or nothing was dispatched since the
            last ``combine``.
        """
        if self._last is None:
            msg = (
                "rows: expected results of what dispatch returned, got nothing dispatched since "
                "the last combine"
            )
            raise ValueError(msg)
        rows = _check.check_results("rows", rows, self.device)
        received, plan = self._last
        if rows.shape[0] != plan.order.numel():
            expected = f"{plan.order.numel()} rows, as many as dispatch returned"
            raise ValueError(refusal("rows", expected, rows))
        self._last = None  # it would keep what arrived, and all that autograd knows of it
        if isinstance(self._exchange, CombinesPlanned):
            rows = joined(rows, received.rows, received.weights)
            return self._exchange.combine_planned(rows, plan, received)
        return self._returned(moe_routing.combine(rows, plan, received.weights), received)

    @_traced_if_shared
    def dispatch_rows(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, *, scales: Tensor | None = None
    ) -> Received:
        """Send tokens as ``dispatch`` does, and return them as they arrive.

        For experts that order rows themselves. They return to ``combine_rows`` one row for each
        that arrived: where ``weights`` came along, the weighted sum over the row's slots.
        """
        received = self._arrived(Tokens(hidden, ids, weights, scales))
        if not received.lent:
            return received
        kept = {
            name: part.clone()
            for name in ("rows", "ids", "scales")
            if (part := getattr(received, name)) is not None
        }
        return received._replace(**kept, lent=False)

    def _arrived(self, tokens: Tokens) -> Received:
        """Send tokens, and return what arrives, perhaps in the transport's memory."""
        tokens = _check.check_tokens(self.problem, self.device, tokens)
        if self._places is not None:
            known = (tokens.ids >= 0) & (tokens.ids < len(self._places))
            places = self._places[torch.where(known, tokens.ids, 0).long()]
            tokens = tokens._replace(ids=torch.where(known, places, -1))
        return self._exchange.dispatch(tokens)

    @_traced_if_shared
    def combine_rows(self, rows: Tensor, received: Received) -> Tensor:
        """Return a result for each row of ``dispatch_rows`` to its token, and sum them: [T, H']."""
        received = _check.check_received(received)
        rows = _check.check_results("rows", rows, self.device)
        if rows.shape[0] != received.ids.shape[0]:
            expected = f"{received.ids.shape[0]} rows, as many as arrived"
            raise ValueError(refusal("rows", expected, rows))
        return self._returned(rows, received)

    def _returned(self, rows: Tensor, received: Received) -> Tensor:
        return self._exchange.combine(joined(rows, received.rows, received.weights), received)
