"""What a router's logits are made of: the operands that ``Router.gate`` takes for them.

For every function of ``_logits`` there is one here, which reads the operands from the router. Where
the logits are more than a norm, a scale and a linear layer, or where a submodule may do more than
it is known for, as an adapter does or a hook, it returns the reason why ``gate`` may not compute
them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from moe_routing import RMSNorm
from moe_routing.integrations._code import described, home_of
from moe_routing.integrations.transformers import _logits
from moe_routing.integrations.transformers._fingerprint import (
    RefusedError,
    fingerprint,
    require_own_methods,
    undecorated,
)
from moe_routing.private_api import runs_hooks

if TYPE_CHECKING:
    from moe_routing.integrations.transformers._logits import Router

NORMS = {"be3943609390"}
"""Fingerprints of the norm in front of Gemma 4's router."""
_KNOWN: dict[type[nn.Module], Mapping[str, Callable[..., Any]]] = {}
"""Class of a submodule that ``gate`` may stand for -> its methods, as they are known."""
if home_of(undecorated(nn.Linear.forward)) == nn.Linear.__module__:  # else somebody replaced it
    _KNOWN[nn.Linear] = {"forward": nn.Linear.forward}


class Front(NamedTuple):
    """What a router's logits are made of, but for the hidden states.

    :ivar weight: of the linear layer, as is ``bias``.
    :ivar hidden_dtype: to which the router brings hidden states; ``None``: they stay as they are.
    :ivar parameter_dtype: likewise for the weight and the bias.
    :ivar logits_dtype: of the logits that the router returns; ``None``: that of the linear layer.
    :ivar flattens: whether hidden states may have more than two dimensions.
    """

    weight: Tensor
    bias: Tensor | None = None
    hidden_dtype: torch.dtype | None = None
    parameter_dtype: torch.dtype | None = None
    logits_dtype: torch.dtype | None = None
    norm: RMSNorm | None = None
    scale: Tensor | None = None
    multiplier: float = 1.0
    flattens: bool = True


ReadFront = Callable[[Any], "Front | str"]
"""Reads the front of a router, or says why it has none."""


def linear(router: Router) -> Front:
    return Front(router.weight)


def linear_with_bias(router: Router) -> Front:
    return Front(router.weight, router.bias)


def linear_float32(router: Router) -> Front:
    return Front(router.weight, None, torch.float32, torch.float32)


def linear_float32_with_bias(router: Router) -> Front:
    return Front(router.weight, router.bias, torch.float32, torch.float32)


def linear_float32_input(router: Router) -> Front:
    return Front(router.weight, hidden_dtype=torch.float32)


def linear_in_weights_dtype(router: Router) -> Front:
    return Front(router.weight, hidden_dtype=router.weight.dtype)


def linear_then_float32(router: Router) -> Front:
    return Front(router.weight, logits_dtype=torch.float32)


def as_given(_router: Router) -> str:
    return "its block computes them"


def of_layers(_router: Router) -> str:
    return "they come from several layers"


def afmoe(router: Router) -> Front | str:
    return _of_layer(router, "gate", logits_dtype=torch.float32)


def gemma(router: Router) -> Front | str:
    norm = router.norm
    return _why_not_known("norm", norm) or _of_layer(
        router,
        "proj",
        norm=RMSNorm(norm.eps, norm.weight if norm.with_scale else None),
        scale=router.scale,
        multiplier=router.scalar_root_size,
        flattens=False,
    )


def hunyuan(router: Router) -> Front | str:
    front = _of_layer(router, "wg")
    if isinstance(front, str) or front.weight.dtype != torch.float32:
        return front
    return front._replace(hidden_dtype=torch.float32)


def jetmoe(router: Router) -> Front | str:
    return _of_layer(router, "layer", logits_dtype=torch.float32, flattens=False)


def laguna(router: Router) -> Front | str:
    cap: float = router.router_logit_softcapping
    return f"it caps them at {cap}" if cap > 0.0 else linear_then_float32(router)


def longcat(router: Router) -> Front:
    return Front(router.classifier.weight, None, torch.float32, torch.float32)


def muse_spark(router: Router) -> Front:
    return linear_float32(router)._replace(multiplier=router.output_multiplier)


FRONTS: Mapping[Callable[..., Tensor], ReadFront] = {
    _logits.afmoe: afmoe,
    _logits.as_given: as_given,
    _logits.gemma: gemma,
    _logits.hunyuan: hunyuan,
    _logits.jetmoe: jetmoe,
    _logits.kolibri: linear_float32,
    _logits.laguna: laguna,
    _logits.linear: linear,
    _logits.linear_float32: linear_float32,
    _logits.linear_float32_input: linear_float32_input,
    _logits.linear_float32_with_bias: linear_float32_with_bias,
    _logits.linear_in_weights_dtype: linear_in_weights_dtype,
    _logits.linear_then_float32: linear_then_float32,
    _logits.linear_with_bias: linear_with_bias,
    _logits.linear_without_autocast: linear_float32,
    _logits.longcat: longcat,
    _logits.muse_spark: muse_spark,
}
"""Computes a router's logits -> reads their front."""


def learn(read: ReadFront, stock: type[nn.Module]) -> None:
    """Prove the norms that a router of that class may hold.

    The code is read here, once for each class of a router, since a compiled call cannot do it.
    """
    if read is not gemma:
        return
    for name, cls in vars(sys.modules[stock.__module__]).items():
        if name.endswith("RMSNorm") and cls not in _KNOWN and _is_known_norm(cls):
            methods = {key: it for key, it in vars(cls).items() if isinstance(it, FunctionType)}
            methods.pop("__init__", None)
            _KNOWN[cls] = methods


def _is_known_norm(cls: type) -> bool:
    try:
        require_own_methods(cls)
        return fingerprint(cls) in NORMS
    except RefusedError:
        return False


def _of_layer(router: Router, name: str, **said: Any) -> Front | str:  # noqa: ANN401 -- fields of a front
    layer = getattr(router, name)
    return _why_not_known(name, layer) or Front(layer.weight, layer.bias, **said)


def _why_not_known(name: str, module: nn.Module) -> str:
    """Say why a submodule may do more than its class is known for, ``""`` if it does not."""
    cls = type(module)
    if cls not in _KNOWN:
        return f"its {name} is a {cls.__module__}.{cls.__qualname__}, whose code is not known"
    for method, known in _KNOWN[cls].items():
        current = vars(module).get(method, getattr(cls, method))
        if current is not known:
            by = "" if is_compiling() else f", by {described(current)}"
            return f"the {method} of its {name} was replaced{by}"
    return f"its {name} has hooks" if runs_hooks(module) else ""
