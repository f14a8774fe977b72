"""``Router``: checks the arguments, finds the kernel, and calls it.

A call like an earlier one goes straight to the kernel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from moe_routing import _after, _check, _leading, _op, _operators  # noqa: F401 -- `_op` registers what `_operators` calls
from moe_routing._autograd import Rule, recorded
from moe_routing._call_cache import UNREADABLE, CachedCall, described, is_ordinary, matcher, never
from moe_routing._dispatch import dispatcher_of, empty_output
from moe_routing._operators import CallConfig
from moe_routing.kernel import (
    NO_OPERANDS,
    Operands,
    Prepares,
    RoutingOutput,
    WarmsUp,
    by_name,
    fields,
    replaced,
)
from moe_routing.planning import routed
from moe_routing.planning.kernel import RoutedPlan
from moe_routing.private_api import carries_tangents, is_functorch_wrapped_tensor
from moe_routing_registry import RoutingSpec
from moe_routing_registry.request import verify_rate
from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    from moe_routing._after import After
    from moe_routing._autograd import Backward, Gradients
    from moe_routing._call_cache import Matches
    from moe_routing._dispatch import Resolved
    from moe_routing.gating.call import Gate
    from moe_routing.gating.latest import Latest
    from moe_routing.kernel import Prepared
    from moe_routing.planning.kernel import DispatchPlan
    from moe_routing.reference.shadow import Health, Shadow
    from moe_routing_registry import ResolutionReport

_CALLS_KEPT = 1024
"""A router that has cached so many calls forgets them all and begins anew."""
_NO_OUT = "out: expected None where gradients are wanted, got tensors; use torch.no_grad()"
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
        self._requested = backend
        self._verify = verify
        if is_dynamo_compiling():
            from moe_routing._traced import shared_shadow_key, text_of

            self._text, self._shadow, self._shadow_key = (
                text_of(spec),
                None,
                shared_shadow_key(verify),
            )
        else:
            self._text, self._shadow = spec.to_json(), _shadow(verify)
            self._shadow_key = None if self._shadow is None else self._shadow.key
        self._calls: dict[tuple[object, ...], CachedCall] = {}
        self._latest: CachedCall | None = None
        self._latest_gate: Latest | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle what the router was made of."""
        return _rebuilt, (self.spec, self.topk, self.num_experts, self._requested, self._verify)

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
            self._check_shared(shared_weights, logits, out, counts)
            output = self(
                logits, topk, per_expert_scale, bias=bias, token_ids=token_ids,
                expert_table=expert_table, num_valid_tokens=num_valid_tokens, valid=valid,
                expert_map=expert_map, logical_to_physical=logical_to_physical,
                replica_count=replica_count, ids=ids, counts=counts, ids_dtype=ids_dtype, out=out,
            )  # fmt: skip
            return self._with_shared(output, shared_weights, in_place=out is not None)
        if valid is not None or type(num_valid_tokens) is Tensor:
            num_valid_tokens = _check.one_padding(num_valid_tokens, valid)
        if counts is not None or logical_to_physical is not None or replica_count is not None:
            return self._with_after(
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
            return self._traced(operands, topk, ids_dtype)
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
        latest = self._latest
        try:
            known = latest is not None and latest.matches(operands, topk, ids_dtype)
        except UNREADABLE:
            known = False
        return latest.route(operands) if known else self._dispatch(operands, topk, ids_dtype)  # type: ignore[union-attr] # known

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
            self._check_shared(shared_weights, logits, pair, counts, plan_out)
        if counts is not None or logical_to_physical is not None or replica_count is not None:
            after = _after.asked(counts, logical_to_physical, replica_count, expert_map)
            _after.check_call(after, operands, self.spec.shared_experts, plan_out)
            routed.require_experts(num_experts, after.replicas)
        # Weights that are no plain memory make those that the plan looks at like them.
        plain = not is_dynamo_compiling() and (
            shared_weights is None or is_ordinary(shared_weights)
        )
        known = self._known(operands, topk, ids_dtype, after) if plain else None
        planned = None if known is None else routed.known(known.plans, asked, operands, plan_out)
        if known is None or planned is None:
            return self._first_with_plan(
                operands, topk, ids_dtype, after, shared_weights, asked, plan_out
            )
        if after is None and shared_weights is None:
            weights, ids = known.route(operands)
        else:
            weights, ids = self._routed(operands, topk, ids_dtype, after, shared_weights)
        return _tuple(RoutedPlan, (weights, ids, planned.fill(weights, ids, plan_out)))

    def _known(
        self,
        operands: Operands,
        topk: int | None,
        ids_dtype: torch.dtype | None,
        after: After | None,
    ) -> CachedCall | None:
        """Return what serves calls like this one, ``None`` if there were none."""
        latest = self._latest
        try:
            if latest is not None and latest.matches(operands, topk, ids_dtype):
                return latest
        except UNREADABLE:  # the checks of a first call name the argument
            return None
        return self._looked_up(operands, topk, ids_dtype, after)[1]

    def _first_with_plan(  # noqa: PLR0913, PLR0917 -- what `with_plan` was given
        self,
        operands: Operands,
        topk: int | None,
        ids_dtype: torch.dtype | None,
        after: After | None,
        shared_weights: Tensor | None,
        asked: routed.Asked,
        out: DispatchPlan | None,
    ) -> RoutedPlan:
        """Check all that a call with a plan brings, before anything is written; then serve it."""
        traced = is_dynamo_compiling()
        checked, selected, dtype = self._checked(operands, topk, ids_dtype)
        if not traced:
            self._check_memory(checked)
        problem, most = routed.checked(
            checked, selected, self.spec.shared_experts, dtype, asked, out
        )
        if traced:
            output = self._routed(operands, topk, ids_dtype, after, shared_weights)
            return routed.composed(output, problem, asked, self._requested, out)
        brought = _tensors(checked) + ([] if shared_weights is None else [shared_weights])
        if out is not None:
            routed.check_memory(checked, out)
            brought += [part for part in out if part is not None]
        if not all(map(is_ordinary, brought)):
            output = self._routed(operands, topk, ids_dtype, after, shared_weights)
            return routed.composed(output, problem, asked, self._requested, out)
        planned = routed.planner(problem, most, checked.logits, self._requested)
        output = self._routed(operands, topk, ids_dtype, after, shared_weights)
        made = RoutedPlan(*output, planned.fill(*output, out))
        known = self._known(operands, topk, ids_dtype, after)
        if known is not None:
            routed.remember(known.plans, asked, planned, checked, made)
        return made

    def _check_shared(
        self,
        shared_weights: Tensor,
        logits: Tensor,
        out: object,
        counts: object,
        planned: DispatchPlan | None = None,
    ) -> None:
        """Check weights of shared experts before anything is written.

        :param out: of the routing, checked by the call itself.
        :param planned: the plan to fill.
        """
        from moe_routing import _shared

        pair = out if isinstance(out, tuple) and len(out) == len(RoutingOutput._fields) else ()
        written = {"weights": pair[0], "ids": pair[1]} if pair else {}
        written |= {} if planned is None else fields(planned)
        _shared.check(shared_weights, self.spec, logits, written, counts)
        if pair and (
            (is_grad_enabled() and shared_weights.requires_grad)
            or (not is_dynamo_compiling() and is_functorch_wrapped_tensor(shared_weights))
        ):
            raise ValueError(_NO_OUT)

    def _with_shared(
        self, output: RoutingOutput, shared_weights: Tensor, *, in_place: bool
    ) -> RoutingOutput:
        from moe_routing import _shared

        count = self.spec.shared_experts
        return _shared.weighed(output, shared_weights, count, in_place=in_place)

    def _with_after(
        self, operands: Operands, topk: int | None, ids_dtype: torch.dtype | None, after: After
    ) -> RoutingOutput:
        """Check what is asked besides routing, then route and do it."""
        _after.check_call(after, operands, self.spec.shared_experts)
        return self._routed(operands, topk, ids_dtype, after)

    def _routed(
        self,
        operands: Operands,
        topk: int | None,
        ids_dtype: torch.dtype | None,
        after: After | None,
        shared_weights: Tensor | None = None,
    ) -> RoutingOutput:
        """Route, and do what is asked besides."""
        if shared_weights is not None:
            output = self._routed(operands, topk, ids_dtype, after)
            in_place = operands.out is not None
            return self._with_shared(output, shared_weights, in_place=in_place)
        if after is None:
            route = self._traced if is_dynamo_compiling() else self._dispatch
            return route(operands, topk, ids_dtype)
        if _leading.is_other_rank(operands.logits):
            return self._reshaped(operands, topk, ids_dtype, after)
        if not is_dynamo_compiling() and all(map(is_ordinary, after.tensors)):
            operands = _check.counted(operands)
            if operands.out is not None:
                operands = operands._replace(out=_check.as_output(operands.out))
            key, found = self._looked_up(operands, topk, ids_dtype, after)
            if found is None:
                found = self._first_with_after(key, operands, topk, ids_dtype, after)
            if found is not None:
                return found.route(operands, after)
        plain = replaced(operands, expert_map=None)
        weights, ids = self(**by_name(plain), topk=topk, ids_dtype=ids_dtype)
        physical = _after.done(
            after, ids, operands.logits.shape[-1], self.spec.shared_experts,
            operands.expert_map, None if operands.out is None else ids,
        )  # fmt: skip
        return RoutingOutput(weights, physical)

    def _dispatch(
        self, operands: Operands, topk: int | None, ids_dtype: torch.dtype | None
    ) -> RoutingOutput:
        """Route a call unlike the one before: look it up, or check it."""
        if _leading.is_other_rank(operands.logits):
            return self._reshaped(operands, topk, ids_dtype)
        operands = _check.counted(operands)
        key, found = self._looked_up(operands, topk, ids_dtype)
        if found is None:
            return self._first(key, operands, topk, ids_dtype)
        return found.route(operands)

    def _reshaped(
        self,
        operands: Operands,
        topk: int | None,
        ids_dtype: torch.dtype | None,
        after: After | None = None,
    ) -> RoutingOutput:
        """Route logits of any leading shape as rows."""
        selected = self._default_topk() if topk is None else _check.integer("topk", topk)
        rows = _leading.flattened(operands, selected + self.spec.shared_experts)
        if after is None:
            output = self(**by_name(rows), topk=topk, ids_dtype=ids_dtype)
        else:
            output = self._routed(rows, topk, ids_dtype, after)
        if operands.out is not None:
            return RoutingOutput(*operands.out)
        return _leading.in_shape(output, operands.logits)

    def _looked_up(
        self,
        operands: Operands,
        topk: int | None,
        ids_dtype: torch.dtype | None,
        after: After | None = None,
    ) -> tuple[tuple[object, ...] | None, CachedCall | None]:
        """Describe a call, and return what serves calls like it, if there were any."""
        try:
            key = described(operands, topk, ids_dtype)
            if after is not None:
                key = (*key, after.optional)
            found = self._calls.get(key)
        except UNREADABLE:
            return None, None
        if found is not None and after is None:  # a call with more never matches as the latest
            self._latest = found
        return key, found

    def _first(
        self,
        key: tuple[object, ...] | None,
        asked: Operands,
        asked_topk: int | None,
        asked_ids: torch.dtype | None,
    ) -> RoutingOutput:
        """Check a call, choose what serves it, and cache that for later calls like it."""
        operands, topk, ids_dtype = self._checked(asked, asked_topk, asked_ids)
        differentiable = self._check_memory(operands)
        config = CallConfig(self._text, self._requested, topk, ids_dtype, self._shadow_key)
        if not all(is_ordinary(t) for t in _tensors(operands)):
            self._latest = CachedCall(never, _never_routes, None, {})
            return self._unordinary(config, operands, differentiable=differentiable)
        if not operands.logits.shape[0]:
            if differentiable:
                return _operators.call(config, operands, training=True)
            return operands.out or empty_output(self.spec, operands.logits, topk, ids_dtype)
        dispatcher = dispatcher_of(self._text, self._requested)
        resolved = dispatcher.resolve_for(
            operands.logits,
            operands.logits.shape[1],
            topk,
            ids_dtype,
            differentiable,
            operands.optional,
        )
        route = self._general_route(resolved)
        rule = Rule(self.spec, topk, resolved.backward, operands.ids is not None)
        call = recorded(rule, route) if differentiable else route
        output = call(operands)
        matches: Matches = never
        plans: dict[tuple[object, ...], routed.Planned] = {}
        if key is not None and all(t.numel() for t in _tensors(operands)):
            if (
                self._shadow is None
                and _vectors_are_contiguous(operands)
                and isinstance(resolved.kernel, Prepares)
            ):
                plain = operands._replace(expert_map=None, out=None) if differentiable else operands
                route = resolved.kernel.prepared(plain) or route
                call = recorded(rule, route) if differentiable else route
            matches = matcher(asked, asked_topk, asked_ids)
            self._keep(key, CachedCall(matches, call, resolved, plans))
        self._latest = CachedCall(matches, call, resolved, plans)
        return output

    def _first_with_after(
        self,
        key: tuple[object, ...] | None,
        asked: Operands,
        asked_topk: int | None,
        asked_ids: torch.dtype | None,
        after: After,
    ) -> CachedCall | None:
        """Check a call that asks for more than routing, choose what serves it, and cache that.

        :returns: ``None`` where no kernel is called, or the operator calls it.
        """
        operands, topk, ids_dtype = self._checked(asked, asked_topk, asked_ids)
        differentiable = self._check_memory(operands)
        if not operands.logits.shape[0] or not all(map(is_ordinary, _tensors(operands))):
            return None
        resolved = dispatcher_of(self._text, self._requested).resolve_for(
            operands.logits,
            operands.logits.shape[1],
            topk,
            ids_dtype,
            differentiable,
            operands.optional | after.optional,
        )
        taken, shadow = resolved.problem.operands, self._shadow
        if differentiable or shadow is not None or "counts" in after.optional - taken:
            # Derivatives, the comparison and the router's own counting need logical ids.
            taken -= {"replicas"}
        rule = Rule(self.spec, topk, resolved.backward, operands.ids is not None)

        def kernel(operands: Operands, after: After) -> RoutingOutput:
            if not after.optional:  # a plain call, which is cached by itself
                return self(**by_name(operands), topk=asked_topk, ids_dtype=asked_ids)

            def route(some: Operands) -> RoutingOutput:
                return resolved.route(some, shadow, after)

            return recorded(rule, route)(operands) if differentiable else route(operands)

        route = _after.served(kernel, taken, self.spec.shared_experts)
        self._latest = CachedCall(never, route, resolved, {})
        if key is not None:
            self._keep(key, self._latest)
        return self._latest

    def _keep(self, key: tuple[object, ...], call: CachedCall) -> None:
        if len(self._calls) >= _CALLS_KEPT:
            self._calls.clear()
        self._calls[key] = call

    def _general_route(self, resolved: Resolved) -> Prepared:
        """Return what calls the kernel with any operands, watched in shadow mode."""
        shadow = self._shadow
        return (
            resolved.route if shadow is None else lambda operands: resolved.route(operands, shadow)
        )

    def _check_memory(self, operands: Operands) -> bool:
        """Refuse what no kernel could read or write; return whether weights need derivatives."""
        _check.check_columns(operands.logits)
        _check.check_addresses(operands)
        differentiable = (
            (is_grad_enabled() and _requires_grad(operands))
            or carries_tangents()
            or any(is_functorch_wrapped_tensor(t) for t in _tensors(operands))
        )
        _refuse_out(operands, differentiable=differentiable)
        if operands.out is not None:
            _check.check_writable("out", *operands.out)
        return differentiable

    def _unordinary(
        self, config: CallConfig, operands: Operands, *, differentiable: bool
    ) -> RoutingOutput:
        """Route tensors that are no plain memory.

        The operator and PyTorch's own rules know what to do with each.
        """
        if any(_check.is_dtensor(t) for t in _tensors(operands)):
            return self._sharded(config, operands, training=differentiable)
        if any(is_functorch_wrapped_tensor(t) for t in _tensors(operands)):
            replayed = operands.ids is not None
            backward = _operator_backward(config, replayed=replayed)
            rule = Rule(self.spec, config.topk, backward, replayed)
            return recorded(rule, lambda some: _operators.call(config, some, training=False))(
                operands
            )
        return _operators.call(config, operands, training=differentiable)

    def _sharded(self, config: CallConfig, operands: Operands, *, training: bool) -> RoutingOutput:
        from moe_routing import _dtensor

        return _dtensor.route(
            config, operands, config.topk + self.spec.shared_experts, training=training
        )

    def _traced(
        self, operands: Operands, topk: int | None, ids_dtype: torch.dtype | None
    ) -> RoutingOutput:
        """Put the operator into the graph that Dynamo is making."""
        if _leading.is_other_rank(operands.logits):
            return self._reshaped(operands, topk, ids_dtype)
        operands, topk, ids_dtype = self._checked(_check.counted(operands), topk, ids_dtype)
        training = is_grad_enabled() and _requires_grad(operands)
        _refuse_out(operands, differentiable=training)
        config = CallConfig(self._text, self._requested, topk, ids_dtype, self._shadow_key)
        if _check.is_dtensor(operands.logits):
            return self._sharded(config, operands, training=training)
        return _operators.call(config, operands, training=training)

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
        return dispatcher_of(self._text, self._requested).resolve(
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
        topk = self._default_topk() if topk is None else topk
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
        self._latest = CachedCall(never, _never_routes, choices[-1], {})
        return choices[-1].report_with_notes()

    @property
    def backend(self) -> str | None:
        """Name of the backend of the latest call, ``None`` before the first.

        Calls inside compiled functions do not count: they leave Python before they are routed.
        """
        resolved = self._latest.resolved if self._latest else None
        return resolved.report.winner if resolved else None

    @property
    def report(self) -> ResolutionReport | None:
        """How the backend of the latest call was chosen, ``None`` before the first call.

        See ``backend``.
        """
        latest = self._latest
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

        return Health() if self._shadow is None else self._shadow.health()

    def __repr__(self) -> str:
        """Show the spec, and what the router was made for."""
        extras = [
            f"{name}={value!r}"
            for name, value in (
                ("topk", self.topk),
                ("num_experts", self.num_experts),
                ("backend", self._requested),
            )
            if value is not None
        ]
        return f"Router({', '.join([repr(self.spec.family), *extras])}): {self.spec.formula}"

    def _default_topk(self) -> int:
        if self.topk is None:
            msg = "topk: expected an int (this router was not made from a configuration), got None"
            raise TypeError(msg)
        return self.topk

    def _checked(
        self, operands: Operands, topk: int | None, ids_dtype: torch.dtype | None
    ) -> tuple[Operands, int, torch.dtype]:
        """Check every argument, and fill in K, the ids' dtype and the type of ``out``."""
        topk = self._default_topk() if topk is None else _check.integer("topk", topk)
        out = operands.out
        if out is not None:
            out = _check.as_output(out)
            operands = replaced(operands, out=out)
        if ids_dtype is None:
            ids_dtype = torch.int32 if out is None else out.ids.dtype
        _check.check_operands(self.spec, operands, topk, ids_dtype, num_experts=self.num_experts)
        return operands, topk, ids_dtype


def _rebuilt(
    spec: RoutingSpec,
    topk: int | None,
    num_experts: int | None,
    backend: str | None,
    verify: float | bool | None,  # noqa: FBT001 -- True is what users write
) -> Router:
    return Router(spec, topk=topk, num_experts=num_experts, backend=backend, verify=verify)


def _operator_backward(config: CallConfig, *, replayed: bool) -> Backward:
    """Return the first derivative through the operator, of tensors of any type."""

    def backward(
        grad_weights: Tensor, logits: Tensor, ids: Tensor, per_expert_scale: Tensor | None
    ) -> Gradients:
        gradients: Gradients = torch.ops.moe_routing.route_backward(
            grad_weights, logits, ids, per_expert_scale, config.spec, config.backend, replayed
        )
        return gradients

    return backward


def _never_routes(operands: Operands) -> RoutingOutput:
    raise AssertionError(operands)


def _tensors(operands: Operands) -> list[Tensor]:
    """Return the tensors that a call brings."""
    return [t for t in (*operands[:-1], *(operands.out or ())) if isinstance(t, Tensor)]


def _vectors_are_contiguous(operands: Operands) -> bool:
    return all(t.is_contiguous() for t in operands[1:-1] if isinstance(t, Tensor))


def _refuse_out(operands: Operands, *, differentiable: bool) -> None:
    """Refuse ``out`` where the weights need derivatives, or ``out`` itself does."""
    out = operands.out
    if out is None:
        return
    if differentiable:
        raise ValueError(_NO_OUT)
    if is_grad_enabled() and out.weights.requires_grad:
        msg = (
            "out: expected tensors that require no gradient, got weights that do; "
            "use torch.no_grad()"
        )
        raise ValueError(msg)


def _requires_grad(operands: Operands) -> bool:
    scale = operands.per_expert_scale
    return operands.logits.requires_grad or (scale is not None and scale.requires_grad)


def _shadow(verify: float | bool | None) -> Shadow | None:  # noqa: FBT001 -- True is what users write
    """Return what watches the calls, if the argument or the environment asks for it."""
    rate = verify_rate(verify)
    if not rate:
        return None
    from moe_routing.reference.shadow import Shadow

    return Shadow(rate)
