"""Use optional operands in Triton's interpreter: print what came out, as JSON.

A process of its own. The arguments: what runs, a check of the kit, of whose cases only the sizes
are smaller, or ``gate``, which is compared with ``eager``; a seed; and ``slots=``, the number above
which a second kernel counts, ``launch=``, the first of its launches that is used, ``rows=``, the
rows of a program that weighs a record, ``layout=``, that of the logits, or ``experts=``, how many
there are.
"""

import json
import math
import sys
from itertools import islice

from interpreter import interpret

interpret()

import torch  # noqa: E402 -- after Triton interprets

import moe_routing  # noqa: E402 -- likewise
from moe_routing.conformance.contract import Item, contract_of  # noqa: E402 -- likewise
from moe_routing.conformance.runner import backend_under_test, evaluate  # noqa: E402 -- likewise
from moe_routing_backends.triton.kernels import counts, weigh  # noqa: E402 -- likewise
from moe_routing_backends.triton.runtime import router  # noqa: E402 -- likewise

TOKENS, EXPERTS, CASES = 7, 32, 17


def small(case, layout, experts):
    """Return the case with fewer tokens, so many experts or fewer, and logits that lie so."""
    return case.but(
        layout=layout or case.layout,
        num_tokens=min(case.num_tokens, TOKENS),
        num_experts=experts or (EXPERTS if case.num_experts > EXPERTS * 2 else case.num_experts),
    )


def checked(name, layout, experts):
    """Run a check of the kit on small cases."""
    under_test = backend_under_test("triton", "cpu")
    (check,) = (check for check in contract_of("route").checks if check.name == name)
    cases = dict.fromkeys(small(case, layout, experts) for case in check.cases("smoke"))
    cases = sorted(
        cases, key=lambda case: not case.spec.shared_experts
    )  # those that have any first
    results = [evaluate(Item(check, case), under_test) for case in islice(cases, CASES)]
    return {result.case: [result.status, result.message] for result in results}


def gated():
    """Gate with a record and a mask, in few programs and in tiles of logits."""
    found = {}
    for family, tokens in (("gemma4", 3), ("grouped_sigmoid_bias", 3), ("topk_softmax", 70)):
        # Small integers: every order of summation gives the same logits.
        hidden, weight = (torch.randint(-8, 9, (n, 40)).float() for n in (tokens, 32))
        route = moe_routing.get_router(family)
        vectors = {
            **({"bias": torch.randn(32)} if route.spec.needs_bias else {}),
            **({"per_expert_scale": torch.rand(32)} if route.spec.per_expert_scale else {}),
        }
        record = torch.randint(-1, 33, (tokens, 4))
        record[0] = -1
        operands = {"ids": record, "valid": torch.arange(tokens) % 5 != 1, **vectors}
        ours, theirs = (
            moe_routing.get_router(family, backend=backend).gate(hidden, weight, 4, **operands)
            for backend in ("triton", "eager")
        )
        same = torch.equal(ours.ids, theirs.ids)
        near = torch.allclose(ours.weights, theirs.weights, rtol=1e-5, atol=1e-7)
        found[f"{family}, {tokens} tokens"] = ["passed" if same and near else "failed", ""]
    return found


if __name__ == "__main__":
    torch.manual_seed(int(sys.argv[2]))
    given = dict(word.split("=") for word in sys.argv[3:])
    router.SLOTS_APART = int(given.get("slots", router.SLOTS_APART))
    counts.LAUNCHES = counts.LAUNCHES[int(given.get("launch", 0)) :]
    if "rows" in given:
        weigh.ROWS = ((math.inf, int(given["rows"])),)
    name, layout = sys.argv[1], given.get("layout")
    experts = int(given.get("experts", 0))
    json.dump(gated() if name == "gate" else checked(name, layout, experts), sys.stdout)
