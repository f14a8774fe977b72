"""The contract of ``balance``, into which each module here enters its checks."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from moe_routing.balancing.problem import BALANCE_EXAMPLE, BalanceProblem
from moe_routing.conformance.balance_clauses import CLAUSES
from moe_routing.conformance.balancing.cases import DTYPES, KINDS, problem_of
from moe_routing.conformance.contract import Contract

if TYPE_CHECKING:
    from collections.abc import Iterator


def _problems() -> Iterator[BalanceProblem]:
    yield BALANCE_EXAMPLE
    yield BalanceProblem(score="logsumexp", num_experts=128, dtype="bfloat16", counts="")


def _declinable() -> Iterator[BalanceProblem]:
    for kind, dtype in product(KINDS, DTYPES):
        yield problem_of(kind, 128, 8, dtype)


BALANCE = Contract(CLAUSES, _problems, declinable=_declinable)
check = BALANCE.check
