"""The device functions of ``plan``, each alone; ``device_functions.py`` runs them.

Each is compared with a few lines of plain Python, and what surrounds the memory that it may write
must stay as it was.
"""

from dataclasses import replace
from itertools import product
from random import Random

import torch
import triton
import triton.language as tl

from moe_routing.planning import PlanProblem
from moe_routing.reference import plan_oracle
from moe_routing_backends.triton.planning import kernels
from moe_routing_backends.triton.planning.kernels import plan_spec

UNTOUCHED = -77
RANDOM = Random(0)  # noqa: S311 -- cases are no secrets
MARGIN = 8
"""Elements around what a function may write."""
LAYOUTS = {
    "sorted": {},
    "dropped": {"drop": "last"},
    "blocks": {"layout": "blocks", "block": 5},
    "dropped_blocks": {"layout": "blocks", "block": 16, "drop": "last"},
    "masked": {"layout": "masked", "drop": "last"},
}


def specs(experts):
    """Yield the constant of every layout, with a histogram that takes a mask and without."""
    for name, layout in LAYOUTS.items():
        spec = plan_spec(PlanProblem(num_experts=experts, topk=3, **layout))
        yield f"{name} of {experts}", spec
        width = 2 * spec.width if spec.width == experts else spec.width
        yield f"{name} of {experts} without masks", replace(spec, masks=False, width=width)


class Memory:
    """Memory of one tensor, with a margin that nothing may touch."""

    def __init__(self, length, device):
        """Hold so many elements that are not written yet."""
        self._all = torch.full((length + 2 * MARGIN,), UNTOUCHED, dtype=torch.int32, device=device)
        self.at = self._all[MARGIN : MARGIN + length]

    def holds(self, expected):
        """Tell whether these are the elements: ``None`` for one that was not written."""
        around = [UNTOUCHED] * MARGIN
        inner = [UNTOUCHED if value is None else value for value in expected]
        return self._all.tolist() == around + inner + around


def on(device, values, dtype=torch.int32):
    """Return numbers on the device."""
    return torch.tensor(values, dtype=dtype, device=device)


def padded(values, width):
    """Return a vector over experts as long as kernels have it."""
    return values + [0] * (width - len(values))


@triton.jit
def experts_kernel(
    ids, out, pairs, row_stride, slot_stride, SPEC: tl.constexpr, FLAT: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Load the expert of each pair."""
    lane = tl.arange(0, SIZE)
    inside = lane < pairs
    pair = tl.where(inside, lane, 0)
    expert = kernels.expert_of_pair(ids, pair, inside, row_stride, slot_stride, SPEC, FLAT)
    tl.store(out + lane, expert)


def expert_of_pair_problems(device):
    """Load ids in range and out of it, in 32 bits and in 64, side by side and apart."""
    wrong = []
    E, K = 5, 3
    spec = plan_spec(PlanProblem(num_experts=E, topk=K))
    for dtype, wide in ((torch.int32, -(2**31)), (torch.int64, 2**32 + 1)):
        values = [0, 4, 5, -1, 3, wide, 2, 1, 2**31 - 1, 4, 4, 0]
        ids = on(device, values, dtype).view(-1, K)
        right = [v if 0 <= v < E else E for v in values] + [E] * 4
        for layout, laid in (
            ("rows", ids),
            ("columns", ids.t().contiguous().t()),
            ("every second", torch.stack([ids, ids + 1], -1).view(4, -1)[:, ::2]),
        ):
            out = Memory(16, device)
            flat = laid.is_contiguous()
            experts_kernel[1,](
                laid, out.at, len(values), *laid.stride(), FLAT=flat, SIZE=16, SPEC=spec
            )
            if not out.holds(right):
                wrong.append(f"expert_of_pair of {layout} in {dtype}: {out.at.tolist()}")
    return wrong


@triton.jit
def counted_kernel(experts, out, SPEC: tl.constexpr, SIZE: tl.constexpr):
    """Count the pairs of each expert."""
    WIDTH: tl.constexpr = SPEC.value.width
    count = kernels.counted(tl.load(experts + tl.arange(0, SIZE)), SPEC)
    tl.store(out + tl.arange(0, WIDTH), count)


def counted_problems(device):
    """Count pairs of every expert, of some, of one and of none."""
    wrong = []
    for E, size in product((1, 5, 16, 64), (32, 128)):
        for name, spec in specs(E):
            for experts in (
                [RANDOM.randint(0, E) for _ in range(size)], [E] * size, [E - 1] * size,
            ):  # fmt: skip
                out = Memory(spec.width, device)
                counted_kernel[1,](on(device, experts), out.at, SIZE=size, SPEC=spec)
                if not out.holds(padded([experts.count(e) for e in range(E)], spec.width)):
                    wrong.append(f"counted, {name}: {out.at.tolist()} of {experts}")
    return wrong


@triton.jit
def rank_kernel(experts, out, SIZE: tl.constexpr):
    """Rank the pairs of a block."""
    lane = tl.arange(0, SIZE)
    tl.store(out + lane, kernels.rank_among(tl.load(experts + lane)))


def ranks(experts):
    """Return how many before each one equal it."""
    return [experts[:place].count(expert) for place, expert in enumerate(experts)]


def rank_among_problems(device):
    """Rank blocks of equal, different and random experts."""
    wrong = []
    for size in (1, 2, 16, 64, 256):
        for experts in (
            [7] * size, list(range(size)), [RANDOM.randint(0, 9) for _ in range(size)],
        ):  # fmt: skip
            out = Memory(size, device)
            rank_kernel[1,](on(device, experts), out.at, SIZE=size)
            if not out.holds(ranks(experts)):
                wrong.append(f"rank_among: {out.at.tolist()} of {experts}")
    return wrong


@triton.jit
def laid_out_kernel(counts, kept, starts, ends, capacity, SPEC: tl.constexpr):
    """Lay out some counts."""
    WIDTH: tl.constexpr = SPEC.value.width
    lane = tl.arange(0, WIDTH)
    keeps, start, end = kernels.laid_out(tl.load(counts + lane), capacity, SPEC)
    tl.store(kept + lane, keeps)
    tl.store(starts + lane, start)
    tl.store(ends + lane, end)


def laid_out(spec, counts, capacity):
    """Return what each expert keeps, where it begins and where it ends."""
    kept = [min(count, capacity) if spec.drops else count for count in counts]
    if spec.masked:
        sizes = [capacity] * len(counts)
    elif spec.block:
        sizes = [-(-keeps // spec.block) * spec.block for keeps in kept]
    else:
        sizes = kept
    ends = [sum(sizes[: expert + 1]) for expert in range(len(sizes))]
    return kept, [end - size for end, size in zip(ends, sizes, strict=True)], ends


def some_counts(experts):
    """Return counts of which some are 0 and some large."""
    return [RANDOM.choice([0, 1, 4, 5, 6, 1000]) for _ in range(experts)]


def laid_out_problems(device):
    """Lay out random counts; experts past the last take no place."""
    wrong = []
    for E, capacity in product((1, 5, 16, 33), (1, 5, 700)):
        for name, spec in specs(E):
            counts, past = some_counts(E), spec.width - E
            kept, starts, ends = laid_out(spec, counts, capacity)
            found = [Memory(spec.width, device) for _ in range(3)]
            laid_out_kernel[1,](
                on(device, padded(counts, spec.width)), *(part.at for part in found), capacity,
                SPEC=spec,
            )  # fmt: skip
            expected = kept + [0] * past, starts + [ends[-1]] * past, ends + [ends[-1]] * past
            if not all(part.holds(right) for part, right in zip(found, expected, strict=True)):
                wrong.append(f"laid_out, {name}, capacity {capacity}, of {counts}")
    return wrong


@triton.jit
def counts_kernel(counts, offsets, dropped, count, kept, start, end, SPEC: tl.constexpr):
    """Write counts; the second program would write others."""
    WIDTH: tl.constexpr = SPEC.value.width
    lane = tl.arange(0, WIDTH)
    other = tl.program_id(0)
    kernels.write_counts(
        counts, offsets, dropped, tl.load(count + lane), tl.load(kept + lane) + other,
        tl.load(start + lane) + other, tl.load(end + lane) + other, SPEC,
    )  # fmt: skip


def write_counts_problems(device):
    """Write the counts of all experts and of none past them, by the first program alone."""
    wrong = []
    for E in (1, 5, 16, 33):
        for name, spec in specs(E):
            counts = some_counts(E)
            kept, starts, ends = laid_out(spec, counts, 5)
            found = Memory(E, device), Memory(E + 1, device), Memory(1, device)
            vectors = (on(device, padded(v, spec.width)) for v in (counts, kept, starts, ends))
            counts_kernel[2,](*(part.at for part in found), *vectors, SPEC=spec)
            dropped = [sum(counts) - sum(kept)] if spec.drops else [None]
            expected = kept, [*starts, ends[-1]], dropped
            if not all(part.holds(right) for part, right in zip(found, expected, strict=True)):
                wrong.append(f"write_counts, {name}, of {counts}")
    return wrong


@triton.jit
def fill_kernel(tensor, first, end, TILE: tl.constexpr):
    """Fill a part of a tensor."""
    kernels.fill(tensor, first, end, 9, TILE)


def fill_problems(device):
    """Fill nothing, an element, a tile, more than all programs do at a time."""
    wrong = []
    for first, length, programs in product((0, 3), (0, 1, 15, 16, 17, 200), (1, 3, 50)):
        out = Memory(first + length, device)
        fill_kernel[programs,](out.at, first, first + length, TILE=16)
        if not out.holds([None] * first + [9] * length):
            wrong.append(f"fill of {length} from {first} in {programs} programs")
    return wrong


@triton.jit
def rows_kernel(order, kept, length, capacity, SPEC: tl.constexpr, TILE: tl.constexpr):
    """Fill the empty places of rows."""
    WIDTH: tl.constexpr = SPEC.value.width
    count = tl.load(kept + tl.arange(0, WIDTH))
    kernels.fill_rows(order, count, 99, length, capacity, TILE)


def fill_rows_problems(device):
    """Fill rows that are full, empty and in between."""
    wrong = []
    for E, capacity, programs in product((1, 5, 16), (1, 7, 40), (1, 3)):
        spec = plan_spec(PlanProblem(num_experts=E, topk=3, **LAYOUTS["masked"]))
        kept = [RANDOM.choice([0, capacity, RANDOM.randint(0, capacity)]) for _ in range(E)]
        out = Memory(E * capacity, device)
        rows_kernel[programs,](
            out.at, on(device, padded(kept, spec.width)), E * capacity, capacity, SPEC=spec,
            TILE=16,
        )  # fmt: skip
        if not out.holds([v for k in kept for v in [None] * k + [99] * (capacity - k)]):
            wrong.append(f"fill_rows of {kept}, capacity {capacity}: {out.at.tolist()}")
    return wrong


@triton.jit
def last_blocks_kernel(order, expert, in_expert, place, kept, SPEC: tl.constexpr):
    """Fill the last blocks of the experts whose last pair is among these."""
    E: tl.constexpr = SPEC.value.num_experts
    WIDTH: tl.constexpr = SPEC.value.width
    lane = tl.arange(0, 16)
    at = tl.load(expert + lane)
    counts = tl.load(kept + tl.arange(0, WIDTH))
    placed = at < E
    at = tl.minimum(at, WIDTH - 1)
    kernels.fill_last_blocks(
        order, tl.load(in_expert + lane), tl.load(place + lane), placed, at, counts, 99, SPEC
    )


def fill_last_blocks_problems(device):
    """Fill blocks of which a pair is last, and no block of a pair that is not or has no place.

    One block is about as long as can be: what is left of it is counted without passing int32. The
    interpreter would count for hours.
    """
    wrong = []
    E = 16
    for block in (1, 2, 5, 64, 65, 200, *([2**31 - 1] if device == "cuda" else [])):
        spec = plan_spec(PlanProblem(num_experts=E, topk=3, layout="blocks", block=block))
        # Expert 0 has its last pair here, expert 1 has it elsewhere, expert 15 has one, and a pair
        # without an expert looks up the last of the vector.
        left, before = min(block - 1, 150), 5
        experts, in_expert = [0, 1, E] + [E] * 13, [block - 1 - left] + [0] * 15
        out = Memory(before + 1 + left, device)
        last_blocks_kernel[1,](
            out.at,
            on(device, experts),
            on(device, in_expert),
            on(device, [before, 0, 3] + [0] * 13),
            on(device, [block - left, 2] + [0] * 13 + [1]),
            SPEC=spec,
        )
        if not out.holds([None] * (before + 1) + [99] * left):
            wrong.append(f"fill_last_blocks of {block}: {out.at.tolist()}")
    return wrong


@triton.jit
def place_kernel(
    order, inverse, block_experts, expert, before, kept, start, first, count, total, pairs,
    capacity, SPEC: tl.constexpr, FILLED: tl.constexpr,
):  # fmt: skip
    """Place the pairs from ``first`` on."""
    WIDTH: tl.constexpr = SPEC.value.width
    lane, column = tl.arange(0, 16), tl.arange(0, WIDTH)
    inside = lane < count
    its = tl.load(expert + lane)
    kernels.place_pairs(
        order, inverse, block_experts, its, kernels.rank_among(its),
        first + tl.where(inside, lane, 0), inside, tl.load(before + column), first,
        tl.load(kept + column), tl.load(start + column), total, pairs, capacity, SPEC, FILLED,
    )  # fmt: skip


def place_pairs_problems(device):
    """Place 13 pairs in the middle of 40, of all layouts, with experts and without."""
    wrong = []
    first, here, pairs, capacity = 11, 13, 40, 3
    for E in (1, 4, 16):
        for (name, spec), filled in product(specs(E), (True, False)):
            experts = [RANDOM.randint(0, E) for _ in range(pairs)]
            counts = [experts.count(e) for e in range(E)]
            kept, starts, ends = laid_out(spec, counts, capacity)
            length = ends[-1] if spec.leaves_empty else pairs
            expected = placed(
                spec, experts, (kept, starts, ends), range(first, first + here), filled=filled
            )
            found = [Memory(n, device) for n in (length, pairs, length // (spec.block or 1))]
            vectors = (
                on(device, padded(vector, spec.width))
                for vector in ([experts[:first].count(e) for e in range(E)], kept, starts)
            )
            its = experts[first : first + here] + [E] * (16 - here)
            place_kernel[1,](
                *(part.at for part in found), on(device, its), *vectors, first, here, ends[-1],
                pairs, capacity, SPEC=spec, FILLED=filled,
            )  # fmt: skip
            names = "order", "inverse", "block_experts"
            for what, part, right in zip(names, found, expected, strict=True):
                if not part.holds(right):
                    wrong.append(f"place_pairs, {name}, filled {filled}: {what} of {experts}")
    return wrong


def placed(spec, experts, laid, here, *, filled):
    """Return what the parts of a plan hold once some of its pairs are placed, and no others."""
    kept, starts, ends = laid
    pairs, total = len(experts), ends[-1]
    order = [None] * (total if spec.leaves_empty else pairs)
    inverse = [None] * pairs
    block_experts = [None] * (len(order) // (spec.block or 1))
    without = 0
    for pair, (expert, rank) in enumerate(zip(experts, ranks(experts), strict=True)):
        has_place = expert < len(kept) and rank < kept[expert]
        place = starts[expert] + rank if has_place else -1
        if not has_place and not spec.leaves_empty:
            place = total + without
            without += 1
        if pair not in here:
            continue
        inverse[pair] = place
        if place >= 0:
            order[place] = pair
        if not spec.block or not has_place:
            continue
        if rank % spec.block == 0:
            block_experts[place // spec.block] = expert
        if rank == kept[expert] - 1 and not filled:
            order[place + 1 : ends[expert]] = [pairs] * (ends[expert] - place - 1)
    return order, inverse, block_experts


@triton.jit
def counting_kernel(
    ids, partial, groups, SPEC: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Count the pairs of a row."""
    K: tl.constexpr = SPEC.value.topk
    row = tl.program_id(0) + tl.arange(0, 1)
    column = tl.arange(0, N)[None, :]
    its = tl.load(ids + row[:, None] * K + column, mask=column < K, other=-1)
    kernels.count_pairs(partial, its, row, groups, SPEC, SIZE, GROUP)


def count_pairs_problems(device):
    """Count pairs of rows that begin and end in blocks and groups, of experts and of none."""
    wrong = []
    E, K, rows = 5, 3, 29
    spec = plan_spec(PlanProblem(num_experts=E, topk=K))
    for dtype, (size, group) in product((torch.int32, torch.int64), ((4, 2), (16, 4), (64, 2))):
        values = [RANDOM.choice([*range(E), E, -1, 2**31 - 1]) for _ in range(rows * K)]
        blocks = -(-len(values) // size)
        groups = -(-blocks // group)
        partial = Memory((groups + blocks) * spec.width, device)
        partial.at.zero_()
        ids = on(device, values, dtype)
        counting_kernel[rows,](ids, partial.at, groups, SPEC=spec, SIZE=size, GROUP=group, N=4)
        right = []
        for part, many in ((size * group, groups), (size, blocks)):
            for first in range(0, many * part, part):
                here = values[first : first + part]
                right += padded([here.count(e) for e in range(E)], spec.width)
        if not partial.holds(right):
            wrong.append(f"count_pairs of {values} in {dtype}, {size} a block, {group} a group")
    return wrong


@triton.jit
def sums_kernel(partial, before, sums, groups, group, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Add the counts of groups."""
    column = tl.arange(0, WIDTH)
    first = tl.load(before + column)
    count, found = kernels.sums_of_groups(partial, groups, group, first, ROWS)
    tl.store(sums + column, count)
    tl.store(sums + WIDTH + column, found)


def sums_of_groups_problems(device):
    """Add the counts of one group, of as many as are added at a time, and of more."""
    wrong = []
    width = 16
    for groups, rows in product((1, 4, 7), (1, 4)):
        counts = [[RANDOM.randint(0, 9) for _ in range(width)] for _ in range(groups)]
        before = [RANDOM.randint(0, 9) for _ in range(width)]
        for group in range(groups):
            sums = Memory(2 * width, device)
            sums_kernel[1,](
                on(device, counts), on(device, before), sums.at, groups, group,
                WIDTH=width, ROWS=rows,
            )  # fmt: skip
            earlier = [sum(column) for column in zip(before, *counts[:group], strict=True)]
            if not sums.holds([sum(column) for column in zip(*counts, strict=True)] + earlier):
                wrong.append(f"sums_of_groups, {group} of {groups}, {rows} at a time")
    return wrong


@triton.jit
def all_kernel(
    ids, order, inverse, counts, offsets, block_experts, num_dropped, pairs, length, blocks,
    capacity, SPEC: tl.constexpr, ROW: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Plan ids that one program holds: a row, or some."""
    WIDTH: tl.constexpr = SPEC.value.width
    lane = tl.arange(0, SIZE)
    inside = lane < pairs
    its = tl.load(ids + lane, mask=inside, other=-1)
    if ROW:
        kernels.plan_row(
            its, order, inverse, counts, offsets, block_experts, num_dropped, length, blocks,
            capacity, SPEC, 16,
        )  # fmt: skip
    else:
        expert = tl.where((its >= 0) & (its < SPEC.value.num_experts), its, SPEC.value.num_experts)
        kernels.place_all(
            order, inverse, counts, offsets, block_experts, num_dropped, expert,
            tl.where(inside, lane, 0), inside, tl.zeros([WIDTH], tl.int32), 0,
            kernels.counted(expert, SPEC), pairs, length, blocks, capacity, SPEC, 16,
        )  # fmt: skip


def plans_problems(device, name, rows, size):
    """Plan so many rows of all layouts in one program."""
    wrong = []
    capacity, K = 2, 3
    for E, layout in product((1, 4, 16), LAYOUTS):
        problem = PlanProblem(num_experts=E, topk=K, **LAYOUTS[layout])
        spec = plan_spec(problem)
        ids = on(device, [RANDOM.randint(-1, E) for _ in range(rows * K)]).view(rows, K)
        right = plan_oracle.plan(problem, ids, capacity if "drop" in LAYOUTS[layout] else None)
        found = [None if part is None else Memory(part.numel(), device) for part in right]
        at = [None if part is None else part.at for part in found]
        blocks = 0 if right.block_experts is None else right.block_experts.numel()
        all_kernel[1,](
            ids, *at, rows * K, right.order.numel(), blocks, capacity, SPEC=spec, ROW=rows == 1,
            SIZE=size,
        )  # fmt: skip
        for what, part, expected in zip(right._fields, found, right, strict=True):
            if part is not None and not part.holds(expected.flatten().tolist()):
                wrong.append(f"{name}, {layout} of {E}: {what} of {ids.tolist()}")
    return wrong


def place_all_problems(device):
    """Plan nine rows whose counts are known."""
    return plans_problems(device, "place_all", 9, 32)


def plan_row_problems(device):
    """Plan a row, some of whose lanes have no slot."""
    return plans_problems(device, "plan_row", 1, 4)


GROUPS = (
    expert_of_pair_problems,
    counted_problems,
    rank_among_problems,
    laid_out_problems,
    write_counts_problems,
    fill_problems,
    fill_rows_problems,
    fill_last_blocks_problems,
    place_pairs_problems,
    count_pairs_problems,
    sums_of_groups_problems,
    place_all_problems,
    plan_row_problems,
)
