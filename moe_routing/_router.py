"""``Router``: checks the arguments, finds the bound kernel with one dict look-up, and calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from moe_routing import _check, _op
from moe_routing._backend import RoutingOutput
from moe_routing._binding import Binder
from moe_routing._kind import INDESCRIBABLE, Asked, Kind, described
from moe_routing_registry import RoutingSpec, verify_rate

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_routing._backend import BoundRouter
    from moe_routing._binding import Binding
    from moe_routing.testing.shadow import Health, Shadow
    from moe_routing_registry import ResolutionReport

_PLAIN = (Tensor, torch.nn.Parameter)
_KINDS_KEPT = 1024
"""A router that knows so many kinds of call forgets them all and begins anew."""


class Router:
    """Routes tokens to experts: ``weights, ids = route(logits, topk)``. Get one from ``moe_routing.get_router``.

    The backend is chosen at the first call for each (device, dtype, E, K, layout) and kept; later calls cost one
    dict look-up. A router may be used from any number of threads.

    :ivar spec: the maths.
    :ivar num_experts: E where the router was made from a configuration, else ``None``.
    :ivar topk: K where the router was made from a configuration, else ``None``; then every call names it.

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
        self._shadow = _shadow(verify)
        self._binder = Binder(spec, backend, self._shadow)
        self._known: dict[tuple[object, ...], Kind] = {}
        self._latest: Kind | None = None

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
        kind: tuple[object, ...] | None = None
        plain = token_ids is None and expert_table is None and num_valid_tokens is None and expert_map is None
        if plain and not is_dynamo_compiling():
            # A call of a kind that passed the checks passes them again. Most often it is the kind of the call before, which
            # takes one look at all tensors together; otherwise the kind is described, and looked up.
            known = self._latest
            try:
                if known is None or not known.serves(logits, topk, per_expert_scale, bias, out, ids_dtype):
                    kind = described(logits, topk, per_expert_scale, bias, out, ids_dtype)
                    known = self._known.get(kind)
                    if known is not None:
                        self._latest = known
            except INDESCRIBABLE:
                kind = known = None
            if known is not None and not (is_grad_enabled() and _requires_grad(logits, per_expert_scale)):
                _, call, self._binder.latest = known
                if out is not None and type(out) is not RoutingOutput:
                    out = RoutingOutput(*out)
                return call(logits, per_expert_scale, bias, out)
        return self._checked(
            kind, logits, topk, per_expert_scale, bias, token_ids, expert_table, num_valid_tokens, expert_map, ids_dtype, out
        )

    def _checked(  # noqa: PLR0913, PLR0917 -- the operands of a call
        self,
        kind: tuple[object, ...] | None,
        logits: Tensor,
        topk: int | None,
        per_expert_scale: Tensor | None,
        bias: Tensor | None,
        token_ids: Tensor | None,
        expert_table: Tensor | None,
        num_valid_tokens: int | Tensor | None,
        expert_map: Tensor | None,
        ids_dtype: torch.dtype | None,
        out: RoutingOutput | tuple[Tensor, Tensor] | None,
    ) -> RoutingOutput:
        """Check everything, then route; a call that went straight to its kernel makes its ``kind`` known."""
        asked = Asked(topk, ids_dtype, type(out))
        if topk is None:
            topk = self._default_topk()
        if out is not None:
            out = _check.as_output(out)
        if ids_dtype is None:
            ids_dtype = torch.int32 if out is None else out.ids.dtype
        self._check(
            logits, topk, per_expert_scale, bias, token_ids, expert_table, num_valid_tokens, expert_map, ids_dtype, out
        )
        training = is_grad_enabled() and _requires_grad(logits, per_expert_scale)
        if training or torch.compiler.is_compiling() or type(logits) not in _PLAIN:
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
                self._binder.latest = _op.binder_of(self.spec.to_json(), self._requested).latest
            return result
        result = self._binder.route(
            logits, topk, per_expert_scale, bias, token_ids, expert_table, num_valid_tokens, expert_map, ids_dtype, out,
            training=False,
        )  # fmt: skip
        if kind is not None and logits.shape[0] and all(v is None or v.is_contiguous() for v in (per_expert_scale, bias)):
            self._remember(kind, asked, logits, topk, per_expert_scale, bias, out, ids_dtype)
        return result

    def _remember(  # noqa: PLR0913, PLR0917 -- what tells kinds of calls apart
        self,
        kind: tuple[object, ...],
        asked: Asked,
        logits: Tensor,
        topk: int,
        per_expert_scale: Tensor | None,
        bias: Tensor | None,
        out: RoutingOutput | None,
        ids_dtype: torch.dtype,
    ) -> None:
        """Keep what serves later calls of this kind; a kernel may have less to do for those than for any call."""
        binding = self._binder.binding_for(
            logits.device, logits.dtype, logits.shape[1], topk, ids_dtype=ids_dtype,
            rows=logits.stride(1) == 1 or logits.shape[1] == 1,
        )  # fmt: skip
        prepare = getattr(binding.bound, "prepared", None) if self._shadow is None else None
        call = prepare(logits, per_expert_scale, bias) if prepare is not None else None
        if len(self._known) >= _KINDS_KEPT:
            self._known.clear()
        serves = asked.of_tensors_like(logits, per_expert_scale, bias, *(out or (None, None)))
        self._known[kind] = self._latest = Kind(serves, call or _by_position(binding.bound), binding)

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
        :returns: ``(bound, report)``: the bound kernel, whose arguments nobody checks, and how it was chosen.
        :raises BackendUnavailableError: no backend fits, or the one that was named does not.
        """
        return self._binder.binding_for(device, dtype, num_experts, topk, ids_dtype=ids_dtype, rows=rows, training=training)

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
        return binding.told()

    @property
    def backend(self) -> str | None:
        """Name of the backend of the latest call, ``None`` before the first."""
        return self._binder.latest.report.winner if self._binder.latest else None

    @property
    def report(self) -> ResolutionReport | None:
        """How the backend of the latest call was chosen, ``None`` before the first call."""
        return self._binder.latest.told() if self._binder.latest else None

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


def _by_position(bound: BoundRouter) -> Callable[..., RoutingOutput]:
    return lambda logits, scale, bias, out: bound(logits, per_expert_scale=scale, bias=bias, out=out)


def _requires_grad(logits: Tensor, per_expert_scale: Tensor | None) -> bool:
    return logits.requires_grad or (per_expert_scale is not None and per_expert_scale.requires_grad)


def _shadow(verify: float | bool | None) -> Shadow | None:  # noqa: FBT001 -- True is what users write
    """Return what watches the calls, where the argument or the environment asks for it."""
    rate = verify_rate(verify)
    if not rate:
        return None
    from moe_routing.testing.shadow import Shadow

    return Shadow(rate)
