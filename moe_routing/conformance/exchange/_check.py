"""The contract of ``exchange``, into which each module here enters its checks."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from moe_routing.conformance.contract import Contract
from moe_routing.conformance.exchange import ranks
from moe_routing.conformance.exchange_clauses import CLAUSES
from moe_routing.distributed.problem import EXCHANGE_EXAMPLE, ExchangeProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.contract import Named
    from moe_routing.conformance.under_test import BackendUnderTest
    from moe_routing_registry import Problem

    Run = Callable[[BackendUnderTest, Any], None]


def every_mode() -> Iterator[Problem]:
    """Yield a problem of each mode."""
    for words in (
        {},
        {"reduce": "rank"},
        {"max_tokens": 64},
        {"reduce": "rank", "max_tokens": 64},
        {"reduce": "rank", "shared_batch": True},
        {"shared_batch": True},
    ):
        yield ExchangeProblem(ranks=2, experts_per_rank=64, topk=8, **words)


def _problems() -> Iterator[Problem]:
    yield EXCHANGE_EXAMPLE
    yield from every_mode()


EXCHANGE = Contract(CLAUSES, _problems)


def check(
    clause: int, cases: Callable[[Profile], Iterable[Named]], *, capability: str = ""
) -> Callable[[Run], Run]:
    """Enter a check that all ranks run together."""

    def enter(run: Run) -> Run:
        @functools.wraps(run)
        def on_every_rank(under_test: BackendUnderTest, case: Any) -> None:  # noqa: ANN401 -- of any check
            with ranks.group_on(under_test.device):
                ranks.together(f"{run.__name__} {case.id}", lambda: run(under_test, case))

        EXCHANGE.check(clause, cases, capability=capability)(on_every_rank)
        return run

    return enter
