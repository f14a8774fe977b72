"""Every argument of ``gate`` that ``route`` does not have, checked before anything is launched."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_routing import _check
from moe_routing.gating.kernel import Projection, RMSNorm
from moe_routing.gating.problem import FLOATS, MAX_EXPERTS, MAX_HIDDEN
from moe_routing_registry.routing_spec import HUGE, TINY, number
from moe_routing_registry.text import refusal

_MATRIX = 2
_DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in FLOATS)
_ANY = f"{', '.join(FLOATS[:-1])} or {FLOATS[-1]}"


def checked_projection(  # noqa: PLR0913 -- one argument each for what is in front of the logits
    hidden: object,
    router_weight: object,
    *,
    router_bias: object,
    norm: object,
    input_scale: object,
    input_multiplier: object,
    num_experts: int | None,
) -> Projection:
    """Check what makes the logits.

    :param num_experts: E as a configuration says it, if one does.
    :raises TypeError: an argument has the wrong type or dtype.
    :raises ValueError: an argument has the wrong value, shape or device.
    """
    hidden = _matrix("hidden", hidden, "[T, H]", _DTYPES)
    columns = hidden.shape[1]
    if not 1 <= columns <= MAX_HIDDEN:
        raise ValueError(refusal("hidden", f"1 to {MAX_HIDDEN} columns", hidden))
    allowed = (hidden.dtype,) if hidden.dtype is torch.float32 else (hidden.dtype, torch.float32)
    weight = _matrix("router_weight", router_weight, f"[E, {columns}]", allowed)
    rows = weight.shape[0]
    if weight.shape[1] != columns:
        raise ValueError(refusal("router_weight", f"shape [E, {columns}], as hidden has", weight))
    if not 1 <= rows <= MAX_EXPERTS:
        raise ValueError(refusal("router_weight", f"1 to {MAX_EXPERTS} rows", weight))
    if num_experts is not None and rows != num_experts:
        expected = f"num_experts = {num_experts} rows, as the configuration says"
        raise ValueError(refusal("router_weight", expected, weight))
    if weight.device != hidden.device:
        raise ValueError(refusal("router_weight", f"hidden's device {hidden.device}", weight))
    eps, norm_weight = None, None
    if norm is not None:
        if not isinstance(norm, RMSNorm):
            raise TypeError(refusal("norm", "a moe_routing.RMSNorm, or None", norm))
        eps = _number("norm: eps", norm.eps, TINY)
        norm_weight = _vector("norm", norm.weight, hidden, columns)
    return Projection(
        hidden,
        weight,
        _vector("router_bias", router_bias, hidden, rows),
        norm_weight,
        _vector("input_scale", input_scale, hidden, columns),
        eps,
        _number("input_multiplier", input_multiplier, -HUGE),
    )


def _matrix(name: str, value: object, shape: str, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """Require a dense tensor of rank 2 and one of the dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(refusal(name, f"a tensor {shape}", value))
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(refusal(name, f"dtype {expected}", value))
    if not _check.is_dense(value) or value.dim() != _MATRIX:
        raise ValueError(refusal(name, f"a dense tensor {shape} of rank 2", value))
    return value


def _vector(name: str, value: object, hidden: Tensor, length: int) -> Tensor | None:
    """Require a float vector of that length on hidden's device, or ``None``."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(refusal(name, f"a float tensor [{length}]", value))
    if not value.dtype.is_floating_point or value.dtype == _check.PACKED:
        raise TypeError(refusal(name, "a float dtype", value))
    if not _check.is_dense(value) or value.dim() != 1 or value.shape[0] != length:
        raise ValueError(refusal(name, f"a dense tensor of shape [{length}]", value))
    if value.device != hidden.device:
        raise ValueError(refusal(name, f"hidden's device {hidden.device}", value))
    return value


def _number(name: str, value: object, least: float) -> float:
    """Require a number that float32 holds."""
    if isinstance(value, torch.SymFloat):
        return value  # type: ignore[return-value] # inside a compiled function it stands for one
    return number(name, value, least, HUGE)


def check_logits_dtype(dtype: object) -> torch.dtype:
    """Require a dtype that logits can be rounded to.

    :raises TypeError: it is none.
    """
    if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES:
        raise TypeError(refusal("logits_dtype", f"{_ANY} of torch", dtype))
    return dtype
