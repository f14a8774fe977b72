"""Specs that plug-ins provide.

``BackendSpec`` for a backend, ``FamilySpec`` for a routing family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from moe_routing_registry import _fields
from moe_routing_registry.device import DeviceInfo
from moe_routing_registry.problem import COMPOSED_OPERANDS, OPTIONAL_OPERANDS
from moe_routing_registry.routing_spec import SCORES, RoutingSpec
from moe_routing_registry.text import refusal, require_name
from moe_routing_registry.verdict import RejectCode, Verdict

if TYPE_CHECKING:
    from moe_routing_registry.operation import Problem
    from moe_routing_registry.problem import RoutingProblem

P = TypeVar("P", bound="Problem")
API_VERSION = 1
"""Version of the plug-in interface; a spec for another version is rejected."""

CAPABILITIES = (
    "compile", "cuda_graphs", "dtype", "family", "gradients", "group", "invariance", "large_sizes",
    "layout", "operands", "several_devices", "shape",
)  # fmt: skip
"""What a backend may leave out deliberately, and state in its spec."""

ANY = "*"
ACCELERATOR = "accelerator"

SupportRule = Callable[[Any, DeviceInfo], Verdict]
"""Takes problems of the operations that its backend has a factory for."""
NotesRule = Callable[[Any, DeviceInfo], tuple[str, ...]]


def knows_score(problem: RoutingProblem, _device: DeviceInfo | None = None) -> Verdict:
    """Accept the score functions that every built-in backend knows.

    It is a support rule, or the start of one.

    >>> from moe_routing_registry import RoutingProblem
    >>> spec = RoutingSpec(family="f", score="square")
    >>> problem = RoutingProblem(spec=spec, num_experts=8, topk=2, dtype="float32")
    >>> knows_score(problem).reason
    "knows the score functions softmax, sigmoid, sqrtsoftplus, not 'square'"
    """
    if problem.spec.score in SCORES:
        return Verdict.yes()
    return Verdict.no(
        RejectCode.FAMILY,
        f"knows the score functions {', '.join(SCORES)}, not {problem.spec.score!r}",
    )


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of device: a platform, and which generations of it.

    CUDA's generations are ordered, so they are a range; ROCm's and Intel's are names without an
    order (gfx1100 > gfx942 says nothing), so they are a set.

    :ivar platform: a ``DeviceInfo.platform``, ``"accelerator"`` for every one but the CPU and meta,
        or ``"*"`` for all.
    :ivar archs: names of the archs; empty for all of them.
    :ivar min_capability: lowest CUDA compute capability, inclusive.
    :ivar max_capability: highest CUDA compute capability, inclusive.
    :ivar explicit: on this kind of device the backend is used only when it is named.

    >>> hopper = DeviceInfo(type="cuda", platform="cuda", arch="sm_90")
    >>> bool(Target("cuda", min_capability=(8, 0)).match(hopper))
    True
    >>> Target("cuda", min_capability=(10, 0)).match(hopper).reason
    'needs compute capability 10.0 or later, the device has 9.0'
    """

    platform: str
    archs: frozenset[str] = frozenset()
    min_capability: tuple[int, int] | None = None
    max_capability: tuple[int, int] | None = None
    explicit: bool = False

    def __post_init__(self) -> None:
        """Check every field, and refuse a version range where versions have no order."""
        platform = _fields.text("platform", self.platform)
        archs = _fields.each("archs", self.archs, frozenset, "a frozenset of strings", _fields.text)
        _fields.keep(
            self,
            platform=platform if platform == ANY else require_name("platform", platform),
            archs=frozenset(archs),
            min_capability=_version("min_capability", self.min_capability),
            max_capability=_version("max_capability", self.max_capability),
            explicit=_fields.exactly("explicit", self.explicit, bool, "True or False"),
        )
        if self.platform != "cuda" and (self.min_capability or self.max_capability):
            msg = (
                "min_capability, max_capability: only platform 'cuda' has an order, "
                f"got platform {self.platform!r}"
            )
            raise ValueError(msg)

    @property
    def narrowness(self) -> int:
        """How narrow the target is, from 0 to 3.

        0 is any platform, 1 any accelerator, 2 one platform, and 3 some generations of one
        platform.
        """
        if self.platform in (ANY, ACCELERATOR):
            return int(self.platform == ACCELERATOR)
        return 3 if self.archs or self.min_capability or self.max_capability else 2

    def match(self, device: DeviceInfo) -> Verdict:
        """Say whether the device is of this kind."""
        if self.platform not in (ANY, device.platform) and not (
            self.platform == ACCELERATOR and device.is_accelerator
        ):
            return Verdict.no(
                RejectCode.PLATFORM, f"is for {self.platform}, the device is {device.platform}"
            )
        if self.archs and device.arch not in self.archs:
            known = ", ".join(sorted(self.archs))
            return Verdict.no(
                RejectCode.ARCH, f"is for {known}, the device is {device.arch or 'of unknown arch'}"
            )
        return self._match_capability(device)

    def _match_capability(self, device: DeviceInfo) -> Verdict:
        low, high, has = self.min_capability, self.max_capability, device.capability
        if low is None and high is None:
            return Verdict.yes()
        if has is None:
            return Verdict.no(
                RejectCode.ARCH, f"needs a known compute capability, the device has {device.arch!r}"
            )
        if low is not None and has < low:
            return Verdict.no(
                RejectCode.ARCH,
                f"needs compute capability {_dotted(low)} or later, the device has {_dotted(has)}",
            )
        if high is not None and has > high:
            return Verdict.no(
                RejectCode.ARCH,
                f"knows compute capability up to {_dotted(high)}, the device has {_dotted(has)}",
            )
        return Verdict.yes()

    def __str__(self) -> str:
        """Name the target: ``cuda >= 8.0``, ``rocm gfx942, gfx950``."""
        parts = [
            {ANY: "any device", ACCELERATOR: "any accelerator"}.get(self.platform, self.platform)
        ]
        if self.archs:
            parts.append(", ".join(sorted(self.archs)))
        if self.min_capability:
            parts.append(f">= {_dotted(self.min_capability)}")
        if self.max_capability:
            parts.append(f"<= {_dotted(self.max_capability)}")
        if self.explicit:
            parts.append("(when named)")
        return " ".join(parts)


def _version(name: str, value: object) -> tuple[int, ...] | None:
    expected = "a pair of integers or None"
    if value is None:
        return None
    numbers = tuple(_fields.each(name, value, tuple, expected, _fields.whole))
    if len(numbers) != 2:  # noqa: PLR2004 -- major and minor
        raise ValueError(refusal(name, expected, numbers))
    return numbers


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSpec:
    """Describes a backend to the registry.

    It holds everything that the choice needs, so that the backend need not be imported.

    Raises ``TypeError`` or ``ValueError`` that names the field, what was expected and what came.

    :ivar name: what users write in ``get_router(backend=...)``: 1 to 100 of the characters a-z,
        0-9, ``.``, ``_``, ``-``.
    :ivar factories: name of each operation that it computes -> dotted path
        ``"package.module:attribute"`` of ``factory(problem, device) -> kernel``, imported only when
        this backend is chosen. A factory that asks ``supports`` itself takes the keyword
        ``unsupported``: if it is True, the factory builds the problem all the same. Only the
        conformance kit passes it, to try what is declined.
    :ivar targets: the devices that it is for.
    :ivar api_version: the version of the plug-in interface that it was written for.
    :ivar families: names of the families that it serves, or ``None`` for every one that
        ``supports`` accepts, except another distribution's with an oracle of its own: only a
        backend that names such a family is known to compute what that says.
    :ivar operands: which of ``OPTIONAL_OPERANDS`` its kernels of ``route`` take, and those of
        ``gate`` but for ``COMPOSED_OPERANDS``. It is not asked about a call that brings another: a
        kernel written before there was such an operand is never handed one. A call that brings one
        of ``COMPOSED_OPERANDS`` is the same problem without it for a backend that does not name it.
    :ivar requirements: PEP 508 strings, checked against installed metadata, never by importing.
    :ivar priority: higher is tried first. Below 0, which is the default, it is never chosen unless
        it is named: an installed backend changes nothing until somebody chooses it. Built in: eager
        0, torch-compile 50, Triton 100.
    :ivar supports: the support rule, ``supports(problem, device) -> Verdict``: cheap, without side
        effects, and without importing torch. It is asked about problems of every operation in
        ``factories``.
    :ivar summary: one line for ``moe-routing doctor``.
    :ivar notes: ``notes(problem, device)``: what is worth knowing where it is chosen, a line each,
        for ``explain`` and doctor; as cheap as ``supports``.
    :ivar tuners: name of an operation -> dotted path of what ``moe-routing tune`` calls,
        ``tuner(problem, device, tokens=..., on_step=...)``; nothing for an operation that has
        nothing to tune. It calls ``on_step(what, done, total)``, first with how long all of it
        takes, then before each step with what is done.
    :ivar gaps: what it consciously leaves out: one of ``CAPABILITIES`` -> the reason, for the
        conformance report. What ``supports`` declines without a gap must really be impossible: the
        conformance kit tries it.
    """

    name: str
    factories: Mapping[str, str] = field(hash=False)
    targets: tuple[Target, ...]
    api_version: int = API_VERSION
    families: frozenset[str] | None = None
    operands: frozenset[str] = frozenset()
    requirements: tuple[str, ...] = ()
    priority: int = -1
    supports: SupportRule | None = field(default=None, compare=False)
    summary: str = ""
    notes: NotesRule | None = field(default=None, compare=False)
    tuners: Mapping[str, str] = field(default_factory=dict, hash=False)
    gaps: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Check every field: a spec that is accepted can be shown, compared and used."""
        families = self.families
        expected = "a tuple of at least one Target"
        _fields.keep(
            self,
            name=require_name("name", self.name),
            factories=_fields.paths("factories", self.factories),
            targets=tuple(_fields.each("targets", self.targets, tuple, expected, _target)),
            api_version=_fields.whole("api_version", self.api_version),
            families=None
            if families is None
            else frozenset(
                _fields.each(
                    "families", families, frozenset, "a frozenset of names, or None", require_name
                )
            ),
            operands=frozenset(
                _fields.each(
                    "operands", self.operands, frozenset, _EXPECTED_OPERANDS, _optional_operand
                )
            ),
            requirements=tuple(
                _fields.each(
                    "requirements",
                    self.requirements,
                    tuple,
                    "a tuple of PEP 508 strings",
                    _fields.text,
                )
            ),
            priority=_fields.whole("priority", self.priority),
            summary=_fields.text("summary", self.summary),
            tuners=_fields.paths("tuners", self.tuners),
            gaps=_gaps(self.gaps),
        )
        if not self.factories:
            raise ValueError(
                refusal("factories", "a factory for at least one operation", self.factories)
            )
        if not self.targets:
            raise ValueError(refusal("targets", expected, self.targets))
        for name in ("supports", "notes"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TypeError(
                    refusal(name, "a function (problem, device), or None", getattr(self, name))
                )
        for operation in self.tuners:
            if operation not in self.factories:
                raise ValueError(
                    refusal(
                        "tuners",
                        f"operations that it has a factory for: {', '.join(self.factories)}",
                        operation,
                    )
                )

    def seen(self, problem: P) -> P:
        """Return the problem as this backend sees it.

        It is without those of ``COMPOSED_OPERANDS`` that the backend does not name.
        """
        brought: frozenset[str] = getattr(problem, "operands", frozenset())
        composed = (brought & _COMPOSED) - self.operands
        return replace(problem, operands=brought - composed) if composed else problem  # type: ignore[type-var] # a problem with operands is a dataclass


_COMPOSED = frozenset(COMPOSED_OPERANDS)
_EXPECTED_OPERANDS = f"a frozenset of names among {', '.join(OPTIONAL_OPERANDS)}"


def _optional_operand(name: str, value: object) -> str:
    plain = _fields.text(name, value)
    if plain not in OPTIONAL_OPERANDS:
        raise ValueError(refusal(name, _EXPECTED_OPERANDS, plain))
    return plain


def _target(name: str, value: object) -> Target:
    return _fields.exactly(name, value, Target, "a tuple of at least one Target")


def _gaps(value: object) -> dict[str, str]:
    expected = f"one of {', '.join(CAPABILITIES)} and a reason"
    gaps = {}
    for capability, reason in _fields.mapping(
        "gaps", value, "a mapping of capabilities to reasons"
    ).items():
        if not isinstance(capability, str) or not isinstance(reason, str):
            raise TypeError(refusal("gaps", expected, (capability, reason)))
        gaps[_fields.text("gaps", capability)] = _fields.text("gaps", reason)
    for capability, reason in gaps.items():
        if capability not in CAPABILITIES or not reason:
            raise ValueError(refusal("gaps", expected, (capability, reason)))
    return gaps


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySpec:
    """Describes a routing family to the registry.

    Raises ``TypeError`` or ``ValueError`` that names the field, what was expected and what came.

    :ivar spec: the family's defaults; its ``family`` is the name that users write, and no built-in
        name.
    :ivar source: paper, model or project that the formula comes from.
    :ivar models: model names (transformers' ``model_type``) that are this family with other values.
    :ivar oracle: ``"package.module:attribute"`` of a float64 oracle that is called like
        ``moe_routing.reference.oracle.route`` (with ``ids`` and ``valid`` only where they are
        given), for maths that the fields of ``RoutingSpec`` cannot say; ``""`` to use the kit's
        own. With one, the family is routed by backends of the same distribution and by those that
        name it in ``BackendSpec.families``, and by no others.
    """

    spec: RoutingSpec
    source: str
    models: Mapping[str, RoutingSpec] = field(default_factory=dict)
    oracle: str = ""

    def __post_init__(self) -> None:
        """Check every field."""
        spec = _fields.exactly("spec", self.spec, RoutingSpec, "a RoutingSpec")
        models = {}
        for key, value in _fields.mapping(
            "models", self.models, "a mapping of model names to RoutingSpecs"
        ).items():
            name = require_name("models", key)
            model = _fields.exactly("models", value, RoutingSpec, f"a RoutingSpec for {name!r}")
            if model.family != spec.family:
                expected = f"specs of the family {spec.family!r}"
                raise ValueError(refusal("models", expected, f"{name}: {model.family}"))
            models[name] = model
        oracle = _fields.text("oracle", self.oracle)
        _fields.keep(
            self,
            source=_fields.text("source", self.source),
            models=models,
            oracle=_fields.path("oracle", oracle) if oracle else "",
        )

    @property
    def names(self) -> frozenset[str]:
        """The names that users write for it: the family's and its models'."""
        return frozenset({self.spec.family, *self.models})
