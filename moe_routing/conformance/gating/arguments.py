"""Clause 8: wrong arguments, one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance.gating._check import check
from moe_routing.conformance.gating.cases import FACTORS, Case
from moe_routing.conformance.requirements import require_refusal
from moe_routing.gating import RMSNorm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.under_test import BackendUnderTest

TELLTALE = 1234.5
"""An element that no error may show."""
RIGHT = Case(variant="gemma4", num_tokens=5, num_experts=16, topk=2, columns=24, factors=FACTORS)


@dataclass(frozen=True, slots=True)
class Wrong:
    """One wrong argument.

    :ivar argument: its name, which the error must name.
    :ivar what: what is wrong with it.
    :ivar changed: makes it of the right arguments.
    :ivar named: the argument that the error names, where it is another.
    """

    argument: str
    what: str
    changed: Callable[[Any], Any]
    named: str = ""

    @property
    def id(self) -> str:
        """Name for test ids."""
        return f"{self.argument}-{self.what.replace(' ', '_')}"

    @property
    def family(self) -> str:
        """The arguments of ``route`` have checks of their own."""
        return ""


def _values(argument: str, *values: object) -> Iterator[Wrong]:
    for value in values:
        plain = isinstance(value, (int, float, str, type(None), torch.dtype))
        what = repr(value) if plain else f"a {type(value).__name__}"
        yield Wrong(argument, what, lambda _, value=value: value)  # type: ignore[misc] # bound now


def _vector(argument: str) -> Iterator[Wrong]:
    yield Wrong(argument, "too short", lambda right: right[:-1])
    yield Wrong(argument, "of rank 2", lambda right: right[None])
    yield Wrong(argument, "of rank 0", lambda right: right[0])
    yield Wrong(argument, "of ints", lambda right: right.int())
    yield Wrong(argument, "of bools", lambda right: right > 0)
    yield Wrong(argument, "sparse", lambda right: right.to_sparse())
    yield Wrong(argument, "on another device", lambda right: right.to("meta"))
    yield Wrong(argument, "a list", lambda right: right.tolist())


def _matrix(argument: str) -> Iterator[Wrong]:
    yield Wrong(argument, "of rank 1", lambda right: right[0])
    yield Wrong(argument, "of rank 3", lambda right: right[None])
    yield Wrong(argument, "of ints", lambda right: right.int())
    yield Wrong(argument, "of float64", lambda right: right.double())
    yield Wrong(argument, "of float8", lambda right: right.to(torch.float8_e4m3fn))
    yield Wrong(argument, "sparse", lambda right: right.to_sparse())
    yield Wrong(argument, "a list", lambda right: right.tolist())
    yield Wrong(argument, "missing", lambda _: None)
    yield Wrong(argument, "without columns", lambda right: right[:, :0])


def _norms() -> Iterator[Wrong]:
    for value in (0.0, -1e-6, torch.nan, torch.inf, 1e-40, 1e39, True, "1e-6", None):
        yield Wrong("norm", f"eps {value!r}", lambda right, eps=value: right._replace(eps=eps))  # type: ignore[misc] # bound now
    yield from _values("norm", 1e-6, (1e-6, None), "rms", torch.nn.RMSNorm(24))
    for wrong in _vector("norm"):
        yield Wrong(
            "norm",
            f"weight {wrong.what}",
            lambda right, wrong=wrong: RMSNorm(right.eps, wrong.changed(right.weight)),  # type: ignore[misc] # bound now
        )


def every_wrong(_profile: Profile) -> Iterator[Wrong]:
    """Yield every wrong argument."""
    yield from _matrix("hidden")
    yield Wrong("hidden", "too wide", lambda right: right[:, :1].expand(5, 16385))
    yield Wrong("hidden", "of other columns", lambda right: right[:, 1:], "router_weight")
    yield Wrong("hidden", "on another device", lambda right: right.to("meta"), "router_weight")
    yield from _matrix("router_weight")
    yield Wrong("router_weight", "of another 16 bits", lambda right: right.half())
    yield Wrong("router_weight", "too high", lambda right: right[:1].expand(1025, 24))
    yield Wrong("router_weight", "without rows", lambda right: right[:0])
    yield Wrong("router_weight", "transposed", lambda right: right.t())
    yield Wrong("router_weight", "on another device", lambda right: right.to("meta"))
    for name in ("router_bias", "input_scale", "per_expert_scale"):
        yield from _vector(name)
    yield from _norms()
    multipliers = (torch.nan, torch.inf, 1e39, True, "2", None, torch.ones(()), [1.0])
    yield from _values("input_multiplier", *multipliers)
    dtypes = ("float32", torch.float64, torch.int32, torch.float8_e4m3fn, None, 32)
    yield from _values("logits_dtype", *dtypes)
    for name in ("return_logits", "invariant"):
        yield from _values(name, None, 1, 0, "yes", torch.ones(()))
    yield from _values("topk", 0, 17, -1, 2.0, "2", None)
    yield from _values("ids_dtype", torch.int16, "int32", None)
    yield from _values("num_valid_tokens", -1, 1.5, "3")
    yield Wrong("bias", "not wanted", lambda _: torch.zeros(16))
    yield Wrong("per_expert_scale", "missing", lambda _: None)


@check(8, every_wrong)
def wrong_arguments_raise_and_are_named(under_test: BackendUnderTest, case: Wrong) -> None:
    """A wrong argument raises an error that names it, in a first call and after a right one."""
    call = RIGHT.make(under_test.device)
    for tensor in call.tensors.values():
        tensor.fill_(TELLTALE)
    arguments = call.arguments
    given = {**arguments, case.argument: case.changed(arguments.get(case.argument))}
    gate = call.gate(under_test)
    for turn in ("the first call", "a call after a right one"):
        require_refusal(
            lambda: gate(**given),
            case.named or case.argument, f"{case.argument} {case.what}, {turn}", TELLTALE,
        )  # fmt: skip
        call.made(under_test)
