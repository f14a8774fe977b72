"""The latest plain call of a router's gate: the next one is mostly like it, in the next layer.

It skips the checks and the choice of kernels then. See ``moe_routing._call_cache``, which does the
same for a router.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moe_routing._call_cache import ABSENT, UNREADABLE
from moe_routing._registry import registry
from moe_routing.planning.routed import PLANS_KEPT, key_of
from moe_routing.private_api import carries_tangents, is_fake_mode, tensor_guard
from moe_routing_registry.request import preference

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_routing._dispatch import Resolved
    from moe_routing.gating.kernel import GateKernel, Projection
    from moe_routing.kernel import Operands, RoutingOutput
    from moe_routing.planning.routed import Asked, Planned
    from moe_routing_registry import RoutingSpec

_registry = registry()
MATRICES = 2
"""Tensors of a projection whose rows may lie apart, the first ones."""


class Chosen(NamedTuple):
    """What serves calls of one kind.

    :ivar routes: what routes the logits; ``None`` where the kernel does.
    :ivar routed: the method of a kernel that routes: asking for it takes longer than all else.
    :ivar planned: likewise of a kernel that plans.
    :ivar as_is: a kernel may read what these calls bring as it is.
    """

    kernel: GateKernel
    routes: Resolved | None
    spec: RoutingSpec
    topk: int
    logits_dtype: torch.dtype
    routed: Callable[..., RoutingOutput] | None = None
    planned: Callable[..., RoutingOutput | None] | None = None
    as_is: bool = False


class Given(NamedTuple):
    """The arguments of a call, as the caller wrote them; see ``Gate.__call__``.

    :ivar operands: without logits.
    """

    projection: Projection
    operands: Operands
    topk: int | None
    ids_dtype: torch.dtype
    logits_dtype: torch.dtype
    invariant: bool


class PlannedGate(NamedTuple):
    """What plans the ids of calls of one kind.

    :ivar at_once: the kernel that gates does, or a part of it.
    """

    planned: Planned
    at_once: bool


class Latest(NamedTuple):
    """The latest call, and what serves those that are like it.

    :ivar plans: by what ``with_plan`` was asked for (``planning.routed.key_of``).
    """

    matches: Callable[[Given], bool]
    chosen: Chosen
    plans: dict[tuple[object, ...], PlannedGate]


def served_by(latest: Latest | None, given: Given) -> Latest | None:
    """Return the latest call, ``None`` where this one is not like it."""
    try:
        return latest if latest is not None and latest.matches(given) else None
    except UNREADABLE:  # the checks name the argument
        return None


def latest_of(given: Given, chosen: Chosen) -> Latest | None:
    """Return what recognises calls like this one, which passed the checks and is no training.

    Such a call has the same types, dtypes, devices, shapes and strides of tensors, and the same
    numbers; of valid tokens any number from 0 to T.
    """
    projection, operands, *words = given
    eps, multiplier, valid = projection.eps, projection.multiplier, operands.num_valid_tokens
    brought = [t for t in (*projection, *operands[1:]) if isinstance(t, Tensor)]
    alike = tensor_guard(_tensors(given))
    kind, rows = type(valid), projection.hidden.shape[0]
    if (
        alike is None
        or not (kind is int or valid is None or isinstance(valid, Tensor))  # checked each time
        or not all(tensor.numel() for tensor in brought)
        or type(multiplier) is not float
        or not (eps is None or type(eps) is float)
    ):
        return None
    topk, ids_dtype, logits_dtype, invariant = words
    preferred, generation = preference.get(), _registry.generation
    wants_gradients = any(tensor.requires_grad for tensor in brought)

    def matches(given: Given) -> bool:
        projection, operands = given[:2]
        valid = operands.num_valid_tokens
        if (
            given.topk is not topk
            or given.ids_dtype is not ids_dtype
            or given.logits_dtype is not logits_dtype
            or given.invariant is not invariant
            or type(projection.multiplier) is not float
            or projection.multiplier != multiplier
            or type(projection.eps) is not type(eps)
            or projection.eps != eps
            or type(valid) is not kind
            or (kind is int and not 0 <= valid <= rows)  # type: ignore[operator] # an int, as the line above says
            or preference.get() != preferred
            or _registry.generation != generation
            or (wants_gradients and torch.is_grad_enabled())
            or carries_tangents()
            or is_fake_mode()
        ):
            return False
        brought = (*projection[:5], *operands[1:5], operands.expert_map, operands.ids)
        # The guard must not be asked of nested tensors: it wants strides, and ends the process.
        if True in [tensor.is_nested for tensor in brought if tensor is not None]:
            return False
        return not (isinstance(valid, Tensor) and valid.is_nested) and alike(*_tensors(given))

    # Nothing is negated lazily: the call was plain.
    as_is = all(
        tensor.stride(-1) == 1 if index < MATRICES else tensor.is_contiguous()
        for index, tensor in enumerate(brought)
    )
    return Latest(matches, chosen._replace(as_is=as_is), {})


def known_plan(latest: Latest, asked: Asked) -> PlannedGate | None:
    """Return what plans calls like the latest, ``None`` where none asked for such a plan."""
    try:
        return latest.plans.get(key_of(asked))
    except UNREADABLE:  # the checks name the argument
        return None


def keep_plan(latest: Latest, asked: Asked, plan: PlannedGate) -> None:
    """Keep what has planned, for later calls like the latest."""
    if len(latest.plans) >= PLANS_KEPT:
        latest.plans.clear()
    latest.plans[key_of(asked)] = plan


def _tensors(given: Given) -> tuple[Tensor, ...]:
    """Return twelve tensors, one for each that a call can bring."""
    hidden, weight, router_bias, norm_weight, input_scale, _, _ = given.projection
    _, scale, bias, token_ids, table, valid, expert_map, ids, _ = given.operands
    return (
        hidden,
        weight,
        ABSENT[0] if router_bias is None else router_bias,
        ABSENT[1] if norm_weight is None else norm_weight,
        ABSENT[2] if input_scale is None else input_scale,
        ABSENT[3] if scale is None else scale,
        ABSENT[4] if bias is None else bias,
        ABSENT[5] if token_ids is None else token_ids,
        ABSENT[6] if table is None else table,
        valid if isinstance(valid, Tensor) else ABSENT[7],
        ABSENT[8] if expert_map is None else expert_map,
        ABSENT[9] if ids is None else ids,
    )
