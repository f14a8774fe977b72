"""The clauses of the contract of ``plan``: what ``clauses`` is for ``route``."""

from __future__ import annotations

from moe_routing.conformance.clauses import Clause

_CLAUSES = (
    Clause(
        0,
        "honest_spec",
        "The spec is honest",
        "What the backend accepts is planned; what it declines is impossible, or a gap.",
        "What `supports()` accepts works, and what it declines is tried all the same: built "
        "without asking, it must raise or be wrong. If it works, the backend must accept it, or "
        "give the reason in its spec's `gaps`.",
        "otherwise declining is the easiest way to pass.",
    ),
    Clause(
        1,
        "order",
        "Order",
        "Pairs are grouped by expert, then by token, then by slot, in every size.",
        "A pair is a number `t * K + k`: slot k of token t. `order` lists the pairs by expert, "
        "then by token, then by slot; `inverse` has the place of each pair in `order`; `counts` "
        "has the number of pairs of each expert; `offsets` has the first place of each expert and, "
        "at E, the end of the last. An expert may stand in several slots of a row. So there is one "
        "right plan, and every backend has its bits, for every launch: E up to 4,096, K up to 64, "
        "`T * K` up to 2**31 - 1.",
        "kernels that take their places from an atomic counter give another order in every run, "
        "and sums over the rows of an expert another last digit.",
    ),
    Clause(
        2,
        "strays",
        "Ids of no expert",
        "An id outside [0, E) has no place among the experts', counts nowhere and reaches no "
        "memory.",
        "The pair of an id outside `[0, E)` has no place among the experts' and is counted "
        "nowhere: the -1 of padding, another rank's experts, any number at all. An int64 id is "
        "read in 64 bits. In the sorted layout such pairs stand at the end of `order`, by token "
        "and then by slot, so that `order` is a permutation; in the other layouts their `inverse` "
        "is -1. No id makes a kernel read or write outside its tensors. What `route` returns with "
        "`num_valid_tokens`, an `expert_map` or shared slots can be planned as it is.",
        "an id of padding that was used as an index wrote before the first counter; a rank that "
        "counted other ranks' pairs ran its experts on rows that nobody sent.",
    ),
    Clause(
        3,
        "blocks",
        "Blocks",
        "In blocks, each expert begins at a multiple of the block; empty places hold T * K.",
        "With `block`, each expert begins at a multiple of it, and an expert without pairs takes "
        "no block. Places without a pair hold `T * K`. `order` has as many places as any ids of "
        "this number could need, `T * K + min(T * K, E) * (block - 1)`. `block_experts` has the "
        "expert of each of the `ceil(len(order) / block)` blocks, and -1 from the end of the last "
        "expert on. `block` is any positive int. Up to the end of the last expert it is, field by "
        "field, what `moe_align_block_size` of vLLM and SGLang returns: `order` is "
        "`sorted_token_ids`, `block_experts` is `expert_ids`, and `offsets[E]` is "
        "`num_tokens_post_padded`.",
        "an unwritten place past the last pair sent a GEMM to a row that does not exist.",
    ),
    Clause(
        4,
        "capacity",
        "Capacity",
        "With a capacity an expert keeps its first pairs, or those of most weight.",
        "With `capacity`, an expert keeps so many of its pairs: the first by token and slot, or, "
        'with `drop="least_weight"`, those of most weight. Of equal weights the first are kept; '
        "-0 equals 0; NaN counts as -inf. What is kept stands in the order of clause 1. A pair "
        "that is dropped has no place, as in clause 2. `num_dropped` counts the pairs of experts "
        "in `[0, E)` that were dropped. It holds in every layout, for any capacity from 1 on.",
        "a policy that sorts by weight and leaves the pairs in that order changes the order of "
        "every sum; two backends that break ties differently train two models.",
    ),
    Clause(
        5,
        "masked",
        "Masked layout",
        "Masked, each expert has a row of `capacity` places, its pairs first and then T * K.",
        "With `masked=True`, `order` is a matrix `[E, capacity]`: the kept pairs of an expert are "
        "at the beginning of its row, and `T * K` after them. `offsets[e]` is `e * capacity`, "
        "`inverse` counts along the whole matrix, and `counts` says how much of each row is used.",
        "a masked GEMM reads `counts[e]` rows from the beginning of row e.",
    ),
    Clause(
        6,
        "dtypes_and_memory",
        "Dtypes and memory",
        "int32 or int64 ids of any strides; contiguous int32 outputs, filled in full; T may be 0.",
        "Ids are int32 or int64, weights float32, both of any strides and offsets, and stay as "
        "they are. All parts of a plan are int32, contiguous and on the ids' device. A plan that "
        "is given as `out` is filled and returned: every element of it, and not an element before "
        "or after. T may be 0: then no expert has a pair, and nothing is launched.",
        "ids are a slice of a wider tensor in some routers; a kernel that left out the counts of "
        "experts without pairs worked as long as the memory held zeros.",
    ),
    Clause(
        7,
        "bad_arguments",
        "Bad arguments",
        "A wrong argument is a ValueError or TypeError that names it, before any launch.",
        "A wrong argument is a `TypeError` or `ValueError` that begins with its name and says what "
        "came (a tensor's shape and dtype, never its elements) and what was expected, before "
        "anything is written. That also holds in calls like an earlier one. E is at most 4,096 "
        "and K at most 64. Sizes whose places do not fit int32 are refused: `T * K`, in blocks "
        "`T * K + E * (block - 1)`, masked `E * capacity`. Parts of `out` that share memory with "
        "each other or with an input are wrong. (`moe_routing.plan` does this for every backend.)",
        "a place past 2**31 wraps to a negative index; `block=True` is not a block of 1.",
    ),
    Clause(
        8,
        "determinism",
        "Determinism",
        "The same call gives the same bits in every run, whatever other threads plan.",
        "The same call gives the same bits in every run, whatever was planned before or is planned "
        "by other threads with the same kernel. A call reads its ids, weights and capacity anew, "
        "also where they changed in place since the last one.",
        "a scratch buffer that a kernel keeps mixes the counts of two threads, and counters that "
        "are not reset are right once.",
    ),
    Clause(
        9,
        "traced",
        "Compile, export, fake tensors",
        "torch.compile, torch.export and fake tensors work, and give what the plain call gives.",
        "`torch.compile(fullgraph=True)` with static and dynamic shapes, `torch.export` and a "
        "saved program give the bits of the plain call; fake tensors give a plan of the right "
        "shapes, and nothing is computed; `torch.library.opcheck` passes. (The product does this "
        "for every backend.)",
        "a graph break in a layer costs more than the plan; a compiler that was told a wrong shape "
        "reads past the end.",
    ),
    Clause(
        10,
        "streams_and_graphs",
        "Streams, graphs, devices",
        "No host synchronisation; graphs, streams and the tensors' device are honoured.",
        "No synchronisation with the host; capturable in a CUDA graph after one warm-up call, and "
        "right on replay with other ids; launched on the current stream and on the ids' own "
        "device, whatever the current one is. What a call needs beyond its outputs belongs to the "
        "call: calls on two streams and replays of two graphs may run at once.",
        "a library's one workspace is right until two graphs that share it are replayed at once.",
    ),
)

CLAUSES = {clause.number: clause for clause in _CLAUSES}
