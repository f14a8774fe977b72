"""The kernels of ``permute`` and ``combine``: rows of tokens to the places of a plan, and back.

A program takes a token and a slice of its columns. To permute, it reads the slice once and writes
it to the places of all K slots: a gather by places would read it K times, far apart in time. To
combine, it adds the slices of K rows in the order of the slots. Every column is computed alone, so
a row has the same bits for every launch.

More programs look for places without a pair in ``order``, and write zeros there.

Nothing trusts a plan: a place is used only where it is in ``[0, min(offsets[E], P))``.

Widths and strides of rows are counted in vectors of ``VEC`` elements and multiplied by ``VEC``
here: so the compiler sees that columns are loaded and masked a vector at a time. That rows begin at
multiples of 16 bytes it is told (``at_row``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_routing_backends.triton.device.pdl import grid_dependency_wait, launch_dependents
from moe_routing_backends.triton.device.rounding import nearest
from moe_routing_backends.triton.device.scores import tree_sum

GROUP = tl.constexpr(128)
"""Columns that share a scale."""
LARGEST = tl.constexpr(448.0)
"""Of float8_e4m3fn."""
LEAST = tl.constexpr(1e-10)
"""The least magnitude that a scale is for."""
SLOTS = tl.constexpr(10)
"""Slots whose loads are all issued before the first is waited for.

Of more, sums spill registers on Intel's GPUs; models have up to 10.
"""
NOT_SPECIALIZED = (
    "hidden", "rows", "grad", "order", "inverse", "offsets", "weights", "out", "scales",
    "grad_rows", "grad_weights", "tokens", "pairs", "places", "experts", "width", "stride",
    "grad_stride",
)  # fmt: skip
"""Arguments whose value or alignment must not select another compiled kernel: all of them."""


@triton.jit
def at_row(tensor, row, width, column, VEC: tl.constexpr):
    """Return the address of a column of a row; there may be more elements than int32 numbers.

    ``VEC`` is above 1 only where rows begin at multiples of 16 bytes, and so does the column. One
    sum, because Triton joins sums of addresses, and forgets what it was told of the first.
    """
    at = tensor + (tl.cast(row, tl.int64) * (width * VEC) + column)
    if VEC > 1:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def item_and_part(width, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Return which item, a token or places, this program takes, and which slice of its columns."""
    slices = tl.cast((width * VEC - 1) // BLOCK + 1, tl.int32)
    program = tl.program_id(0)
    return program // slices, program % slices


@triton.jit
def columns_of(part, width, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Return the first column of a slice, its lanes, and which of these are columns."""
    first = tl.cast(part, tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    return first, lane, lane < width * VEC - first


@triton.jit
def end_of_places(offsets, experts, places):
    """Return the end of the places that hold pairs."""
    return tl.minimum(tl.load(offsets + experts), places)


@triton.jit
def places_of(inverse, token, first, end, K: tl.constexpr):
    """Load the places of up to ``SLOTS`` slots from ``first`` on, and tell which have one.

    The place of a slot without one is 0.
    """
    place = ()
    has_place = ()
    for k in tl.static_range(K if K < SLOTS else SLOTS):
        loaded = tl.load(inverse + tl.cast(token, tl.int64) * K + first + k, first + k < K, -1)
        has_one = (loaded >= 0) & (loaded < end)
        place = place + (tl.where(has_one, loaded, 0),)
        has_place = has_place + (has_one,)
    return place, has_place


@triton.jit
def has_no_pair(order, place, end, pairs):
    """Tell whether a place holds no pair."""
    pair = tl.load(order + place)
    return (pair < 0) | (pair >= pairs) | (place >= end)


@triton.jit
def empty_from(order, first, end, pairs, places, PLACES: tl.constexpr):
    """Return how many places from ``first`` on to look through, 0 where none of them is empty."""
    lane = tl.arange(0, PLACES)
    inside = lane < places - first
    empty = has_no_pair(order, first + tl.where(inside, lane, 0), end, pairs)
    found = tl.max(empty.to(tl.int32), axis=0)
    return tl.where(found > 0, tl.minimum(places - first, PLACES), 0)


@triton.jit
def write_zeros(out, row, width, column, lane, inside, VEC: tl.constexpr):
    """Write zeros to a slice of a row."""
    zero = tl.zeros([lane.shape[0]], tl.int32).to(out.dtype.element_ty)
    tl.store(at_row(out, row, width, column, VEC) + lane, zero, mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_permute(
    hidden, order, inverse, offsets, out, tokens: tl.int32, pairs: tl.int32, places: tl.int32,
    experts: tl.int32, width: tl.int64, stride: tl.int64, K: tl.constexpr, UNIT: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Move the rows of ``hidden``, read as integers of the type ``UNIT``.

    :param PLACES: how many places a program looks through for empty ones; 0 where these are left
        as they are.
    """
    source = hidden.to(tl.pointer_type(UNIT))
    target = out.to(tl.pointer_type(UNIT))
    item, part = item_and_part(width, VEC, BLOCK)
    column, lane, inside = columns_of(part, width, VEC, BLOCK)
    grid_dependency_wait(PDL)
    launch_dependents(EARLY)
    end = end_of_places(offsets, experts, places)
    if item < tokens:
        row = tl.load(at_row(source, item, stride, column, VEC) + lane, mask=inside)
        for first in range(0, K, SLOTS):
            # All places before the first store: no load is moved ahead of a store.
            place, has_place = places_of(inverse, item, first, end, K)
            for k in tl.static_range(len(place)):
                at = at_row(target, place[k], width, column, VEC) + lane
                tl.store(at, row, mask=inside & has_place[k])
    elif PLACES > 0:
        first_place = (item - tokens) * PLACES
        for i in range(empty_from(order, first_place, end, pairs, places, PLACES)):
            if has_no_pair(order, first_place + i, end, pairs):
                write_zeros(target, first_place + i, width, column, lane, inside, VEC)


@triton.jit
def to_float8(value):
    """Round float32 numbers of magnitudes below 464 to bits of float8_e4m3fn; NaN stays NaN.

    In integers: not every part has an instruction for it.
    """
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # To the nearest of 3 bits of mantissa, of two the even; then exponents begin at -7, not -127.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 the numbers are 2**-9 apart, as those of float32 are from 2**14 on.
    subnormal = (tl.abs(value) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    rounded = tl.where(magnitude < 0x3C800000, subnormal, normal)
    rounded = tl.where(magnitude > 0x7F800000, 0x7F, rounded)
    return (rounded | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_permute_quantized(
    hidden, order, inverse, offsets, out, scales, tokens: tl.int32, pairs: tl.int32,
    places: tl.int32, experts: tl.int32, width: tl.int64, stride: tl.int64, K: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Move the rows of ``hidden`` as bits of float8_e4m3fn, and the scales of their groups.

    :param BLOCK: columns of a slice, a multiple of ``GROUP``.
    """
    GROUPS: tl.constexpr = BLOCK // GROUP
    target = out.to(tl.pointer_type(tl.uint8))
    item, part = item_and_part(width, VEC, BLOCK)
    column, lane, inside = columns_of(part, width, VEC, BLOCK)
    groups = (width * VEC - 1) // GROUP + 1
    group, group_lane, group_inside = columns_of(part, groups, 1, GROUPS)
    grid_dependency_wait(PDL)
    launch_dependents(EARLY)
    end = end_of_places(offsets, experts, places)
    if item < tokens:
        at = at_row(hidden, item, stride, column, VEC) + lane
        row = tl.reshape(tl.load(at, mask=inside, other=0.0).to(tl.float32), [GROUPS, GROUP])
        # The largest magnitude as an integer, of which NaN is the largest.
        magnitude = row.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        top = tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)
        scale = tl.div_rn(tl.where(top < LEAST, LEAST, top), LARGEST)
        divisor = tl.broadcast_to(scale[:, None], [GROUPS, GROUP])
        # NVIDIA's division takes a slow path for 0, which masked columns are too: 2 us a launch on
        # an H100. 0 times the quotient of 1 is what 0 gives, NaN where the scale is NaN.
        is_zero = row == 0.0
        quotient = tl.div_rn(tl.where(is_zero, 1.0, row), divisor)
        quotient = quotient * tl.where(is_zero, row, 1.0)
        rounded = tl.reshape(to_float8(quotient), [BLOCK])
        for first in range(0, K, SLOTS):
            place, has_place = places_of(inverse, item, first, end, K)
            for k in tl.static_range(len(place)):
                to_row = at_row(target, place[k], width, column, VEC) + lane
                tl.store(to_row, rounded, mask=inside & has_place[k])
                to_scales = at_row(scales, place[k], groups, group, 1) + group_lane
                tl.store(to_scales, scale, mask=group_inside & has_place[k])
    elif PLACES > 0:
        first_place = (item - tokens) * PLACES
        for i in range(empty_from(order, first_place, end, pairs, places, PLACES)):
            place = first_place + i
            if has_no_pair(order, place, end, pairs):
                write_zeros(target, place, width, column, lane, inside, VEC)
                write_zeros(scales, place, groups, group, group_lane, group_inside, 1)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_combine(
    rows, inverse, offsets, weights, out, places: tl.int32, experts: tl.int32, width: tl.int64,
    stride: tl.int64, K: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Add the rows of each token's slots, times their weights."""
    token, part = item_and_part(width, VEC, BLOCK)
    column, lane, inside = columns_of(part, width, VEC, BLOCK)
    grid_dependency_wait(PDL)
    launch_dependents(EARLY)
    end = end_of_places(offsets, experts, places)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, K, SLOTS):
        place, has_place = places_of(inverse, token, first, end, K)
        # All rows before the first sum, so that they are on their way together.
        row = ()
        weight = ()
        for k in tl.static_range(len(place)):
            at = at_row(rows, place[k], stride, column, VEC) + lane
            row = row + (tl.load(at, mask=inside & has_place[k], other=0.0),)
            if weights is not None:
                pair = tl.cast(token, tl.int64) * K + first + k
                weight = weight + (tl.load(weights + pair, has_place[k], 0.0).to(tl.float32),)
        for k in tl.static_range(len(place)):
            added = row[k].to(tl.float32)
            if weights is not None:
                # The product is rounded, and then the sum: launches allow no fused multiply-add
                # (``enable_fp_fusion``), so all give the same bits.
                added = added * weight[k]
            # Of a pair without a place, 0 times 0.
            total = total + added
    to_token = at_row(out, token, width, column, VEC) + lane
    tl.store(to_token, nearest(total, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_combine_backward(
    grad, rows, order, inverse, offsets, weights, grad_rows, grad_weights, tokens: tl.int32,
    pairs: tl.int32, places: tl.int32, experts: tl.int32, width: tl.int64, grad_stride: tl.int64,
    stride: tl.int64, K: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
    PLACES: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the gradients of rows and weights; a program takes a pair, and all columns.

    :param BLOCK: columns at a time. The products of columns that are so far apart are added first,
        then neighbours: the order depends on nothing else.
    """
    program = tl.program_id(0)
    grid_dependency_wait(PDL)
    launch_dependents(EARLY)
    end = end_of_places(offsets, experts, places)
    slices = tl.cast((width * VEC - 1) // BLOCK + 1, tl.int32)
    moving = tokens * K
    if program < moving:
        place = tl.load(inverse + program)
        weight = tl.load(weights + program).to(tl.float32)
        has_place = (place >= 0) & (place < end)
        place = tl.where(has_place, place, 0)
        total = tl.zeros([BLOCK], tl.float32)
        for part in range(slices):
            column, lane, inside = columns_of(part, width, VEC, BLOCK)
            inside = inside & has_place
            at_grad = at_row(grad, program // K, grad_stride, column, VEC) + lane
            of_token = tl.load(at_grad, mask=inside, other=0.0).to(tl.float32)
            row = tl.load(at_row(rows, place, stride, column, VEC) + lane, mask=inside, other=0.0)
            of_row = nearest(weight * of_token, grad_rows.dtype.element_ty)
            to_row = at_row(grad_rows, place, width, column, VEC) + lane
            tl.store(to_row, of_row, mask=inside)
            total += of_token * row.to(tl.float32)
        of_weight = tl.sum(tree_sum(total[None, :]), axis=0)
        tl.store(grad_weights + program, tl.where(has_place, of_weight, 0.0))
    else:
        first_place = (program - moving) * PLACES
        for i in range(empty_from(order, first_place, end, pairs, places, PLACES)):
            if has_no_pair(order, first_place + i, end, pairs):
                for part in range(slices):
                    column, lane, inside = columns_of(part, width, VEC, BLOCK)
                    write_zeros(grad_rows, first_place + i, width, column, lane, inside, VEC)
