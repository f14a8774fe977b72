"""``Settings``: what is to be measured. Imports no torch."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    from collections.abc import Collection

MODES = {
    "graph": "replays of a CUDA graph, outputs allocated before: what the kernels take",
    "call": "whole calls, outputs allocated in them",
    "host": "what a call takes of the CPU, the device not waited for",
}
"""What is timed."""
COMPARISONS = {
    "baseline": "a Triton kernel that sorts whole rows, as the published Gemma4 kernel does",
    "eager": "the formula as model code writes it, in plain PyTorch",
    "compile-default": "the same through torch.compile",
    "compile-reduce-overhead": "the same with mode='reduce-overhead'",
    "compile-max-autotune": "the same with mode='max-autotune'",
}
"""What backends that route are compared with."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Short names of the dtypes of logits."""


class Case(NamedTuple):
    """One problem of routing and one number of tokens."""

    router: str
    dtype: str
    num_experts: int
    topk: int
    tokens: int

    def __str__(self) -> str:
        """Say it in a line."""
        return f"{self.router} {self.dtype} E={self.num_experts} K={self.topk} T={self.tokens:,}"

    @property
    def title(self) -> str:
        """Name the problem above its table."""
        return f"{self.router}, {self.dtype} logits, E = {self.num_experts}, K = {self.topk}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is to be measured of routing.

    :cvar operation: ``"route"``.

    Every router, dtype, number of tokens, mode and implementation with every other.

    :ivar routers: model or family names.
    :ivar sizes: E and K for each of the routers.
    :ivar backends: names of backends; empty: the one that the device gets; ``("all",)``: each that
        fits.
    :ivar tokens: T.
    :ivar dtypes: of the logits: ``"bfloat16"``, ``"float16"``, ``"float32"``.
    :ivar device: ``"cpu"``, ``"cuda:0"``, ...
    :ivar modes: names in ``MODES``.
    :ivar compare: names in ``COMPARISONS``.

    Raises ``ValueError`` that names the field for a value that cannot be.

    >>> len(Settings(tokens=(1, 16)).cases)
    2
    """

    operation: ClassVar[str] = "route"

    routers: tuple[str, ...] = ("gemma4",)
    sizes: tuple[tuple[int, int], ...] = ((128, 8),)
    backends: tuple[str, ...] = ()
    tokens: tuple[int, ...] = (1, 16, 256, 4096, 65536)
    dtypes: tuple[str, ...] = ("bfloat16",)
    device: str = "cpu"
    modes: tuple[str, ...] = ("call",)
    compare: tuple[str, ...] = ("eager",)

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        check_known("dtypes", self.dtypes, DTYPES.values())
        check_known("compare", self.compare, COMPARISONS)
        check_tokens(self.tokens)
        check_modes(self.modes, self.device)

    @property
    def cases(self) -> list[Case]:
        """Every problem and number of tokens, in the order in which they are measured."""
        return [
            Case(router, dtype, *size, tokens)
            for router, size in zip(self.routers, self.sizes, strict=True)
            for dtype in self.dtypes
            for tokens in self.tokens
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Rebuild from ``to_dict``'s values."""
        sizes = tuple((int(e), int(k)) for e, k in values["sizes"])
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists, "sizes": sizes})


def check_known(name: str, values: Collection[str], known: Collection[str]) -> None:
    """Refuse names that are not known.

    :raises ValueError: one is not.
    """
    for value in values:
        if value not in known:
            raise ValueError(refusal(name, f"one of {', '.join(known)}", value))


def check_tokens(tokens: tuple[int, ...]) -> None:
    """Refuse what are no numbers of tokens.

    :raises ValueError: there is none, or one is no positive int.
    """
    if not tokens or not all(isinstance(count, int) and count >= 1 for count in tokens):
        raise ValueError(refusal("tokens", "integers >= 1", tokens))


def check_modes(modes: tuple[str, ...], device: str) -> None:
    """Refuse what cannot be timed on a device.

    :raises ValueError: no such mode, or the device has no such clock.
    """
    check_known("modes", modes, MODES)
    unlike = set(modes) - {"call"}
    if device.partition(":")[0] == "cpu" and unlike:
        msg = (
            "modes: expected call on the CPU, which has no graphs and is its own host, "
            f"got {', '.join(sorted(unlike))}"
        )
        raise ValueError(msg)
    if "graph" in modes and device.partition(":")[0] != "cuda":
        msg = (
            f"modes: expected call or host on {device}, "
            "got graph: only CUDA and ROCm devices have CUDA graphs"
        )
        raise ValueError(msg)


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return fields of settings as JSON has them, with lists for tuples."""
    return {
        name: [list(item) if isinstance(item, tuple) else item for item in value]
        if isinstance(value, tuple)
        else value
        for name, value in values.items()
    }


def best_mode(device: str) -> str:
    """Choose how to time where nobody says: the kernels alone, where they can be."""
    graphs = device.partition(":")[0] == "cuda" and importlib.util.find_spec("triton") is not None
    return "graph" if graphs else "call"
