"""``Dispatcher``: from a call to its kernel.

One serves the plain, traced and training calls of a spec and a backend name.

A choice is made once for each device, dtype, E, K, ids dtype, layout, ``training`` and preference.
A kernel is built once for each backend and problem, whoever asks: ``training`` is part of the
choice, but one kernel serves calls with and without gradients.
"""

from __future__ import annotations

import dataclasses
import warnings
from contextvars import ContextVar
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moe_routing import _check
from moe_routing._registry import registry
from moe_routing.formula import weights_backward
from moe_routing.kernel import (
    NO_OPERANDS,
    REPLAY,
    Differentiates,
    HasNotes,
    Operands,
    Prepares,
    RoutingOutput,
    WarmsUp,
    is_mask,
)
from moe_routing.private_api import unset_fake_temporarily
from moe_routing.probing import locate, probe
from moe_routing.python_warnings import not_raised
from moe_routing_registry import (
    BackendUnavailableError,
    RejectCode,
    Request,
    RoutingProblem,
    RoutingSpec,
    Verdict,
)
from moe_routing_registry.containment import PluginFailure, contained, notes_of
from moe_routing_registry.errors import DowngradeWarning, FactoryError
from moe_routing_registry.locks import ForkSafeLock
from moe_routing_registry.report import Rejection
from moe_routing_registry.request import STRICT_VARIABLE, preference
from moe_routing_registry.routing_spec import SCORES
from moe_routing_registry.text import printable, refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from moe_routing._after import After
    from moe_routing._autograd import Backward
    from moe_routing.kernel import Kernel
    from moe_routing.reference.shadow import Shadow
    from moe_routing_registry import DeviceInfo, Problem, ResolutionReport

Key = tuple[
    torch.device, torch.dtype, int, int, torch.dtype, bool, bool, frozenset[str], "str | None"
]
"""What a choice depends on.

Device, logits dtype, E, K, ids dtype, rows, training, ``RoutingProblem.operands``, preference.
"""


class Resolved(NamedTuple):
    """A kernel, and the report of how its backend was chosen.

    :ivar problem: what the kernel is built for; ``training`` is as asked.
    :ivar backward: the gradients of logits and scale, by the kernel if it has a backward; see
        ``Differentiates.backward``.
    """

    kernel: Kernel
    report: ResolutionReport
    problem: RoutingProblem
    backward: Backward

    def report_with_notes(self) -> ResolutionReport:
        """Return the report with the kernel's own notes, which may change with every call."""
        kernel = self.kernel
        own = notes_of(
            "its kernel's notes", lambda: kernel.notes if isinstance(kernel, HasNotes) else ()
        )
        notes = tuple(dict.fromkeys((*self.report.notes, *own)))
        return dataclasses.replace(self.report, notes=notes)

    def route(
        self, operands: Operands, shadow: Shadow | None = None, after: After | None = None
    ) -> RoutingOutput:
        """Call the kernel with checked operands, and let shadow mode compare the result.

        :param after: what the kernel is to do besides, which ``problem.operands`` names.
        """
        output = self._call(operands, after)
        if shadow is not None:
            shadow.observe(self.problem.spec, self.problem.topk, operands, output, self._call)
        return output

    def _call(self, operands: Operands, after: After | None = None) -> RoutingOutput:
        logits, scale, bias, token_ids, expert_table, valid, expert_map, recorded, out = operands
        # A kernel that is not built for an optional operand need not know the keyword.
        optional: dict[str, Any] = {} if after is None else after.keywords
        if recorded is not None:
            optional["ids"] = recorded.contiguous()
        return self.kernel(
            logits,
            per_expert_scale=None if scale is None else scale.contiguous(),
            bias=None if bias is None else bias.contiguous(),
            token_ids=None if token_ids is None else token_ids.contiguous(),
            expert_table=None if expert_table is None else expert_table.contiguous(),
            num_valid_tokens=valid.contiguous() if is_mask(valid) else valid,  # type: ignore[union-attr] # a tensor
            expert_map=None if expert_map is None else expert_map.contiguous(),
            out=out,
            **optional,
        )

    def warm_up_backward(self) -> None:
        """Go back through zeros once with each dtype that a scale may have.

        So a kernel's backward is compiled.
        """
        problem, device = self.problem, self.report.device
        if device is None:
            return
        place = (
            torch.device(device.type)
            if device.index is None
            else torch.device(device.type, device.index)
        )
        dtype: torch.dtype = getattr(torch, problem.dtype)
        step = 1 if problem.layout == "rows" else 2
        logits = torch.zeros(1, problem.num_experts * step, dtype=dtype, device=place)[:, ::step]
        ids = torch.arange(problem.topk, device=place)[None].to(getattr(torch, problem.ids_dtype))
        grad = torch.zeros(1, problem.topk, device=place)
        for vectors in {torch.float32, dtype} if problem.spec.per_expert_scale else {None}:
            scale = (
                None
                if vectors is None
                else torch.ones(problem.num_experts, dtype=vectors, device=place)
            )
            self.backward(grad, logits, ids, scale)


class Dispatcher:
    """Chooses and builds for one spec and, where the user names one, one backend.

    ``dispatcher_of`` returns it.
    """

    def __init__(self, spec: RoutingSpec, requested: str | None) -> None:
        """Keep the maths and the backend's name; nothing is chosen yet."""
        self.spec = spec
        self._requested = requested
        self._resolved: dict[Key, Resolved] = {}

    def resolve_for(  # noqa: PLR0913, PLR0917 -- the fields of a RoutingProblem
        self,
        logits: Tensor,
        num_experts: int,
        topk: int,
        ids_dtype: torch.dtype,
        training: bool,  # noqa: FBT001 -- likewise
        operands: frozenset[str] = NO_OPERANDS,
    ) -> Resolved:
        """Return the kernel for logits that have been checked; T is not 0."""
        rows = logits.stride(1) == 1 or num_experts == 1
        key = (
            logits.device,
            logits.dtype,
            num_experts,
            topk,
            ids_dtype,
            rows,
            training,
            operands,
            preference.get(),
        )
        return self._resolved.get(key) or self._resolve(key)

    def resolve(  # noqa: PLR0913 -- the fields of a RoutingProblem
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        num_experts: int,
        topk: int,
        *,
        ids_dtype: torch.dtype = torch.int32,
        rows: bool = True,
        training: bool = False,
        operands: frozenset[str] = NO_OPERANDS,
    ) -> Resolved:
        """Return the kernel ahead of the first call; the same kernel serves later calls.

        :param rows: whether the experts of a row are adjacent in memory.
        :param operands: ``RoutingProblem.operands``.
        :raises TypeError: an argument has the wrong type or dtype.
        :raises ValueError: an argument has the wrong value, or the device is not here.
        :raises BackendUnavailableError: no backend fits, or the one that was named does not.
        """
        locate(device)  # which checks it; the key has the device as tensors name it: "mps:0"
        _check.check_dtype(dtype)
        _check.check_ids_dtype(ids_dtype, None)
        rows, training = _check.flag("rows", rows), _check.flag("training", training)
        device = torch.device(device)
        index: int | None = device.index  # torch types it as an int, but "cuda" has none
        if index is None and device.type not in ("cpu", "meta"):
            device = torch.empty(0, device=device).device
        num_experts, topk = _check.experts(num_experts), _check.integer("topk", topk)
        self.spec.check_size(num_experts, topk)
        key = (
            device, dtype, num_experts, topk, ids_dtype, rows, training,
            _check.optional_operands(operands), preference.get(),
        )  # fmt: skip
        return self._resolved.get(key) or self._resolve(key)

    def _resolve(self, key: Key) -> Resolved:
        with _lock_for((id(self), key)):
            if key not in self._resolved:
                self._resolved[key] = self._choose(key)
            return self._resolved[key]

    def _choose(self, key: Key) -> Resolved:
        device, dtype, num_experts, topk, ids_dtype, rows, training, operands, _ = key
        problem = RoutingProblem(
            spec=self.spec,
            num_experts=num_experts,
            topk=topk,
            dtype=dtype_name(dtype),
            ids_dtype=dtype_name(ids_dtype),
            training=training,
            layout="rows" if rows else "strided",
            operands=operands,
        )
        require = _require_closed_form if training else None
        request = Request.gather(self._requested)
        kernel, report = chosen(problem, probe(device), request, require=require)
        backward = (
            kernel.backward
            if isinstance(kernel, Differentiates)
            else partial(weights_backward, self.spec, absent=bool(operands & REPLAY))
        )
        winner = registry().backends[str(report.winner)]
        return Resolved(kernel, report, winner.seen(problem), backward)


def chosen(
    problem: Problem,
    device: DeviceInfo,
    request: Request,
    *,
    require: Callable[[str, Any, Any], None] | None = None,
) -> tuple[Any, ResolutionReport]:
    """Choose a backend for a problem of any operation, and return its kernel and why.

    A backend whose factory fails is passed over, unless it was named.

    :param require: is called with the backend's name, its kernel and the problem; raises
        ``FactoryError`` for a kernel that cannot do what the problem needs.
    :raises BackendUnavailableError: no backend fits, or the one that was named does not.
    """
    if _registry.generation != _generation:
        _start_anew()
    report = registry().resolve(problem, device, request)
    while report.winner is not None:
        try:
            kernel = _kernel(report.winner, problem, device)
            if require is not None:
                require(report.winner, kernel, problem)
        except FactoryError as error:
            report = report.without(error.rejection)
            if report.winner is None:
                raise BackendUnavailableError(report.why, report) from error
            continue
        _warn_of_downgrade(report, request)
        return kernel, report
    raise BackendUnavailableError(report.why, report)


_dispatchers: dict[tuple[str, str | None], Dispatcher] = {}
_kernels: dict[tuple[str, Problem, DeviceInfo], Any] = {}
_locks: dict[Hashable, ForkSafeLock] = {}
_registry = registry()
_generation = 0
"""``Registry.generation`` for which the three above were filled."""
_filling = ForkSafeLock()


def dispatcher_of(spec: str, requested: str | None) -> Dispatcher:
    """Return the process's dispatcher for a spec and a backend.

    :param spec: the canonical JSON of the spec.
    :param requested: the name of a backend, or ``None``.

    A backend that is registered or unregistered by hand starts them anew.
    """
    if _registry.generation != _generation:
        _start_anew()
    found = _dispatchers.get((spec, requested))
    if found is None:
        found = _dispatchers.setdefault(
            (spec, requested), Dispatcher(RoutingSpec.from_json(spec), requested)
        )
    return found


def _start_anew() -> None:
    global _generation  # noqa: PLW0603 -- the process has one registry, and so one set of dispatchers
    with _filling:
        for store in (_dispatchers, _kernels, _locks):
            store.clear()
        _generation = _registry.generation


def _lock_for(key: Hashable) -> ForkSafeLock:
    """Return the lock of one choice or one kernel.

    A factory may route, and must find the locks of other problems free.
    """
    return _locks.setdefault(key, ForkSafeLock())


_building: ContextVar[tuple[Hashable, ...]] = ContextVar("moe_routing_building", default=())
"""What this thread's factories are building, the innermost last."""


def _kernel(name: str, problem: Problem, device: DeviceInfo) -> Any:  # noqa: ANN401 -- each operation has its own type
    """Return the backend's kernel for the problem, with or without gradients.

    Build it if it is the first.

    :raises FactoryError: the factory raised, or returned no callable.
    """
    if isinstance(problem, RoutingProblem):
        problem = registry().backends[name].seen(dataclasses.replace(problem, training=False))
    key = (name, problem, device)
    with _lock_for(key):
        if key in _kernels:
            return _kernels[key]
        if key in _building.get():
            msg = (
                f"the factory of backend {name!r} routed {problem}, "
                "the problem that it is building for"
            )
            raise RuntimeError(msg)
        token = _building.set((*_building.get(), key))
        try:
            # Whatever the caller is in the middle of, a kernel and the tensors that it keeps are
            # real.
            with not_raised(), unset_fake_temporarily(), torch.inference_mode(mode=False):
                kernel = registry().build(name, problem, device)
                _look_for_methods(name, kernel)
        finally:
            _building.reset(token)
        _kernels[key] = kernel
        return kernel


def _look_for_methods(name: str, kernel: Kernel) -> None:
    """Look for the optional methods of a kernel, once, so that no later look at them raises.

    :raises FactoryError: looking raised, or something else has the name of a method.
    """
    methods = {"prepared": Prepares, "warmup": WarmsUp, "backward": Differentiates}
    try:
        with contained("looking at its kernel"):
            for method, protocol in methods.items():
                if isinstance(kernel, protocol) and not callable(found := getattr(kernel, method)):
                    raise TypeError(refusal(method, "a method", found))
    except PluginFailure as failure:
        verdict = Verdict.no(RejectCode.FACTORY_FAILED, failure.sentence)
        raise _refused(name, verdict, failure.trace) from failure.error


def _refused(name: str, verdict: Verdict, trace: str = "") -> FactoryError:
    brought_by = registry().distribution(name)
    return FactoryError(
        Rejection(name=name, verdict=verdict, distribution=brought_by, traceback=trace)
    )


def _require_closed_form(name: str, kernel: object, problem: RoutingProblem) -> None:
    """Refuse to train with a kernel that has no ``backward``.

    Accept it if the built-in gradient knows the maths.

    :raises FactoryError: the built-in gradient does not know the maths.
    """
    if isinstance(kernel, Differentiates):
        return
    spec = problem.spec
    family = registry().families.get(spec.family)
    if spec.score not in SCORES:
        beyond = f"the score function {spec.score!r} of family {spec.family!r}"
    elif family is not None and family.oracle:
        beyond = f"the family {spec.family!r}, which has an oracle of its own"
    else:
        return
    reason = f"its kernel has no `backward`, and the built-in gradient does not know {beyond}"
    raise _refused(name, Verdict.no(RejectCode.TRAINING, reason))


def _warn_of_downgrade(report: ResolutionReport, request: Request) -> None:
    """Nothing falls back silently: warn once, or raise if ``MOE_ROUTING_STRICT`` is set."""
    missed = report.rejection(report.missed) if report.missed else None
    if missed is None:
        return
    fix = f"; fix: {missed.verdict.fix}" if missed.verdict.fix else ""
    where = printable(str(report.device))
    operation = "route" if report.problem is None else report.problem.operation
    doing = "routes" if operation == "route" else f"computes {operation}"
    text = (
        f"{where} {doing} with {report.winner!r}, not with {missed.name!r}, "
        f"which {missed.verdict.reason}{fix}"
    )
    if request.strict:
        msg = f"{STRICT_VARIABLE} is set and {text}"
        raise BackendUnavailableError(msg, report)
    _warn_once(text)


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, DowngradeWarning, stacklevel=2)


def dtype_name(dtype: object) -> str:
    """Return a dtype's name without its module: ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def empty_output(
    spec: RoutingSpec, logits: Tensor, topk: int, ids_dtype: torch.dtype
) -> RoutingOutput:
    """Allocate outputs for the logits, unfilled."""
    shape = (logits.shape[0], topk + spec.shared_experts)
    return RoutingOutput(
        torch.empty(shape, dtype=torch.float32, device=logits.device),
        torch.empty(shape, dtype=ids_dtype, device=logits.device),
    )
