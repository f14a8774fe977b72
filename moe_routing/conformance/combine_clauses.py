"""The clauses of the contract of ``combine``: what ``clauses`` is for ``route``.

Those from 4 on have the numbers of ``permute``'s.
"""

from __future__ import annotations

from moe_routing.conformance.clauses import Clause

_CLAUSES = (
    Clause(
        0,
        "honest_spec",
        "The spec is honest",
        "What the backend accepts is combined; what it declines is impossible, or a gap.",
        "What `supports()` accepts works, and what it declines is tried all the same: built "
        "without asking, it must raise or be wrong. If it works, the backend must accept it, or "
        "give the reason in its spec's `gaps`. A declared gap must be one, in this operation or in "
        "another that the backend computes.",
        "otherwise declining is the easiest way to pass.",
    ),
    Clause(
        1,
        "sums",
        "Sums",
        "Row t is the float32 sum of its slots' rows times weights, in slot order, rounded once.",
        "Row t of the result is the sum over the slots k of `weights[t, k] * rows[inverse[t, k]]`. "
        "Weights and rows are bfloat16, float16 or float32, and become float32 without loss; "
        "without weights each is 1. The sum is in float32, from slot 0 to slot K - 1, and rounded "
        "once, to the rows' dtype. A backend may round a product before it adds it, or not, and "
        "may flush products and sums below 2**-126 to zero. Between the least and the greatest "
        "value that these leave, every element must lie, for any T, K and H.",
        "sums in bfloat16 lose three of eight experts' last digits; sums in the order of the "
        "experts change with the batch.",
    ),
    Clause(
        2,
        "pairs_without_a_place",
        "Pairs without a place",
        "A pair without a place adds nothing, and rows at places without a pair are not read.",
        "A pair whose place is not in `[0, offsets[E])` adds nothing, whatever its weight is, NaN "
        "and infinity too: it was dropped, pads, or is of another rank's expert. A token without "
        "any place gets zeros. Rows at places that no pair has are never read, so they may hold "
        "anything: NaN there reaches no token. Rows of a masked plan may be `[E, capacity, H]` or "
        "`[E * capacity, H]`.",
        "a grouped product leaves the rest of a block as it was in memory, and 0 * NaN is NaN.",
    ),
    Clause(
        3,
        "not_finite",
        "NaN and infinity",
        "NaN and infinity in rows and weights that count come out as float32 arithmetic says.",
        "A row that is read counts as it is: NaN gives NaN in that column of that token and "
        "nowhere else, infinity gives infinity, infinities of both signs or infinity times 0 give "
        "NaN, and a weight of 0 is a product like any other. What exceeds the largest number of "
        "the rows' dtype when it is rounded is infinite; the float32 sum itself may exceed it on "
        "the way.",
        "a kernel that skips weights of 0 hides an expert's NaN until its weight is 1e-30.",
    ),
    Clause(
        4,
        "memory",
        "Memory",
        "Rows and weights of any strides; a contiguous output, filled in full; T may be 0.",
        "Rows and weights may have any strides and offset, repeat in memory, and stay as they are, "
        "and so does the plan. The result is contiguous and on the device of the rows. Every "
        "element of it is written, and not an element before or after. T may be 0, and H too: then "
        "nothing is launched. Calls may follow each other with gradients, without them and in "
        "inference mode.",
        "experts write into a slice of a wider buffer in some models; a kernel that loads 16 bytes "
        "at a time goes past the end of rows of odd width.",
    ),
    Clause(
        5,
        "any_plan",
        "Plans of any content",
        "Whatever the tensors of a plan hold, nothing outside the rows and result is touched.",
        "The shapes of a plan are checked, what its tensors hold is not: that would need a "
        "synchronisation. Whatever that is, nothing outside the tensors is read or written, and "
        "clauses 1 and 2 hold as they are written: `offsets[E]` may be any number, and a place at "
        "or past the end of `order` is none. Nothing else of `offsets`, and nothing of `counts` "
        "and `order` changes the sums.",
        "a plan that a graph was captured with, and that nobody filled before its first replay, "
        "read rows from addresses that are nobody's.",
    ),
    Clause(
        6,
        "bad_arguments",
        "Bad arguments",
        "A wrong argument is a ValueError or TypeError that names it, before any launch.",
        "A wrong argument is a `TypeError` or `ValueError` that begins with its name and says what "
        "came (a tensor's shape and dtype, never its elements) and what was expected. That also "
        "holds in calls like an earlier one. Rows of another number of places than the plan's are "
        "wrong, weights of another T or K, a plan of another device, dtype or shape. "
        "(`moe_routing.combine` does this for every backend.)",
        "weights of another batch have the right dtype and rank, and are read past their end.",
    ),
    Clause(
        7,
        "same_bits",
        "The same bits, always",
        "A token's sum has the same bits in any batch, run and thread.",
        "The result of a token depends on its rows and weights only: it has the same bits for any "
        "T, wherever its rows lie, next to any other tokens, in every run, whatever other threads "
        "combine with the same kernel. A call reads its rows, weights and plan anew, also where "
        "they changed in place since the last one.",
        "sums whose order depends on the batch give other logits in training than in inference.",
    ),
    Clause(
        8,
        "gradients",
        "Gradients",
        "Gradients flow to rows and weights, deterministic, and differentiable again.",
        "The gradient of the row at the place of the pair (t, k) is `weights[t, k] * grad[t]`, in "
        "float32 and rounded once; at places without a pair it is 0. That of `weights[t, k]` is "
        "the sum over the columns of `grad[t] * rows[inverse[t, k]]`, in float32, rounded once to "
        "the weights' dtype, and 0 for a pair without a place, whatever rows and weights hold "
        "there. They have the same bits in every run. They equal autograd through the formulas, in "
        "the second order too. Plain, traced and compiled calls have them.",
        "a weight without a gradient is a router that learns nothing; 0 * NaN of a place that "
        "nobody filled spoils the weights of a whole layer.",
    ),
    Clause(
        9,
        "traced",
        "Compile, export, fake tensors",
        "torch.compile, torch.export and fake tensors work, and give what the plain call gives.",
        "`torch.compile(fullgraph=True)` with static and dynamic shapes, `torch.export` and a "
        "saved program give what the plain call gives; fake tensors give a result of the right "
        "shape, and nothing is computed; `torch.library.opcheck` passes, with gradients too. (The "
        "product does this for every backend.)",
        "a compiler that was told a wrong shape reads past the end.",
    ),
    Clause(
        10,
        "streams_and_graphs",
        "Streams, graphs, devices",
        "No host synchronisation; graphs, streams and the tensors' device are honoured.",
        "No synchronisation with the host; capturable in a CUDA graph after one warm-up call, and "
        "right on replay with other rows, weights and another plan; launched on the current stream "
        "and on the rows' own device, whatever the current one is. What a call needs beyond its "
        "outputs belongs to the call: calls on two streams and replays of two graphs may run at "
        "once.",
        "a library's one workspace is right until two graphs that share it are replayed at once.",
    ),
)

CLAUSES = {clause.number: clause for clause in _CLAUSES}
