"""Gate in Triton's interpreter, against the float64 oracle, and to the bit against itself.

A process of its own, with ``TRITON_INTERPRET=1``. Arguments: a seed, what of ``CHECKS``, and how
often.
"""

# ruff: noqa: S311 -- cases are no secrets

import random
import sys
from itertools import islice

from interpreter import interpret

interpret()

import torch  # noqa: E402 -- after Triton interprets
import triton  # noqa: E402 -- likewise
import triton.language as tl  # noqa: E402 -- likewise
from interpreted_permutation import check_around, rows_of, to_fill  # noqa: E402 -- likewise

import moe_routing  # noqa: E402 -- likewise
from moe_routing.conformance.contract import Item, contract_of  # noqa: E402 -- likewise
from moe_routing.conformance.runner import backend_under_test, evaluate  # noqa: E402 -- likewise
from moe_routing.conformance.variants import VARIANTS, fits  # noqa: E402 -- likewise
from moe_routing.gating import GateOutput, GateProblem, Projection  # noqa: E402 -- likewise
from moe_routing.planning import PlanProblem  # noqa: E402 -- likewise
from moe_routing.planning.call import allocated, shapes  # noqa: E402 -- likewise
from moe_routing.reference import gate_oracle, plan_oracle  # noqa: E402 -- likewise
from moe_routing_backends.triton import knows_group_scores  # noqa: E402 -- likewise
from moe_routing_backends.triton.gating import gate as host  # noqa: E402 -- likewise
from moe_routing_backends.triton.gating.kernels import parts_of  # noqa: E402 -- likewise
from moe_routing_backends.triton.gating.launches import GateLaunch  # noqa: E402 -- likewise
from moe_routing_backends.triton.planning.launches import (  # noqa: E402 -- likewise
    FEWEST_COUNTED,
    MOST_PLACES_OF_ROW,
    WIDEST_BY_ROUTER,
)
from moe_routing_backends.triton.planning.planner import build  # noqa: E402 -- likewise
from moe_routing_backends.triton.runtime import router  # noqa: E402 -- likewise
from moe_routing_registry import RoutingProblem, RoutingSpec  # noqa: E402 -- likewise

FLOATS = ("bfloat16", "float16", "float32")
OF_EACH_KIND = (
    GateLaunch(128, 16, 32, 4, "slice"),
    GateLaunch(512, 32, 64, 4, "group"),
    GateLaunch(None, 16, 128, 4),
)
LAUNCHES = (
    None,
    (GateLaunch(None, 16, 64, 4, "slice"),),
    (GateLaunch(None, 32, 64, 4),),
    (GateLaunch(None, 16, 32, 4, "group"),),
    OF_EACH_KIND,
)


def vector(length):
    """Return a vector of any dtype, or none."""
    dtype = random.choice([None, *FLOATS, "float64", "float8_e5m2"])
    return None if dtype is None else (torch.randn(length) + 1).to(getattr(torch, dtype))


def drawn():
    """Return a problem, its projection, and what else routing takes."""
    variant = random.choice(list(VARIANTS))
    spec = VARIANTS[variant]
    experts, topk = random.choice([(8, 2), (16, 4), (64, 8), (72, 2)])
    if not fits(spec, experts, topk):
        return drawn()
    routing = RoutingProblem(spec=spec, num_experts=experts, topk=topk, dtype="float32")
    if not knows_group_scores(routing):
        return drawn()
    tokens = random.choice([1, 2, 3, 17, 40])
    columns = random.choice([1, 8, 96, 255, 256, 520, 4300])  # the last: more than 32 slices
    dtype = random.choice(FLOATS)
    float32_weight = dtype != "float32" and random.random() < 0.3
    norm = random.choice(["", "rms", "rms_weight"])
    norm_weight = vector(columns) if norm == "rms_weight" else None
    norm = "rms" if norm and norm_weight is None else norm
    weight = rows_of(experts, columns, "float32" if float32_weight else dtype)
    projection = Projection(
        rows_of(tokens, columns, dtype), weight, vector(experts), norm_weight, vector(columns),
        eps=1e-6 if norm else None, multiplier=random.choice([1.0, columns**-0.5, 3e4]),
    )  # fmt: skip
    problem = GateProblem(
        spec=spec, num_experts=experts, topk=topk, hidden_size=columns, dtype=dtype,
        float32_weight=float32_weight, router_bias=projection.router_bias is not None, norm=norm,
        input_scale=projection.input_scale is not None,
        logits_dtype=random.choice(["float32", *FLOATS]),
        ids_dtype=random.choice(["int32", "int64"]),
    )  # fmt: skip
    operands = {}
    if spec.per_expert_scale:
        operands["per_expert_scale"] = torch.rand(experts)
    if spec.needs_bias:
        operands["bias"] = torch.randn(experts)
    if spec.selection == "token_table":
        operands["token_ids"] = torch.randint(-1, 6, (tokens,))
        operands["expert_table"] = torch.randint(0, experts, (5, topk))
    return problem, projection, operands


def built(problem, device, launches):
    """Return the kernel, with these launches."""
    return host.TritonGate(problem, device, router.build(problem.routing, device), launches)


def gates(device):
    """Gate random hidden states: right, and the same bits from every launch and either call."""
    problem, projection, operands = drawn()
    tokens, shape = len(projection.hidden), (len(projection.hidden), problem.num_experts)
    dtype = getattr(torch, problem.logits_dtype)
    found = []
    padding = random.choice([{}, {"num_valid_tokens": tokens // 2}])
    for launches in (None, random.choice(LAUNCHES[1:])):
        said = f"{problem}, {launches}: {list(projection.hidden.shape)}"
        kernel = built(problem, device, launches)
        logits, around = to_fill(*shape, dtype=dtype)
        kernel(projection, logits)
        check_around(around, said)
        again, around = to_fill(*shape, dtype=dtype)
        routed = kernel.routed(projection, again, **operands, **padding)
        check_around(around, said)
        silent = kernel.routed(projection, None, **operands, **padding)
        found += [(logits, *routed), (again, *silent)]
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert torch.equal(one.nan_to_num(), same.nan_to_num()), said
    made = GateOutput(*found[0][1:], found[0][0])
    given = operands | padding
    problems = gate_oracle.output_problems(problem.spec, projection, problem.topk, made, **given)
    assert not problems, (said, problems)


def has_the_same_bits_in_any_batch(device):
    """Gate rows alone and among others, at other addresses and strides, by one object."""
    problem, projection, operands = drawn()
    tokens = 35
    hidden = torch.randn(tokens, problem.hidden_size).to(projection.hidden.dtype)
    dtype = getattr(torch, problem.logits_dtype)
    projection = projection._replace(hidden=hidden)
    kernel = built(problem, device, random.choice([None, OF_EACH_KIND]))
    whole = torch.empty(tokens, problem.num_experts, dtype=dtype)
    kernel(projection, whole)
    order = torch.randperm(tokens)
    moved = torch.empty(tokens, problem.hidden_size + 3, dtype=hidden.dtype)[:, 3:]
    moved.copy_(hidden[order])
    for some in (slice(0, 1), slice(3, 20), slice(None)):
        rows = moved[some]
        made = torch.empty(len(rows), problem.num_experts, dtype=dtype)
        kernel(projection._replace(hidden=rows), made)
        assert torch.equal(made, whole[order[some]]), (problem, some)
        if "token_ids" not in operands:  # which are of as many tokens as were drawn
            kernel.routed(projection._replace(hidden=rows), made.fill_(torch.nan), **operands)
            assert torch.equal(made, whole[order[some]]), (problem, some)


def long_rows_have_the_same_bits_from_every_launch(device):
    """Gate rows of more columns than the kernel that routes reads at once."""
    spec = RoutingSpec(family="mixtral", renormalize=True)
    for name, columns in (("bfloat16", 8500), ("float16", 4300), ("float32", 4300)):
        problem = GateProblem(
            spec=spec, num_experts=8, topk=2, hidden_size=columns, dtype=name, norm="rms",
            input_scale=True,
        )  # fmt: skip
        dtype = getattr(torch, name)
        projection = Projection(
            torch.randn(2, columns).to(dtype), torch.randn(8, columns).to(dtype),
            input_scale=torch.randn(columns).to(dtype), eps=1e-6,
        )  # fmt: skip
        every = []
        for takes in ("slice", "group", "all"):
            kernel = built(problem, device, (GateLaunch(None, 16, 32, 4, takes),))
            logits = torch.empty(2, 8)
            made = GateOutput(*kernel.routed(projection, logits), logits)
            assert not gate_oracle.output_problems(spec, projection, 2, made), (name, takes)
            every.append(logits)
        assert all(torch.equal(every[0], logits) for logits in every), name


def plans(device):
    """Plan what is gated: a row, counted pairs, and what is left to the planner, in any layout."""
    problem, projection, operands = drawn()
    columns = problem.topk + problem.spec.shared_experts
    tokens = random.choice([1, 1, 3, 520 // columns + 1, 1000 // columns])
    projection = projection._replace(
        hidden=torch.randn(tokens, problem.hidden_size).to(projection.hidden.dtype)
    )
    if "token_ids" in operands:
        operands["token_ids"] = torch.randint(-1, 6, (tokens,))
    operands |= random.choice([{}, {"num_valid_tokens": tokens // 2}])
    experts = problem.num_experts + problem.spec.shared_experts
    if random.random() < 0.5:
        operands["expert_map"] = torch.randint(-2, experts + 9, (experts,))
    known = random.choice([experts, experts - 2, experts + 5, 2000])
    capacity = random.choice([1, 7, 99])
    block = random.choice([1, 2, 16, 64])
    layout = random.choice(
        [{}, {"drop": "last"}, {"layout": "blocks", "block": block},
         {"layout": "masked", "drop": "last"}]
    )  # fmt: skip
    asked = PlanProblem(
        num_experts=max(1, known), topk=columns, ids_dtype=problem.ids_dtype, **layout
    )
    capacity = capacity if "drop" in layout else None
    kernel = built(problem, device, random.choice(LAUNCHES))
    right = kernel.routed(projection, None, **operands)
    made = allocated(shapes(asked, tokens, capacity), right.ids.device)
    for part in made:
        if part is not None:
            part.fill_(-77)
    planner = build(asked, device)
    output = kernel.planned(projection, planner, made, capacity=capacity, **operands)
    few = tokens > 1 and tokens * columns < FEWEST_COUNTED
    said = f"{problem}, {asked}: {tokens} tokens, {layout}, {capacity}"
    wide = known > WIDEST_BY_ROUTER or made.order.numel() > MOST_PLACES_OF_ROW
    logits = kernel._writes_logits(projection, kernel._launches[-1])
    assert (output is None) <= (few or wide or logits), said
    if output is not None:
        assert torch.equal(output.ids, right.ids), said
        assert torch.equal(output.weights, right.weights), said
        expected = plan_oracle.plan(asked, right.ids, capacity)
        for one, other in zip(made, expected, strict=True):
            assert other is None if one is None else torch.equal(one, other), said


@triton.jit
def parts_kernel(numbers, parts, count, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """Store the parts of every number, ``[COUNT, count]``."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = parts_of(tl.load(numbers + at, mask=at < count), COUNT)
    for i in tl.static_range(COUNT):
        tl.store(parts + i * count + at, found[i].to(tl.float32), mask=at < count)


def parts_add_up(_device):
    """Cut float32 numbers of every exponent, and products of two bfloat16 numbers."""
    edges = torch.tensor([0.0, 1.0, 3.4028234663852886e38, 2.0**-126, 1 + 2.0**-23, 1 / 3])
    bits = torch.randint(-(2**31), 2**31, (4000,)).to(torch.int32).view(torch.float32)
    numbers = torch.cat([edges, -edges, bits[bits.isfinite()]])
    products = torch.randn(4000).bfloat16().float() * torch.randn(4000).bfloat16().float()
    for given, count in ((numbers, 3), (products, 2), (torch.randn(99).half().float(), 2)):
        parts = torch.empty(count, len(given))
        parts_kernel[triton.cdiv(len(given), 256),](given, parts, len(given), 256, count)
        lost = (parts.double().sum(0) - given.double()).abs()
        # What is left below the least bfloat16 number is lost.
        assert (lost <= torch.where(given.abs() < 2.0**-102, 2.0**-133, 0.0)).all()
        assert torch.equal(parts.bfloat16().float(), parts)


def conforms(_device):
    """Run the kit's checks of values, memory and rows out of range, two cases of each."""
    under_test = backend_under_test("triton", "cpu")
    for check in contract_of("gate").checks:
        if check.clause in {1, 2, 3, 4, 5}:
            for case in islice(check.cases("smoke"), 2):
                result = evaluate(Item(check, case), under_test)
                assert result.status == "passed", (check.name, result.case, result.message)


CHECKS = {
    check.__name__: check
    for check in (
        conforms,
        gates,
        has_the_same_bits_in_any_batch,
        long_rows_have_the_same_bits_from_every_launch,
        parts_add_up,
        plans,
    )
}


def main(seed, check, times):
    """Check in the interpreter."""
    random.seed(seed)
    torch.manual_seed(seed)
    device = moe_routing.probe("cpu")
    for _ in range(times):
        CHECKS[check](device)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
