"""The latest call of ``plan``: the next one is mostly like it, and is recognised at little cost.

See ``moe_routing._call_cache``, which does the same for a router.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moe_routing._call_cache import UNREADABLE
from moe_routing._registry import registry
from moe_routing.planning.kernel import DispatchPlan
from moe_routing.private_api import is_fake_mode, tensor_guard
from moe_routing_registry.request import preference

if TYPE_CHECKING:
    from collections.abc import Callable

_registry = registry()


class _Latest(NamedTuple):
    """The latest call, which the next one mostly is like.

    :ivar asked: the arguments that are no tensors.
    :ivar types: their types: 128.0 and True are no integers.
    :ivar alike: compares all tensors with those of the call.
    :ivar form: which parts its ``out`` has; ``None`` without ``out``.
    :ivar apart: addresses of tensors that were seen to share no memory.
    """

    call: Any
    asked: tuple[object, ...]
    types: tuple[type, ...]
    alike: Callable[..., bool]
    form: tuple[bool, bool] | None
    has_weights: bool
    generation: int
    preferred: str | None
    inference: bool
    apart: set[tuple[int, ...]]

    def matches(
        self,
        asked: tuple[object, ...],
        ids: Tensor,
        weights: Tensor | None,
        out: DispatchPlan | None,
    ) -> bool:
        """Tell whether a call is like this one; it may say no to one that is."""
        if (
            asked != self.asked
            or tuple(map(type, asked)) != self.types
            or (out is not None and type(out) is not DispatchPlan)
            or form_of(out) != self.form
            or (weights is not None) is not self.has_weights
            or preference.get() != self.preferred
            or _registry.generation != self.generation
            or is_fake_mode()
        ):
            return False
        given = _given(ids, weights, out)
        # The guard must not be asked of nested tensors: it wants strides, and ends the process.
        if True in [tensor.is_nested for tensor in given] or not self.alike(*given):
            return False
        if out is None:
            return True
        return (
            torch.is_inference_mode_enabled() is self.inference and _addresses(given) in self.apart
        )


_kept: list[_Latest | None] = [None]
"""One place, for the thread that was last."""
_APART_KEPT = 4096
"""Sets of addresses that are remembered; when there are more, remembering begins anew."""


def call_like(
    asked: tuple[object, ...], ids: Tensor, weights: Tensor | None, out: DispatchPlan | None
) -> Any:  # noqa: ANN401 -- whatever was kept
    """Return what was kept for a call like this one, ``None`` where this is like no other."""
    latest = _kept[0]
    try:
        if latest is not None and latest.matches(asked, ids, weights, out):
            return latest.call
    except UNREADABLE:  # the checks name the argument
        return None
    return None


def _given(ids: Tensor, weights: Tensor | None, out: DispatchPlan | None) -> list[Tensor]:
    """Return the tensors that a call brings."""
    given = [ids] if weights is None else [ids, weights]
    return given if out is None else [*given, *parts_of(out)]


def parts_of(out: DispatchPlan) -> list[Tensor]:
    """Return the tensors of a plan; ``form_of`` tells which they are."""
    return [part for part in out if part is not None]


def form_of(out: DispatchPlan | None) -> tuple[bool, bool] | None:
    """Tell which parts a plan has, of those that it may lack."""
    return out if out is None else (out[4] is None, out[5] is None)


def _addresses(given: list[Tensor]) -> tuple[int, ...]:
    """Return where each tensor begins."""
    return tuple([tensor.data_ptr() for tensor in given])


def keep(
    call: Any,  # noqa: ANN401 -- whatever the caller wants back
    asked: tuple[object, ...],
    ids: Tensor,
    weights: Tensor | None,
    out: DispatchPlan | None,
) -> None:
    """Remember a call that passed the checks, so that the next one like it is recognised."""
    given = _given(ids, weights, out)
    if not all(tensor.numel() for tensor in given):
        return
    addresses = _addresses(given) if out is not None else ()
    latest, types = _kept[0], tuple(map(type, asked))
    if (
        latest is not None
        and latest.call is call
        and latest.apart
        and addresses
        and latest.types == types
        and len(latest.apart) < _APART_KEPT
    ):
        latest.apart.add(addresses)  # the same kind of call with other memory
        return
    alike = tensor_guard(given)
    if alike is None:
        return
    _kept[0] = _Latest(
        call, asked, types, alike, form_of(out), weights is not None, _registry.generation,
        preference.get(), torch.is_inference_mode_enabled(), {addresses} if addresses else set(),
    )  # fmt: skip
