"""The functions that users call.

They get a router, list names, explain a choice and prefer a backend.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.compiler import is_dynamo_compiling

from moe_routing import _check
from moe_routing._dispatch import dtype_name
from moe_routing._registry import registry
from moe_routing._router import Router
from moe_routing.families import FAMILIES
from moe_routing.models import MODELS, NOT_EXPRESSED, from_config
from moe_routing.planning import PlanProblem
from moe_routing.planning.routed import note
from moe_routing.probing import probe
from moe_routing_registry import (
    Problem,
    Request,
    ResolutionReport,
    RoutingProblem,
    RoutingSpec,
    UnknownNameError,
)
from moe_routing_registry.request import preferring, verify_rate
from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from contextlib import AbstractContextManager

    from moe_routing_registry import BackendSpec, DeviceInfo

_routers: dict[tuple[object, ...], Router] = {}


def get_router(
    router: str | RoutingSpec | object,
    *,
    backend: str | None = None,
    verify: float | bool | None = None,
) -> Router:
    """Return the router of a model, a family, a spec or a configuration.

    The same arguments give the same router, from any thread. Nothing is probed or built before its
    first call. Inside a compiled function the call is a constant, and costs nothing when the
    function runs.

    :param router: a model name (transformers' ``model_type``), a family name, a ``RoutingSpec``, or
        a configuration object or dict with a ``model_type``, from which E, K, groups, scaling and
        renormalisation are read.
    :param backend: name of the backend to use, or an error; ``None`` to choose the best for each
        device.
    :param verify: ``True``, or the share of calls, to compare with the float64 oracle in shadow;
        see ``Router.health``.
    :raises UnknownNameError: no such router or backend; near matches are named.
    :raises ValueError: the configuration lacks an attribute, or has an impossible value.

    >>> get_router("gemma4")
    Router('gemma4'): ids = topk(l); w = softmax(l[ids]) * per_expert_scale[ids]
    >>> get_router("gema4")
    Traceback (most recent call last):
    ...
    moe_routing_registry.errors.UnknownNameError: unknown router 'gema4': did you mean 'gemma4'...
    """
    if is_dynamo_compiling():
        return _traced_router(router, backend, verify)
    if backend is not None:
        registry().check_names(Request(backend=backend, asked_by="argument"))
    if verify is not None:
        verify_rate(verify)
    spec, topk, num_experts = _look_up(router)
    key = (spec, topk, num_experts, backend, verify)
    found = _routers.get(key)
    if found is None:
        # No lock: of two threads that come here at once, both get the router that was stored first.
        made = Router(spec, topk=topk, num_experts=num_experts, backend=backend, verify=verify)
        found = _routers.setdefault(key, made)
    return found


def _traced_router(router: object, backend: str | None, verify: float | bool | None) -> Router:  # noqa: FBT001 -- as above
    """Make a router inside a compiled function, of parts that Dynamo can trace."""
    from moe_routing._traced import check_backend, spec_named

    if backend is not None:
        check_backend(backend)
    if isinstance(router, RoutingSpec):
        return Router(router, backend=backend, verify=verify)
    if isinstance(router, str):
        return Router(spec_named(router), backend=backend, verify=verify)
    configured = from_config(router)
    return Router(
        configured.spec,
        topk=configured.topk,
        num_experts=configured.num_experts,
        backend=backend,
        verify=verify,
    )


def _look_up(router: object) -> tuple[RoutingSpec, int | None, int | None]:
    if isinstance(router, RoutingSpec):
        return router, None, None
    if isinstance(router, str):
        return named(router), None, None
    try:
        configured = from_config(router)
    except TypeError as error:
        if not str(error).startswith("config: "):  # else it names a field of the configuration
            raise
        expected = "a name, a RoutingSpec, or a configuration with a model_type"
        raise TypeError(refusal("router", expected, router)) from error
    return configured.spec, configured.topk, configured.num_experts


def named(router: str) -> RoutingSpec:
    """Return the spec of a model or family.

    :raises UnknownNameError: there is none of that name.
    :raises ValueError: the model's routing cannot be expressed.
    """
    known = list_routers()
    if router not in known and router in NOT_EXPRESSED:
        msg = f"router: {router!r} cannot be expressed: {NOT_EXPRESSED[router]}"
        raise ValueError(msg)
    if router not in known:
        kind = "router"
        raise UnknownNameError(kind, router, known)
    return known[router]


def list_routers() -> Mapping[str, RoutingSpec]:
    """Return every name that ``get_router`` takes, with its spec.

    The names are those of families and models, also of plug-ins.

    >>> list_routers()["mixtral"].formula
    'ids = topk(l); w = softmax(l[ids])'
    """
    plugins = registry().families
    brought = {
        name: spec for family_spec in plugins.values() for name, spec in family_spec.models.items()
    }
    return {
        **{name: family_spec.spec for name, family_spec in plugins.items()},
        **brought,
        **{name: family_spec.spec for name, family_spec in FAMILIES.items()},
        **{name: preset.spec for name, preset in MODELS.items()},
    }


def list_backends() -> Mapping[str, BackendSpec]:
    """Return the spec of every registered backend, best first.

    >>> "eager" in list_backends()
    True
    """
    return dict(sorted(registry().backends.items(), key=lambda item: (-item[1].priority, item[0])))


def explain(  # noqa: PLR0913 -- the fields of a RoutingProblem
    router: str | RoutingSpec | Problem | object,
    *,
    device: torch.device | str = "cpu",
    num_experts: int | None = None,
    topk: int | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    backend: str | None = None,
    training: bool = False,
    operands: Collection[str] = (),
) -> ResolutionReport:
    """Say which backend a call would get, and why; builds and launches nothing, and never raises.

    :param router: as for ``get_router``; or a problem of any operation, which has a size and dtype
        of its own.
    :param num_experts: E; 128 where neither it nor a configuration says.
    :param topk: K; 8 (at most E) where neither it nor a configuration says.
    :param operands: names of the operands that not every backend takes and that the call brings:
        ``("ids",)`` for recorded ids.
    :returns: a report; where an argument is wrong (no such router, dtype or device; an E or K that
        cannot be) its ``error`` says what came and what was expected.

    >>> explain("gemma4", num_experts=128, topk=8).winner
    'eager'
    >>> explain("gemma4", device="warp:9").winner is None
    True
    """
    if isinstance(router, Problem):
        return _explain(router, device, backend)
    try:
        spec, configured_topk, configured_experts = _look_up(router)
        num_experts = num_experts if num_experts is not None else configured_experts or 128
        num_experts = _check.experts(num_experts)
        topk = _check.integer(
            "topk", topk if topk is not None else configured_topk or min(8, num_experts)
        )
        spec.check_size(num_experts, topk)
        training = _check.flag("training", training)
        known = {dtype_name(each) for each in _check.LOGITS_DTYPES}
        if not isinstance(dtype, (str, torch.dtype)) or dtype_name(dtype) not in known:
            expected = f"one of {', '.join(sorted(known))}"
            raise ValueError(refusal("dtype", expected, dtype))  # noqa: TRY301 -- the report carries it, like what the calls above raise
        problem = RoutingProblem(
            spec=spec,
            num_experts=num_experts,
            topk=topk,
            dtype=dtype_name(dtype),
            training=training,
            operands=_check.optional_operands(operands),
        )
    except Exception as error:  # noqa: BLE001 -- the promise is never to raise: the report carries what went wrong
        return ResolutionReport(requested=backend, error=f"{type(error).__name__}: {error}")
    return _explain(problem, device, backend)


def _explain(problem: Problem, device: torch.device | str, backend: str | None) -> ResolutionReport:
    try:
        request = _request_for(problem, backend)
    except Exception as error:  # noqa: BLE001 -- likewise
        return ResolutionReport(requested=backend, error=f"{type(error).__name__}: {error}")
    try:
        info = probe(device)
    except Exception as error:  # noqa: BLE001 -- likewise
        return ResolutionReport(problem=problem, requested=backend, error=str(error))
    try:
        report = registry().resolve(problem, info, request)
        plans = isinstance(problem, RoutingProblem) and report.winner is not None
        notes = (_how_it_plans(problem, info, request),) if plans else ()  # type: ignore[arg-type] # as the line above says
        return replace(report, notes=(*report.notes, *notes))
    except Exception as error:  # noqa: BLE001 -- likewise
        return ResolutionReport(
            problem=problem,
            device=info,
            requested=backend,
            error=f"{type(error).__name__}: {error}",
        )


def _request_for(problem: Problem, backend: str | None) -> Request:
    if problem.operation != "exchange":
        return Request.gather(backend)
    from moe_routing.distributed.request import transport_request  # which few processes need

    return transport_request(backend)


def _how_it_plans(problem: RoutingProblem, info: DeviceInfo, request: Request) -> str:
    """Say what ``Router.with_plan`` would do."""
    shared = problem.spec.shared_experts
    try:
        plans = PlanProblem(
            num_experts=problem.num_experts + shared,
            topk=problem.topk + shared,
            ids_dtype=problem.ids_dtype,
        )
    except ValueError as error:
        return f"with_plan: not here, {error}"
    report = registry().resolve(plans, info, request)
    if report.winner is None:
        return f"with_plan: not here, {report.why}"
    return note(report.winner)


def prefer(backend: str) -> AbstractContextManager[None]:
    """Use that backend for every call inside the block, in this thread or task.

    A router that names a backend of its own keeps it. What ``prefer`` returns may be used for
    several blocks, one after another, inside each other or in several threads.

    :raises UnknownNameError: no such backend.

    >>> with prefer("eager"):
    ...     route = get_router("mixtral")
    """
    registry().check_names(Request(backend=backend, asked_by="context"))
    return preferring(backend)
