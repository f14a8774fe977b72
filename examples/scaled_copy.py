"""An operation of a plug-in, with two backends, its oracle and its contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from moe_routing.conformance import Clause, Contract
from moe_routing_registry import (
    BackendSpec,
    DeviceInfo,
    OperationSpec,
    RejectCode,
    Target,
    Verdict,
    hookimpl,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

MOST = 1000


@dataclass(frozen=True)
class CopyProblem:
    """``size`` numbers, of which each is doubled."""

    operation: ClassVar[str] = "scaled_copy"
    family: ClassVar[str] = ""
    size: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"operation": self.operation, "size": self.size}

    def __str__(self) -> str:
        """Return the problem in a few words, for reports."""
        return f"{self.size} numbers"


EXAMPLE = CopyProblem(4)


# Backends. Each factory returns a kernel for a problem.


def double(_problem: CopyProblem, _device: DeviceInfo) -> Callable[[Tensor], Tensor]:
    """Return a kernel that multiplies."""
    return lambda x: x * 2


def add(_problem: CopyProblem, _device: DeviceInfo) -> Callable[[Tensor], Tensor]:
    """Return a kernel that adds."""
    return lambda x: x + x


def up_to_most(problem: CopyProblem, _device: DeviceInfo) -> Verdict:
    """Accept what ``double`` can take."""
    if problem.size <= MOST:
        return Verdict.yes()
    return Verdict.no(RejectCode.SHAPE, f"takes up to {MOST} numbers, not {problem.size}")


@hookimpl
def moe_routing_backends() -> list[BackendSpec]:
    """Register both backends; the one with the higher priority is chosen where it fits."""
    anywhere = (Target("*"),)
    return [
        BackendSpec(
            name="double",
            factories={"scaled_copy": "scaled_copy:double"},
            targets=anywhere,
            priority=2,
            supports=up_to_most,
        ),
        BackendSpec(
            name="add", factories={"scaled_copy": "scaled_copy:add"}, targets=anywhere, priority=1
        ),
    ]


# The operation: its oracle, its contract, and where they are.


def oracle(x: Tensor) -> Tensor:
    """Return the exact result in float64."""
    return 2 * x.double()


CONTRACT = Contract(
    {
        1: Clause(
            1,
            "exact",
            "Exact",
            "Each number is doubled, exactly.",
            "Each number is doubled, exactly.",
            "Doubling changes the exponent only.",
        )
    },
    problems=lambda: [EXAMPLE],
)


@dataclass(frozen=True)
class Case:
    """What a check is run with."""

    size: int
    family: ClassVar[str] = ""

    @property
    def id(self) -> str:
        """Return its name in reports."""
        return str(self.size)


@CONTRACT.check(1, cases=lambda _profile: [Case(3), Case(70)])
def numbers_are_doubled(under_test: Any, case: Case) -> None:  # noqa: ANN401 -- the kit's own
    """Numbers are doubled."""
    import torch

    x = torch.randn(case.size)
    made = under_test.kernel(CopyProblem(case.size))(x)
    if not torch.equal(made.double(), oracle(x)):
        msg = f"{case.size} numbers are not doubled"
        raise AssertionError(msg)


@hookimpl
def moe_routing_operations() -> list[OperationSpec]:
    """Register the operation."""
    return [
        OperationSpec(
            name="scaled_copy",
            example="scaled_copy:EXAMPLE",
            oracle="scaled_copy:oracle",
            contract="scaled_copy:CONTRACT",
            summary="twice each number",
        )
    ]
