"""Run the later clauses of ``plan`` on Triton's interpreter, on small cases: print what came out.

A process of its own, with ``TRITON_INTERPRET=1``. The checks are the kit's; of their cases, the
sizes alone are smaller, and those that are the same then are run once. Arguments: ``shipped``, for
the launches of the table that ships, or ``two``, for two launches whatever the size, whose scratch
memory threads must not share; and the names of checks, with how many cases of each, as JSON.
"""

import json
import sys
from dataclasses import replace
from itertools import islice

from moe_routing.conformance.contract import Item, contract_of
from moe_routing.conformance.planning.cases import Case
from moe_routing.conformance.runner import backend_under_test, evaluate
from moe_routing_backends.triton.planning import planner
from moe_routing_backends.triton.planning.launches import PlanLaunch, PlanStep
from moe_routing_backends.triton.planning.table import LAYOUTS, PlanTable

SMALL = {"num_tokens": 5, "num_experts": 6, "topk": 3}
TWO = PlanStep(None, PlanLaunch(2, 4, 1, step=4))
"""Small cases have several programs, whose counts differ from thread to thread."""
ALWAYS_TWO = PlanTable("tests", "none", {(6, layout): (TWO,) for layout in LAYOUTS})


def small(case):
    """Return the case with fewer tokens and experts, if it has any."""
    if not isinstance(case, Case):
        return case
    return replace(case, **{size: min(getattr(case, size), most) for size, most in SMALL.items()})


def main(launches, asked):
    """Run the checks, and print what came out of each case."""
    if launches == "two":
        planner.plan_table_for = lambda _device, _problem: ALWAYS_TWO
    under_test = backend_under_test("triton", "cpu")
    checks = {check.name: check for check in contract_of("plan").checks}
    found = {}
    for name, count in asked.items():
        cases = dict.fromkeys(small(case) for case in checks[name].cases("smoke"))
        results = [evaluate(Item(checks[name], case), under_test) for case in islice(cases, count)]
        found[name] = {result.case: [result.status, result.message] for result in results}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
