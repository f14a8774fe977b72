"""The device functions that kernels share, each alone: print what is wrong, by function, as JSON.

A process of its own, in Triton's interpreter, or with the argument ``gpu`` compiled and on the GPU.
Networks are tried on every sequence of zeros and ones: what sorts those sorts everything (Knuth,
The Art of Computer Programming 3, 5.3.4). Keys of 16-bit numbers are tried for all 65,536 of them.
"""

import json
import os
import sys
from functools import cache
from itertools import product

from interpreter import interpret

ON_GPU = sys.argv[1:2] == ["gpu"]
if ON_GPU:
    os.environ["TRITON_INTERPRET"] = "0"
else:
    interpret()

import device_functions_plan as plan  # noqa: E402 -- after the variable is set
import torch  # noqa: E402 -- likewise
import triton  # noqa: E402 -- likewise
import triton.language as tl  # noqa: E402 -- likewise

from moe_routing_backends.triton.device import bf16x2, keys, scores  # noqa: E402 -- likewise
from moe_routing_backends.triton.device import sorting_networks as networks  # noqa: E402 -- likewise
from moe_routing_backends.triton.gating.kernels import parts_of_product  # noqa: E402 -- likewise

DEVICE = "cuda" if ON_GPU else "cpu"
BLOCK = 1024
LOWEST = -3.4028234663852886e38


def launch(kernel, count, *arguments, **constants):
    """Run a kernel over so many elements."""
    kernel[triton.cdiv(count, BLOCK),](
        *arguments, count, BLOCK=BLOCK, enable_fp_fusion=False, **constants
    )


@triton.jit
def load8(source, at, mask):
    """Load a list of 8 keys."""
    return (
        tl.load(source + at * 8, mask=mask), tl.load(source + at * 8 + 1, mask=mask),
        tl.load(source + at * 8 + 2, mask=mask), tl.load(source + at * 8 + 3, mask=mask),
        tl.load(source + at * 8 + 4, mask=mask), tl.load(source + at * 8 + 5, mask=mask),
        tl.load(source + at * 8 + 6, mask=mask), tl.load(source + at * 8 + 7, mask=mask),
    )  # fmt: skip


@triton.jit
def store_list(target, at, t, mask, N: tl.constexpr):
    """Store a list."""
    for i in tl.static_range(len(t)):
        tl.store(target + at * N + i, t[i], mask=mask)


@triton.jit
def sort_kernel(a, b, out, count, BLOCK: tl.constexpr, WHAT: tl.constexpr):
    """Apply a network to lists of 8 keys, ``a`` and ``b``."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    x = load8(a, at, mask)
    y = load8(b, at, mask)
    if WHAT == "sort4":
        store_list(out, at, networks.sort4(x[:4]), mask, 4)
    elif WHAT == "sort8":
        store_list(out, at, networks.sort8(x), mask, 8)
    elif WHAT == "sort_bitonic8":
        store_list(out, at, networks.sort_bitonic8(x), mask, 8)
    elif WHAT == "best8":
        store_list(out, at, networks.sort_bitonic8(networks.best8(x, y)), mask, 8)
    elif WHAT == "merge16":
        top, rest = networks.merge16(x, y)
        store_list(out, at, top + rest, mask, 16)
    else:
        top, _rest, lost = networks.insert(x, x, x[7] * 0, y, 8)
        store_list(out, at, top + (lost,), mask, 9)  # noqa: RUF005 -- Triton has no starred tuples


def as_keys(bits, dtype):
    """Turn zeros and ones into keys of a dtype.

    Keys of int32 are pairs of bfloat16, whose other half has the opposite.
    """
    if dtype == torch.int32:
        one = 0x3F80
        return (torch.where(bits == 1, one, 0) | (torch.where(bits == 1, 0, one) << 16)).to(
            torch.int32
        )
    return (bits.long() * 0x12345678 + 9).to(dtype)


def low(found, dtype):
    """Return zeros and ones from keys."""
    return (
        ((found.cpu().long() & 0xFFFF) == 0x3F80).int()
        if dtype == torch.int32
        else (found.cpu().long() != 9).int()
    )


def of_network(what, a, b, expected, dtype):
    """Say where a network gives another list than expected."""
    x, y = (as_keys(torch.tensor(lists), dtype).contiguous().to(DEVICE) for lists in (a, b))
    out = torch.zeros(len(a), len(expected[0]), dtype=dtype, device=DEVICE)
    launch(sort_kernel, len(a), x, y, out, WHAT=what)
    bad = (low(out, dtype) != torch.tensor(expected)).any(1).nonzero().flatten().tolist()
    return [f"{what} of {a[i]}, {b[i]} as {dtype}: {low(out, dtype)[i].tolist()}" for i in bad[:3]]


def network_problems():
    """Try every network on every sequence of zeros and ones that it is for."""
    every = [list(bits) for bits in product((0, 1), repeat=8)]
    falling = [[1] * n + [0] * (8 - n) for n in range(9)]
    pairs = list(product(falling, falling))
    a, b = [list(p[0]) for p in pairs], [list(p[1]) for p in pairs]
    bitonic = [
        bits
        for bits in every
        if sum(x != y for x, y in zip(bits, bits[1:] + bits[:1], strict=True)) <= 2
    ]
    down = [sorted(bits, reverse=True) for bits in every]
    wrong = []
    for dtype in (torch.uint32, torch.int64, torch.int32):
        # A key of 64 bits is unsigned in the kernels; torch stores it as int64, and the keys here
        # are small.
        if dtype == torch.int64 and ON_GPU:
            continue
        wrong += of_network(
            "sort4", every, every, [sorted(bits[:4], reverse=True) for bits in every], dtype
        )
        wrong += of_network("sort8", every, every, down, dtype)
        wrong += of_network(
            "sort_bitonic8",
            bitonic,
            bitonic,
            [sorted(bits, reverse=True) for bits in bitonic],
            dtype,
        )
        merged = [sorted(x + y, reverse=True) for x, y in zip(a, b, strict=True)]
        wrong += of_network("best8", a, b, [m[:8] for m in merged], dtype)
        wrong += of_network("merge16", a, b, merged, dtype)
        if dtype != torch.int32:  # keys alone are inserted
            wrong += of_network("insert", a, b, [m[:9] for m in merged], dtype)
    return wrong


@triton.jit
def exact16_kernel(x, index, key, value, count, BLOCK: tl.constexpr, MASK: tl.constexpr):
    """Pack 16-bit numbers with their index, and take them out again."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    packed = keys.exact16_key(tl.load(x + at, mask=mask), tl.load(index + at, mask=mask), MASK)
    tl.store(key + at, packed.to(tl.int64), mask=mask)
    tl.store(value + at, keys.value_of_exact16(packed, MASK), mask=mask)


def exact16_problems():
    """Pack all 65,536 numbers of each format.

    Keys must be in the order of value, then of index from the lowest.
    """
    wrong = []
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        for experts in (128, 2048):
            x = patterns.view(dtype)
            generator = torch.Generator().manual_seed(experts)
            index = torch.randint(experts, x.shape, generator=generator, dtype=torch.int32)
            key, value = torch.zeros(len(x), dtype=torch.int64), torch.zeros(len(x))
            on = [t.to(DEVICE) for t in (x, index, key, value)]
            launch(exact16_kernel, len(x), *on, MASK=experts - 1)
            key, value = on[2].cpu(), on[3].cpu()
            clean = x.float().nan_to_num(float("-inf"), float("inf"), float("-inf"))
            ranked = torch.tensor(
                sorted(range(len(x)), key=lambda i: (clean[i].item(), -index[i].item()))
            )
            if (key[ranked].diff() < 0).any():
                wrong.append(f"exact16_key of {dtype} is out of order at E = {experts}")
            value_of, index_of = clean[ranked], index[ranked]
            same = (value_of[1:] == value_of[:-1]) & (index_of[1:] == index_of[:-1])
            if ((key[ranked].diff() == 0) != same).any():
                wrong.append(f"exact16_key of {dtype} confuses numbers at E = {experts}")
            if not torch.equal(value, clean.clamp(LOWEST, -LOWEST)):
                wrong.append(f"value_of_exact16 of {dtype} is another number at E = {experts}")
    return wrong


@triton.jit
def float32_kernel(x, key, back, below, above, count, BLOCK: tl.constexpr, MASK: tl.constexpr):
    """Map clean float32 to ordered keys and back, and to truncated keys and their bounds."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    t = keys.clean(tl.load(x + at, mask=mask))
    ordered = keys.ordered_key(t)
    tl.store(key + at, ordered.to(tl.int64), mask=mask)
    tl.store(back + at, keys.value_of_key(ordered), mask=mask)
    truncated = keys.truncated_key(t, at & MASK, MASK)
    tl.store(below + at, keys.value_of_truncated((truncated | MASK) ^ MASK), mask=mask)
    tl.store(above + at, keys.value_of_truncated(truncated | MASK), mask=mask)


def numbers():
    """Return float32 of every magnitude, sign and kind."""
    generator = torch.Generator().manual_seed(0)
    drawn = (
        torch.randint(-(2**31), 2**31, (200_000,), generator=generator)
        .to(torch.int32)
        .view(torch.float32)
    )
    special = torch.tensor(
        [
            0.0,
            -0.0,
            1.0,
            -1.0,
            float("inf"),
            float("-inf"),
            float("nan"),
            1e-45,
            -1e-45,
            LOWEST,
            -LOWEST,
        ]
    )
    return torch.cat([drawn, special])


def float32_problems():
    """Keys of float32 must have the order of the numbers.

    A truncated key must bound its number.
    """
    x = numbers()
    key = torch.zeros(len(x), dtype=torch.int64)
    on = [t.to(DEVICE) for t in (x, key, *(torch.zeros(len(x)) for _ in range(3)))]
    launch(float32_kernel, len(x), *on, MASK=127)
    key, back, below, above = (t.cpu() for t in on[1:])
    clean = x.nan_to_num(LOWEST, -LOWEST, LOWEST)
    ranked = clean.argsort()
    # ``clean`` is what NumPy sorts, so equal numbers must have equal keys, and others must not.
    tests = {
        "ordered_key is out of order": (key[ranked].diff() < 0).any(),
        "ordered_key confuses numbers": (
            (key[ranked].diff() == 0) != (clean[ranked].diff() == 0)
        ).any(),
        "ordered_key is 0": (key == 0).any(),
        "value_of_key is another number": (back != clean).any(),
        "a truncated key is no bound": ((below > clean) | (above < clean)).any(),
    }
    return [what for what, bad in tests.items() if bad]


@triton.jit
def pairs_kernel(a, b, most, least, mask_of, count, BLOCK: tl.constexpr):
    """Compare pairs of bfloat16."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    x = tl.load(a + at, mask=mask)
    y = tl.load(b + at, mask=mask)
    tl.store(most + at, bf16x2.max_bf16x2(x, y), mask=mask)
    tl.store(least + at, bf16x2.min_bf16x2(x, y), mask=mask)
    tl.store(mask_of + at, bf16x2.mask_not_below(x, y, 0x00010001).to(tl.int64), mask=mask)


def pair_problems():
    """Compare all pairs of some bfloat16, in both halves."""
    values = torch.tensor(
        [
            0.0,
            -0.0,
            1.0,
            -1.0,
            1.0078125,
            3e38,
            -3e38,
            float("inf"),
            float("-inf"),
            1e-40,
            float("nan"),
        ]
    )
    low, high = (
        t.flatten().to(torch.bfloat16) for t in torch.meshgrid(values, values, indexing="ij")
    )
    a = (low.view(torch.int16).int() & 0xFFFF) | (high.view(torch.int16).int() << 16)
    b = (high.view(torch.int16).int() & 0xFFFF) | (low.view(torch.int16).int() << 16)
    on = [
        t.to(DEVICE)
        for t in (
            a,
            b,
            torch.zeros_like(a),
            torch.zeros_like(a),
            torch.zeros(len(a), dtype=torch.int64),
        )
    ]
    launch(pairs_kernel, len(a), *on)
    most, least, mask_of = (t.cpu() for t in on[2:])

    def first(pair):
        return (pair & 0xFFFF).to(torch.int16).view(torch.bfloat16).float()

    x, y = low.float(), high.float()
    number = x.isfinite() | x.isinf()
    both = number & (y.isfinite() | y.isinf())
    tests = {
        "max_bf16x2": both & (first(most) != torch.maximum(x, y)),
        "max_bf16x2 of NaN and a number": number & y.isnan() & (first(most) != x),
        "min_bf16x2": both & (first(least) != torch.minimum(x, y)),
        "mask_not_below, low half": ((mask_of & 1) != 0) != ~(x < y),
        "mask_not_below, high half": ((mask_of & 0x10000) != 0) != ~(y < x),
    }
    return [f"{what} of {x[bad][0]} and {y[bad][0]}" for what, bad in tests.items() if bad.any()]


@triton.jit
def round_kernel(x, out, bits, count, BLOCK: tl.constexpr):
    """Round to pairs of bfloat16, and find the index of a bit."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    value = tl.load(x + at, mask=mask)
    tl.store(out + at, bf16x2.round_to_bf16x2(value, -value), mask=mask)
    one = tl.full([BLOCK], 1, tl.uint32) << (at % 32).to(tl.uint32)
    tl.store(bits + at, bf16x2.index_of_bit(one), mask=mask)


def round_problems():
    """Round to nearest even, as PyTorch does, and find the only bit that is set."""
    x = numbers()
    on = [
        t.to(DEVICE)
        for t in (x, torch.zeros(len(x), dtype=torch.int32), torch.zeros(len(x), dtype=torch.int32))
    ]
    launch(round_kernel, len(x), *on)
    out, bits = on[1].cpu(), on[2].cpu()
    known = ~x.isnan()
    halves = (
        (out & 0xFFFF).to(torch.int16).view(torch.bfloat16),
        (out >> 16).to(torch.int16).view(torch.bfloat16),
    )
    wrong = [
        f"round_to_bf16x2 of {v[known & (half != v.bfloat16())][0]}"
        for v, half in zip((x, -x), halves, strict=True)
        if (known & (half != v.bfloat16())).any()
    ]
    return wrong + ([] if torch.equal(bits, torch.arange(len(x)).int() % 32) else ["index_of_bit"])


@triton.jit
def product_kernel(x, factor, high, low, count, BLOCK: tl.constexpr):
    """Split products into two parts."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    of_product = parts_of_product(
        tl.load(x + at, mask=mask, other=0.0), tl.load(factor + at, mask=mask, other=0.0)
    )
    tl.store(high + at, of_product[0], mask=mask)
    tl.store(low + at, of_product[1], mask=mask)


def product_problems():
    """Split products of all mantissas, of every magnitude whose products are exact, and others."""
    generator = torch.Generator().manual_seed(0)
    mantissa = 1 + torch.arange(128) / 128
    x, factor = (t.flatten() for t in torch.meshgrid(mantissa, mantissa, indexing="ij"))
    scale = torch.randint(-58, 64, (2, len(x)), generator=generator)
    sign = 1 - 2 * torch.randint(2, (2, len(x)), generator=generator)
    x = torch.cat([sign[0] * x.ldexp(scale[0]), torch.tensor([0.0, 1.0, float("nan"), 3.38e38])])
    factor = torch.cat([sign[1] * factor.ldexp(scale[1]), torch.tensor([3.0, 0.0, 1.0, 1.0])])
    x, factor = x.bfloat16(), factor.bfloat16()
    on = [t.to(DEVICE) for t in (x, factor, torch.zeros_like(x), torch.zeros_like(x))]
    launch(product_kernel, len(x), *on)
    found = on[2].cpu().double() + on[3].cpu().double()
    bad = found.nan_to_num() != (x.double() * factor.double()).nan_to_num()
    bad |= found.isnan() != x.isnan()
    return [f"{found[i]} of {x[i]} times {factor[i]}" for i in bad.nonzero().flatten()[:3]]


@triton.jit
def maths_kernel(x, out, count, BLOCK: tl.constexpr, WHAT: tl.constexpr):
    """Compute a function of float32."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    v = tl.load(x + at, mask=mask)
    if WHAT == "exp":
        y = scores.exp(v)
    elif WHAT == "log1p":
        y = scores.log1p(v)
    elif WHAT == "tanh":
        y = scores.tanh(v)
    elif WHAT == "sigmoid":
        y = scores.sigmoid(v, v * 0.0)
    elif WHAT == "sqrtsoftplus":
        y = scores.sqrtsoftplus(v, v * 0.0)
    else:
        y = scores.reciprocal(v)
    tl.store(out + at, y, mask=mask)


MATHS = {
    "exp": (lambda x: x.exp(), (-87.0, 88.0), 2.5),
    "log1p": (lambda x: x.log1p(), (0.0, 1.0), 3.5),
    "tanh": (lambda x: x.tanh(), (-12.0, 12.0), 4.0),
    "sigmoid": (lambda x: x.sigmoid(), (-86.0, 20.0), 5.0),
    "sqrtsoftplus": (lambda x: torch.nn.functional.softplus(x).sqrt(), (-80.0, 60.0), 5.0),
    "reciprocal": (lambda x: x.reciprocal(), (1.0, 1e30), 2.5),
}
"""Each function in float64, its range, and the largest error that ours may have.

The error is in units in the last place.
"""


@cache
def ulps_off():
    """Return by how many units in the last place each function is off at most."""
    found = {}
    for what, (exact, (lowest, highest), _) in MATHS.items():
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(200_000, generator=generator)
        x = torch.cat(
            [
                lowest + (highest - lowest) * x,
                x * 1e-3,
                torch.linspace(max(lowest, -2.0), min(highest, 2.0), 20_000),
            ]
        )
        x = x.clamp(lowest, highest)
        on = [x.to(DEVICE), torch.zeros(len(x), device=DEVICE)]
        launch(maths_kernel, len(x), *on, WHAT=what)
        right = exact(x.double())
        unit = torch.ldexp(
            torch.ones(len(x), dtype=torch.float64),
            torch.frexp(right.abs().clamp(min=2.0**-126)).exponent - 24,
        )
        found[what] = ((on[1].cpu().double() - right).abs() / unit).max().item()
    return found


def maths_problems():
    """Hold each function to its bound."""
    return [
        f"{what} is off by {off:.2f} units in the last place"
        for what, off in ulps_off().items()
        if not off <= MATHS[what][2]
    ]


@triton.jit
def sum_kernel(x, out, ROWS: tl.constexpr, N: tl.constexpr):
    """Sum rows."""
    at = tl.arange(0, ROWS)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + tl.arange(0, ROWS), scores.tree_sum(tl.load(x + at)))


def sum_problems():
    """Sum neighbours first, whatever the length, so that zeros past the end change no bit."""
    wrong = []
    for n in (1, 2, 8, 64, 512):
        x = torch.rand(16, n, generator=torch.Generator().manual_seed(n))
        expected = x
        while expected.shape[1] > 1:
            expected = expected[:, ::2] + expected[:, 1::2]
        for width in (n, 2 * n):
            padded = torch.zeros(16, width)
            padded[:, :n] = x
            out = torch.zeros(16, device=DEVICE)
            sum_kernel[1,](padded.to(DEVICE), out, ROWS=16, N=width)
            if not torch.equal(out.cpu(), expected[:, 0]):
                wrong.append(f"tree_sum of {n} in {width}")
    return wrong


def main():
    """Print what is wrong, by group."""
    torch.set_num_threads(1)
    groups = (
        network_problems,
        exact16_problems,
        float32_problems,
        pair_problems,
        round_problems,
        product_problems,
        maths_problems,
        sum_problems,
    )
    found = {group.__name__.removesuffix("_problems"): group() for group in groups}
    found |= {of.__name__.removesuffix("_problems"): of(DEVICE) for of in plan.GROUPS}
    json.dump({"wrong": found, "ulps": ulps_off()}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
