"""``Router.gate`` in the place of a router's own computation of its logits.

The operands are read from the router at each call, and nothing is kept: trained, merged and loaded
weights count at the next call. Each call also asks anew whether something takes part that ``gate``
would pass over; then the router computes its logits itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from moe_routing._call_cache import ORDINARY
from moe_routing._check import is_dense, is_dtensor
from moe_routing._dispatch import dtype_name
from moe_routing.gating.kernel import GateOutput
from moe_routing.gating.problem import FLOATS, MAX_EXPERTS, MAX_HIDDEN, GateProblem
from moe_routing.integrations.transformers import _logits
from moe_routing.integrations.transformers._warnings import warn_once
from moe_routing.private_api import TRACED, carries_tangents, is_functorch_wrapped_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_routing import RoutingSpec
    from moe_routing.gating.problem import Norm
    from moe_routing.integrations.transformers._fronts import Front, ReadFront
    from moe_routing.integrations.transformers._loads import Route
    from moe_routing.integrations.transformers._logits import Router

GATED = "_moe_routing_gate"
"""Attribute of a router that ``patch`` was asked to gate.

It says why the router computes its own logits, and is ``""`` if it need not.
"""
_DTYPES = tuple(getattr(torch, name) for name in FLOATS)
_TAKES = f"gate takes {', '.join(FLOATS[:-1])} or {FLOATS[-1]}"
_FLOAT32 = torch.finfo(torch.float32)


def gated(
    read: ReadFront, router: Router, route: Route, hidden: Tensor, further: Mapping[str, Any]
) -> GateOutput | None:
    """Gate a router's hidden states; ``None``: the router computes its own logits.

    Warns once if it does so for another reason than the one that ``patch`` found.

    :param further: what routing takes after the logits, by name.
    """
    found: str | None = getattr(router, GATED)
    if found is None:
        return None
    front = read(router)
    reason = front if isinstance(front, str) else _why_not(front) or _why_not_now(front, hidden)
    if isinstance(front, str) or reason:
        if reason != found and not is_compiling():
            warn_once(f"{type(router).__name__} computes its own logits: {reason}")
        return None
    weight = front.weight
    if front.flattens:
        hidden = _logits.flat(hidden)
    if front.hidden_dtype not in {None, torch.float32}:  # float32 holds what it was without loss
        hidden = hidden.to(front.hidden_dtype)
    if weight.dtype not in {hidden.dtype, torch.float32}:
        weight = weight.float()
    made = route.gate(
        hidden,
        weight,
        router_bias=front.bias,
        norm=front.norm,
        input_scale=front.scale,
        input_multiplier=front.multiplier,
        logits_dtype=front.parameter_dtype or front.weight.dtype,
        return_logits=True,
        **further,
    )
    logits = made.logits.to(front.logits_dtype or made.logits.dtype)
    return GateOutput(made.weights, made.ids, logits)


def why_not(read: ReadFront, router: Router) -> str:
    """Say why a router computes its own logits, ``""`` if ``gate`` may.

    What depends on the call is left to the call. So are DTensors: FSDP's are whole there.
    """
    front = read(router)
    return front if isinstance(front, str) else _why_not(front)


def problem_of(read: ReadFront, router: Router, spec: RoutingSpec, topk: int) -> GateProblem:
    """Return the problem of a router that ``gate`` may serve; hidden states as its weight is."""
    front = read(router)
    assert not isinstance(front, str)  # noqa: S101 -- for mypy
    experts, columns = front.weight.shape
    norm: Norm = ""
    if front.norm is not None:
        norm = "rms" if front.norm.weight is None else "rms_weight"
    return GateProblem(
        spec=spec,
        num_experts=experts,
        topk=topk,
        hidden_size=columns,
        dtype=dtype_name(front.weight.dtype),
        router_bias=front.bias is not None,
        norm=norm,
        input_scale=front.scale is not None,
        logits_dtype=dtype_name(front.parameter_dtype or front.weight.dtype),
        ids_dtype="int64",
    )


def _why_not(front: Front) -> str:
    """Say what ``gate`` does not take of what the router holds."""
    norm_weight = None if front.norm is None else front.norm.weight
    named = {"weight": front.weight, "bias": front.bias, "norm": norm_weight, "scale": front.scale}
    reasons = [_why_not_tensor(name, t) for name, t in named.items() if t is not None]
    for reason in reasons:
        if reason:
            return reason
    return _why_not_sizes(front) or _why_not_numbers(front)


def _why_not_tensor(name: str, tensor: Tensor) -> str:
    if not (_is_plain(tensor) or is_dtensor(tensor)):
        kind = type(tensor)
        return f"its {name} is a {kind.__module__}.{kind.__qualname__}, no plain tensor"
    if tensor.dtype not in _DTYPES or not is_dense(tensor):
        return f"its {name} is {_of(tensor)}; {_TAKES}"
    return ""


def _why_not_sizes(front: Front) -> str:
    experts, columns = front.weight.shape
    if not (1 <= experts <= MAX_EXPERTS and 1 <= columns <= MAX_HIDDEN):
        most = f"{MAX_EXPERTS} experts and {MAX_HIDDEN} columns"
        return f"its weight has the shape [{experts}, {columns}]; gate takes up to {most}"
    vectors = (
        ("bias", front.bias, experts),
        ("norm", None if front.norm is None else front.norm.weight, columns),
        ("scale", front.scale, columns),
    )
    for name, vector, length in vectors:
        if vector is not None and vector.shape != (length,):
            return f"its {name} has the shape {list(vector.shape)}; gate takes [{length}]"
    return ""


def _why_not_numbers(front: Front) -> str:
    if front.norm is not None and not _FLOAT32.tiny <= front.norm.eps <= _FLOAT32.max:
        return f"the eps of its norm is {front.norm.eps}; gate takes what float32 holds, above 0"
    if not -_FLOAT32.max <= front.multiplier <= _FLOAT32.max:
        return f"it multiplies by {front.multiplier}; gate takes what float32 holds"
    return ""


def _why_not_now(front: Front, hidden: Tensor) -> str:
    """Say why the router computes its own logits in this call."""
    weight = front.weight
    if not (_is_plain(hidden) and is_dense(hidden)) or is_dtensor(weight):
        return "a tensor is of another class than torch.Tensor, or is not dense"
    if _is_autocast(hidden.device.type):
        return "autocast is on"
    if not is_compiling() and (
        carries_tangents() or any(map(is_functorch_wrapped_tensor, (hidden, weight)))
    ):
        return "torch.func or forward-mode autograd computes a derivative"
    if not front.flattens and hidden.dim() != 2:  # noqa: PLR2004 -- of a matrix
        return f"hidden states have the shape {list(hidden.shape)}"
    return _why_not_dtypes(front, hidden)


def _why_not_dtypes(front: Front, hidden: Tensor) -> str:
    """Say which dtypes the router's own operations do not take together."""
    parameter_dtype = front.parameter_dtype or front.weight.dtype
    weight = f"its weight is {_of(front.weight)}"
    if hidden.dtype not in _DTYPES or (front.hidden_dtype or hidden.dtype) != parameter_dtype:
        return f"hidden states are {_of(hidden)}, {weight}"
    if front.bias is not None and (front.parameter_dtype or front.bias.dtype) != parameter_dtype:
        return f"its bias is {_of(front.bias)}, {weight}"
    if front.scale is not None and front.scale.dtype != hidden.dtype:
        return f"its scale is {_of(front.scale)}, {weight}"
    return ""


def _is_autocast(device_type: str) -> bool:
    # Dynamo would leave a call of is_autocast_available in its graph.
    compiling, available = is_compiling(), torch.amp.is_autocast_available
    has_autocast = device_type != "meta" if compiling else available(device_type)
    return has_autocast and torch.is_autocast_enabled(device_type)


def _is_plain(tensor: object) -> bool:
    return type(tensor) in ORDINARY or isinstance(tensor, TRACED)


def _of(tensor: Tensor) -> str:
    dtype = dtype_name(tensor.dtype)
    return dtype if is_dense(tensor) else f"{dtype} and not dense"
