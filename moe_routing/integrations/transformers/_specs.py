"""The routing spec of a router: its model's preset, with the values of the router's attributes.

The maths is the preset's alone. Here is how routers keep what a configuration says, and what must
be refused. The attributes are read at each call, so a setting that changes after ``patch`` is
followed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_routing.formula.weights import score
from moe_routing.integrations.transformers._fingerprint import RefusedError, fingerprint
from moe_routing.models import MODELS, spec_of
from moe_routing_registry import RoutingSpec
from moe_routing_registry.routing_spec import SCORES
from moe_routing_registry.text import refusal, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from moe_routing.integrations.transformers._logits import Router
    from moe_routing.models import ModelPreset

ERNIE_STATICS = {"4dcdbd880a75"}
"""Fingerprints of the submodule that adds Ernie's bias to its scores."""


@dataclass(frozen=True)
class Settings:
    """The preset that a router computes, and the router's attributes that the preset depends on.

    :ivar preset: one model's, where the routers of several have the same code.
    :ivar given: attributes of the configuration that this code does not look at -> the values with
        which the preset computes what this code does.
    :ivar no_groups: why a router with more than one group is left; empty if it is routed.
    :ivar names: the attributes of the router.
    """

    preset: ModelPreset
    given: Mapping[str, object] = field(default_factory=dict, hash=False)
    no_groups: str = ""
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Find the names."""
        read = [name for name in self.preset.settings if name not in self.given]
        object.__setattr__(self, "names", tuple(_kept(name)[0] for name in read))

    def read(self, router: Router) -> tuple[Any, ...]:
        """Return the values; of a submodule, such as a score function, its class."""
        return tuple([_constant(getattr(router, name, None)) for name in self.names])

    def spec_of(
        self, router: Router, num_experts: int | None, topk: Callable[[Router], int]
    ) -> RoutingSpec:
        """Return the spec for the router's current settings.

        :param num_experts: E, ``None`` if it is not known.
        :param topk: reads K.
        :raises RefusedError: they are missing, cannot be expressed, or do not fit E and K; names
            them.
        """
        try:
            spec = spec_of(
                self.preset, {name: self._value(router, name) for name in self.preset.settings}
            )
            if num_experts is not None:
                spec.check_size(num_experts, topk(router))
        except (AttributeError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            said = ", ".join(
                f"{name}={shown(getattr(router, name, 'missing'))}" for name in self.names
            )
            msg = f"its settings cannot be routed: {error}" + (
                f"; read from {said}" if said else ""
            )
            raise RefusedError(msg) from error
        if spec.grouped and self.no_groups:
            raise RefusedError(self.no_groups)
        return spec

    def _value(self, router: Router, attribute: str) -> object:
        """Return what an attribute of the configuration would be for the router as it is."""
        if attribute in self.given:
            return self.given[attribute]
        name, translated = _kept(attribute)
        value = getattr(router, name)
        if isinstance(value, Tensor):  # which may change in place, and nobody would see it
            raise TypeError(refusal(name, "a plain value", value))
        return translated(value)


def of(name: str, /, **given: object) -> Settings:
    """Return the settings of a router that computes the preset of that name."""
    return Settings(MODELS[name], given)


def _constant(value: object) -> object:
    """Return what ``torch.compile`` can compare: a class's name in place of a submodule."""
    return type(value).__qualname__ if isinstance(value, nn.Module) else value


def _same(value: object) -> object:
    return value


def _score_name(function: Callable[[Tensor], Tensor]) -> str:
    """Return the name of what a score function computes, or the function as an error shows it."""
    x = torch.tensor([[-3.0, 0.5, 4.0]], device="cpu")
    for name in SCORES:
        if torch.allclose(function(x), score(RoutingSpec(family="score", score=name), x)):
            return name
    return shown(function)


_KEPT: Mapping[str, tuple[str, Callable[[Any], object]]] = {
    "1 / top_k": ("top_k", lambda topk: 1.0 / topk),
    "ffn_config.moe_normalize_expert_weights": ("moe_normalize_expert_weights", _same),
    "moe_norm_min": ("norm_min", _same),
    "n_group": ("num_group", _same),
    "norm_topk_prob": ("norm_topk_prob", bool),
    "scoring_func": ("score_fn", _score_name),
    "use_expert_bias": ("use_expert_bias", bool),
}
"""Attribute of a configuration -> the router's attribute for it, and how to read the value."""


def _kept(attribute: str) -> tuple[str, Callable[[Any], object]]:
    return _KEPT.get(attribute, (attribute, _same))


def prove_ernie_statics(router: Router) -> None:
    """Raise ``RefusedError`` unless the submodule that Ernie's recipe replaces is known."""
    if fingerprint(type(router.moe_statics)) not in ERNIE_STATICS:
        msg = (
            f"the code of {type(router.moe_statics).__qualname__}, which adds its bias, is none "
            "that is known"
        )
        raise RefusedError(msg)
