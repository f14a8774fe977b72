"""Permute and combine random rows in Triton's interpreter, against the formulas, to the bit.

A process of its own, with ``TRITON_INTERPRET=1``. Argument: a seed.
"""

# ruff: noqa: S311 -- cases are no secrets

import random
import sys

import torch

import moe_routing
from moe_routing.formula import permutation as formula
from moe_routing.permutation import CombineProblem, PermuteProblem
from moe_routing.permutation.problem import FLOATS, GROUP
from moe_routing_backends.triton.permutation.mover import (
    MoveLaunch,
    TritonCombine,
    TritonPermute,
)

LAUNCHES = (
    None,
    MoveLaunch(8, 32, early=False),
    MoveLaunch(16, 64, early=True),
    MoveLaunch(128, 128, early=False),
)
WHOLE = ("bool", "int64", "uint8", "complex64", "complex128", "float64", "float8_e4m3fn")
"""Dtypes of rows that are moved, and neither quantized nor combined."""
RARE = (1e30, float("inf"), float("-inf"), float("nan"))
UNTOUCHED = 77
CASES = 25


def drawn():
    """Return a plan, and its numbers of tokens, slots and places."""
    experts, topk = random.choice([1, 3, 8, 40]), random.choice([1, 2, 3, 8, 17])
    tokens = random.choice([1, 2, 5, 13])
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


def same(one, other):
    return torch.equal(bits(one), bits(other))


def has_pair(plan):
    """Tell which places have a pair."""
    return formula._tokens(plan)[1]


def permutes(device):
    """Permute rows of any dtype, and quantized."""
    plan, layout, tokens, topk, places = drawn()
    quantize = random.choice(["", "float8_e4m3fn"])
    dtype = random.choice(FLOATS if quantize else FLOATS + WHOLE)
    columns = random.choice([1, 5, 8, 32, 100, 128, 130, 300, 512])
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
        assert same(scales[full], right[1][full]), said
        assert same(out[full].float(), right[0][full].float()), said
    else:
        assert same(out[full], formula.permuted(hidden, plan)[full]), said


def combines(device):
    """Combine rows, and go back."""
    plan, _, tokens, topk, places = drawn()
    dtype, of_weights = random.choice(FLOATS), random.choice([*FLOATS, ""])
    columns = random.choice([1, 5, 8, 100, 128, 300, 1100])
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
    kernel.backward(
        grad, rows, plan, weights, grad_rows, None if weights is None else grad_weights
    )
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


def main(seed):
    """Permute and combine."""
    random.seed(seed)
    torch.manual_seed(seed)
    device = moe_routing.probe("cpu")
    for _ in range(CASES):
        permutes(device)
        combines(device)


if __name__ == "__main__":
    main(int(sys.argv[1]))
