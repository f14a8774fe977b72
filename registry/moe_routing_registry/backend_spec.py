"""Specs that plug-ins provide.

``BackendSpec`` for a backend, ``FamilySpec`` for a routing family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_routing_registry._fields import require, require_path, require_paths
from moe_routing_registry.device import DeviceInfo
from moe_routing_registry.routing_spec import SCORES, RoutingSpec
from moe_routing_registry.text import refusal, require_name
from moe_routing_registry.verdict import RejectCode, Verdict

if TYPE_CHECKING:
    from moe_routing_registry.problem import RoutingProblem

API_VERSION = 1
"""Version of the plug-in interface; a spec for another version is rejected."""

CAPABILITIES = (
    "compile", "cuda_graphs", "dtype", "family", "gradients",
    "large_sizes", "layout", "several_devices", "shape",
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
        if self.platform != ANY:
            require_name("platform", self.platform)
        require("archs", self.archs, frozenset, "a frozenset of strings", of=str)
        for name in ("min_capability", "max_capability"):
            version = getattr(self, name)
            if version is not None:
                require(name, version, tuple, "a pair of integers or None", of=int)
                if len(version) != 2:  # noqa: PLR2004 -- major and minor
                    raise ValueError(refusal(name, "a pair of integers or None", version))
        require("explicit", self.explicit, bool, "True or False")
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
        nothing to tune.
    :ivar gaps: what it consciously leaves out: one of ``CAPABILITIES`` -> the reason, for the
        conformance report. What ``supports`` declines without a gap must really be impossible: the
        conformance kit tries it.
    """

    name: str
    factories: Mapping[str, str] = field(hash=False)
    targets: tuple[Target, ...]
    api_version: int = API_VERSION
    families: frozenset[str] | None = None
    requirements: tuple[str, ...] = ()
    priority: int = -1
    supports: SupportRule | None = field(default=None, compare=False)
    summary: str = ""
    notes: NotesRule | None = field(default=None, compare=False)
    tuners: Mapping[str, str] = field(default_factory=dict, hash=False)
    gaps: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Check every field: a spec that is accepted can be shown, compared and used."""
        require_name("name", self.name)
        require_paths("factories", self.factories)
        if not self.factories:
            raise ValueError(
                refusal("factories", "a factory for at least one operation", self.factories)
            )
        require("targets", self.targets, tuple, "a tuple of at least one Target", of=Target)
        if not self.targets:
            raise ValueError(refusal("targets", "a tuple of at least one Target", self.targets))
        require("api_version", self.api_version, int, "an integer")
        if self.families is not None:
            require("families", self.families, frozenset, "a frozenset of names, or None", of=str)
        require("requirements", self.requirements, tuple, "a tuple of PEP 508 strings", of=str)
        require("priority", self.priority, int, "an integer")
        for name in ("supports", "notes"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TypeError(
                    refusal(name, "a function (problem, device), or None", getattr(self, name))
                )
        require("summary", self.summary, str, "a string")
        require_paths("tuners", self.tuners)
        for operation in self.tuners:
            if operation not in self.factories:
                raise ValueError(
                    refusal(
                        "tuners",
                        f"operations that it has a factory for: {', '.join(self.factories)}",
                        operation,
                    )
                )
        require("gaps", self.gaps, Mapping, "a mapping of capabilities to reasons")
        for capability, reason in self.gaps.items():
            if capability not in CAPABILITIES or not isinstance(reason, str) or not reason:
                expected = f"one of {', '.join(CAPABILITIES)} and a reason"
                raise ValueError(refusal("gaps", expected, (capability, reason)))


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySpec:
    """Describes a routing family to the registry.

    Raises ``TypeError`` or ``ValueError`` that names the field, what was expected and what came.

    :ivar spec: the family's defaults; its ``family`` is the name that users write, and no built-in
        name.
    :ivar source: paper, model or project that the formula comes from.
    :ivar models: model names (transformers' ``model_type``) that are this family with other values.
    :ivar oracle: ``"package.module:attribute"`` of a float64 oracle that is called like
        ``moe_routing.reference.oracle.route``, for maths that the fields of ``RoutingSpec`` cannot
        say; ``""`` to use the kit's own. With one, the family is routed by backends of the same
        distribution and by those that name it in ``BackendSpec.families``, and by no others.
    """

    spec: RoutingSpec
    source: str
    models: Mapping[str, RoutingSpec] = field(default_factory=dict)
    oracle: str = ""

    def __post_init__(self) -> None:
        """Check every field."""
        require("spec", self.spec, RoutingSpec, "a RoutingSpec")
        require("source", self.source, str, "a string")
        require("models", self.models, Mapping, "a mapping of model names to RoutingSpecs")
        for name, spec in self.models.items():
            require_name("models", name)
            require("models", spec, RoutingSpec, f"a RoutingSpec for {name!r}")
            if spec.family != self.spec.family:
                raise ValueError(
                    refusal(
                        "models",
                        f"specs of the family {self.spec.family!r}",
                        f"{name}: {spec.family}",
                    )
                )
        require("oracle", self.oracle, str, "a string")
        if self.oracle:
            require_path("oracle", self.oracle)

    @property
    def names(self) -> frozenset[str]:
        """The names that users write for it: the family's and its models'."""
        return frozenset({self.spec.family, *self.models})
