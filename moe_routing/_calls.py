"""The call cache of a router, and the code that fills it.

``Router`` builds the operands and passes them to ``Calls``. The first call with a new signature is
validated, and a kernel is chosen for it; later calls with that signature use the cached kernel.
``Router.__call__`` itself handles a call with the signature of the previous one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from moe_routing import _after, _check, _leading, _op, _operators  # noqa: F401 -- `_op` registers what `_operators` calls
from moe_routing._autograd import Rule, recorded
from moe_routing._call_cache import UNREADABLE, CachedCall, described, is_ordinary, matcher, never
from moe_routing._dispatch import dispatcher_of, empty_output
from moe_routing._operators import CallConfig
from moe_routing.kernel import Operands, Prepares, RoutingOutput, fields, replaced
from moe_routing.planning import routed
from moe_routing.planning.kernel import RoutedPlan
from moe_routing.private_api import carries_tangents, is_functorch_wrapped_tensor
from moe_routing_registry.request import verify_rate

if TYPE_CHECKING:
    from moe_routing._after import After
    from moe_routing._autograd import Backward, Gradients
    from moe_routing._call_cache import Matches
    from moe_routing._dispatch import Resolved
    from moe_routing.kernel import Prepared
    from moe_routing.planning.kernel import DispatchPlan
    from moe_routing.reference.shadow import Shadow
    from moe_routing_registry import RoutingSpec

_CACHE_SIZE = 1024
"""Maximum number of cached calls. When the cache is full, it is cleared."""
_NO_OUT = "out: expected None where gradients are wanted, got tensors; use torch.no_grad()"
_tuple = tuple.__new__
"""Makes a named tuple in half the time of its own constructor, which is a Python function."""


class Calls:
    """Validates, dispatches and caches the calls of one router.

    :ivar spec: the spec of the router; ``topk`` and ``num_experts`` are those of the router too.
    :ivar requested: the name of the backend that the user asked for, or ``None``.
    :ivar text: the spec as JSON, which the custom operators take.
    :ivar shadow: compares calls with the oracle, or ``None``; operators find it by ``shadow_key``.
    :ivar cache: the cached calls, by signature.
    :ivar latest: the cached call that was used last.
    """

    def __init__(
        self,
        spec: RoutingSpec,
        topk: int | None,
        num_experts: int | None,
        requested: str | None,
        verify: float | bool | None,  # noqa: FBT001 -- True is what users write
    ) -> None:
        """Start with an empty cache. ``Router`` documents the parameters."""
        self.spec = spec
        self.topk = topk
        self.num_experts = num_experts
        self.requested = requested
        if is_dynamo_compiling():
            from moe_routing._traced import shared_shadow_key, text_of

            self.text, self.shadow, self.shadow_key = text_of(spec), None, shared_shadow_key(verify)
        else:
            self.text, self.shadow = spec.to_json(), _shadow(verify)
            self.shadow_key = None if self.shadow is None else self.shadow.key
        self.cache: dict[tuple[object, ...], CachedCall] = {}
        self.latest: CachedCall | None = None

    def planned(  # noqa: PLR0913, PLR0917 -- what `with_plan` was given
        self,
        operands: Operands,
        topk: int | None,
        ids_dtype: torch.dtype | None,
        after: After | None,
        shared_weights: Tensor | None,
        asked: routed.Asked,
        out: DispatchPlan | None,
    ) -> RoutedPlan:
        """Route, and plan the ids."""
        # Weights that are no plain memory make those that the plan looks at like them.
        plain = not is_dynamo_compiling() and (
            shared_weights is None or is_ordinary(shared_weights)
        )
        known = self._known(operands, topk, ids_dtype, after) if plain else None
        planned = None if known is None else routed.known(known.plans, asked, operands, out)
        if known is None or planned is None:
            return self._first_with_plan(
                operands, topk, ids_dtype, after, shared_weights, asked, out
            )
        if after is None and shared_weights is None:
            weights, ids = known.route(operands)
        else:
            weights, ids = self.routed(operands, topk, ids_dtype, after, shared_weights)
        return _tuple(RoutedPlan, (weights, ids, planned.fill(weights, ids, out)))

    def _known(
        self,
        operands: Operands,
        topk: int | None,
        ids_dtype: torch.dtype | None,
        after: After | None,
    ) -> CachedCall | None:
        """Return the cached call with this signature, or ``None``."""
        again = self._again(operands, topk, ids_dtype)
        return again or self._looked_up(operands, topk, ids_dtype, after)[1]

    def _again(
        self, operands: Operands, topk: int | None, ids_dtype: torch.dtype | None
    ) -> CachedCall | None:
        """Return the latest cached call if its signature matches, or ``None``."""
        latest = self.latest
        try:
            return latest if latest and latest.matches(operands, topk, ids_dtype) else None
        except UNREADABLE:  # the checks of a first call name the argument
            return None

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
        """Validate all arguments of a call with a plan before writing anything; then route."""
        traced = is_dynamo_compiling()
        checked, selected, dtype = self.checked(operands, topk, ids_dtype)
        if not traced:
            self._check_memory(checked)
        problem, most = routed.checked(
            checked, selected, self.spec.shared_experts, dtype, asked, out
        )
        if traced:
            output = self.routed(operands, topk, ids_dtype, after, shared_weights)
            return routed.composed(output, problem, asked, self.requested, out)
        brought = _tensors(checked) + ([] if shared_weights is None else [shared_weights])
        if out is not None:
            routed.check_memory(checked, out)
            brought += [part for part in out if part is not None]
        if not all(map(is_ordinary, brought)):
            output = self.routed(operands, topk, ids_dtype, after, shared_weights)
            return routed.composed(output, problem, asked, self.requested, out)
        planned = routed.planner(problem, most, checked.logits, self.requested)
        output = self.routed(operands, topk, ids_dtype, after, shared_weights)
        made = RoutedPlan(*output, planned.fill(*output, out))
        known = self._known(operands, topk, ids_dtype, after)
        if known is not None:
            routed.remember(known.plans, asked, planned, checked, made)
        return made

    def check_shared(
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

    def weighed(
        self, output: RoutingOutput, shared_weights: Tensor, *, in_place: bool
    ) -> RoutingOutput:
        """Put the weights of shared experts into the output."""
        from moe_routing import _shared

        count = self.spec.shared_experts
        return _shared.weighed(output, shared_weights, count, in_place=in_place)

    def with_after(
        self, operands: Operands, topk: int | None, ids_dtype: torch.dtype | None, after: After
    ) -> RoutingOutput:
        """Validate the counts and replicas of a call, then route with them."""
        _after.check_call(after, operands, self.spec.shared_experts)
        return self.routed(operands, topk, ids_dtype, after)

    def routed(
        self,
        operands: Operands,
        topk: int | None,
        ids_dtype: torch.dtype | None,
        after: After | None,
        shared_weights: Tensor | None = None,
    ) -> RoutingOutput:
        """Route, and apply counts, replicas and weights of shared experts if they are given."""
        if shared_weights is not None:
            output = self.routed(operands, topk, ids_dtype, after)
            in_place = operands.out is not None
            return self.weighed(output, shared_weights, in_place=in_place)
        if after is None:
            return self.plain(operands, topk, ids_dtype)
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
        weights, ids = self.routed(plain, topk, ids_dtype, None)
        physical = _after.done(
            after, ids, operands.logits.shape[-1], self.spec.shared_experts,
            operands.expert_map, None if operands.out is None else ids,
        )  # fmt: skip
        return RoutingOutput(weights, physical)

    def plain(
        self, operands: Operands, topk: int | None, ids_dtype: torch.dtype | None
    ) -> RoutingOutput:
        """Route without counts, replicas or weights of shared experts.

        ``Router.__call__`` repeats these steps inline, which saves a Python call.
        """
        if is_dynamo_compiling():
            return self.traced(operands, topk, ids_dtype)
        again = self._again(operands, topk, ids_dtype)
        return again.route(operands) if again else self.dispatch(operands, topk, ids_dtype)

    def dispatch(
        self, operands: Operands, topk: int | None, ids_dtype: torch.dtype | None
    ) -> RoutingOutput:
        """Route a call whose signature differs from the latest: use the cache, or validate it."""
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
        selected = self.default_topk() if topk is None else _check.integer("topk", topk)
        rows = _leading.flattened(operands, selected + self.spec.shared_experts)
        output = self.routed(rows, topk, ids_dtype, after)
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
        """Return the signature of a call, and the cached call with that signature or ``None``."""
        try:
            key = described(operands, topk, ids_dtype)
            if after is not None:
                key = (*key, after.optional)
            found = self.cache.get(key)
        except UNREADABLE:
            return None, None
        if found is not None and after is None:  # a call with more never matches as the latest
            self.latest = found
        return key, found

    def _first(
        self,
        key: tuple[object, ...] | None,
        asked: Operands,
        asked_topk: int | None,
        asked_ids: torch.dtype | None,
    ) -> RoutingOutput:
        """Validate a call, choose a kernel, route, and cache the kernel for this signature."""
        operands, topk, ids_dtype = self.checked(asked, asked_topk, asked_ids)
        differentiable = self._check_memory(operands)
        config = CallConfig(self.text, self.requested, topk, ids_dtype, self.shadow_key)
        if not all(is_ordinary(t) for t in _tensors(operands)):
            self.latest = CachedCall(never, never_routes, None, {})
            return self._unordinary(config, operands, differentiable=differentiable)
        if not operands.logits.shape[0]:
            if differentiable:
                return _operators.call(config, operands, training=True)
            return operands.out or empty_output(self.spec, operands.logits, topk, ids_dtype)
        dispatcher = dispatcher_of(self.text, self.requested)
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
                self.shadow is None
                and _vectors_are_contiguous(operands)
                and isinstance(resolved.kernel, Prepares)
            ):
                plain = operands._replace(expert_map=None, out=None) if differentiable else operands
                route = resolved.kernel.prepared(plain) or route
                call = recorded(rule, route) if differentiable else route
            matches = matcher(asked, asked_topk, asked_ids)
            self._keep(key, CachedCall(matches, call, resolved, plans))
        self.latest = CachedCall(matches, call, resolved, plans)
        return output

    def _first_with_after(
        self,
        key: tuple[object, ...] | None,
        asked: Operands,
        asked_topk: int | None,
        asked_ids: torch.dtype | None,
        after: After,
    ) -> CachedCall | None:
        """Validate a call with counts or replicas, choose a kernel, and cache it.

        :returns: ``None`` where no kernel is called, or the operator calls it.
        """
        operands, topk, ids_dtype = self.checked(asked, asked_topk, asked_ids)
        differentiable = self._check_memory(operands)
        if not operands.logits.shape[0] or not all(map(is_ordinary, _tensors(operands))):
            return None
        resolved = dispatcher_of(self.text, self.requested).resolve_for(
            operands.logits,
            operands.logits.shape[1],
            topk,
            ids_dtype,
            differentiable,
            operands.optional | after.optional,
        )
        taken, shadow = resolved.problem.operands, self.shadow
        if differentiable or shadow is not None or "counts" in after.optional - taken:
            # Derivatives, the comparison and the router's own counting need logical ids.
            taken -= {"replicas"}
        rule = Rule(self.spec, topk, resolved.backward, operands.ids is not None)

        def kernel(operands: Operands, after: After) -> RoutingOutput:
            if not after.optional:  # a plain call, which is cached by itself
                return self.routed(operands, asked_topk, asked_ids, None)

            def route(some: Operands) -> RoutingOutput:
                return resolved.route(some, shadow, after)

            return recorded(rule, route)(operands) if differentiable else route(operands)

        route = _after.served(kernel, taken, self.spec.shared_experts)
        self.latest = CachedCall(never, route, resolved, {})
        if key is not None:
            self._keep(key, self.latest)
        return self.latest

    def _keep(self, key: tuple[object, ...], call: CachedCall) -> None:
        if len(self.cache) >= _CACHE_SIZE:
            self.cache.clear()
        self.cache[key] = call

    def _general_route(self, resolved: Resolved) -> Prepared:
        """Return what calls the kernel with any operands, watched in shadow mode."""
        shadow = self.shadow
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

    def traced(
        self, operands: Operands, topk: int | None, ids_dtype: torch.dtype | None
    ) -> RoutingOutput:
        """Put the operator into the graph that Dynamo is making."""
        if _leading.is_other_rank(operands.logits):
            return self._reshaped(operands, topk, ids_dtype)
        operands, topk, ids_dtype = self.checked(_check.counted(operands), topk, ids_dtype)
        training = is_grad_enabled() and _requires_grad(operands)
        _refuse_out(operands, differentiable=training)
        config = CallConfig(self.text, self.requested, topk, ids_dtype, self.shadow_key)
        if _check.is_dtensor(operands.logits):
            return self._sharded(config, operands, training=training)
        return _operators.call(config, operands, training=training)

    def default_topk(self) -> int:
        if self.topk is None:
            msg = "topk: expected an int (this router was not made from a configuration), got None"
            raise TypeError(msg)
        return self.topk

    def checked(
        self, operands: Operands, topk: int | None, ids_dtype: torch.dtype | None
    ) -> tuple[Operands, int, torch.dtype]:
        """Check every argument, and fill in K, the ids' dtype and the type of ``out``."""
        topk = self.default_topk() if topk is None else _check.integer("topk", topk)
        out = operands.out
        if out is not None:
            out = _check.as_output(out)
            operands = replaced(operands, out=out)
        if ids_dtype is None:
            ids_dtype = torch.int32 if out is None else out.ids.dtype
        _check.check_operands(self.spec, operands, topk, ids_dtype, num_experts=self.num_experts)
        return operands, topk, ids_dtype


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


def never_routes(operands: Operands) -> RoutingOutput:
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
