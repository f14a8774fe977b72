"""The kit's quick part: a few seconds a backend, for ``moe-routing doctor --verify``.

Needs no pytest.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_routing.conformance.runner import Result
    from moe_routing.conformance.under_test import BackendUnderTest

BUDGET_SECONDS = 4.0
"""No check is begun after this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found.

    :ivar clause: the number of a clause of the contract.
    :ivar name: name of the check.
    :ivar ok: whether the backend kept it.
    :ivar sentence: what was checked, or what went wrong and where.
    """

    clause: int
    name: str
    ok: bool
    sentence: str


CHECKS = (
    "it_serves_the_families_that_its_spec_names",
    "ids_come_in_exact_order",
    "equal_scores_go_to_the_lower_id",
    "nan_and_inf_follow_the_rule",
    "selection_is_exact_in_float32",
    "every_output_is_written_and_nothing_else",
    "any_strides_are_read_as_they_lie",
    "no_tokens_give_empty_outputs",
    "padding_is_blank",
    "gradients_match_autograd_through_the_oracle",
)
"""At most one check a clause, the most telling one, in the order of the contract."""


def verify(backend: str, device: str = "cpu") -> list[Finding]:
    """Check the backend against the oracle on one device, in under 5 seconds.

    Never raises for a wrong backend.

    A finding's sentence says on how many cases its check was made. ``dataclasses.asdict`` makes
    JSON of a finding.

    :raises UnknownNameError: there is no such backend.

    >>> {finding.ok for finding in verify("eager")}
    {True}
    """
    from moe_routing.conformance.runner import backend_under_test

    return _findings(backend_under_test(backend, device))


def _findings(under_test: BackendUnderTest) -> list[Finding]:
    from moe_routing.conformance import checks
    from moe_routing.conformance.runner import evaluate

    until = time.monotonic() + BUDGET_SECONDS  # imports do not count: the first check always runs
    found = []
    for check in map(checks.named, CHECKS):
        results = []
        for item in check.items("smoke"):
            if time.monotonic() > until:
                break
            results.append(evaluate(item, under_test))
        if results:
            ok, sentence = _said(check.sentence, results)
            found.append(Finding(clause=check.clause, name=check.name, ok=ok, sentence=sentence))
    return found


def _said(sentence: str, results: list[Result]) -> tuple[bool, str]:
    wrong = [result for result in results if result.status == "failed"]
    if wrong:
        first = f"{wrong[0].case}: {wrong[0].message}"
        return False, f"{len(wrong)} of {len(results)} cases are wrong, the first: {first}"
    right = sum(result.status == "passed" for result in results)
    declined = ", the others are declined" if right < len(results) else ""
    return True, f"{sentence.rstrip('.')} ({right} of {len(results)} cases{declined})"
