"""Permute and combine rows in Triton's interpreter, against the formulas, to the bit.

A process of its own, with ``TRITON_INTERPRET=1``. Arguments: a seed, what of ``CHECKS``, and how
often.
"""

# ruff: noqa: S311 -- cases are no secrets

import random
import sys

from interpreter import interpret

interpret()

import torch  # noqa: E402 -- after Triton interprets

import moe_routing  # noqa: E402 -- likewise
from moe_routing.formula import permutation as formula  # noqa: E402 -- likewise
from moe_routing.permutation import CombineProblem, PermuteProblem  # noqa: E402 -- likewise
from moe_routing.permutation.problem import FLOATS, GROUP  # noqa: E402 -- likewise
from moe_routing_backends.triton.permutation.mover import MoveLaunch, TritonCombine, TritonPermute  # noqa: E402 -- likewise
from moe_routing_backends.triton.runtime import bound  # noqa: E402 -- likewise

LAUNCHES = (
    None,
    MoveLaunch(32, 32, early=False),
    MoveLaunch(16, 64, early=True),
    MoveLaunch(128, 128, early=False),
)
WHOLE = ("bool", "int64", "uint8", "complex64", "complex128", "float64", "float8_e4m3fn")
"""Dtypes of rows that are moved, and neither quantized nor combined."""
RARE = (1e30, float("inf"), float("-inf"), float("nan"))
UNTOUCHED = 77


def drawn():
    """Return a plan, and its numbers of tokens, slots and places."""
    experts, topk = random.choice([1, 3, 8, 20]), random.choice([1, 2, 3, 17])
    tokens = random.choice([1, 2, 5])
    ids = torch.randint(-1, experts + 1, (tokens, topk))
    asked = random.choice(
        [
            {},
            {"block": random.choice([1, 4, 7])},
            {"capacity": 2},
            {"capacity": 3, "masked": True},
            {"capacity": 2, "block": 4},
        ]
    )
    plan = moe_routing.plan(ids, experts, **asked, backend="eager")
    layout = "masked" if "masked" in asked else "blocks" if "block" in asked else "sorted"
    return plan, layout, tokens, topk, plan.order.numel()


def rows_of(number, columns, dtype, rare=()):
    """Return random rows, at any distance, some of them at odd addresses.

    :param rare: numbers that a few elements have.
    """
    apart = columns + random.choice([0, 0, 3, 16])
    size = getattr(torch, dtype).itemsize
    flat = torch.randint(-100, 100, (number * apart * size + size,), dtype=torch.int8)
    if dtype in FLOATS:
        numbers = torch.randn(number * apart + 1).mul_(10.0 ** random.randint(-3, 3))
        numbers[torch.rand(len(numbers)) < 0.02] = random.choice([0.0, -0.0, 1e-30, *rare])
        flat = numbers.to(getattr(torch, dtype)).view(torch.int8)
    elif dtype == "bool":
        flat = flat > 0
    first = random.choice([0, 0, 1])
    whole = flat.view(getattr(torch, dtype))[first:][: number * apart]
    return torch.as_strided(whole, (number, columns), (apart, 1), whole.storage_offset())


def to_fill(*shape, dtype):
    """Return a tensor that holds anything, and the memory around it."""
    bytes_ = dtype.itemsize * (size := torch.Size(shape).numel())
    memory = torch.full((bytes_ + 512,), UNTOUCHED, dtype=torch.int8)
    return memory[256 : 256 + bytes_].view(dtype)[:size].view(shape), memory


def check_around(memory, said):
    """Require that nothing was written next to a tensor."""
    around = torch.cat([memory[:256], memory[-256:]])
    assert (around == UNTOUCHED).all(), said


def bits(tensor):
    """Return a tensor as bytes; NaN has one representation."""
    if tensor.dtype in {getattr(torch, name) for name in FLOATS}:
        tensor = torch.where(tensor.isnan(), torch.nan, tensor)
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(torch.int8)


def same(one, other, rows=slice(None)):
    """Compare some rows to the bit, as bytes: torch 2.8 indexes no float8 on CPUs."""
    return torch.equal(bits(one)[rows], bits(other)[rows])


def has_pair(plan):
    """Tell which places have a pair."""
    return formula._tokens(plan)[1]


def permutes(device):
    """Permute rows of any dtype, and quantized."""
    plan, layout, tokens, topk, places = drawn()
    quantize = random.choice(["", "float8_e4m3fn"])
    dtype = random.choice(FLOATS if quantize else FLOATS + WHOLE)
    columns = random.choice([1, 5, 8, 32, 48, 100, 130, 256])
    hidden = rows_of(tokens, columns, dtype, RARE)
    launch = random.choice(LAUNCHES)
    problem = PermuteProblem(topk=topk, dtype=dtype, layout=layout, quantize=quantize)
    said = f"{problem}, {launch}: {list(hidden.shape)} of strides {hidden.stride()}"
    out, memory = to_fill(places, columns, dtype=getattr(torch, quantize or dtype))
    groups = -(-columns // GROUP)
    scales, more_memory = to_fill(places, groups, dtype=torch.float32)
    TritonPermute(problem, device, launch)(
        hidden, plan, out, **({"scales": scales} if quantize else {})
    )
    check_around(memory, said)
    check_around(more_memory, said)
    full = has_pair(plan) if layout == "masked" else slice(None)
    if quantize:
        values, of_groups = formula.quantized(hidden)
        right = formula.permuted(values, plan), formula.permuted(of_groups, plan)
        assert same(scales, right[1], full), said
        assert same(out.float(), right[0].float(), full), said
    else:
        assert same(out, formula.permuted(hidden, plan), full), said


def combines(device):
    """Combine rows, and go back."""
    plan, _, tokens, topk, places = drawn()
    dtype, of_weights = random.choice(FLOATS), random.choice([*FLOATS, ""])
    columns = random.choice([1, 5, 8, 100, 128])
    rows = rows_of(places, columns, dtype)
    weights = torch.randn(tokens, topk).to(getattr(torch, of_weights)) if of_weights else None
    grad = rows_of(tokens, columns, dtype)
    rows[~has_pair(plan)] = torch.nan
    if weights is not None:
        weights[~formula._places(plan)[1]] = torch.nan
    launch = random.choice(LAUNCHES)
    problem = CombineProblem(topk=topk, dtype=dtype, weights=of_weights)
    said = f"{problem}, {launch}: {list(rows.shape)} of strides {rows.stride()}"
    kernel = TritonCombine(problem, device, launch)
    out, memory = to_fill(tokens, columns, dtype=rows.dtype)
    kernel(rows, plan, weights, out)
    check_around(memory, said)
    assert same(out, formula.combined(rows, plan, weights)), said
    grad_rows, memory = to_fill(places, columns, dtype=rows.dtype)
    grad_weights, more_memory = to_fill(tokens, topk, dtype=torch.float32)
    kernel.backward(grad, rows, plan, weights, grad_rows, None if weights is None else grad_weights)
    check_around(memory, said)
    check_around(more_memory, said)
    right = formula.combined_backward(grad, rows, plan, weights)
    assert same(grad_rows, right[0]), said
    if weights is not None:
        check_sums(grad_weights, grad, rows, plan, said)


def check_sums(grad_weights, grad, rows, plan, said):
    """Hold sums over columns to the error bound of any order of summation."""
    place, has_place = formula._places(plan)
    products = rows.double()[place] * grad.double()[:, None]
    products = torch.where(has_place[:, :, None], products, 0.0)
    bound = products.abs().sum(2) * (2**-24 * 1.01 * (grad.shape[1] + 1))
    assert ((grad_weights - products.sum(2)).abs() <= bound).all(), said
    assert (grad_weights[~has_place] == 0).all(), said


def rounds_to_float8(device):
    """Quantize numbers at, between and next to all those of float8_e4m3fn, of the scale 1."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()].sort().values
    between = (every[1:] + every[:-1]) / 2
    numbers = torch.cat([every, between])
    away = torch.tensor(torch.inf)
    near = torch.cat([numbers, numbers.nextafter(away), numbers.nextafter(-away)])
    near = torch.cat([near[near.abs() <= 448], torch.tensor([2.0**-10, 1e-10, 1e-40])])
    rows = torch.zeros(1, -(-len(near) // (GROUP - 1)), GROUP)
    rows[:, :, 0] = 448
    padded = torch.zeros(rows.shape[1] * (GROUP - 1))
    padded[: len(near)] = near
    rows[0, :, 1:] = padded.view(-1, GROUP - 1)
    hidden = rows.flatten(1)
    plan = moe_routing.plan(torch.zeros(1, 1, dtype=torch.int32), 1, backend="eager")
    problem = PermuteProblem(topk=1, dtype="float32", quantize="float8_e4m3fn")
    out = torch.empty(hidden.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(1, rows.shape[1])
    TritonPermute(problem, device)(hidden, plan, out, scales=scales)
    assert (scales == 1).all()
    right = hidden.to(torch.float8_e4m3fn)
    assert torch.equal(out.view(torch.uint8), right.view(torch.uint8))


def trusts_no_plan(device):
    """Hand over plans of any content: nothing is written next to the results."""
    plan, layout, tokens, topk, places = drawn()
    most = 2**31 - 1
    edges = [-most - 1, -most, -1, 0, 1, places - 1, places, places + 1, tokens * topk, most]

    def anything(part):
        return torch.tensor(random.choices(edges, k=part.numel()), dtype=torch.int32).view(
            part.shape
        )

    plan = plan._replace(
        order=anything(plan.order),
        inverse=anything(plan.inverse),
        offsets=torch.full_like(plan.offsets, random.choice([most, most, places + 1, -most - 1])),
    )
    columns = random.choice([1, 8, 40])
    hidden, rows = rows_of(tokens, columns, "float32"), rows_of(places, columns, "float32")
    weights = torch.randn(tokens, topk)
    out, around = to_fill(tokens, columns, dtype=torch.float32)
    grad_rows, around_rows = to_fill(places, columns, dtype=torch.float32)
    grad_weights, around_weights = to_fill(tokens, topk, dtype=torch.float32)
    values, around_values = to_fill(places, columns, dtype=torch.float8_e4m3fn)
    scales, around_scales = to_fill(places, 1, dtype=torch.float32)
    problem = PermuteProblem(topk=topk, dtype="float32", layout=layout)
    quantized = PermuteProblem(topk=topk, dtype="float32", layout=layout, quantize="float8_e4m3fn")
    TritonPermute(problem, device)(hidden, plan, grad_rows)
    check_around(around_rows, problem)
    TritonPermute(quantized, device)(hidden, plan, values, scales=scales)
    add = TritonCombine(CombineProblem(topk=topk, dtype="float32"), device)
    add(rows, plan, weights, out)
    add.backward(hidden, rows, plan, weights, grad_rows, grad_weights)
    for memory in (around, around_rows, around_weights, around_values, around_scales):
        check_around(memory, plan)
    # A pair's place is all that combine asks for.
    assert same(out, formula.combined(rows, plan, weights))


def sums_are_the_same_for_any_batch(device):
    """Go back through one token among others and alone, at other addresses and strides."""
    tokens, topk, columns = 3, 2, 1100
    plan = moe_routing.plan(torch.tensor([[0, 1], [1, 0], [1, 1]]), 2, backend="eager")
    alone = moe_routing.plan(torch.tensor([[1, 0]]), 2, backend="eager")
    rows, grad = torch.randn(tokens * topk, columns), torch.randn(tokens, columns)
    of_one = torch.empty(2, columns + 3)[:, 3:].copy_(rows[plan.inverse[1]][[1, 0]])
    add = TritonCombine(CombineProblem(topk=topk, dtype="float32"), device)
    found = []
    for g, r, p in ((grad, rows, plan), (grad[1:2], of_one, alone)):
        grad_weights = torch.empty(len(g), topk)
        add.backward(g, r, p, torch.ones(len(g), topk), torch.empty(r.shape), grad_weights)
        found.append(grad_weights)
    assert torch.equal(found[0][1:2], found[1])


def in_several_launches(device):
    """Let a launch have few programs, as though the tokens were too many for one."""
    bound.MOST_PROGRAMS = 4
    plan = moe_routing.plan(torch.randint(-1, 3, (6, 2)), 3, backend="eager")
    hidden, rows, weights = torch.randn(6, 8), torch.randn(12, 8), torch.rand(6, 2)
    moved, out, grad_rows, grad_weights = (
        torch.empty_like(t) for t in (rows, hidden, rows, weights)
    )
    TritonPermute(PermuteProblem(topk=2, dtype="float32"), device)(hidden, plan, moved)
    add = TritonCombine(CombineProblem(topk=2, dtype="float32"), device)
    add(rows, plan, weights, out)
    add.backward(hidden, rows, plan, weights, grad_rows, grad_weights)
    assert same(moved, formula.permuted(hidden, plan))
    assert same(out, formula.combined(rows, plan, weights))
    assert same(grad_rows, formula.combined_backward(hidden, rows, plan, weights)[0])
    check_sums(grad_weights, hidden, rows, plan, "in parts")


def permutes_and_combines(device):
    """Permute and combine random rows."""
    permutes(device)
    combines(device)


CHECKS = {
    check.__name__: check
    for check in (
        permutes_and_combines,
        in_several_launches,
        rounds_to_float8,
        sums_are_the_same_for_any_batch,
        trusts_no_plan,
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
