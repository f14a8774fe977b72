"""``Router``: checks the arguments, finds the bound kernel with one dict look-up, and calls it."""

from __future__ import annotations

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
    verify_rate,
)

if TYPE_CHECKING:
    from moe_routing._backend import BoundRouter
    from moe_routing.testing.shadow import Health, Shadow
    from moe_routing_registry import Registry, ResolutionReport

_PLAIN = (Tensor, torch.nn.Parameter)

Key = tuple[torch.device, torch.dtype, int, int, torch.dtype, bool, bool, "str | None"]
"""Device, logits dtype, E, K, ids dtype, rows, training, preference: what a binding depends on."""


class Binding(NamedTuple):
    """A kernel bound to a problem, and the report of how it was chosen."""

    bound: BoundRouter
    report: ResolutionReport


class Router:
    """Routes tokens to experts: ``weights, ids = route(logits, topk)``. Get one from ``moe_routing.get_router``.

    The backend is chosen at the first call for each (device, dtype, E, K, layout) and kept; later calls cost one
    dict look-up. A router may be used from any number of threads.

    :ivar spec: the maths.
    :ivar num_experts: E where the router was made from a configuration, else ``None``.
    :ivar topk: K where the router was made from a configuration, else ``None``; then every call names it.
    :ivar latest: the binding of the latest call, ``None`` before the first.

    ``verify=True`` compares every call with the float64 oracle, ``verify=0.01`` one in a hundred, without ever changing a
    result or raising: ``health()`` and the logger ``moe_routing.verify`` tell. ``MOE_ROUTING_VERIFY=sample:0.01`` does so
    for every router.

    >>> route = Router(RoutingSpec(family="topk_softmax", renormalize=True))
    >>> weights, ids = route(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2)
    >>> weights, ids
    (tensor([[0.5000, 0.5000]]), tensor([[1, 2]], dtype=torch.int32))
    """

    def __init__(
        self,
        spec: RoutingSpec,
        *,
        topk: int | None = None,
        num_experts: int | None = None,
        backend: str | None = None,
        verify: float | bool | None = None,
    ) -> None:
        self.spec = spec
        self.topk = topk
        self.num_experts = num_experts
        self._requested = backend
        self._bindings: dict[Key, Binding] = {}
        self._lock = threading.Lock()
        self._shadow = _shadow(verify)
        self.latest: Binding | None = None

    def __call__(  # noqa: PLR0913 -- one argument an operand of the maths
        self,
        logits: Tensor,
        topk: int | None = None,
        per_expert_scale: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        token_ids: Tensor | None = None,
        expert_table: Tensor | None = None,
        num_valid_tokens: int | Tensor | None = None,
        expert_map: Tensor | None = None,
        ids_dtype: torch.dtype | None = None,
        out: RoutingOutput | tuple[Tensor, Tensor] | None = None,
    ) -> RoutingOutput:
        """Select ``topk`` experts for every token and weigh them.

        :param logits: ``[T, E]``, any float dtype (float64 is rounded to float32), any strides; T may be 0.
        :param topk: K, 1 <= K <= E; may be left out where the router was made from a configuration.
        :param per_expert_scale: ``[E]``, any float dtype; for specs with ``per_expert_scale`` (Gemma4), and only those.
        :param bias: ``[E]``, any float dtype; for specs whose selection adds a bias, and only those.
        :param token_ids: ``[T]``, int32 or int64; for token-table selection, and only that.
        :param expert_table: ``[vocabulary, K]``, int32 or int64; likewise.
        :param num_valid_tokens: rows at or past it are padding and get ids -1 and weights 0; an int, or an integer
            tensor with one element on the logits' device, which is never read on the host.
        :param expert_map: ``[E + shared_experts]``, int32 or int64, logical -> physical expert.
        :param ids_dtype: ``torch.int32`` (default) or ``torch.int64``.
        :param out: ``(weights, ids)`` to write into: contiguous, ``[T, K + shared_experts]``, not with gradients.
        :returns: ``RoutingOutput(weights, ids)``: float32 and ``ids_dtype``, both ``[T, K + shared_experts]``, ordered
            by descending selection score, equal scores by ascending id.
        :raises TypeError: an argument has the wrong type or dtype.
        :raises ValueError: an argument has the wrong value, shape or device.
        :raises BackendUnavailableError: no backend fits, or the one that was named does not.
        """
        if topk is None:
            topk = self._default_topk()
        if out is not None:
            out = _check.as_output(out)
        if ids_dtype is None:
            ids_dtype = torch.int32 if out is None else out.ids.dtype
        self._check(
            logits, topk, per_expert_scale, bias, token_ids, expert_table, num_valid_tokens, expert_map, ids_dtype, out
        )
        training = torch.is_grad_enabled() and (
            logits.requires_grad or (per_expert_scale is not None and per_expert_scale.requires_grad)
        )
        if training or torch.compiler.is_compiling() or type(logits) not in _PLAIN:
            from moe_routing import _op

            if out is not None and training:
                msg = "out: expected None where gradients are wanted, got tensors; use torch.no_grad()"
                raise ValueError(msg)
            result = _op.call(
                self.spec, self._requested, logits, topk, per_expert_scale, bias, token_ids, expert_table,
                num_valid_tokens, expert_map, ids_dtype, out, training=training,
            )  # fmt: skip
            if self._shadow is not None and not torch.compiler.is_compiling():
                self._shadow.look(self.spec, logits, topk, result, {
                    "per_expert_scale": per_expert_scale, "bias": bias, "token_ids": token_ids, "expert_table": expert_table,
                    "num_valid_tokens": num_valid_tokens, "expert_map": expert_map,
                })  # fmt: skip
            if not torch.compiler.is_compiling():
                self.latest = _op.router_of(self.spec.to_json(), self._requested).latest
            return result
        return self.route_checked(
            logits, topk, per_expert_scale, bias, token_ids, expert_table, num_valid_tokens, expert_map, ids_dtype, out,
            training=False,
        )  # fmt: skip

    def route_checked(  # noqa: PLR0913, PLR0917 -- positional: this is the hot path
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
        """Find the bound kernel and call it; the arguments have been checked. For this package's own use."""
        num_tokens, num_experts = logits.shape
        if num_tokens == 0:
            return out if out is not None else empty_output(self.spec, logits, topk, ids_dtype)
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
        _check.check_topk(self.spec, num_experts, topk)
        key = (device, dtype, num_experts, topk, ids_dtype, rows, training, preference.get())
        binding = self._bindings.get(key) or self._bind(key)
        self.latest = binding
        return binding

    def warmup(  # noqa: PLR0913 -- the fields of a RoutingProblem
        self,
        num_experts: int | None = None,
        topk: int | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        ids_dtype: torch.dtype = torch.int32,
        training: bool = False,
    ) -> ResolutionReport:
        """Choose, build and compile before the first call (and before a CUDA graph is captured).

        :returns: the report of the choice.
        """
        num_experts = num_experts if num_experts is not None else self.num_experts
        if num_experts is None:
            msg = "num_experts: expected an int (this router was not made from a configuration), got None"
            raise TypeError(msg)
        topk = topk if topk is not None else self._default_topk()
        binding = self.binding_for(device, dtype, num_experts, topk, ids_dtype=ids_dtype, training=training)
        compile_ahead = getattr(binding.bound, "warmup", None)
        if compile_ahead is not None:
            compile_ahead()
        return binding.report

    @property
    def backend(self) -> str | None:
        """Name of the backend of the latest call, ``None`` before the first."""
        return self.latest.report.winner if self.latest else None

    @property
    def report(self) -> ResolutionReport | None:
        """How the backend of the latest call was chosen, ``None`` before the first call."""
        return self.latest.report if self.latest else None

    def health(self) -> Health:
        """Return what shadow mode has seen of this router's calls: how many were compared, near ties, and what was wrong.

        >>> route = Router(RoutingSpec(family="topk_softmax", renormalize=True), verify=True)
        >>> _ = route(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2)
        >>> route.health().compared, route.health().ok
        (1, True)
        """
        from moe_routing.testing.shadow import Health

        return Health() if self._shadow is None else self._shadow.health()

    def __repr__(self) -> str:
        """Show the spec, and what the router was made for."""
        extras = [
            f"{name}={value!r}"
            for name, value in (("topk", self.topk), ("num_experts", self.num_experts), ("backend", self._requested))
            if value is not None
        ]
        return f"Router({', '.join([repr(self.spec.family), *extras])}): {self.spec.formula}"

    def _default_topk(self) -> int:
        if self.topk is None:
            msg = "topk: expected an int (this router was not made from a configuration), got None"
            raise TypeError(msg)
        return self.topk

    def _check(  # noqa: PLR0913, PLR0917 -- positional: this is the hot path
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
    ) -> None:
        spec = self.spec
        _check.check_logits(logits)
        num_tokens, num_experts = logits.shape
        if self.num_experts is not None and num_experts != self.num_experts:
            msg = f"logits: expected num_experts = {self.num_experts} columns, as the configuration says, got {num_experts}"
            raise ValueError(msg)
        _check.check_topk(spec, num_experts, topk)
        by_table = spec.selection == "token_table"
        if per_expert_scale is not None or spec.per_expert_scale:
            _check.check_vector("per_expert_scale", per_expert_scale, num_experts, logits, wanted=spec.per_expert_scale)
        if bias is not None or spec.needs_bias:
            _check.check_vector("bias", bias, num_experts, logits, wanted=spec.needs_bias)
        if token_ids is not None or expert_table is not None or by_table:
            _check.check_vector("token_ids", token_ids, num_tokens, logits, integer=True, wanted=by_table)
            _check.check_table(spec, expert_table, topk, logits)
        if num_valid_tokens is not None:
            _check.check_valid_tokens(num_valid_tokens, logits)
        if expert_map is not None:
            _check.check_vector("expert_map", expert_map, num_experts + spec.shared_experts, logits, integer=True)
        _check.check_ids_dtype(ids_dtype, out)
        if out is not None:
            _check.check_out(out, topk + spec.shared_experts, logits)

    def _bind(self, key: Key) -> Binding:
        with self._lock:
            if key not in self._bindings:
                self._bindings[key] = self._choose(key)
            return self._bindings[key]

    def _choose(self, key: Key) -> Binding:
        device, dtype, num_experts, topk, ids_dtype, rows, training, _ = key
        problem = RoutingProblem(
            spec=self.spec,
            num_experts=num_experts,
            topk=topk,
            dtype=dtype_name(dtype),
            ids_dtype=dtype_name(ids_dtype),
            training=training,
            layout="rows" if rows else "strided",
        )
        binding = _resolve_and_build(registry(), problem, device, Request.gather(self._requested))
        return binding if self._shadow is None else Binding(self._shadow.watch(binding.bound, self.spec, topk), binding.report)


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


def _shadow(verify: float | bool | None) -> Shadow | None:  # noqa: FBT001 -- True is what users write
    """Return what watches the calls, where the argument or the environment asks for it."""
    rate = verify_rate(verify)
    if not rate:
        return None
    from moe_routing.testing.shadow import Shadow

    return Shadow(rate)


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
