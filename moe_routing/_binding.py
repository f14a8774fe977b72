"""``Binder``: from a call to its bound kernel: one dict look-up, or a choice among the backends and a build."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moe_routing import _check
from moe_routing._backend import RoutingOutput
from moe_routing._registry import registry
from moe_routing.probing import probe
from moe_routing_registry import (
    STRICT_VARIABLE,
    BackendUnavailableError,
    DowngradeWarning,
    FactoryError,
    Request,
    RoutingProblem,
    RoutingSpec,
    preference,
)

if TYPE_CHECKING:
    from moe_routing._backend import BoundRouter
    from moe_routing.testing.shadow import Shadow
    from moe_routing_registry import Registry, ResolutionReport

Key = tuple[torch.device, torch.dtype, int, int, torch.dtype, bool, bool, "str | None"]
"""Device, logits dtype, E, K, ids dtype, rows, training, preference: what a binding depends on."""


class Binding(NamedTuple):
    """A kernel bound to a problem, and the report of how it was chosen."""

    bound: BoundRouter
    report: ResolutionReport

    def told(self) -> ResolutionReport:
        """Return the report with what the kernel says of itself now, behind what its card said when it was chosen."""
        said = (*self.report.notes, *getattr(self.bound, "notes", ()))
        return dataclasses.replace(self.report, notes=tuple(dict.fromkeys(said)))


class Binder:
    """Binds one spec to whatever device, dtype and sizes the calls bring, once each.

    :ivar latest: the binding of the latest call, ``None`` before the first.
    """

    def __init__(self, spec: RoutingSpec, requested: str | None, shadow: Shadow | None = None) -> None:
        """Keep what every binding shares: the maths, the backend asked for, and who watches the calls."""
        self.latest: Binding | None = None
        self._spec = spec
        self._requested = requested
        self._shadow = shadow
        self._bindings: dict[Key, Binding] = {}
        self._lock = threading.Lock()

    def route(  # noqa: PLR0913, PLR0917 -- positional: this is the hot path
        self,
        logits: Tensor,
        topk: int,
        per_expert_scale: Tensor | None,
        bias: Tensor | None,
        token_ids: Tensor | None,
        expert_table: Tensor | None,
        num_valid_tokens: int | Tensor | None,
        expert_map: Tensor | None,
        ids_dtype: torch.dtype,
        out: RoutingOutput | None,
        *,
        training: bool,
    ) -> RoutingOutput:
        """Find the bound kernel and call it; the arguments have been checked."""
        num_tokens, num_experts = logits.shape
        if num_tokens == 0:
            return out if out is not None else empty_output(self._spec, logits, topk, ids_dtype)
        rows = logits.stride(1) == 1 or num_experts == 1
        key = (logits.device, logits.dtype, num_experts, topk, ids_dtype, rows, training, preference.get())
        binding = self._bindings.get(key)
        if binding is None:
            binding = self._bind(key)
        self.latest = binding
        return binding.bound(
            logits,
            per_expert_scale=_contiguous(per_expert_scale),
            bias=_contiguous(bias),
            token_ids=_contiguous(token_ids),
            expert_table=_contiguous(expert_table),
            num_valid_tokens=num_valid_tokens,
            expert_map=_contiguous(expert_map),
            out=out,
        )

    def binding_for(  # noqa: PLR0913 -- the fields of a RoutingProblem
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        num_experts: int,
        topk: int,
        *,
        ids_dtype: torch.dtype = torch.int32,
        rows: bool = True,
        training: bool = False,
    ) -> Binding:
        """Choose and build ahead of the first call; the same binding serves later calls.

        :param rows: whether the experts of a row lie side by side in memory.
        :raises BackendUnavailableError: no backend fits, or the one that was named does not.
        """
        device = torch.device(device)
        index: int | None = device.index  # torch types it as an int, but "cuda" has none
        if index is None and device.type not in ("cpu", "meta"):
            device = torch.empty(0, device=device).device
        _check.check_topk(self._spec, num_experts, topk)
        key = (device, dtype, num_experts, topk, ids_dtype, rows, training, preference.get())
        binding = self._bindings.get(key) or self._bind(key)
        self.latest = binding
        return binding

    def _bind(self, key: Key) -> Binding:
        with self._lock:
            if key not in self._bindings:
                self._bindings[key] = self._choose(key)
            return self._bindings[key]

    def _choose(self, key: Key) -> Binding:
        device, dtype, num_experts, topk, ids_dtype, rows, training, _ = key
        problem = RoutingProblem(
            spec=self._spec,
            num_experts=num_experts,
            topk=topk,
            dtype=dtype_name(dtype),
            ids_dtype=dtype_name(ids_dtype),
            training=training,
            layout="rows" if rows else "strided",
        )
        binding = _resolve_and_build(registry(), problem, device, Request.gather(self._requested))
        return (
            binding if self._shadow is None else Binding(self._shadow.watch(binding.bound, self._spec, topk), binding.report)
        )


def _resolve_and_build(known: Registry, problem: RoutingProblem, device: torch.device, request: Request) -> Binding:
    info = probe(device)
    report = known.resolve(problem, info, request)
    while report.winner is not None:
        try:
            bound: BoundRouter = known.build(report.winner, problem, info)
        except FactoryError as error:
            report = report.without(error.rejection)
            if report.winner is None:
                raise BackendUnavailableError(report.why, report) from error
            continue
        _say_if_missed(report, request)
        return Binding(bound, report)
    raise BackendUnavailableError(report.why, report)


def _say_if_missed(report: ResolutionReport, request: Request) -> None:
    """Nothing falls back silently: say once, or raise if ``MOE_ROUTING_STRICT`` is set."""
    missed = report.rejection(report.missed) if report.missed else None
    if missed is None:
        return
    fix = f"; mend: {missed.verdict.fix}" if missed.verdict.fix else ""
    text = f"{report.device} routes with {report.winner!r}, not with {missed.name!r}, which {missed.verdict.reason}{fix}"
    if request.strict:
        msg = f"{STRICT_VARIABLE} is set and {text}"
        raise BackendUnavailableError(msg, report)
    _warn_once(text)


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, DowngradeWarning, stacklevel=2)


def _contiguous(operand: Tensor | None) -> Tensor | None:
    return operand if operand is None or operand.is_contiguous() else operand.contiguous()


def dtype_name(dtype: object) -> str:
    """Return a dtype's name without its module: ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def empty_output(spec: RoutingSpec, logits: Tensor, topk: int, ids_dtype: torch.dtype) -> RoutingOutput:
    """Allocate outputs for the logits, unfilled."""
    shape = (logits.shape[0], topk + spec.shared_experts)
    return RoutingOutput(
        torch.empty(shape, dtype=torch.float32, device=logits.device),
        torch.empty(shape, dtype=ids_dtype, device=logits.device),
    )
