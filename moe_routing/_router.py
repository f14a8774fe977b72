"""``Router``: the public interface of routing.

A call with the signature of the previous one goes straight to the kernel. ``Calls`` handles all
other calls.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from moe_routing import _after, _check
from moe_routing._call_cache import UNREADABLE, CachedCall, never
from moe_routing._calls import Calls, never_routes
from moe_routing._dispatch import dispatcher_of
from moe_routing.kernel import NO_OPERANDS, Operands, RoutingOutput, WarmsUp
from moe_routing.planning import routed
from moe_routing_registry import RoutingSpec
from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    from moe_routing._dispatch import Resolved
    from moe_routing.gating.call import Gate
    from moe_routing.gating.latest import Latest
    from moe_routing.planning.kernel import RoutedPlan
    from moe_routing.reference.shadow import Health
    from moe_routing_registry import ResolutionReport

_tuple = tuple.__new__
"""Makes a named tuple in half the time of its own constructor, which is a Python function."""


class Router:
    """Routes tokens to experts: ``weights, ids = route(logits, topk)``.

    Get one from ``moe_routing.get_router``.

    The backend is chosen at the first call for each (device, dtype, E, K, layout) and kept; later
    calls cost one comparison of their tensors. A router may be used from any number of threads. It
    is a value: it may be copied, pickled and sent to other processes, which choose for themselves;
    what it has seen (``report``, ``health``) stays here.

    :ivar spec: the maths.
    :ivar num_experts: E for a router of a configuration, else ``None``.
    :ivar topk: K for a router of a configuration, else ``None``; then every call names it.

    ``verify=True`` compares every call with the float64 oracle, ``verify=0.01`` one in a hundred,
    without ever changing a result or raising: ``health()`` and the logger ``moe_routing.verify``
    tell. ``MOE_ROUTING_VERIFY=sample:0.01`` does so for every router. Calls inside compiled
    functions are compared too.

    >>> route = Router(RoutingSpec(family="topk_softmax", renormalize=True))
    >>> weights, ids = route(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2)
    >>> weights, ids
    (tensor([[0.5000, 0.5000]]), tensor([[1, 2]], dtype=torch.int32))
    """

    def __init__(
        self,
        spec: RoutingSpec,
        *,
        topk: int | None = None,
        num_experts: int | None = None,
        backend: str | None = None,
        verify: float | bool | None = None,
    ) -> None:
        if not isinstance(spec, RoutingSpec):
            raise TypeError(refusal("spec", "a RoutingSpec", spec))
        self.spec = spec
        self.topk = None if topk is None else _check.integer("topk", topk)
        self.num_experts = None if num_experts is None else _check.experts(num_experts)
        if backend is not None and not isinstance(backend, str):
            raise TypeError(refusal("backend", "a name, or None", backend))
        self._verify = verify
        self._calls = Calls(spec, self.topk, self.num_experts, backend, verify)
        self._latest_gate: Latest | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle what the router was made of."""
        return _rebuilt, (
            self.spec,
            self.topk,
            self.num_experts,
            self._calls.requested,
            self._verify,
        )

    def __call__(  # noqa: PLR0913 -- one argument an operand of the maths
        self,
        logits: Tensor,
        topk: int | None = None,
        per_expert_scale: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        token_ids: Tensor | None = None,
        expert_table: Tensor | None = None,
        num_valid_tokens: int | Tensor | None = None,
        valid: Tensor | None = None,
        expert_map: Tensor | None = None,
        logical_to_physical: Tensor | None = None,
        replica_count: Tensor | None = None,
        shared_weights: Tensor | None = None,
        ids: Tensor | None = None,
        counts: Tensor | None = None,
        ids_dtype: torch.dtype | None = None,
        out: RoutingOutput | tuple[Tensor, Tensor] | None = None,
    ) -> RoutingOutput:
        """Select ``topk`` experts for every token and weigh them.

        :param logits: ``[T, E]``, any float dtype (float64 is rounded to float32), any strides; T
            may be 0. Other leading shapes, ``[E]`` and ``[B, L, E]`` for example, are routed as
            rows, without a copy where the rows can be viewed as ``[T, E]``; ``token_ids``, ``out``
            and what is returned then have the leading shape in place of T. A DTensor
            ``[T, E]`` that is sharded by rows or replicated is routed on each rank, and the outputs
            are placed like it.
        :param topk: K, 1 <= K <= E; may be left out for a router of a configuration.
        :param per_expert_scale: ``[E]``, any float dtype; for specs with ``per_expert_scale``
            (Gemma4), and only those.
        :param bias: ``[E]``, any float dtype; for specs whose selection adds a bias, and only
            those.
        :param token_ids: ``[T]``, int32 or int64; for token-table selection, and only that.
        :param expert_table: ``[vocabulary, K]``, int32 or int64; likewise. A token whose id is not
            in the table, or whose entries are not all in [0, E), counts as padding.
        :param num_valid_tokens: rows at or past it are padding and get ids -1 and weights 0, more
            than T are all; an integer, or an int32 or int64 tensor of shape [] or [1] on the
            logits' device, which is never read on the host. Only with logits ``[T, E]``.
        :param valid: a bool mask ``[T]`` in place of ``num_valid_tokens``: rows where it is False
            are padding, wherever they stand.
        :param expert_map: ``[E + shared_experts]``, int32 or int64, logical -> physical expert.
            Experts may share a physical id, and one that is elsewhere has -1; the weights stay as
            they are.
        :param logical_to_physical: ``[E + shared_experts, R]``, int32 or int64, in place of
            ``expert_map`` where experts have replicas: row t (of logits that are flattened to ``[T,
            E]``) gets the physical id ``logical_to_physical[e, t % replica_count[e]]`` of an expert
            e. Other entries may be anything.
        :param replica_count: ``[E + shared_experts]``, int32 or int64, from 1 to R; other numbers
            count as the nearest of these.
        :param shared_weights: ``[shared_experts]``, or ``[T, shared_experts]`` for weights of each
            row, any float dtype and strides: in place of the spec's ``shared_weight``, which must
            not be 0. Rows of padding keep the weight 0. Gradients flow to it.
        :param ids: recorded logical ids ``[T, K]``, of any integer dtype: weigh these experts
            instead of selecting, with their unbiased scores. A row that is -1 throughout has no
            record and is routed as usual. In other rows a slot of -1 has no expert: it gets id -1
            and weight 0, and the others are renormalised without it. A row with an id outside [-1,
            E) counts as padding.
        :param counts: ``[E]``, or ``[E + shared_experts]`` to count shared experts too, int32 or
            int64, any stride: the call adds to each logical expert's element how many slots it has
            in rows that are no padding. Nothing else of the call may be in its memory. int32 wraps.
        :param ids_dtype: ``torch.int32`` (default) or ``torch.int64``.
        :param out: ``(weights, ids)`` to write into: contiguous, ``[T, K + shared_experts]``, not
            with gradients, and of memory that they share neither with each other nor with an
            operand.
        :returns: ``RoutingOutput(weights, ids)``: float32 and ``ids_dtype``, both ``[T, K +
            shared_experts]`` and contiguous, ordered by descending selection score, equal scores by
            ascending id; recorded ids keep their order.
        :raises TypeError: an argument has the wrong type or dtype.
        :raises ValueError: an argument has the wrong value, shape or device.
        :raises BackendUnavailableError: no backend fits, or the one that was named does not.
        """
        if shared_weights is not None:
            self._calls.check_shared(shared_weights, logits, out, counts)
            output = self(
                logits, topk, per_expert_scale, bias=bias, token_ids=token_ids,
                expert_table=expert_table, num_valid_tokens=num_valid_tokens, valid=valid,
                expert_map=expert_map, logical_to_physical=logical_to_physical,
                replica_count=replica_count, ids=ids, counts=counts, ids_dtype=ids_dtype, out=out,
            )  # fmt: skip
            return self._calls.weighed(output, shared_weights, in_place=out is not None)
        if valid is not None or type(num_valid_tokens) is Tensor:
            num_valid_tokens = _check.one_padding(num_valid_tokens, valid)
        if counts is not None or logical_to_physical is not None or replica_count is not None:
            return self._calls.with_after(
                Operands(
                    logits, per_expert_scale, bias, token_ids, expert_table,
                    num_valid_tokens, expert_map, ids, out,  # type: ignore[arg-type] # checked next
                ),
                topk, ids_dtype,
                _after.asked(counts, logical_to_physical, replica_count, expert_map),
            )  # fmt: skip
        if is_dynamo_compiling():
            operands = Operands(
                logits, per_expert_scale, bias, token_ids, expert_table,
                num_valid_tokens, expert_map, ids, out,  # type: ignore[arg-type] # checked next
            )  # fmt: skip
            return self._calls.traced(operands, topk, ids_dtype)
        if type(out) is tuple and len(out) == 2:  # noqa: PLR2004 -- a pair
            out = _tuple(RoutingOutput, out)
        operands = _tuple(
            Operands,
            (
                logits,
                per_expert_scale,
                bias,
                token_ids,
                expert_table,
                num_valid_tokens,
                expert_map,
                ids,
                out,
            ),
        )
        calls = self._calls
        latest = calls.latest
        try:
            known = latest is not None and latest.matches(operands, topk, ids_dtype)
        except UNREADABLE:
            known = False
        return latest.route(operands) if known else calls.dispatch(operands, topk, ids_dtype)  # type: ignore[union-attr] # known

    @property
    def gate(self) -> Gate:
        """The router's linear layer and routing as one operation.

        >>> route = Router(RoutingSpec(family="topk_softmax", renormalize=True))
        >>> weights, ids = route.gate(torch.tensor([[1.0, 2.0]]), torch.eye(2), 1)
        >>> ids.tolist()
        [[1]]
        """
        from moe_routing.gating.call import Gate

        return Gate(self)

    def with_plan(  # noqa: PLR0913 -- the arguments of a call, and those of `plan`
        self,
        logits: Tensor,
        topk: int | None = None,
        per_expert_scale: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        token_ids: Tensor | None = None,
        expert_table: Tensor | None = None,
        num_valid_tokens: int | Tensor | None = None,
        valid: Tensor | None = None,
        expert_map: Tensor | None = None,
        logical_to_physical: Tensor | None = None,
        replica_count: Tensor | None = None,
        shared_weights: Tensor | None = None,
        ids: Tensor | None = None,
        counts: Tensor | None = None,
        ids_dtype: torch.dtype | None = None,
        num_experts: int | None = None,
        block: int | None = None,
        capacity: int | None = None,
        drop: Literal["last", "least_weight"] = "last",
        masked: bool = False,
        out: RoutedPlan | None = None,
    ) -> RoutedPlan:
        """Route, and plan the ids: a call of the router, then ``moe_routing.plan`` of its ids.

        Padding, other ranks' experts and shared experts are planned as they stand in the ids. A
        plan is of rows: flatten logits of another leading shape to ``[T, E]`` first.

        :param num_experts: how many ids the plan knows. E + shared experts without an
            ``expert_map`` or ``logical_to_physical``; with one it must be given, for its entries
            are not read on the host.
        :param shared_weights: as of a call, like ``counts``, which counts logical experts, whatever
            is planned.
        :param block: as in ``moe_routing.plan``, like ``capacity``, ``drop`` and ``masked``;
            ``drop="least_weight"`` looks at the weights that are returned.
        :param out: ``(weights, ids, plan)`` to write into.
        :returns: ``RoutedPlan(weights, ids, plan)``.
        :raises TypeError: an argument has the wrong type or dtype.
        :raises ValueError: an argument has the wrong value, shape or device.
        :raises BackendUnavailableError: no backend fits, or the one that was named does not.

        >>> route = Router(RoutingSpec(family="topk_softmax", renormalize=True))
        >>> routed = route.with_plan(torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]]), 2)
        >>> routed.ids.tolist(), routed.plan.order.tolist(), routed.plan.offsets.tolist()
        ([[1, 2], [0, 2]], [2, 0, 1, 3], [0, 1, 2, 4])
        """
        asked = (num_experts, block, capacity, drop, masked)
        pair, plan_out = routed.parts_of_out(out)
        num_valid_tokens = _check.one_padding(num_valid_tokens, valid)
        operands = _tuple(
            Operands,
            (
                logits,
                per_expert_scale,
                bias,
                token_ids,
                expert_table,
                num_valid_tokens,
                expert_map,
                ids,
                pair,
            ),
        )
        if num_valid_tokens is not None:
            operands = _check.counted(operands)
        after = None
        if shared_weights is not None:
            self._calls.check_shared(shared_weights, logits, pair, counts, plan_out)
        if counts is not None or logical_to_physical is not None or replica_count is not None:
            after = _after.asked(counts, logical_to_physical, replica_count, expert_map)
            _after.check_call(after, operands, self.spec.shared_experts, plan_out)
            routed.require_experts(num_experts, after.replicas)
        return self._calls.planned(
            operands, topk, ids_dtype, after, shared_weights, asked, plan_out
        )

    def resolve(  # noqa: PLR0913 -- the fields of a RoutingProblem
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        num_experts: int,
        topk: int,
        *,
        ids_dtype: torch.dtype = torch.int32,
        rows: bool = True,
        training: bool = False,
        operands: frozenset[str] = NO_OPERANDS,
    ) -> Resolved:
        """Choose and build ahead of the first call; the same kernel serves later calls.

        :param rows: whether the experts of a row are adjacent in memory.
        :param operands: names of the operands that not every backend takes and that calls bring:
            ``"ids"``, ``"valid"``, ``"counts"`` and ``"replicas"``.
        :returns: ``(kernel, report)``: the kernel, whose arguments nobody checks, and how it was
            chosen.
        :raises TypeError: an argument has the wrong type or dtype.
        :raises ValueError: an argument has the wrong value, or the device is not here.
        :raises BackendUnavailableError: no backend fits, or the one that was named does not.
        """
        return dispatcher_of(self._calls.text, self._calls.requested).resolve(
            device, dtype, num_experts, topk, ids_dtype=ids_dtype, rows=rows, training=training,
            operands=operands,
        )  # fmt: skip

    def warmup(  # noqa: PLR0913 -- the fields of a RoutingProblem
        self,
        num_experts: int | None = None,
        topk: int | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        ids_dtype: torch.dtype = torch.int32,
        training: bool = False,
        operands: frozenset[str] = NO_OPERANDS,
    ) -> ResolutionReport:
        """Choose, build and compile before the first call (and before a CUDA graph is captured).

        Plain calls, calls inside compiled functions and, with ``training=True``, calls with
        gradients are then warm.

        :param operands: names of the operands that not every backend takes and that calls bring:
            ``{"ids"}`` for calls with recorded ids, ``{"counts"}`` for calls that count.
        :returns: the report of the choice.
        :raises TypeError: an argument has the wrong type or dtype.
        :raises ValueError: an argument has the wrong value, or the device is not here.
        :raises BackendUnavailableError: no backend fits, or the one that was named does not.
        """
        num_experts = num_experts if num_experts is not None else self.num_experts
        if num_experts is None:
            msg = (
                "num_experts: expected an int (this router was not made from a configuration), "
                "got None"
            )
            raise TypeError(msg)
        topk = self._calls.default_topk() if topk is None else topk
        choices = [
            self.resolve(
                device,
                dtype,
                num_experts,
                topk,
                ids_dtype=ids_dtype,
                training=wanted,
                operands=operands,
            )
            for wanted in ((False, True) if _check.flag("training", training) else (False,))
        ]
        for kernel in {
            id(resolved.kernel): resolved.kernel for resolved in choices
        }.values():  # mostly it is one
            if isinstance(kernel, WarmsUp):
                kernel.warmup()
        if training:
            choices[-1].warm_up_backward()
        self._calls.latest = CachedCall(never, never_routes, choices[-1], {})
        return choices[-1].report_with_notes()

    @property
    def backend(self) -> str | None:
        """Name of the backend of the latest call, ``None`` before the first.

        Calls inside compiled functions do not count: they leave Python before they are routed.
        """
        latest = self._calls.latest
        resolved = latest.resolved if latest else None
        return resolved.report.winner if resolved else None

    @property
    def report(self) -> ResolutionReport | None:
        """How the backend of the latest call was chosen, ``None`` before the first call.

        See ``backend``.
        """
        latest = self._calls.latest
        if latest is None or latest.resolved is None:
            return None
        report = latest.resolved.report_with_notes()
        planners = dict.fromkeys(planned.call.winner for planned in latest.plans.values())
        notes = [routed.note(winner) for winner in planners if winner is not None]
        return replace(report, notes=(*report.notes, *notes))

    def health(self) -> Health:
        """Return what shadow mode has seen of this router's calls.

        How many were compared, near ties, and what was wrong.

        >>> route = Router(RoutingSpec(family="topk_softmax", renormalize=True), verify=True)
        >>> _ = route(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2)
        >>> route.health().compared, route.health().ok
        (1, True)
        """
        from moe_routing.reference.shadow import Health

        shadow = self._calls.shadow
        return Health() if shadow is None else shadow.health()

    def __repr__(self) -> str:
        """Show the spec, and what the router was made for."""
        extras = [
            f"{name}={value!r}"
            for name, value in (
                ("topk", self.topk),
                ("num_experts", self.num_experts),
                ("backend", self._calls.requested),
            )
            if value is not None
        ]
        return f"Router({', '.join([repr(self.spec.family), *extras])}): {self.spec.formula}"


def _rebuilt(
    spec: RoutingSpec,
    topk: int | None,
    num_experts: int | None,
    backend: str | None,
    verify: float | bool | None,  # noqa: FBT001 -- True is what users write
) -> Router:
    return Router(spec, topk=topk, num_experts=num_experts, backend=backend, verify=verify)
