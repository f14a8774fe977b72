"""The contracts of ``permute`` and ``combine``, into which each module here enters its checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance.combine_clauses import CLAUSES as COMBINE_CLAUSES
from moe_routing.conformance.contract import Contract
from moe_routing.conformance.permutation.cases import CombineCase, PermuteCase
from moe_routing.conformance.permute_clauses import CLAUSES as PERMUTE_CLAUSES
from moe_routing.permutation.problem import COMBINE_EXAMPLE, PERMUTE_EXAMPLE, CombineProblem
from moe_routing.permutation.problem import PermuteProblem as _Permute

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.contract import Named
    from moe_routing.conformance.permutation.cases import Case
    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing_registry import Problem

    Made = Callable[..., Case]
    """``PermuteCase`` or ``CombineCase``."""
    Run = Callable[[BackendUnderTest, Any], None]


def _permutes() -> Iterator[Problem]:
    yield PERMUTE_EXAMPLE
    yield _Permute(topk=8, dtype="bfloat16", layout="blocks")
    yield _Permute(topk=8, dtype="bfloat16", quantize="float8_e4m3fn")


def _combines() -> Iterator[Problem]:
    yield COMBINE_EXAMPLE
    yield CombineProblem(topk=8, dtype="bfloat16", weights="")


def _declinable(operation: type[Case]) -> Callable[[], Iterator[Problem]]:
    def problems() -> Iterator[Problem]:
        from moe_routing.conformance.permutation.honesty import every_form

        for form in every_form(operation, "quick"):
            for case in form:
                yield case.make(torch.device("cpu")).problem

    return problems


PERMUTE = Contract(PERMUTE_CLAUSES, _permutes, declinable=_declinable(PermuteCase))
COMBINE = Contract(COMBINE_CLAUSES, _combines, declinable=_declinable(CombineCase))


def both(
    clause: int, cases: Callable[[type[Case], Profile], Iterable[Named]], *, capability: str = ""
) -> Callable[[Run], Run]:
    """Enter a check of that clause into both contracts, each with cases of its operation."""

    def enter(run: Run) -> Run:
        for contract, operation in ((PERMUTE, PermuteCase), (COMBINE, CombineCase)):
            of_profile = _of(operation, cases)
            contract.check(clause, of_profile, capability=capability)(run)
        return run

    return enter


def _of(
    operation: type[Case], cases: Callable[[type[Case], Profile], Iterable[Named]]
) -> Callable[[Profile], Iterable[Named]]:
    return lambda profile: cases(operation, profile)
