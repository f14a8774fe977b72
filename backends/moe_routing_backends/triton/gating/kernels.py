"""The kernels of ``gate``: the router's linear layer on matrix units, and routing after it.

H is cut into slices of ``SLICE`` columns. A matrix unit adds the products of a slice. In float32,
the slices of a group are added one after another, and then the groups. That order depends on H
alone, so a row has the same bits whoever adds: for few tokens a program for each slice, for more a
program for each group, after both of which ``moe_routing_gate_route`` adds the rest and routes; for
many a program that takes all slices of its tile and writes the logits.

The experts are the rows of a product and the tokens its columns. So one token is no less than an
instruction needs: on an H100 ``wgmma`` takes 64 rows and 8 columns or more. Instructions that have
other shapes, of which Triton picks one by the tile's, could add in another order; the tiles of all
launches (``launches.py``) get the same.

**Products are exact.** A factor of float32 is a sum of three bfloat16 numbers, 8 bits each of its
24, and the matrix unit adds the products of all. The bits are cut off rather than rounded: so no
part is beyond the largest bfloat16. Two parts are enough for a bfloat16 hidden state times a
bfloat16 vector, whose product has 16 bits. With ``PACKED``, instructions on pairs of bfloat16
compute both parts: the high one is rounded, and clamped. What is below 2**-126 may be lost.

Vectors of columns are multiplied into the hidden states: a program has fewer tokens than experts,
and the weight goes to the matrix unit as it is read. A float32 weight is in three parts anyway, and
takes the vectors itself.

The norm's factor belongs to a row: it is applied to the sum. The squares are added up by programs
that take several slices or write logits, since these have the row in their registers. Where
programs take one slice, the kernel that routes adds them in the same order: it reads the row while
it waits for the slices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_routing_backends.triton.device.keys import INTERPRETED
from moe_routing_backends.triton.device.pdl import grid_dependency_wait, launch_dependents
from moe_routing_backends.triton.device.rounding import nearest
from moe_routing_backends.triton.device.scores import tree_sum
from moe_routing_backends.triton.gating.launches import MOST_OF_GROUP
from moe_routing_backends.triton.kernels.cooperative import experts_of, route_by_rounds
from moe_routing_backends.triton.planning import launches as planning
from moe_routing_backends.triton.planning.kernels import count_pairs, fill, plan_row
from moe_routing_backends.triton.runtime.launcher import ALIGNMENT

SUM = tl.constexpr(tl.float64 if INTERPRETED else tl.float32)
"""What a slice is added up in.

NumPy, by which the interpreter multiplies, adds in another order for each shape; its sums of
float64 are exact but for rare rows, and so the same in any order. It also would multiply the bits
of bfloat16 numbers.
"""
BITS = tl.constexpr(8 * ALIGNMENT)
"""Of the widest load of a thread."""
HIGH_BITS = tl.constexpr(-0x10000)
"""Of a float32, those that a bfloat16 has."""
FILLED_AT_A_TIME = tl.constexpr(planning.FILLED_AT_A_TIME)
"""Numbers that a program writes at a time: zeros, and empty places of a plan."""
UNROLLED = tl.constexpr(MOST_OF_GROUP)
"""Partial sums that are added without a loop over groups: of 4,096 scaled columns, or of 8,192
others."""
NOT_SPECIALIZED = (
    "hidden", "router_weight", "router_bias", "norm_weight", "input_scale", "logits", "weights",
    "ids", "per_expert_scale", "bias", "token_ids", "expert_table", "num_valid_tokens",
    "expert_map", "pair_counts", "order", "inverse", "counts", "offsets", "block_experts",
    "num_dropped", "T", "valid", "vocabulary", "hidden_stride", "weight_stride", "eps",
    "multiplier", "num_counts", "groups", "length", "blocks", "capacity",
)  # fmt: skip
"""Arguments whose value or alignment must not select another compiled kernel.

That is all but the memory between the two kernels, which is always aligned.
"""


@triton.jit
def parts_of(x, COUNT: tl.constexpr):
    """Return bfloat16 numbers of which float32 ``x`` is the sum, 8 bits of ``x`` each."""
    parts = ()
    for _ in tl.static_range(COUNT):
        part = (x.to(tl.int32, bitcast=True) & HIGH_BITS).to(tl.float32, bitcast=True)
        parts += (part.to(tl.bfloat16),)
        x -= part  # exact
    return parts


@triton.jit
def parts_of_product(x, factor):
    """Split ``x * factor`` into two bfloat16 numbers, high and low.

    The high one is rounded, so the low one may have the other sign. The sum is exact for products
    from 2**-118 up to 2**128. A pair of products takes four instructions, and some 13 in float32.
    """
    if INTERPRETED:
        return parts_of(x.to(tl.float32) * factor.to(tl.float32), 2)
    else:
        # The largest bfloat16 takes the place of infinity in the high part. From 2**129 on the low
        # part is infinite. NaN stays.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 none, most, high, minus;
            mov.b32 none, 0x80008000;
            mov.b32 most, 0x7F7F7F7F;
            fma.rn.bf16x2 high, $2, $3, none;
            min.NaN.xorsign.abs.bf16x2 high, high, most;
            neg.bf16x2 minus, high;
            fma.rn.bf16x2 $1, $2, $3, minus;
            mov.b32 $0, high;
            }""",
            "=r,=r,r,r", [x, factor], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def read_rows(
    tensor, row, column, stride, HIDDEN_SIZE: tl.constexpr, TAIL: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Read ``[ROWS, COLUMNS]`` of a matrix.

    :param TAIL: there may be columns past the last, which are 0.
    :param ALIGNED: rows begin at multiples of 16 bytes.
    """
    at = tensor + (row.to(tl.int64)[:, None] * stride + column[None, :])
    if ALIGNED:
        # Said of the sum: Triton joins sums of addresses, and forgets what it was told of a part.
        at = tl.multiple_of(at, (1, 16))
    if TAIL:
        return tl.load(at, mask=(column < HIDDEN_SIZE)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def read_vector(vector, column, HIDDEN_SIZE: tl.constexpr, ALIGNED: tl.constexpr):
    """Read the numbers at columns, in the shape of ``column``; 0 past the last."""
    at = vector + column
    if ALIGNED:
        at = tl.multiple_of(at, 16 if len(at.shape) == 1 else (1, 16))
    return tl.load(at, mask=column < HIDDEN_SIZE, other=0.0)


@triton.jit
def factors_of_columns(
    norm_weight, input_scale, column, HIDDEN_SIZE: tl.constexpr, ALIGNED: tl.constexpr
):
    """Return the given vector, or the product of both in float32, in the shape of ``column``."""
    if norm_weight is not None and input_scale is not None:
        weight = read_vector(norm_weight, column, HIDDEN_SIZE, ALIGNED).to(tl.float32)
        return weight * read_vector(input_scale, column, HIDDEN_SIZE, ALIGNED).to(tl.float32)
    elif norm_weight is not None:
        return read_vector(norm_weight, column, HIDDEN_SIZE, ALIGNED)
    else:
        return read_vector(input_scale, column, HIDDEN_SIZE, ALIGNED)


@triton.jit
def squares_of(x):
    """Add the squares of each chunk, the numbers in 16 bytes, in a fixed order.

    :returns: float32 ``[ROWS, COLUMNS / (numbers of a chunk)]``.
    """
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    CHUNK: tl.constexpr = BITS // x.dtype.primitive_bitwidth
    # A thread that reads 16 bytes at a time has all of them: then halving moves nothing.
    columns = (x.to(tl.float32),)
    for halvings in tl.static_range(1, 4):
        if CHUNK >> halvings:
            halves = ()
            for i in tl.static_range(len(columns)):
                halves += tl.split(tl.reshape(columns[i], [ROWS, COLUMNS >> halvings, 2]))
            columns = halves
    squares = columns[0] * columns[0]
    for i in tl.static_range(1, CHUNK):
        squares = tl.fma(columns[i], columns[i], squares)
    return squares


@triton.jit
def squares_of_row(
    hidden, row, stride, HIDDEN_SIZE: tl.constexpr, SLICE: tl.constexpr, STEP: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Add the squares of one row as the programs that take groups of slices do.

    :param GROUPS: groups of the row, or more of which the last have no columns; a power of two.
    :returns: float32 ``[1, CHUNKS]``.
    """
    STEPS: tl.constexpr = SLICE // STEP
    # At most 16 steps of each group are read at once, so that a large H compiles soon.
    AT_ONCE: tl.constexpr = min(GROUP, max(1, 16 // STEPS))
    group = tl.arange(0, GROUPS)
    of_groups = tl.zeros([GROUPS, CHUNKS], tl.float32)
    for first in range(0, GROUP, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            of_slices = tl.zeros([GROUPS, CHUNKS], tl.float32)
            for step in tl.static_range(STEPS):
                slice_ = group * GROUP + first + i
                column = (slice_ * SLICE + step * STEP)[:, None] + tl.arange(0, STEP)[None, :]
                at = hidden + (row.to(tl.int64) * stride + column)
                if ALIGNED:
                    at = tl.multiple_of(at, (1, 16))
                mask = column < HIDDEN_SIZE
                if GROUP % AT_ONCE:
                    mask = mask & (first + i < GROUP)
                # From the second cache (``LDG.STRONG.GPU``): this kernel has not waited, and the
                # first cache may have what was there before the hidden states.
                x = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
                of_slices += squares_of(x)
            of_groups += of_slices
    squares = tl.zeros([CHUNKS], tl.float32)
    for i in tl.static_range(GROUPS):
        squares += tl.sum(tl.where((group == i)[:, None], of_groups, 0.0), axis=0)  # exact
    return squares[None, :]


@triton.jit
def add_products(w, x, sums):
    """Add the products of ``w [EXPERTS, COLUMNS]`` and ``x [TOKENS, COLUMNS]`` to the sums."""
    if INTERPRETED:
        return tl.dot(w.to(SUM), tl.trans(x.to(SUM)), sums, out_dtype=SUM)
    else:
        return tl.dot(w, tl.trans(x), sums)


@triton.jit
def read_step(
    hidden, router_weight, norm_weight, input_scale, column, token, expert, hidden_stride,
    weight_stride, HIDDEN_SIZE: tl.constexpr, TAIL: tl.constexpr, ALIGNED: tl.constexpr,
    SPREAD: tl.constexpr,
):  # fmt: skip
    """Read some columns of the weight and of the hidden states, and their factors if any.

    :param SPREAD: rows for which factors are read: a thread has those that it multiplies by. With
        0 they are read once, and move through shared memory.
    """
    w = read_rows(router_weight, expert, column, weight_stride, HIDDEN_SIZE, TAIL, ALIGNED)
    x = read_rows(hidden, token, column, hidden_stride, HIDDEN_SIZE, TAIL, ALIGNED)
    if norm_weight is not None or input_scale is not None:
        if SPREAD:
            column = tl.broadcast_to(column[None, :], [SPREAD, column.shape[0]])
        factors = factors_of_columns(norm_weight, input_scale, column, HIDDEN_SIZE, ALIGNED)
        return w, x, factors if SPREAD else factors[None, :]
    else:
        return w, x


@triton.jit
def add_step(
    sums, low, read, HIDDEN_PARTS: tl.constexpr, WEIGHT_PARTS: tl.constexpr,
    SCALES_HIDDEN: tl.constexpr, PACKED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Add the products of some columns.

    :param read: what ``read_step`` has read.
    :param low: the sum of products of low parts. A matrix unit cuts off the sum that it adds to
        once in 16 terms. These products would cut off the large sum once more each; by themselves
        they cut off their own, which is small.
    :param CHAINED: a slice is one step. Products of low parts are added first, and those of high
        parts to the same sum.
    """
    w = read[0]
    x = read[1]
    if PACKED:
        of_hidden = parts_of_product(x, read[2])
    else:
        if len(read) > 2:
            if SCALES_HIDDEN:
                x = x.to(tl.float32) * read[2].to(tl.float32)
            else:
                w = w.to(tl.float32) * read[2].to(tl.float32)
        of_hidden = parts_of(x.to(tl.float32), HIDDEN_PARTS) if HIDDEN_PARTS else (x,)
    of_weight = parts_of(w.to(tl.float32), WEIGHT_PARTS) if WEIGHT_PARTS else (w,)
    for j in tl.static_range(len(of_hidden) - 1, -1, -1):
        for i in tl.static_range(len(of_weight)):
            if CHAINED or i + j == 0:
                sums = add_products(of_weight[i], of_hidden[j], sums)
            else:
                low = add_products(of_weight[i], of_hidden[j], low)
    return sums, low


@triton.jit
def sums_of_slice(
    hidden, router_weight, norm_weight, input_scale, slice_, token, expert, hidden_stride,
    weight_stride, HIDDEN_SIZE: tl.constexpr, SLICE: tl.constexpr, STEP: tl.constexpr,
    HIDDEN_PARTS: tl.constexpr, WEIGHT_PARTS: tl.constexpr, SCALES_HIDDEN: tl.constexpr,
    PACKED: tl.constexpr, ALIGNED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Return the sums of a slice's products ``[EXPERTS, TOKENS]``.

    The parameters are those of ``Order``.

    :param AHEAD: the next columns are read before products of these are waited for. The compiler
        moves no load across the barriers of a product.
    """
    TAIL: tl.constexpr = HIDDEN_SIZE % SLICE != 0
    STEPS: tl.constexpr = SLICE // STEP
    CHAINED: tl.constexpr = STEPS == 1
    SPREAD: tl.constexpr = token.shape[0] if SCALES_HIDDEN else expert.shape[0]
    sums = tl.zeros([expert.shape[0], token.shape[0]], SUM)
    low = sums
    first = slice_ * SLICE + tl.arange(0, STEP)
    if HIDDEN_PARTS > 1 and WEIGHT_PARTS > 1:
        # A loop: unrolled, four to nine products a step take seconds to compile.
        for step in range(STEPS):
            read = read_step(
                hidden, router_weight, norm_weight, input_scale, first + step * STEP, token, expert,
                hidden_stride, weight_stride, HIDDEN_SIZE, TAIL, ALIGNED, SPREAD,
            )  # fmt: skip
            sums, low = add_step(
                sums, low, read, HIDDEN_PARTS, WEIGHT_PARTS, SCALES_HIDDEN, PACKED, CHAINED
            )  # fmt: skip
    else:
        for step in tl.static_range(STEPS):
            if step == 0 or not AHEAD:
                read = read_step(
                    hidden, router_weight, norm_weight, input_scale, first + step * STEP, token,
                    expert, hidden_stride, weight_stride, HIDDEN_SIZE, TAIL, ALIGNED, SPREAD,
                )  # fmt: skip
            if AHEAD and step + 1 < STEPS:
                after = read_step(
                    hidden, router_weight, norm_weight, input_scale, first + (step + 1) * STEP,
                    token, expert, hidden_stride, weight_stride, HIDDEN_SIZE, TAIL, ALIGNED, SPREAD,
                )  # fmt: skip
            sums, low = add_step(
                sums, low, read, HIDDEN_PARTS, WEIGHT_PARTS, SCALES_HIDDEN, PACKED, CHAINED
            )  # fmt: skip
            if AHEAD and step + 1 < STEPS:
                read = after
    if HIDDEN_PARTS + WEIGHT_PARTS > 0 and not CHAINED:
        sums += low
    return sums.to(tl.float32)


@triton.jit
def factor_of_rows(
    squares, eps, multiplier, HIDDEN_SIZE: tl.constexpr, NORM: tl.constexpr,
    MULTIPLIED: tl.constexpr,
):  # fmt: skip
    """Return what the sums of a row are multiplied by, float32 ``[TOKENS]``.

    :param squares: ``[TOKENS, CHUNKS]``.
    """
    factor = tl.full([squares.shape[0]], 1.0, tl.float32)
    if NORM:
        squares = tree_sum(squares)
        factor = tl.div_rn(factor, tl.sqrt_rn(tl.div_rn(squares, factor * HIDDEN_SIZE) + eps))
    if MULTIPLIED:
        factor *= multiplier
    return factor


@triton.jit
def bias_of_experts(router_bias, expert, E: tl.constexpr):
    """Return the bias of the linear layer, float32 ``[EXPERTS]``."""
    return tl.load(router_bias + expert, mask=expert < E, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_gate_sums(
    hidden, router_weight, router_bias, norm_weight, input_scale, partial, logits, pair_counts,
    T: tl.int32, hidden_stride: tl.int64, weight_stride: tl.int64, eps: tl.float32,
    multiplier: tl.float32, num_counts: tl.int32,
    E: tl.constexpr, HIDDEN_SIZE: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr,
    STEP: tl.constexpr, TAKES: tl.constexpr, NORM: tl.constexpr, MULTIPLIED: tl.constexpr,
    HIDDEN_PARTS: tl.constexpr, WEIGHT_PARTS: tl.constexpr, SCALES_HIDDEN: tl.constexpr,
    PACKED: tl.constexpr, ALIGNED: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Multiply ``BLOCK_T`` tokens by ``BLOCK_E`` experts.

    :param partial: float32 memory for partial sums ``[PROGRAMS, T, E]``, where a program takes one
        slice or one group of slices; with a norm after them those of squares
        ``[PROGRAMS, T, CHUNKS]``, where it takes more than one slice.
    :param logits: ``[T, E]``, where it takes all.
    :param pair_counts: ``num_counts`` numbers to be set to 0, or ``None``.
    :param TAKES: slices that a program takes.
    """
    SLICES: tl.constexpr = (HIDDEN_SIZE + SLICE - 1) // SLICE
    EXPERT_TILES: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    PROGRAMS: tl.constexpr = (SLICES + TAKES - 1) // TAKES
    grid_dependency_wait(PDL)
    if partial is not None:
        # After the wait, because the next kernel reads the hidden states before its own
        # (``squares_of_row``). Before it, programs of several later kernels would also occupy
        # registers and shared memory while they wait.
        launch_dependents(PDL)
    if pair_counts is not None:
        fill(pair_counts, 0, num_counts, 0, FILLED_AT_A_TIME)
    program = tl.program_id(0)
    # Programs of the same tokens are neighbours: they share the hidden states in the cache.
    tile = program // PROGRAMS
    expert = tile % EXPERT_TILES * BLOCK_E + tl.arange(0, BLOCK_E)
    token = tile // EXPERT_TILES * BLOCK_T + tl.arange(0, BLOCK_T)
    # Rows past the last read the last: no mask for them.
    readable_expert = tl.minimum(expert, E - 1)
    readable_token = tl.minimum(token, T - 1)
    written = (expert < E)[:, None] & (token < T)[None, :]
    part = program % PROGRAMS
    if partial is not None and TAKES == 1:
        # Large tiles need too many registers for it: fewer programs would fit.
        AHEAD: tl.constexpr = WEIGHT_PARTS == 0 and (BLOCK_T <= 32 or HIDDEN_PARTS > 0)
        sums = sums_of_slice(
            hidden, router_weight, norm_weight, input_scale, part, readable_token,
            readable_expert, hidden_stride, weight_stride, HIDDEN_SIZE, SLICE, STEP, HIDDEN_PARTS,
            WEIGHT_PARTS, SCALES_HIDDEN, PACKED, ALIGNED, AHEAD,
        )  # fmt: skip
    else:
        TAIL: tl.constexpr = HIDDEN_SIZE % SLICE != 0
        STEPS: tl.constexpr = SLICE // STEP
        CHAINED: tl.constexpr = STEPS == 1
        sums = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
        CHUNKS: tl.constexpr = STEP * hidden.dtype.element_ty.primitive_bitwidth // BITS
        squares = tl.zeros([BLOCK_T, CHUNKS], tl.float32)
        of_group = sums
        squares_of_group = squares
        of_slice = tl.zeros([BLOCK_E, BLOCK_T], SUM)
        low = of_slice
        squares_of_slice = squares
        first = part * TAKES
        last = tl.minimum(first + TAKES, SLICES)
        # One loop over all steps: a loop for each slice would have to begin to read anew.
        for step in tl.range(first * STEPS, last * STEPS, num_stages=STAGES):
            read = read_step(
                hidden, router_weight, norm_weight, input_scale, step * STEP + tl.arange(0, STEP),
                readable_token, readable_expert, hidden_stride, weight_stride, HIDDEN_SIZE, TAIL,
                ALIGNED, 0,
            )  # fmt: skip
            if NORM:
                squares_of_slice += squares_of(read[1])
            of_slice, low = add_step(
                of_slice, low, read, HIDDEN_PARTS, WEIGHT_PARTS, SCALES_HIDDEN, PACKED, CHAINED
            )  # fmt: skip
            if step % STEPS == STEPS - 1:
                if HIDDEN_PARTS + WEIGHT_PARTS > 0 and not CHAINED:
                    of_slice += low
                    low = tl.zeros([BLOCK_E, BLOCK_T], SUM)
                of_group += of_slice.to(tl.float32)
                squares_of_group += squares_of_slice
                of_slice = tl.zeros([BLOCK_E, BLOCK_T], SUM)
                squares_of_slice = tl.zeros([BLOCK_T, CHUNKS], tl.float32)
                if TAKES > GROUP:
                    if step // STEPS % GROUP == GROUP - 1:
                        sums += of_group
                        squares += squares_of_group
                        of_group = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
                        squares_of_group = tl.zeros([BLOCK_T, CHUNKS], tl.float32)
        sums += of_group
        squares += squares_of_group
    if partial is not None:
        row = part.to(tl.int64) * T + token
        tl.store(partial + (row[None, :] * E + expert[:, None]), sums, mask=written)
        if NORM and TAKES > 1:
            if tile % EXPERT_TILES == 0:
                at = PROGRAMS * T.to(tl.int64) * E + row[:, None] * CHUNKS
                at += tl.arange(0, CHUNKS)[None, :]
                tl.store(partial + at, squares, mask=(token < T)[:, None])
    else:
        made = sums
        if NORM or MULTIPLIED:
            made *= factor_of_rows(squares, eps, multiplier, HIDDEN_SIZE, NORM, MULTIPLIED)[None, :]
        if router_bias is not None:
            made += bias_of_experts(router_bias, expert, E)[:, None]
        at = logits + (token.to(tl.int64)[None, :] * E + expert[:, None])
        tl.store(at, nearest(made, logits.dtype.element_ty), mask=written)


@triton.jit
def read_parts(at, first, step, here, PARTS: tl.constexpr, COUNT: tl.constexpr, TAIL: tl.constexpr):
    """Return ``COUNT`` partial sums from the first on, a tuple, and the address after the last.

    :param at: addresses of the first.
    :param step: int64, elements from one to the next. Addresses advance by an addition: products of
        64 bits kept a warp busy for longer than the loads take.
    :param here: which elements exist; ``None`` for all.
    :param TAIL: some of the partial sums may be past the last.
    """
    parts = ()
    for i in tl.static_range(COUNT):
        if TAIL:
            known = first + i < PARTS
            parts += (tl.load(at, mask=known if here is None else here & known, other=0.0),)
        else:
            parts += (tl.load(at, mask=here, other=None if here is None else 0.0),)
        at += step
    return parts, at


@triton.jit
def added(parts, GROUP: tl.constexpr, zero):
    """Return the sum of partial sums, a tuple: of the groups' sums, one group after another."""
    total = zero
    for first in tl.static_range(0, len(parts), GROUP):
        of_group = zero
        for i in tl.static_range(first, min(first + GROUP, len(parts))):
            of_group += parts[i]
        total += of_group
    return total


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_gate_route(
    hidden, partial, router_bias, logits, weights, ids, per_expert_scale, bias, token_ids,
    expert_table, num_valid_tokens, expert_map, pair_counts, order, inverse, counts, offsets,
    block_experts, num_dropped, T: tl.int32, valid: tl.int32, vocabulary: tl.int32,
    hidden_stride: tl.int64, eps: tl.float32, multiplier: tl.float32, groups: tl.int32,
    length: tl.int32, blocks: tl.int32, capacity: tl.int32, SPEC: tl.constexpr,
    PLAN_SPEC: tl.constexpr, PLAN_SIZE: tl.constexpr, PLAN_GROUP: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr, SLICE: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
    GROUP: tl.constexpr, GROUPS_OF_ROW: tl.constexpr, CHUNKS: tl.constexpr, NORM: tl.constexpr,
    MULTIPLIED: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr,
    VALID_ON_DEVICE: tl.constexpr, PDL: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    N: tl.constexpr, UNROLL: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Add all partial sums, make logits of them, and route ``BLOCK_T`` rows.

    :param hidden: where there is a norm, and the partial sums are of slices: the squares of a row,
        one a program, are added here.
    :param partial: what ``moe_routing_gate_sums`` wrote.
    :param PARTS: partial sums of a row: of its slices, ``GROUP`` to a group, or of its groups.
    :param GROUPS_OF_ROW: as ``squares_of_row`` wants them.
    :param CHUNKS: partial sums of squares of a row in each of ``PARTS``.
    :param logits: ``[T, E]`` to be written, or ``None``.
    :param pair_counts: of the pairs of blocks and groups, which are counted here, or ``None``.
    :param order: and the next five: the plan of the ids if there is one row, or ``None``.
    :param PLAN_SIZE: pairs of a block.
    :param PLAN_GROUP: blocks of a group.
    :param DTYPE: of logits.
    """
    E: tl.constexpr = SPEC.value.num_experts
    launch_dependents(PDL)
    if hidden is not None:
        # Before the wait, while the slices are added. Their programs let this kernel start only
        # after they have waited for what made the hidden states.
        tl.static_assert(BLOCK_T == 1)
        squares = squares_of_row(
            hidden, tl.program_id(0), hidden_stride, HIDDEN_SIZE, SLICE, STEP, GROUP,
            GROUPS_OF_ROW, CHUNKS, ALIGNED,
        )  # fmt: skip
        factor = factor_of_rows(squares, eps, multiplier, HIDDEN_SIZE, NORM, MULTIPLIED)
    grid_dependency_wait(PDL)
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_batch = row < T
    _, expert, exists = experts_of(GROUPS, SIZE, SPEC)
    here = in_batch[:, None] & exists[None, :]
    made = tl.zeros([BLOCK_T, GROUPS * SIZE], tl.float32)
    # Rows past the last read the last: no mask for them.
    readable = tl.minimum(row, T - 1).to(tl.int64)[:, None]
    there = None if GROUPS * SIZE == E else exists[None, :]
    at = partial + (readable * E + expert[None, :])
    rows = T.to(tl.int64)
    if PARTS <= UNROLLED:
        # All loads come before the first sum, so that they overlap. This needs ``REGISTERS``.
        parts, at = read_parts(at, 0, rows * E, there, PARTS, PARTS, False)
        made = added(parts, GROUP, made)
    else:
        # All of a large H at once take up to a minute to compile.
        for first in range(0, PARTS, GROUP):
            parts, at = read_parts(at, first, rows * E, there, PARTS, GROUP, True)
            made += added(parts, GROUP, tl.zeros_like(made))
    if hidden is None:
        squares = tl.zeros([BLOCK_T, CHUNKS], tl.float32)
        if NORM:
            at = partial + (rows * (PARTS * E) + readable * CHUNKS + tl.arange(0, CHUNKS)[None, :])
            parts, at = read_parts(at, 0, rows * CHUNKS, None, PARTS, PARTS, False)
            squares = added(parts, 1, squares)
        factor = factor_of_rows(squares, eps, multiplier, HIDDEN_SIZE, NORM, MULTIPLIED)
    if NORM or MULTIPLIED:
        made *= factor[:, None]
    if router_bias is not None:
        made += tl.load(router_bias + expert, mask=exists, other=0.0).to(tl.float32)[None, :]
    rounded = nearest(made, DTYPE)
    if logits is not None:
        at = logits + (row.to(tl.int64)[:, None] * E + expert[None, :])
        tl.store(at, rounded, mask=here)
    picked = route_by_rounds(
        row, None, weights, ids, per_expert_scale, bias, token_ids, expert_table, num_valid_tokens,
        expert_map, None, None, None, T, valid, 0, 0, vocabulary, SPEC, E, 1, VALID_ON_DEVICE,
        GROUPS, SIZE, N, UNROLL, BLOCK_T, rounded,
    )  # fmt: skip
    if pair_counts is not None:
        count_pairs(pair_counts, picked, row, groups, PLAN_SPEC, PLAN_SIZE, PLAN_GROUP)
    if order is not None:
        plan_row(
            tl.reshape(picked, [N]), order, inverse, counts, offsets, block_experts, num_dropped,
            length, blocks, capacity, PLAN_SPEC, FILLED_AT_A_TIME,
        )  # fmt: skip
