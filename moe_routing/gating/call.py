"""``Router.gate``: checks the arguments, finds the kernel, and calls it."""

from __future__ import annotations

from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from moe_routing import _after, _check, _shared
from moe_routing._autograd import apply_map
from moe_routing._call_cache import is_ordinary
from moe_routing._dispatch import chosen, dispatcher_of, dtype_name, empty_output
from moe_routing._registry import registry
from moe_routing.formula.gate import in_full
from moe_routing.gating import op
from moe_routing.gating._check import check_logits_dtype, checked_projection
from moe_routing.gating.kernel import GateOutput, GatesAndPlans, GatesAndRoutes, Projection, RMSNorm
from moe_routing.gating.latest import (
    Chosen,
    Given,
    PlannedGate,
    keep_plan,
    known_plan,
    latest_of,
    served_by,
)
from moe_routing.gating.problem import GateProblem, Norm
from moe_routing.kernel import Operands, RoutingOutput, by_name, fields, is_mask, replaced
from moe_routing.planning import routed
from moe_routing.planning.call import allocated, prepared
from moe_routing.planning.kernel import RoutedPlan
from moe_routing.private_api import has_tangent, is_functorch_wrapped_tensor
from moe_routing.probing import probe
from moe_routing_registry import Request
from moe_routing_registry.request import preference
from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import Unpack

    from moe_routing._after import After
    from moe_routing._router import Router
    from moe_routing.gating.kernel import GateKernel
    from moe_routing.kernel import Prepared
    from moe_routing.reference.shadow import Shadow
    from moe_routing_registry import RoutingSpec

_registry = registry()
_NAMES = (
    "hidden", "router_weight", "router_bias", "norm", "input_scale", "norm", "input_multiplier",
)  # fmt: skip
"""The arguments that the parts of a projection came in."""
_APART = ("counts", "logical_to_physical", "replica_count", "shared_weights")
"""Arguments of what is done after the kernel."""
_UNWANTED = torch.empty(0)
"""In place of logits that nobody asks for."""
_kernels: dict[tuple[object, ...], Any] = {}
_KERNELS_KEPT = 1024
"""When there are more, remembering begins anew."""


class GateConfig(NamedTuple):
    """What of a call is neither a tensor nor part of the projection.

    :ivar spec: the canonical JSON of the spec.
    :ivar backend: the backend that the user named, if any.
    :ivar shadow: the key of what watches the router's calls, if anything does.
    :ivar training: whether gradients are wanted.
    """

    spec: str
    topk: int
    ids_dtype: torch.dtype
    logits_dtype: torch.dtype
    invariant: bool
    backend: str | None
    shadow: str | None
    training: bool


class GateOptions(TypedDict, total=False):
    """What a call takes by name; see ``Gate.__call__``."""

    router_bias: Tensor | None
    norm: RMSNorm | None
    input_scale: Tensor | None
    input_multiplier: float
    logits_dtype: torch.dtype
    invariant: bool
    bias: Tensor | None
    token_ids: Tensor | None
    expert_table: Tensor | None
    num_valid_tokens: int | Tensor | None
    valid: Tensor | None
    expert_map: Tensor | None
    logical_to_physical: Tensor | None
    replica_count: Tensor | None
    shared_weights: Tensor | None
    ids: Tensor | None
    counts: Tensor | None
    ids_dtype: torch.dtype


class Gate:
    """Gates hidden states: ``weights, ids = gate(hidden, router_weight, topk)``.

    Get one from a router: ``moe_routing.get_router("gemma4").gate``. It computes the router's
    linear layer, with what stands in front of it, and routes the logits as that router does. A call
    like the one before costs one comparison of its tensors: its arguments are not checked again.

    >>> import moe_routing
    >>> gate = moe_routing.get_router("mixtral").gate
    >>> hidden, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> weights, ids, logits = gate(hidden, weight, 1, return_logits=True)
    >>> ids, logits
    (tensor([[1]], dtype=torch.int32), tensor([[1., 2.]]))
    """

    def __init__(self, router: Router) -> None:
        """Gate as that router routes."""
        self._router = router

    @overload
    def __call__(
        self,
        hidden: Tensor,
        router_weight: Tensor,
        topk: int | None = None,
        per_expert_scale: Tensor | None = None,
        *,
        return_logits: Literal[False] = False,
        **options: Unpack[GateOptions],
    ) -> RoutingOutput: ...
    @overload
    def __call__(
        self,
        hidden: Tensor,
        router_weight: Tensor,
        topk: int | None = None,
        per_expert_scale: Tensor | None = None,
        *,
        return_logits: Literal[True],
        **options: Unpack[GateOptions],
    ) -> GateOutput: ...
    def __call__(  # noqa: PLR0913 -- one argument an operand of the maths
        self,
        hidden: Tensor,
        router_weight: Tensor,
        topk: int | None = None,
        per_expert_scale: Tensor | None = None,
        *,
        router_bias: Tensor | None = None,
        norm: RMSNorm | None = None,
        input_scale: Tensor | None = None,
        input_multiplier: float = 1.0,
        logits_dtype: torch.dtype = torch.float32,
        return_logits: bool = False,
        invariant: bool = True,
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
        ids_dtype: torch.dtype = torch.int32,
    ) -> RoutingOutput | GateOutput:
        """Compute the logits of every token, select ``topk`` experts and weigh them.

        The logits are ``(norm(hidden) * input_scale * input_multiplier) @ router_weight.T +
        router_bias``, with nothing rounded on the way but by arithmetic in float32 or better.

        :param hidden: ``[T, H]``, bfloat16, float16 or float32, any strides; H is at most 16,384,
            T may be 0.
        :param router_weight: ``[E, H]``, of the dtype of ``hidden`` or float32; E is at most 1,024.
        :param topk: K, as of ``Router.__call__``.
        :param per_expert_scale: likewise, as are ``bias``, ``token_ids``, ``expert_table``,
            ``num_valid_tokens``, ``valid``, ``expert_map``, ``logical_to_physical``,
            ``replica_count``, ``shared_weights``, ``ids``, ``counts`` and ``ids_dtype``.
        :param router_bias: ``[E]``, any float dtype: the bias of the linear layer, part of the
            logits.
        :param norm: a ``moe_routing.RMSNorm`` in front of everything else.
        :param input_scale: ``[H]``, any float dtype: a factor of each column.
        :param input_multiplier: a factor of all columns; Gemma 4 has ``H**-0.5``.
        :param logits_dtype: round the logits to it before they are routed, as a model does whose
            linear layer returns bfloat16.
        :param return_logits: return the logits too, as they were routed.
        :param invariant: let the bits of a row depend on nothing but the row, whatever other rows
            there are and wherever it stands. A backend that has no such order of summation is not
            used. ``False`` asks for the fastest order.
        :returns: ``RoutingOutput(weights, ids)``, or ``GateOutput(weights, ids, logits)``.
        :raises TypeError: an argument has the wrong type or dtype.
        :raises ValueError: an argument has the wrong value, shape or device.
        :raises BackendUnavailableError: no backend fits, or the one that was named does not.
        """
        return_logits = _check.flag("return_logits", return_logits)
        is_norm = isinstance(norm, RMSNorm)
        weight, eps = (norm.weight, norm.eps) if is_norm else (None, None)  # type: ignore[union-attr] # is_norm says so
        padding = num_valid_tokens
        if valid is not None or type(num_valid_tokens) is Tensor:
            padding = _check.one_padding(num_valid_tokens, valid)
        after = renaming = None
        if shared_weights is not None:
            _shared.check(shared_weights, self._router.spec, hidden, {}, counts)
        if counts is not None or logical_to_physical is not None or replica_count is not None:
            after = _after.asked(counts, logical_to_physical, replica_count, expert_map)
            named = {
                "per_expert_scale": per_expert_scale, "bias": bias, "token_ids": token_ids,
                "expert_table": expert_table, "num_valid_tokens": num_valid_tokens, "valid": valid,
                "expert_map": expert_map, "ids": ids, "hidden": hidden,
                "router_weight": router_weight, "router_bias": router_bias, "norm": weight,
                "input_scale": input_scale,
            }  # fmt: skip
            self._check_after(after, named)
            renaming, expert_map = expert_map, None  # after the kernel
        given = Given(
            Projection(
                hidden, router_weight, router_bias, weight, input_scale, eps, input_multiplier
            ),
            Operands(
                hidden, per_expert_scale, bias, token_ids, expert_table, padding, expert_map, ids,
            ),
            topk, ids_dtype, logits_dtype, invariant,
        )  # fmt: skip
        known = None
        if not is_dynamo_compiling() and (is_norm or norm is None):
            known = served_by(self._router._latest_gate, given)  # noqa: SLF001 -- a gate is a part of its router
        if known is not None:
            made = _served(known.chosen, given.projection, given.operands, wanted=return_logits)
            made = made if after is None else self._done(after, made, router_weight, renaming)
            made = self._weighed(made, shared_weights)
            return made if return_logits else RoutingOutput(made.weights, made.ids)
        checked = self._checked(
            hidden, router_weight, topk, per_expert_scale,
            {
                "router_bias": router_bias, "norm": norm, "input_scale": input_scale,
                "input_multiplier": input_multiplier, "logits_dtype": logits_dtype,
                "invariant": invariant, "bias": bias, "token_ids": token_ids,
                "expert_table": expert_table, "num_valid_tokens": num_valid_tokens, "valid": valid,
                "expert_map": expert_map, "ids": ids, "ids_dtype": ids_dtype,
            },
        )  # fmt: skip
        made, chosen = _gated(*checked, wanted=return_logits)
        if chosen is not None:
            self._router._latest_gate = latest_of(given, chosen)  # noqa: SLF001 -- likewise
        made = made if after is None else self._done(after, made, router_weight, renaming)
        made = self._weighed(made, shared_weights)
        return made if return_logits else RoutingOutput(made.weights, made.ids)

    def with_plan(  # noqa: PLR0913 -- the arguments of a call, and those of `plan`
        self,
        hidden: Tensor,
        router_weight: Tensor,
        topk: int | None = None,
        per_expert_scale: Tensor | None = None,
        *,
        num_experts: int | None = None,
        block: int | None = None,
        capacity: int | None = None,
        drop: Literal["last", "least_weight"] = "last",
        masked: bool = False,
        **options: Unpack[GateOptions],
    ) -> RoutedPlan:
        """Gate, and plan the ids: a call, then ``moe_routing.plan`` of its ids.

        :param num_experts: as of ``Router.with_plan``, like ``block``, ``capacity``, ``drop`` and
            ``masked``.
        :param options: what a call takes by name, but for ``return_logits``.
        :returns: ``RoutedPlan(weights, ids, plan)``.
        :raises TypeError: an argument has the wrong type or dtype.
        :raises ValueError: an argument has the wrong value, shape or device.
        :raises BackendUnavailableError: no backend fits, or the one that was named does not.
        """
        for name, value in options.items():
            if name not in GateOptions.__annotations__:
                raise TypeError(refusal(name, "no such argument", value))
        asked, given = (num_experts, block, capacity, drop, masked), None
        is_norm = isinstance(options.get("norm"), (RMSNorm, NoneType))
        apart = any(options.get(name) is not None for name in _APART)
        if is_norm and not apart and not is_dynamo_compiling():
            given = _given(hidden, router_weight, topk, per_expert_scale, options)
            latest = served_by(self._router._latest_gate, given)  # noqa: SLF001 -- a gate is a part of its router
            plan = None if latest is None else known_plan(latest, asked)
            if latest is not None and plan is not None:
                return _planned(latest.chosen, given.projection, given.operands, plan)
        checked = self._checked(hidden, router_weight, topk, per_expert_scale, options)
        return self._first_with_plan(*checked, options, asked, given)

    def _first_with_plan(  # noqa: PLR0913, PLR0917 -- the results of `_checked`, and a plan's arguments
        self,
        projection: Projection,
        operands: Operands,
        config: GateConfig,
        options: GateOptions,
        asked: routed.Asked,
        given: Given | None,
    ) -> RoutedPlan:
        """Gate and plan what is not like the latest call.

        :param given: what to remember it by, if it brings nothing that is done after the kernel.
        """
        spec, shared_weights = self._router.spec, options.get("shared_weights")
        problem, most = routed.checked(
            operands, config.topk, spec.shared_experts, config.ids_dtype, asked, None
        )
        planned, brought = None, _tensors(projection, operands)
        if shared_weights is not None:
            brought.append(shared_weights)
        if not is_dynamo_compiling() and all(map(is_ordinary, brought)):
            planned = routed.planner(problem, most, operands.logits, config.backend)
        is_call = config.shadow is None and not config.training and projection.hidden.shape[0] > 0
        if given is not None and planned is not None and is_call:
            chosen = _chosen(projection, config, operands.optional)
            made, plan = _first_planned(chosen, projection, operands, planned)
            latest = served_by(self._router._latest_gate, given) or latest_of(given, chosen)  # noqa: SLF001 -- a gate is a part of its router
            if latest is not None:
                keep_plan(latest, asked, plan)
                self._router._latest_gate = latest  # noqa: SLF001 -- likewise
            return made
        after, expert_map = _after_of(options), options.get("expert_map")
        if shared_weights is not None:
            _shared.check(shared_weights, spec, projection.hidden, {}, options.get("counts"))
        if after is not None:
            self._check_after(after, {**by_name(operands), **fields(projection), "logits": None})
            routed.require_experts(asked[0], after.replicas)
            operands = replaced(operands, expert_map=None)  # after the kernel
        gated, _ = _gated(projection, operands, config, wanted=False)
        if after is not None:
            gated = self._done(after, gated, projection.router_weight, expert_map)
        gated = self._weighed(gated, shared_weights)
        output = RoutingOutput(gated.weights, gated.ids)
        if planned is None:
            return routed.composed(output, problem, asked, config.backend, None)
        return RoutedPlan(*output, planned.fill(*output, None))

    def _check_after(self, after: After, operands: Mapping[str, object]) -> None:
        """Check what is to be done after the kernel, and the map, which no kernel sees then."""
        for name, value in operands.items():
            if isinstance(value, Tensor) and not _check.is_dense(value):
                raise ValueError(refusal(name, "a dense tensor", value))
        shared = self._router.spec.shared_experts
        _after.check(after, operands["router_weight"], 0, shared, operands, {})

    def _done(
        self, after: After, made: GateOutput, router_weight: Tensor, expert_map: Tensor | None
    ) -> GateOutput:
        """Do what is left to do with the logical ids, and rename them."""
        experts, shared = router_weight.shape[0], self._router.spec.shared_experts
        return _renamed(made, _after.done(after, made.ids, experts, shared, expert_map, None))

    def _weighed(self, made: GateOutput, shared_weights: Tensor | None) -> GateOutput:
        """Return the output with the call's weights of shared experts, if it has any."""
        if shared_weights is None:
            return made
        output = RoutingOutput(made.weights, made.ids)
        count = self._router.spec.shared_experts
        return GateOutput(*_shared.weighed(output, shared_weights, count), made.logits)

    def __repr__(self) -> str:
        """Show the router."""
        return f"{self._router!r}.gate"

    def _checked(
        self,
        hidden: Tensor,
        router_weight: Tensor,
        topk: int | None,
        per_expert_scale: Tensor | None,
        options: GateOptions,
    ) -> tuple[Projection, Operands, GateConfig]:
        """Check every argument; what stands in place of the logits has their shape."""
        router = self._router
        projection = checked_projection(
            hidden,
            router_weight,
            router_bias=options.get("router_bias"),
            norm=options.get("norm"),
            input_scale=options.get("input_scale"),
            input_multiplier=options.get("input_multiplier", 1.0),
            num_experts=router.num_experts,
        )
        operands = _check.counted(
            Operands(
                _in_place_of_logits(projection), per_expert_scale, options.get("bias"),
                options.get("token_ids"), options.get("expert_table"),
                _check.one_padding(options.get("num_valid_tokens"), options.get("valid")),
                options.get("expert_map"), options.get("ids"),
            )
        )  # fmt: skip
        calls = router._calls  # noqa: SLF001 -- a gate is a part of its router
        topk = calls.default_topk() if topk is None else _check.integer("topk", topk)
        ids_dtype = options.get("ids_dtype", torch.int32)
        logits_dtype = check_logits_dtype(options.get("logits_dtype", torch.float32))
        invariant = _check.flag("invariant", options.get("invariant", True))
        _check.check_operands(router.spec, operands, topk, ids_dtype)
        _refuse_special(projection, operands)
        training = torch.is_grad_enabled() and any(
            isinstance(t, Tensor) and t.requires_grad for t in (*projection, per_expert_scale)
        )
        config = GateConfig(
            calls.text, topk, ids_dtype, logits_dtype, invariant, calls.requested, calls.shadow_key,
            training,
        )  # fmt: skip
        return projection, operands, config


def _given(
    hidden: Tensor,
    router_weight: Tensor,
    topk: int | None,
    per_expert_scale: Tensor | None,
    options: GateOptions,
) -> Given:
    """Return what tells whether a call is like the latest.

    All arguments may be wrong, but that ``norm`` is a norm.
    """
    norm, valid = options.get("norm"), options.get("valid")
    padding = options.get("num_valid_tokens")
    if valid is not None or type(padding) is Tensor:
        padding = _check.one_padding(padding, valid)
    eps, weight = (None, None) if norm is None else norm
    projection = Projection(
        hidden,
        router_weight,
        options.get("router_bias"),
        weight,
        options.get("input_scale"),
        eps,
        options.get("input_multiplier", 1.0),
    )
    operands = Operands(
        hidden,
        per_expert_scale,
        options.get("bias"),
        options.get("token_ids"),
        options.get("expert_table"),
        padding,
        options.get("expert_map"),
        options.get("ids"),
    )
    ids_dtype = options.get("ids_dtype", torch.int32)
    logits_dtype = options.get("logits_dtype", torch.float32)
    invariant = options.get("invariant", True)
    return Given(projection, operands, topk, ids_dtype, logits_dtype, invariant)


def _after_of(options: GateOptions) -> After | None:
    """Return what is to be done after the kernel, if the arguments ask for anything."""
    counts, count = options.get("counts"), options.get("replica_count")
    table = options.get("logical_to_physical")
    if counts is None and table is None and count is None:
        return None
    return _after.asked(counts, table, count, options.get("expert_map"))


def _gated(
    projection: Projection, operands: Operands, config: GateConfig, *, wanted: bool
) -> tuple[GateOutput, Chosen | None]:
    """Call the kernel with plain tensors, and the operator with all others.

    :param wanted: whether the logits are; anything may stand in their place otherwise.
    :returns: also what serves later calls of this kind, ``None`` where they must be checked too.
    """
    plain = not (config.training or is_dynamo_compiling())
    if plain and all(map(is_ordinary, _tensors(projection, operands))):
        if config.shadow is not None or not projection.hidden.shape[0]:
            return run(projection, operands, config), None
        chosen = _chosen(projection, config, operands.optional)
        return _served(chosen, projection, operands, wanted=wanted), chosen
    made = op.gate(projection, _as_tensors(operands), config)
    if operands.expert_map is None:
        return made, None
    return _renamed(made, apply_map(made.ids, operands.expert_map)), None


def _planned(
    chosen: Chosen, projection: Projection, operands: Operands, plan: PlannedGate
) -> RoutedPlan:
    """Gate a token or more, and plan the ids, as an earlier call of this kind did."""
    if plan.at_once:
        made = _at_once(chosen, projection, operands, plan.planned)
        assert made is not None  # noqa: S101 -- for mypy: it was not the first time
        return made
    weights, ids, _ = _served(chosen, projection, operands, wanted=False)
    return RoutedPlan(weights, ids, plan.planned.fill(weights, ids, None))


def _first_planned(
    chosen: Chosen, projection: Projection, operands: Operands, planned: routed.Planned
) -> tuple[RoutedPlan, PlannedGate]:
    """Gate and plan, and return what plans calls like this one."""
    made = _at_once(chosen, projection, operands, planned)
    if made is not None:
        return made, PlannedGate(planned, at_once=True)
    weights, ids, _ = _served(chosen, projection, operands, wanted=False)
    made = RoutedPlan(weights, ids, planned.fill(weights, ids, None))
    again = routed.Planned(prepared(planned.call, ids, made.plan))
    return made, PlannedGate(again, at_once=False)


def _at_once(
    chosen: Chosen, projection: Projection, operands: Operands, planned: routed.Planned
) -> RoutedPlan | None:
    """Let the kernel that gates plan too; ``None`` where it does not, and nothing was done."""
    call, device = planned.call, projection.hidden.device
    if chosen.planned is None or call.problem.drop == "least_weight":
        return None
    out = allocated(call.parts, device)
    projection = projection if chosen.as_is else _readable(projection)
    taken = _taken(operands, as_is=chosen.as_is)
    with in_full(device):
        output = chosen.planned(projection, call.kernel, out, capacity=call.capacity, **taken)
    return None if output is None else RoutedPlan(*output, out)


def _renamed(made: GateOutput, ids: Tensor) -> GateOutput:
    """Return the output with these ids; PyTorch 2.11 compiles no ``_replace`` that is returned."""
    return GateOutput(made.weights, ids, made.logits)


def run(projection: Projection, operands: Operands, config: GateConfig) -> GateOutput:
    """Gate checked real tensors, and let shadow mode compare logits and what is routed.

    :param operands: what routing takes; its logits are made here.
    """
    if not projection.hidden.shape[0]:
        logits, spec = _empty_logits(projection, config.logits_dtype), _spec(config)
        return GateOutput(*empty_output(spec, logits, config.topk, config.ids_dtype), logits)
    shadow = None if config.shadow is None else _shadow(config.shadow)
    chosen = _chosen(projection, config, operands.optional)
    return _served(chosen, projection, operands, shadow, wanted=True)


def _chosen(projection: Projection, config: GateConfig, optional: frozenset[str]) -> Chosen:
    """Choose what gates, and what routes where the kernel does not.

    :param optional: names of the operands that not every backend takes.
    """
    kernel, routes, spec = _kernel(projection, config, optional), None, _spec(config)
    if not isinstance(kernel, GatesAndRoutes):
        routes = dispatcher_of(config.spec, who_routes(config.backend)).resolve_for(
            _empty_logits(projection, config.logits_dtype), projection.router_weight.shape[0],
            config.topk, config.ids_dtype, config.training, optional,
        )  # fmt: skip
    return Chosen(
        kernel, routes, spec, config.topk, config.logits_dtype,
        kernel.routed if isinstance(kernel, GatesAndRoutes) else None,
        kernel.planned if isinstance(kernel, GatesAndPlans) else None,
    )  # fmt: skip


def _served(
    chosen: Chosen,
    projection: Projection,
    operands: Operands,
    shadow: Shadow | None = None,
    *,
    wanted: bool,
) -> GateOutput:
    """Gate a token or more.

    :param wanted: whether the logits are: otherwise a kernel that routes does not write them.
    """
    projection = projection if chosen.as_is else _readable(projection)
    if chosen.routed is not None and shadow is None and not wanted:
        with in_full(projection.hidden.device):
            output = chosen.routed(projection, None, **_taken(operands, as_is=chosen.as_is))
        return GateOutput(*output, _UNWANTED)
    kernel, logits = chosen.kernel, _empty_logits(projection, chosen.logits_dtype)
    operands = replaced(operands, logits=logits)
    with in_full(logits.device):
        route: Prepared
        if chosen.routes is not None:
            kernel(projection, logits)
            route = chosen.routes.route
            output = route(operands)
        else:
            assert chosen.routed is not None  # noqa: S101 -- for mypy
            output = chosen.routed(projection, logits, **_taken(operands))
            route = partial(_routed, chosen.routed, projection, logits)
        if shadow is not None:
            wrong_in = partial(_wrong_in, projection, logits)
            shadow.observe(chosen.spec, chosen.topk, operands, output, route, wrong_in)
    return GateOutput(*output, logits)


@torch.no_grad()
def _wrong_in(projection: Projection, logits: Tensor, rows: slice) -> list[str]:
    """Say which logits of these rows are further from the exact ones than their bound allows."""
    from moe_routing.reference.compare import exact_device
    from moe_routing.reference.gate_oracle import logits_problems

    home = exact_device(logits)
    some = projection._replace(hidden=projection.hidden[rows])
    there = Projection(*(t.to(home) if isinstance(t, Tensor) else t for t in some))  # type: ignore[arg-type] # its own parts
    return logits_problems(there, logits[rows].to(home))


def _empty_logits(projection: Projection, dtype: torch.dtype) -> Tensor:
    hidden, weight = projection.hidden, projection.router_weight
    return hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=dtype)


def _spec(config: GateConfig) -> RoutingSpec:
    return dispatcher_of(config.spec, None).spec


def who_routes(backend: str | None) -> str | None:
    """Return the backend to name for routing: a backend that only gates leaves it to the best."""
    found = None if backend is None else _registry.backends.get(backend)
    return backend if found is None or "route" in found.factories else None


def _routed(
    gate: Callable[..., RoutingOutput], projection: Projection, logits: Tensor, operands: Operands
) -> RoutingOutput:
    return gate(projection, logits, **_taken(operands))


def _taken(operands: Operands, *, as_is: bool = False) -> dict[str, Any]:
    """Return what a kernel that routes takes besides logits, by name.

    :param as_is: it may read all of them as they are.
    """
    _, scale, bias, token_ids, table, valid, expert_map, ids, _ = operands
    if not as_is:
        scale, bias, token_ids, table = map(_packed, (scale, bias, token_ids, table))
        expert_map, ids = _packed(expert_map), _packed(ids)
        valid = _packed(valid) if is_mask(valid) else valid  # type: ignore[arg-type] # a tensor
    taken = {
        "per_expert_scale": scale,
        "bias": bias,
        "token_ids": token_ids,
        "expert_table": table,
        "num_valid_tokens": valid,
        "expert_map": expert_map,
    }
    return taken if ids is None else {**taken, "ids": ids}


def _kernel(projection: Projection, config: GateConfig, optional: frozenset[str]) -> GateKernel:
    hidden, weight, bias, norm_weight, input_scale, eps, _ = projection
    norm: Norm = "" if eps is None else "rms" if norm_weight is None else "rms_weight"
    asked = (
        config.spec, config.topk, config.ids_dtype, config.logits_dtype, config.invariant,
        config.backend, hidden.device, hidden.dtype, weight.dtype, weight.shape, bias is None, norm,
        input_scale is None, optional, preference.get(), _registry.generation,
    )  # fmt: skip
    kernel: GateKernel | None = _kernels.get(asked)
    if kernel is None:
        problem = GateProblem(
            spec=_spec(config),
            num_experts=weight.shape[0],
            topk=config.topk,
            hidden_size=hidden.shape[1],
            dtype=dtype_name(hidden.dtype),
            float32_weight=weight.dtype != hidden.dtype,
            router_bias=bias is not None,
            norm=norm,
            input_scale=input_scale is not None,
            logits_dtype=dtype_name(config.logits_dtype),
            ids_dtype=dtype_name(config.ids_dtype),
            invariant=config.invariant,
            operands=optional,
        )
        kernel, _ = chosen(problem, probe(hidden.device), Request.gather(config.backend))
        if len(_kernels) >= _KERNELS_KEPT:
            _kernels.clear()
        _kernels[asked] = kernel
    assert kernel is not None  # noqa: S101 -- for mypy
    return kernel


def _in_place_of_logits(projection: Projection) -> Tensor:
    """Return a tensor without memory of its own that has the shape of the logits."""
    hidden, weight = projection.hidden, projection.router_weight
    return hidden.detach()[:, :1].expand(hidden.shape[0], weight.shape[0])


def _tensors(projection: Projection, operands: Operands) -> list[Tensor]:
    return [t for t in _parts(projection, operands) if isinstance(t, Tensor)]


def _parts(projection: Projection, operands: Operands) -> list[object]:
    """Return what a call brings, without the logits."""
    _, *others = operands
    return [*projection, *others]


def _as_tensors(operands: Operands) -> Operands:
    """Return the operands as the operator takes them."""
    valid = operands.num_valid_tokens
    if valid is None or isinstance(valid, Tensor):
        return operands
    counted = torch.full((1,), valid, dtype=torch.int64, device=operands.logits.device)
    return replaced(operands, num_valid_tokens=counted)


def _refuse_special(projection: Projection, operands: Operands) -> None:
    """Refuse what no rule says anything about.

    :raises TypeError: there is a DTensor, or a tensor inside torch.func or with a tangent.
    """
    traced = is_dynamo_compiling()
    names = (*_NAMES, *Operands._fields[1:])
    for name, tensor in zip(names, _parts(projection, operands), strict=True):
        if not isinstance(tensor, Tensor):
            continue
        if _check.is_dtensor(tensor):
            expected = "a plain tensor; gate the rows of each rank by themselves"
            raise TypeError(refusal(name, expected, tensor))
        if not traced and (is_functorch_wrapped_tensor(tensor) or has_tangent(tensor)):
            where = "outside torch.func and forward mode"
            expected = f"a tensor {where}; route the logits of a linear layer there"
            raise TypeError(refusal(name, expected, tensor))


def _readable(projection: Projection) -> Projection:
    """Return tensors that a kernel may read: nothing negated lazily, and unit strides."""
    hidden, weight, bias, norm_weight, input_scale, eps, multiplier = projection
    return Projection(
        _rows(hidden), _rows(weight), _packed(bias), _packed(norm_weight), _packed(input_scale),
        eps, multiplier,
    )  # fmt: skip


def _rows(matrix: Tensor) -> Tensor:
    matrix = matrix.resolve_neg()
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _packed(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.resolve_neg().contiguous()


def _shadow(key: str) -> Shadow | None:
    from moe_routing.reference.shadow import shadow_of

    return shadow_of(key)
