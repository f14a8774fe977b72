"""The kernels of the transport: rows straight into the memory of other ranks, and signals.

An exchange is one launch. Programs write rows, over NVLink where they are another rank's. Each then
adds its share to the signal that this rank has in the memory of every rank, itself too: the shares
of an exchange are ``WHOLE`` together. The last program waits until the signals of all ranks are
whole: what comes after the launch finds all that arrived. (The last, because Triton interprets one
after the other.)

Each rank counts its exchanges, and signals grow by a whole in each. All ranks make the same
exchanges in the same order, so the numbers agree. The count is in the device's memory, because a
CUDA graph that is replayed makes exchanges which the host knows nothing of.

What an exchange writes into, the one before it does not: there is memory for the way there and for
the way back. A rank reads what arrived before its next exchange, so whoever has seen a rank's
signal may overwrite what that rank got in the exchange before. Where an exchange follows one of the
same kind, nobody has seen such a signal: then ranks first signal that they are ready, and wait for
each other (``begin``).

Only programs of other ranks are waited for, and they are few enough to run at the same time
as those of exchanges on other streams. A wait ends after ``limit``: the rank's number is written
where the host reads it, and the kernel is stopped. What had not arrived would be used otherwise.

Every rank writes for the rank after it first, then for the one after that, and for itself last
(``share``). In any other order ranks write to the same one at times, and its link is the bottleneck
while others are idle: with rows in the order of tokens, four GPUs got two thirds of their links.

Widths, strides and pitches of rows are counted in vectors of ``VEC`` units: so the compiler sees
that a thread copies a vector at once, as is said again where rows begin (``_vectors``).
"""

from __future__ import annotations

import triton
import triton.language as tl

try:
    from triton.language.extra import cuda
except ImportError:  # a build of Triton for other vendors alone
    cuda = None

# Looked up here, because Triton looks for all that stands in a kernel, reached or not.
globaltimer = getattr(cuda, "globaltimer", None)
gdc_wait = getattr(cuda, "gdc_wait", None)
gdc_launch_dependents = getattr(cuda, "gdc_launch_dependents", None)

EPOCH = tl.constexpr(0)
"""Of ``state``: the number of the last exchange."""
KIND = tl.constexpr(1)
"""Of ``state``: the kind of the last exchange."""
WHOLE = tl.constexpr(1 << 20)
"""What the shares of a rank's programs are together; there are fewer programs."""
THERE = tl.constexpr(1)
"""A kind of exchange: to the experts."""
BACK = tl.constexpr(2)
"""A kind of exchange: to the tokens."""
LATE = tl.constexpr(0)
"""Of ``said``: one more than a rank that was waited for too long."""
FULL = tl.constexpr(1)
"""Of ``said``: one more than a rank that found no place for all its rows."""
CLOCK = tl.constexpr(2)
"""Of ``state``: nanoseconds, as some thread saw them last."""
POLLS = tl.constexpr(20_000)
"""Where Triton interprets kernels there is no clock: a wait ends after so many looks."""
LOOKS = tl.constexpr(256)
"""Looks at signals for each look at the clock."""
NOT_SPECIALIZED = (
    "rows", "ids", "weights", "inverse", "order", "dropped", "ranks", "kept", "offsets", "tokens",
    "topk", "words", "stride", "ids_stride", "ids_step", "weights_stride", "weights_step", "pitch",
    "me", "experts", "per_rank", "most", "weights_at", "numbers", "limit", "slots",
    "columns", "split",
)  # fmt: skip
"""Arguments whose value or alignment must not select another compiled kernel: ranks that compile
one in the middle of a run let the others wait."""
BITS = tl.constexpr(64)
"""Slots of which one number says whose they are."""
LINGER = tl.constexpr(20_000_000)
"""Nanoseconds for the host to see who is late, before the kernel is stopped."""


@triton.jit
def address(table, rank, dtype: tl.constexpr, offset=0):
    """Return where a rank's memory begins, as a pointer."""
    return (tl.load(table + rank) + offset).to(tl.pointer_type(dtype))


@triton.jit
def _time(state, INTERPRETED: tl.constexpr):
    """Return the time in nanoseconds, the same in all threads of a program.

    Each thread has read its own: those of the program that disagreed about the time would go
    different ways, and wait for each other.
    """
    if INTERPRETED:
        return tl.cast(0, tl.int64)
    now = globaltimer().to(tl.int64)
    tl.atomic_max(state + CLOCK, now, sem="relaxed", scope="gpu")
    # What that returned was there before: the time of another wait, which may be long ago.
    return tl.atomic_max(state + CLOCK, tl.cast(0, tl.int64), sem="relaxed", scope="gpu")


@triton.jit
def _wait(own, number, limit, said, state, RANKS: tl.constexpr, LANES: tl.constexpr,
          INTERPRETED: tl.constexpr):  # fmt: skip
    """Wait until the signals of all ranks are ``number`` or more."""
    lanes = tl.arange(0, LANES)
    there = lanes < RANKS
    looks = tl.cast(0, tl.int64)
    begun = tl.cast(0, tl.int64)
    least = number - 1
    while (least < number) & (looks >= 0):
        nothing = tl.zeros([LANES], tl.int64)
        seen = tl.atomic_add(own + lanes, nothing, mask=there, sem="acquire", scope="sys")
        least = tl.min(tl.where(there, seen, number))
        looks += 1
        over = looks > POLLS
        if not INTERPRETED:
            over = False
            if looks % LOOKS == 0:
                now = _time(state, INTERPRETED)
                if begun == 0:
                    begun = now
                over = now - begun > limit
        if (least < number) & over:
            first = tl.min(tl.where(there & (seen < number), lanes, LANES))
            tl.store(said + LATE, (first + 1).to(tl.int64))
            looks = tl.cast(-1, tl.int64)
            if not INTERPRETED:
                until = _time(state, INTERPRETED) + LINGER
                while _time(state, INTERPRETED) < until:
                    looks = tl.cast(-1, tl.int64)
                tl.inline_asm_elementwise(
                    "trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
                )


@triton.jit
def _signals(signals, at, RANKS: tl.constexpr, LANES: tl.constexpr):
    """Return the addresses of element ``at`` of the signals of every rank."""
    lanes = tl.arange(0, LANES)
    bases = tl.load(signals + lanes, mask=lanes < RANKS, other=0)
    return bases.to(tl.pointer_type(tl.int64)) + at


@triton.jit
def begin(state, signals, said, me, limit, kind: tl.constexpr, RANKS: tl.constexpr,
          LANES: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Return the number of this exchange, once other ranks' memory may be written.

    Every program signals, so that none waits for one that has not begun.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    epoch = tl.load(state + EPOCH) + 1
    if tl.load(state + KIND) == kind:
        number = tl.zeros([LANES], tl.int64) + epoch
        there = tl.arange(0, LANES) < RANKS
        at = _signals(signals, RANKS + me, RANKS, LANES)
        tl.atomic_xchg(at, number, mask=there, sem="release", scope="sys")
        own = address(signals, me, tl.int64) + RANKS
        _wait(own, epoch, limit, said, state, RANKS, LANES, INTERPRETED)
        tl.debug_barrier()
    return epoch


@triton.jit
def end(state, signals, said, me, epoch, limit, kind: tl.constexpr, RANKS: tl.constexpr,
        LANES: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Signal what was written; the last program waits for all others, of every rank.

    It returns whether this is the last program.

    The barrier orders what all threads of a program wrote before its signal. The state may be
    written when this rank's signal is whole: then all its programs have read it.
    """
    tl.debug_barrier()
    last = tl.program_id(0) == tl.num_programs(0) - 1
    share = tl.where(last, WHOLE - tl.num_programs(0) + 1, 1).to(tl.int64)
    shares = tl.zeros([LANES], tl.int64) + share
    there = tl.arange(0, LANES) < RANKS
    tl.atomic_add(
        _signals(signals, me, RANKS, LANES), shares, mask=there, sem="release", scope="sys"
    )
    if last:
        own = address(signals, me, tl.int64)
        _wait(own, epoch * WHOLE, limit, said, state, RANKS, LANES, INTERPRETED)
        tl.store(state + KIND, kind)
        tl.store(state + EPOCH, epoch)
    return last


@triton.jit
def share(items, RANKS: tl.constexpr, ONE_OF: tl.constexpr):
    """Return the first item of this program, the end of its items, and the step between them.

    There are as many items for each rank, and those for this one are last. If programs have several
    each, one of so many writes only those: stores of a multiprocessor are in order, so what stays
    here would wait for what the link has not taken yet.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    first, end, step = program, items, programs
    if (items > programs) & (programs >= ONE_OF):
        others = items - items // RANKS
        if program % ONE_OF == ONE_OF - 1:
            first = others + program // ONE_OF
            step = programs // ONE_OF
        else:
            first = program - program // ONE_OF
            end = others
            step = programs - programs // ONE_OF
    return first, end, step


@triton.jit
def _vectors(memory, row, pitch, part, VEC: tl.constexpr, WIDTH: tl.constexpr):
    """Return the addresses of a part of a row.

    One sum for each address, because Triton joins sums, and forgets what it was told of the first.
    """
    columns = part * WIDTH + tl.arange(0, WIDTH)
    at = memory + (tl.cast(row, tl.int64) * (pitch * VEC) + columns)
    if VEC > 1:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def _inside(words, part, VEC: tl.constexpr, WIDTH: tl.constexpr):
    """Tell which elements of a part a row has."""
    return part * WIDTH + tl.arange(0, WIDTH) < words * VEC


@triton.jit
def _nearest(value, dtype: tl.constexpr):
    """Round float32 numbers to the nearest of a dtype, of two the even."""
    if dtype == tl.bfloat16:
        # In integers, since Triton's interpreter truncates here.
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(bits & 0x7FFFFFFF > 0x7F800000, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_send(
    rows, ids, weights, inverse, order, dropped, ranks, kept, state, said, signals, told, memory,
    tokens, topk, split, words, stride, ids_stride, ids_step, weights_stride, weights_step, pitch,
    me, experts, per_rank, most, weights_at, numbers, limit,
    RANKS: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, SUMS: tl.constexpr,
    PLACED: tl.constexpr, BY_PLACE: tl.constexpr, TELLS: tl.constexpr, WEIGHS: tl.constexpr,
    KEEPS: tl.constexpr, VEC: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write rows to the ranks of their experts.

    Without ``SUMS`` a row goes to each expert: that of pair p of this rank to place p of what its
    expert's rank keeps for this rank. With ``SUMS`` a row goes once to each rank that has one of
    the token's experts: that of token t to place t. Where fewer places are kept than there can be
    rows, a plan says which has which (``PLACED``).

    :param rows: of the tokens; ``BY_PLACE`` those of what comes back.
    :param ids: ``[T, K]``. An expert is on rank ``expert // per_rank``; one that is not in ``[0,
        experts)`` is on none.
    :param split: without ``SUMS``, programs that share the slots of a token: more than one where
        there are few tokens.
    :param inverse: filled where ``TELLS``: the place, in what comes back, of each slot's row, or
        with ``SUMS`` of each rank's; -1 if none comes. ``PLACED``: read.
    :param order: ``PLACED``: the slot, or with ``SUMS`` the token's rank, at each place; a number
        beyond them at an empty one.
    :param dropped: ``PLACED``: how many found no place. If any, every rank is told.
    :param ranks: filled likewise: the rank of each slot, or each rank; -1 if none comes.
    :param kept: where ``KEEPS``, as many ``numbers`` of what this rank was told are copied there,
        which is faster than another launch if they are few.
    :param memory: for each rank, the address of its rows.
    :param most: places that a rank keeps for each other: pairs, or with ``SUMS`` tokens.
    :param told: for each rank, the address of the experts of its places, which are written where
        ``TELLS``; ``weights_at`` bytes behind them the weights.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    epoch = begin(state, signals, said, me, limit, THERE, RANKS, LANES, PDL, INTERPRETED)
    parts = tl.maximum(tl.cdiv(words * VEC, WIDTH), 1)
    element = rows.dtype.element_ty
    slots = tl.arange(0, SLOTS)
    first, last_item, step = share(RANKS * tokens * split * parts, RANKS, max(RANKS, 3))
    for item in range(first, last_item, step):
        part = item % parts
        piece = (item // parts) % split
        token = (item // parts // split) % tokens
        rank = (me + 1 + item // parts // split // tokens) % RANKS
        experts_at = ids + token.to(tl.int64) * ids_stride
        expert = tl.load(experts_at + slots * ids_step, mask=slots < topk, other=-1)
        its = (expert >= 0) & (expert < experts) & ((expert // per_rank).to(tl.int32) == rank)
        goes = tl.max((its & (slots % split == piece)).to(tl.int32)) > 0
        # A bit for each slot: to load and divide its expert again takes longer than a short row.
        bits = tl.sum(its.to(tl.int64) << slots.to(tl.int64))
        target = address(memory, rank, element)
        inside = _inside(words, part, VEC, WIDTH)
        if SUMS:
            at_rank = token
            if PLACED:
                at_rank = tl.load(inverse + token * RANKS + rank) - rank * most
                goes = goes & (at_rank >= 0)
            elif TELLS:
                if part == 0:
                    place = tl.where(goes, rank * most + token, -1)
                    tl.store(inverse + token * RANKS + rank, place)
                    tl.store(ranks + token * RANKS + rank, tl.where(goes, rank, -1))
            if goes:
                row = rank * most + at_rank if BY_PLACE else token
                values = tl.load(_vectors(rows, row, stride, part, VEC, WIDTH), mask=inside)
                at = _vectors(target, me * most + at_rank, pitch, part, VEC, WIDTH)
                tl.store(at, values, mask=inside)
        elif goes:
            if not BY_PLACE:  # read once, whatever the number of experts there
                values = tl.load(_vectors(rows, token, stride, part, VEC, WIDTH), mask=inside)
            for slot in range(piece, topk, split):
                is_there = (bits >> slot) & 1 != 0
                if SLOTS > BITS:
                    another = tl.load(experts_at + slot * ids_step)
                    is_there = (another >= 0) & (another < experts)
                    is_there = is_there & ((another // per_rank).to(tl.int32) == rank)
                if is_there:
                    row = token * topk + slot  # of what comes back
                    at_rank = row
                    if PLACED:
                        row = tl.load(inverse + row)
                        at_rank = row - rank * most
                    if at_rank >= 0:
                        at = _vectors(target, me * most + at_rank, pitch, part, VEC, WIDTH)
                        if BY_PLACE:
                            own = _vectors(rows, row, stride, part, VEC, WIDTH)
                            tl.store(at, tl.load(own, mask=inside), mask=inside)
                        else:
                            tl.store(at, values, mask=inside)
    if TELLS:
        pairs = tokens * topk
        places = most * topk if SUMS else most
        chunks = tl.cdiv(places, CHUNK)
        # From the middle on: with few rows the first programs have those.
        for item in range((program + programs // 2) % programs, RANKS * chunks, programs):
            rank = item // chunks
            number = (item % chunks) * CHUNK + tl.arange(0, CHUNK)
            pair = number
            here = pair < pairs
            if PLACED:
                own = number < places
                if SUMS:
                    row = tl.load(order + rank * most + number // topk, mask=own, other=0)
                    here = own & (row < tokens * RANKS)
                    pair = row // RANKS * topk + number % topk
                else:
                    pair = tl.load(order + rank * most + number, mask=own, other=0)
                    here = own & (pair < pairs)
            token = (pair // topk).to(tl.int64)
            expert = tl.load(
                ids + token * ids_stride + (pair % topk) * ids_step, mask=here, other=-1
            )
            known = (expert >= 0) & (expert < experts)
            its = tl.where(known, expert // per_rank, -1).to(tl.int32)
            local = tl.where(its == rank, (expert - rank * per_rank).to(tl.int32), -1)
            entry = me * places + number
            its_ids = address(told, rank, tl.int32)
            tl.store(its_ids + entry, local, mask=number < places)
            if WEIGHS:
                weighed = here & (its == rank)
                at = weights + token * weights_stride + (pair % topk) * weights_step
                weight = tl.load(at, mask=weighed)
                its_weights = address(told, rank, weights.dtype.element_ty, weights_at)
                tl.store(its_weights + entry, weight, mask=weighed)
            if not SUMS and not PLACED:
                if rank == 0:
                    tl.store(inverse + pair, tl.where(known, pair, -1), mask=here)
                    tl.store(ranks + pair, its, mask=here)
    if PLACED:
        if program == 0:
            if tl.load(dropped) > 0:  # every rank learns of it with this rank's signal
                lanes = tl.arange(0, LANES)
                flags = _signals(signals, 2 * RANKS + me, RANKS, LANES)
                yes = tl.full([LANES], 1, tl.int64)
                tl.atomic_xchg(flags, yes, mask=lanes < RANKS, sem="relaxed", scope="sys")
    last = end(state, signals, said, me, epoch, limit, THERE, RANKS, LANES, INTERPRETED)
    if PLACED:
        if last:
            tl.debug_barrier()
            lanes = tl.arange(0, LANES)
            flags = address(signals, me, tl.int64) + 2 * RANKS + lanes
            lost = tl.load(flags, mask=lanes < RANKS, other=0, volatile=True)
            first = tl.min(tl.where(lost > 0, lanes, LANES))
            if first < LANES:
                tl.store(said + FULL, (first + 1).to(tl.int64))
    if KEEPS:
        if last:
            tl.debug_barrier()
            told_me = address(told, me, tl.int32)
            for begun in range(0, numbers, CHUNK):
                copied = begun + tl.arange(0, CHUNK)
                own = copied < numbers
                tl.store(kept + copied, tl.load(told_me + copied, mask=own), mask=own)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_send_back(
    rows, inverse, offsets, ids, state, said, signals, memory,
    slots, words, stride, pitch, me, most, experts, limit,
    RANKS: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr,
    BY_RANK: tl.constexpr,
    PLANNED: tl.constexpr, VEC: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write a row of each place that has an expert to the rank that the place is kept for.

    There it becomes the row of its pair; ``BY_RANK`` that of its place in what is kept for this
    rank.

    :param rows: by place; or, ``PLANNED``, in the order of a plan of the places' experts.
    :param inverse: the row of each place, where ``PLANNED``, up to ``offsets[experts]``.
    :param ids: ``[places, slots]``: the experts of each place; a negative one is none.
    :param GROUP: places that a program looks at together; 1 where a place has several ``slots``.
    """
    epoch = begin(state, signals, said, me, limit, BACK, RANKS, LANES, PDL, INTERPRETED)
    parts = tl.maximum(tl.cdiv(words * VEC, WIDTH), 1)
    element = rows.dtype.element_ty
    used = tl.load(offsets + experts) if PLANNED else 0
    lanes = tl.arange(0, SLOTS)
    groups = tl.cdiv(most, GROUP)
    first, last_item, step = share(RANKS * groups * parts, RANKS, max(RANKS, 3))
    for item in range(first, last_item, step):
        part = item % parts
        begun = (item // parts) % groups * GROUP
        rank = (me + 1 + item // parts // groups) % RANKS
        its = address(memory, rank, element)
        inside = _inside(words, part, VEC, WIDTH)
        # All places of a group are looked at together: one after the other they took most of the
        # time of those that have no expert.
        place = tl.cast(rank * most + begun, tl.int64)
        if PLANNED:
            seen = tl.load(inverse + place + lanes, mask=lanes < most - begun, other=-1)
            there = (seen >= 0) & (seen < used)
        else:
            own = lanes < tl.minimum(most - begun, GROUP) * slots
            there = tl.load(ids + place * slots + lanes, mask=own, other=-1) >= 0
        bits = tl.sum(there.to(tl.int32) << lanes) if GROUP > 1 else tl.max(there.to(tl.int32))
        for number in range(GROUP):
            if (bits >> number) & 1 != 0:
                row = tl.load(inverse + place + number) if PLANNED else place + number
                values = tl.load(_vectors(rows, row, stride, part, VEC, WIDTH), mask=inside)
                its_place = begun + number
                kept = me * most + its_place if BY_RANK else its_place
                at = _vectors(its, kept, pitch, part, VEC, WIDTH)
                tl.store(at, values, mask=inside)
    end(state, signals, said, me, epoch, limit, BACK, RANKS, LANES, INTERPRETED)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moe_routing_sum_back(
    rows, inverse, offsets, weights, state, said, signals, memory,
    topk, columns, stride, pitch, me, most, experts, limit,
    RANKS: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, VEC: tl.constexpr,
    WIDTH: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write to each token's rank the weighted sum of the rows of its experts here.

    The sum is in float32, from slot 0 on, as ``moe_routing.combine`` makes it.

    :param rows: in the order of a plan of the places' experts.
    :param inverse: ``[places, topk]``: the row of each slot; up to ``offsets[experts]``.
    :param weights: ``[places, topk]``.
    """
    epoch = begin(state, signals, said, me, limit, BACK, RANKS, LANES, PDL, INTERPRETED)
    parts = tl.maximum(tl.cdiv(columns * VEC, WIDTH), 1)
    element = rows.dtype.element_ty
    used = tl.load(offsets + experts)
    lanes = tl.arange(0, SLOTS)
    first, last_item, step = share(RANKS * most * parts, RANKS, RANKS)
    for item in range(first, last_item, step):
        part = item % parts
        its_place = (item // parts) % most
        rank = (me + 1 + item // parts // most) % RANKS
        slot = tl.cast(rank * most + its_place, tl.int64) * topk
        all_rows = tl.load(inverse + slot + lanes, mask=lanes < topk, other=-1)
        if tl.max(((all_rows >= 0) & (all_rows < used)).to(tl.int32)) > 0:
            inside = _inside(columns, part, VEC, WIDTH)
            total = tl.zeros([WIDTH], tl.float32)
            for k in range(topk):
                row = tl.load(inverse + slot + k)
                if (row >= 0) & (row < used):
                    weight = tl.load(weights + slot + k).to(tl.float32)
                    at = _vectors(rows, row, stride, part, VEC, WIDTH)
                    total += weight * tl.load(at, mask=inside, other=0.0).to(tl.float32)
            its = address(memory, rank, element)
            at = _vectors(its, me * most + its_place, pitch, part, VEC, WIDTH)
            tl.store(at, _nearest(total, element), mask=inside)
    end(state, signals, said, me, epoch, limit, BACK, RANKS, LANES, INTERPRETED)
