"""``Registry``: every backend and family there is, and the choice among them."""

from __future__ import annotations

import inspect
import shlex
import warnings
from contextvars import ContextVar
from operator import itemgetter
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from moe_routing_registry import _requirements
from moe_routing_registry._loading import Inventory, discover, load
from moe_routing_registry.backend_spec import API_VERSION, BackendSpec
from moe_routing_registry.containment import PluginFailure, contained, notes_of
from moe_routing_registry.errors import (
    DuplicateNameError,
    FactoryError,
    PluginWarning,
    UnknownNameError,
)
from moe_routing_registry.locks import ForkSafeLock
from moe_routing_registry.operation import Problem
from moe_routing_registry.report import Candidate, Rejection, ResolutionReport
from moe_routing_registry.request import BACKEND_VARIABLE, BLOCK_VARIABLE, Request
from moe_routing_registry.text import printable, refusal, shown
from moe_routing_registry.verdict import FIXABLE, RejectCode, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from moe_routing_registry._loading import Plugin as Plugin  # noqa: PLC0414 -- what `plugins` returns
    from moe_routing_registry.backend_spec import FamilySpec
    from moe_routing_registry.device import DeviceInfo
    from moe_routing_registry.operation import OperationSpec


_loading: ContextVar[bool] = ContextVar("moe_routing_loading", default=False)
"""Whether this thread is loading plug-ins."""


class Registry:
    """Backends and families from plug-ins, loaded on first use, once, whichever thread comes first.

    :param built_in: name -> module of the plug-ins that are there even in a checkout without
        metadata.
    :param reserved: names of the built-in families and models, which no plug-in may bring.
    :param operations: the built-in operations.
    :ivar generation: how often ``register`` and ``unregister`` changed what there is; whoever keeps
        a choice compares it.
    """

    def __init__(
        self,
        built_in: Mapping[str, str] | None = None,
        reserved: Collection[str] = (),
        operations: Iterable[OperationSpec] = (),
    ) -> None:
        """Load nothing yet."""
        self._built_in = dict(built_in or {})
        self._reserved = frozenset(reserved)
        self._operations = {operation.name: operation for operation in operations}
        self._left_out: dict[str, str] = {}
        self._lock = ForkSafeLock()
        self._inventory: Inventory | None = None
        self.generation = 0

    def load(self, on_plugin: Callable[[Plugin], object] = lambda _plugin: None) -> Inventory:
        """Load the plug-ins, unless they are loaded.

        :param on_plugin: called with each plug-in before it is imported.
        """
        if self._inventory is None:
            with self._lock:
                if self._inventory is None:
                    self._inventory = self._loaded(on_plugin)
                    # Only now: where warnings are errors, the first one must not undo the loading.
                    for failure in self._inventory.failures:
                        _warn_of(failure)
        return self._inventory

    def _loaded(self, on_plugin: Callable[[Plugin], object]) -> Inventory:
        if _loading.get():
            msg = "plug-ins are being loaded; a plug-in cannot use the registry at its own import"
            raise RuntimeError(msg)
        token = _loading.set(True)
        try:
            return load(self._built_in, self._reserved, self._operations, self._left_out, on_plugin)
        finally:
            _loading.reset(token)

    @property
    def loaded(self) -> bool:
        """Whether the plug-ins are loaded."""
        return self._inventory is not None

    def plugin(self, backend: str) -> Plugin | None:
        """Return the plug-in that brought a backend, or ``None`` if it was added by hand."""
        return self.load().plugins.get(backend)

    def plugins(self) -> list[Plugin]:
        """Find the plug-ins, without importing them."""
        return discover(self._built_in, Inventory())

    def leave_out(self, key: str, why: str) -> None:
        """Do not load the plug-in of that key: doctor has seen that loading it does not end.

        :raises RuntimeError: the plug-ins are loaded already.
        """
        with self._lock:
            if self._inventory is not None:
                msg = f"{key}: the plug-ins are loaded already"
                raise RuntimeError(msg)
            self._left_out[key] = why

    @property
    def backends(self) -> Mapping[str, BackendSpec]:
        """Specs of the backends by name."""
        return self.load().backends

    @property
    def families(self) -> Mapping[str, FamilySpec]:
        """Specs of the families that plug-ins brought, by name."""
        return self.load().families

    @property
    def operations(self) -> Mapping[str, OperationSpec]:
        """Operations by name: the built-in ones and those of plug-ins."""
        return self.load().operations

    def operation(self, name: str) -> OperationSpec:
        """Return the spec of an operation.

        :raises UnknownNameError: there is none of that name.
        """
        if name not in self.operations:
            kind = "operation"
            raise UnknownNameError(kind, name, self.operations)
        return self.operations[name]

    def example(self, operation: str) -> Problem:
        """Import the example of an operation.

        :raises UnknownNameError: there is no such operation.
        :raises PluginFailure: its import raised.
        """
        path = self.operation(operation).example
        with contained(f"importing the example of operation {operation!r}"):
            problem: object = resolve_name(path)
            if not isinstance(problem, Problem):
                raise TypeError(refusal("example", "a Problem", problem))
        return problem

    @property
    def failures(self) -> tuple[Rejection, ...]:
        """Plug-ins that failed at import or registration, with their traceback."""
        return tuple(self.load().failures)

    @property
    def duplicates(self) -> tuple[DuplicateNameError, ...]:
        """Names that two distributions claim."""
        return tuple(self.load().duplicates)

    def distribution(self, name: str, kind: str = "backend") -> str:
        """Return the distribution that brought a backend (or, with ``kind="family"``, a family)."""
        return self.load().distributions[kind, name]

    def register(self, spec: BackendSpec, distribution: str = "(this process)") -> None:
        """Add a backend by hand, for a notebook or a test; plug-ins use the hook.

        Raises ``TypeError`` for what is no ``BackendSpec``, and ``DuplicateNameError`` if the name
        is taken.
        """
        if type(spec) is not BackendSpec:
            raise TypeError(refusal("spec", "a BackendSpec", spec))
        with self._lock:
            inventory = self.load()
            if spec.name in inventory.backends:
                kind, taken_by = "backend", inventory.distributions["backend", spec.name]
                raise DuplicateNameError(kind, spec.name, taken_by, distribution)
            inventory.add(spec, distribution)
            self.generation += 1

    def unregister(self, name: str) -> None:
        """Take out a backend that was added by hand."""
        with self._lock:
            inventory = self.load()
            del inventory.backends[name]
            del inventory.distributions["backend", name]
            inventory.plugins.pop(name, None)
            self.generation += 1

    def resolve(self, problem: Problem, device: DeviceInfo, request: Request) -> ResolutionReport:
        """Choose: who was named, else the best by priority, then narrower target, then name.

        Nothing is imported or built, and a backend that does not fit is an entry in the report, not
        an exception.

        Raises ``UnknownNameError`` for an unknown operation or a misspelt name in the request, and
        ``DuplicateNameError`` while two distributions claim a name that is not blocked.
        """
        self.operation(problem.operation)
        self.check_names(request)
        fitting: list[tuple[Rank, Candidate]] = []
        rejected = list(self.failures)
        lost: list[tuple[Rank, str]] = []
        for name, backend in self.backends.items():
            verdict, trace = self._judge(backend, problem, device, request)
            distribution = self.distribution(name)
            if verdict:
                fitting.append(
                    (
                        _rank(backend, device),
                        Candidate(name=name, priority=backend.priority, distribution=distribution),
                    )
                )
                continue
            rejected.append(
                Rejection(name=name, verdict=verdict, distribution=distribution, traceback=trace)
            )
            if verdict.code in FIXABLE and _chosen_by_itself(backend, device):
                lost.append((_rank(backend, device), name))
        fitting.sort(key=itemgetter(0))
        eligible = tuple(candidate for _, candidate in fitting)
        winner = next((c.name for c in eligible if request.backend in (None, c.name)), None)
        return ResolutionReport(
            problem=problem,
            device=device,
            winner=winner,
            asked_by=request.asked_by,
            requested=request.backend,
            eligible=eligible,
            rejected=tuple(rejected),
            missed=_missed(request, fitting, lost),
            notes=() if winner is None else _notes(self.backends[winner], problem, device),
        )

    def check_names(self, request: Request) -> None:
        """Raise for a wrong name of a backend, and for a duplicate name that is not resolved.

        The name may come from an argument, a context or the environment.
        """
        known = {*self.backends, *(failure.name for failure in self.failures)}
        if not isinstance(request.backend, (str, type(None))):
            raise TypeError(refusal("backend", "a name, or None", request.backend))
        if request.backend is not None and request.backend not in known:
            kind = (
                f"backend in {BACKEND_VARIABLE}" if request.asked_by == "environment" else "backend"
            )
            raise UnknownNameError(kind, request.backend, known)
        for name in sorted(request.blocked - known):
            msg = f"backend in {BLOCK_VARIABLE}"
            raise UnknownNameError(msg, name, known)
        for duplicate in self.duplicates:
            if duplicate.name not in request.blocked:
                raise duplicate

    def _judge(
        self, backend: BackendSpec, problem: Problem, device: DeviceInfo, request: Request
    ) -> tuple[Verdict, str]:
        """Go from the cheapest reason to the dearest.

        The second item is a traceback, mostly empty.
        """
        cheap = (self._permitted, _offers, _matches, self._serves, _takes, _requires)
        for rule in cheap:
            verdict = rule(backend, problem, device, request)
            if not verdict:
                return verdict, ""
        verdict, trace = self._ask(backend, problem, device)
        if verdict and request.backend != backend.name and not _chosen_by_itself(backend, device):
            fix = f"with moe_routing.prefer({backend.name!r}): ..."
            return Verdict.no(
                RejectCode.EXPLICIT_ONLY, "fits, but is only used when it is named", fix
            ), ""
        return verdict, trace

    def _permitted(
        self, backend: BackendSpec, _problem: Problem, _device: DeviceInfo, request: Request
    ) -> Verdict:
        if backend.name in request.blocked:
            return Verdict.no(
                RejectCode.BLOCKED, f"{BLOCK_VARIABLE} names it", f"unset {BLOCK_VARIABLE}"
            )
        if backend.api_version != API_VERSION:
            reason = (
                f"is written for plug-in interface {backend.api_version}, this is {API_VERSION}"
            )
            package = self.distribution(backend.name).partition(" ")[0]
            fix = f"pip install --upgrade moe-routing {shlex.quote(package)}"
            return Verdict.no(RejectCode.API_VERSION, reason, fix)
        return Verdict.yes()

    def _serves(
        self, backend: BackendSpec, problem: Problem, _device: DeviceInfo, _request: Request
    ) -> Verdict:
        name = problem.family
        if not name:
            return Verdict.yes()
        if backend.families is not None:
            if name in backend.families:
                return Verdict.yes()
            reason = f"does not serve family {name!r}; serves {', '.join(sorted(backend.families))}"
            return Verdict.no(RejectCode.FAMILY, reason)
        family = self.families.get(name)
        if (
            family is None
            or not family.oracle
            or self.distribution(backend.name) == self.distribution(name, "family")
        ):
            return Verdict.yes()
        reason = (
            f"computes what the fields of a spec say, and family {name!r} has an oracle "
            "of its own, which may say more"
        )
        return Verdict.no(RejectCode.FAMILY, reason)

    @staticmethod
    def _ask(backend: BackendSpec, problem: Problem, device: DeviceInfo) -> tuple[Verdict, str]:
        if backend.supports is None:
            return Verdict.yes(), ""
        try:
            with contained("its support rule"):
                verdict: object = backend.supports(backend.seen(problem), device)
        except PluginFailure as failure:
            return Verdict.no(RejectCode.SUPPORT_RULE_FAILED, failure.sentence), failure.trace
        if type(verdict) is not Verdict:
            reason = f"its support rule returned {shown(verdict)}, not a Verdict"
            return Verdict.no(RejectCode.SUPPORT_RULE_FAILED, reason), ""
        return verdict, ""

    def build(
        self, name: str, problem: Problem, device: DeviceInfo, *, unsupported: bool = False
    ) -> Any:  # noqa: ANN401 -- typed as Kernel one layer up, where torch is
        """Import the backend's factory and build.

        :param unsupported: tell a factory that takes this keyword to build what ``supports``
            declines all the same.
        :raises FactoryError: the factory cannot be imported, raises, or returns something that
            cannot be called.
        """
        try:
            with contained("its factory"):
                backend = self.backends[name]
                factory: Callable[..., object] = resolve_name(backend.factories[problem.operation])
                told = {"unsupported": True} if unsupported and _takes_unsupported(factory) else {}
                bound = factory(backend.seen(problem), device, **told)
        except PluginFailure as failure:
            verdict = Verdict.no(RejectCode.FACTORY_FAILED, failure.sentence)
            raise FactoryError(self._rejection(name, verdict, failure.trace)) from failure.error
        if not callable(bound):
            verdict = Verdict.no(
                RejectCode.FACTORY_FAILED, f"its factory returned {shown(bound)}, not a callable"
            )
            raise FactoryError(self._rejection(name, verdict, ""))
        return bound

    def builds_unsupported(self, name: str, operation: str) -> bool:
        """Tell whether a backend can be told to build what its support rule declines.

        The answer is about its factory for that operation.

        :raises FactoryError: the factory cannot be imported.
        """
        try:
            with contained("importing its factory"):
                return _takes_unsupported(resolve_name(self.backends[name].factories[operation]))
        except PluginFailure as failure:
            verdict = Verdict.no(RejectCode.FACTORY_FAILED, failure.sentence)
            raise FactoryError(self._rejection(name, verdict, failure.trace)) from failure.error

    def tuner(self, name: str, operation: str) -> Any:  # noqa: ANN401 -- what it takes and returns, its caller knows
        """Import the function that measures a backend's launches of an operation.

        ``None`` where the backend has nothing to tune.

        :raises PluginFailure: its import raised.
        """
        path = self.backends[name].tuners.get(operation)
        if path is None:
            return None
        with contained("importing its tuner"):
            return resolve_name(path)

    def _rejection(self, name: str, verdict: Verdict, trace: str) -> Rejection:
        return Rejection(
            name=name, verdict=verdict, distribution=self.distribution(name), traceback=trace
        )


def _takes_unsupported(factory: Callable[..., object]) -> bool:
    return "unsupported" in inspect.signature(factory).parameters


def _notes(backend: BackendSpec, problem: Problem, device: DeviceInfo) -> tuple[str, ...]:
    rule, seen = backend.notes, backend.seen(problem)
    return () if rule is None else notes_of("its notes", lambda: rule(seen, device))


def _warn_of(failure: Rejection) -> None:
    who = printable(f"plug-in {failure.name!r} of {failure.distribution}")
    text = (
        f"{who} is not used: {failure.verdict.reason}; "
        "`moe-routing doctor --verbose` shows the traceback"
    )
    warnings.warn(text, PluginWarning, stacklevel=2)


Rank = tuple[int, int, str]
"""Sort key of the choice, best first: priority, then narrower target, then name."""


def _rank(backend: BackendSpec, device: DeviceInfo) -> Rank:
    return (
        -backend.priority,
        -max((t.narrowness for t in backend.targets if t.match(device)), default=0),
        backend.name,
    )


def _missed(
    request: Request, fitting: list[tuple[Rank, Candidate]], lost: list[tuple[Rank, str]]
) -> str | None:
    """Name the backend that would have won if it were not for something that can be fixed."""
    if request.backend is not None or not lost:
        return None
    rank, name = min(lost)
    return name if not fitting or rank < fitting[0][0] else None


def _offers(
    backend: BackendSpec, problem: Problem, _device: DeviceInfo, _request: Request
) -> Verdict:
    if problem.operation in backend.factories:
        return Verdict.yes()
    computes = ", ".join(backend.factories)
    reason = f"has no factory for the operation {problem.operation!r}; it computes {computes}"
    return Verdict.no(RejectCode.OPERATION, reason)


def _matches(
    backend: BackendSpec, _problem: Problem, device: DeviceInfo, _request: Request
) -> Verdict:
    verdicts = [target.match(device) for target in backend.targets]
    if any(verdicts):
        return Verdict.yes()
    # The most telling one: a wrong generation of the right platform says more than a wrong
    # platform.
    generations = [verdict for verdict in verdicts if verdict.code is RejectCode.ARCH]
    platforms = " and ".join(dict.fromkeys(target.platform for target in backend.targets))
    return (
        generations[0]
        if generations
        else Verdict.no(RejectCode.PLATFORM, f"is for {platforms}, the device is {device.platform}")
    )


def _chosen_by_itself(backend: BackendSpec, device: DeviceInfo) -> bool:
    return backend.priority >= 0 and any(
        t.match(device) and not t.explicit for t in backend.targets
    )


def _takes(
    backend: BackendSpec, problem: Problem, _device: DeviceInfo, _request: Request
) -> Verdict:
    brought: frozenset[str] = getattr(backend.seen(problem), "operands", frozenset())
    missing = sorted(brought - backend.operands)
    if not missing:
        return Verdict.yes()
    return Verdict.no(RejectCode.OPERANDS, f"takes no operand {' or '.join(missing)}")


def _requires(
    backend: BackendSpec, _problem: Problem, _device: DeviceInfo, _request: Request
) -> Verdict:
    return _requirements.check(backend.requirements)
