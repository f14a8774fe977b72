"""The clauses of the contract.

The one source of ``docs/contract.md``, of the test class and of what reports print.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clause:
    """One clause of the contract.

    :ivar number: its number; 0 is the honesty of a backend's spec, without which the others say
        little.
    :ivar name: a few words, as in test ids.
    :ivar title: the same as a heading.
    :ivar rule: the rule in a sentence.
    :ivar text: the rule at length, in Markdown.
    :ivar reason: the mistake for which the clause is there.
    """

    number: int
    name: str
    title: str
    rule: str
    text: str
    reason: str


_CLAUSES = (
    Clause(
        0,
        "honest_spec",
        "The spec is honest",
        "What the backend accepts works; what it declines is impossible, or a gap with a reason.",
        "What `supports()` accepts works, and what it declines is tried all the same: built "
        "without asking, it must raise or be wrong. If it works, the backend must accept it, or "
        'name the gap and its reason in its spec (`BackendSpec(gaps={"dtype": "half precision is '
        'left to ..."})`), which the report prints. A declared gap must be one, in this operation '
        "or in another that the backend computes.",
        "otherwise declining is the easiest way to pass.",
    ),
    Clause(
        1,
        "order_and_ties",
        "Order and ties",
        "Ids come by descending selection score, equal scores by ascending id, -0 equal to +0.",
        "Ids come by descending selection score; equal scores go to the lower expert id; -0 equals "
        "+0.",
        "CUDA gating kernels break ties to the lowest id, `torch.topk` on a CPU does not, and with "
        "bfloat16 logits one row in twenty has a tie at the K-th place: the same prompt was routed "
        "differently by each backend. Sparsemixer's ids are in the order of its rounds, a table's "
        "in the table's.",
    ),
    Clause(
        2,
        "valid_ids",
        "Valid ids",
        "Ids are unique and in [0, E), whatever the input.",
        "Ids are unique and in `[0, E)`, whatever the input; a token table's are as unique as its "
        "entries. An `expert_map` may rename them to any others.",
        "duplicated ids from NaN rows crashed fused expert kernels, and a kernel that began its "
        "running maximum at -1 returned expert 0 several times when every biased score was below "
        "that.",
    ),
    Clause(
        3,
        "non_finite",
        "Non-finite logits",
        "NaN counts as -inf, logits are clamped to float32's range, no logit makes a weight NaN or "
        "inf.",
        "NaN counts as -inf and infinities as the largest finite numbers; everything else follows "
        "from the formula. So NaN and -inf are chosen only when fewer than K others exist, several "
        "+inf share the weight, and a row of NaN and -inf alone gives ids `0..K-1`. Where a bias "
        "is added to scores, the score of a NaN logit is that of -inf, and the bias still counts. "
        "A NaN bias counts as -inf. Weights are never NaN or infinite, unless `per_expert_scale` "
        "is, or a product leaves float32's range.",
        "one overflow in one layer otherwise spreads over the batch, or sorts first here and last "
        "there.",
    ),
    Clause(
        4,
        "exact_selection",
        "Exact selection",
        "Selection is exact in float32, and made on the logits where that is the same.",
        "Selection is exact in float32 of the given logits: bfloat16 and float16 widen exactly, "
        "and no score is rounded back to the logits' dtype before selection. Where the score is "
        "monotonic, selection is on the logits.",
        "softmax in bfloat16 makes ties out of different logits, and a float32 sigmoid is 1 from "
        "17 on.",
    ),
    Clause(
        5,
        "gathered_weights",
        "Gathered weights",
        "Weights are gathered from the unbiased scores, never recovered by subtracting the bias.",
        "The weights are gathered from the unbiased scores.",
        "recovered as `biased - bias`, a score of 1e-8 under a bias of 12 is 0 in float32, and its "
        "row of weights NaN.",
    ),
    Clause(
        6,
        "weights_and_dtypes",
        "Weights and dtypes",
        "Weights are float32, within rtol 2e-6; ids are int32, or int64 on request; contiguous.",
        "Weights are float32 within the tolerance above; ids are int32, or int64 on request; both "
        "are contiguous. Given outputs are written in full, and not an element before or after "
        "them; inputs stay as they are. `expert_map` renames only the ids that come out: its "
        "entries stand there as they are, any number that the ids' dtype holds. Equal ones are of "
        "experts that share a place, and -1 is that of one that is elsewhere; both keep their "
        "weights.",
        "DeepEP wants int64, FlashInfer and the Triton expert kernels int32, and a conversion "
        "costs more than the routing; a kernel that skips its last row works as long as the "
        "allocator hands out last step's memory; ids that were a view of a sorted row crashed "
        "every compiled function that routed few tokens, because the compiler had been told that "
        "they are contiguous.",
    ),
    Clause(
        7,
        "bad_arguments",
        "Bad arguments",
        "A wrong argument is a ValueError or TypeError that names it, before any launch.",
        "A wrong argument is a `TypeError` or `ValueError` that begins with its name and says what "
        "came and what was expected, before anything is launched. Outputs that share memory with "
        "each other or with an operand (from its first byte to its last) are wrong, and so are "
        "outputs that cannot be written: weights that require a gradient while gradients are "
        "recorded, inference tensors outside inference mode. Operands may share memory with each "
        "other. (Inside a compiled function there are no addresses to look at; there outputs are "
        "written after everything is read.)",
        "a scale that was too short was read out of bounds; a router fell back to softmax for a "
        "sigmoid model without a word. (The `Router` does this for every backend.)",
    ),
    Clause(
        8,
        "strides",
        "Strides",
        "Any strides and offsets, past 2**31 elements too; row strides cost no copy.",
        "Any row stride and any element stride, any offset into the storage, past 2**31 elements "
        "too; a row stride costs no copy. Logits `[..., E]` of another leading shape than `[T]` "
        "are routed as rows, without a copy where the strides allow a view, and answered "
        "`[..., K]`. (The `Router` does this for every backend.)",
        "router outputs are slices, and `row * stride` in 32 bits wraps at 16.7 million tokens of "
        "128 experts.",
    ),
    Clause(
        9,
        "no_tokens",
        "No tokens",
        "No tokens: empty outputs, and nothing is launched.",
        "T = 0 gives empty outputs of the right shape and dtype, and launches nothing.",
        "a grid of 0 blocks is an error, and an idle rank of a data-parallel group has exactly "
        "that.",
    ),
    Clause(
        10,
        "batch_invariance",
        "Batch invariance",
        "A row's bits do not depend on the other rows, their number or its position.",
        "A row's bits do not depend on the other rows, on how many there are or where it stands, "
        "or on which variant the size picked.",
        "reinforcement learning compares log-probabilities of the same tokens from two batches.",
    ),
    Clause(
        11,
        "determinism",
        "Determinism",
        "The same input gives the same bits in every run, whatever was routed before or is routed "
        "by other threads.",
        "The same input gives the same bits in every run, a hundred times, whatever the kernel has "
        "routed or warmed up before. A call reads all its operands, also those that changed in "
        "place since the last one, and one router serves any number of threads.",
        "ties resolved by whichever thread is first are found in production; a copy of the bias "
        "that was kept at the first call ignored every update of it, and one scratch buffer for "
        "all threads mixed their rows.",
    ),
    Clause(
        12,
        "streams_and_graphs",
        "Streams, graphs, devices",
        "No host synchronisation; CUDA graphs, current stream and tensor's device are honoured.",
        "No synchronisation with the host; capturable in a CUDA graph after one warm-up call, and "
        "right on replay with other inputs; launched on the current stream and on the tensor's own "
        "device, whatever the current one is.",
        "one `.item()` in a layer halves decoding speed, and a kernel on the wrong stream is right "
        "until it is not.",
    ),
    Clause(
        13,
        "padding",
        "Padding",
        "Rows at or past num_valid_tokens get ids -1 and weights 0, without a synchronisation.",
        "With `valid`, a bool mask `[T]`, rows in which it is False are padding, wherever "
        "they stand: they get ids -1 and weights 0 in every column, and no other row changes. A "
        'backend says in its spec that it takes a mask (`BackendSpec(operands={"valid"})`). '
        "With `num_valid_tokens`, an integer or a tensor on the device, rows at or past it get ids "
        "-1 and weights 0 in every column, shared slots too, whatever the rows hold. Any number "
        "from T on means all rows. A negative integer is a wrong argument; a negative number on "
        "the device, which nobody reads on the host, means that no row is valid. With a token "
        "table, a row also counts as padding if its token id is outside the table, or if an entry "
        "of that token is outside [0, E). Nothing is read past the table, and the host learns of "
        "none: an error would need a synchronisation.",
        "graphs are captured at fixed sizes, and the padding's garbage was routed to experts; "
        "token ids past the table read the memory after it, and what stood there came out as "
        "experts.",
    ),
    Clause(
        14,
        "compile_and_export",
        "Compile and export",
        "torch.compile(fullgraph=True), torch.export and fake tensors work, and opcheck passes.",
        "`torch.compile(fullgraph=True)`, `torch.export` and fake tensors work, and "
        "`torch.library.opcheck` passes. (The operator `moe_routing::route` does this for every "
        "backend; a backend cannot break it but by synchronising or by changing inputs.)",
        "a graph break in every layer costs a model more than its routing, and an operator whose "
        "fake kernel says something else than the real one crashes the code that was compiled "
        "around it.",
    ),
    Clause(
        15,
        "gradients",
        "Gradients",
        "Gradients flow from the weights to logits and scale; selection has none.",
        "Gradients flow from the weights to the logits and to `per_expert_scale`, equal to "
        "autograd through the oracle at the chosen ids; selection has none; NaN and infinite "
        "logits get 0. Where a NaN or infinite scale weighs an expert of a row, the gradient of "
        "that row's logits has no stated value; every other gradient is as with finite scales. "
        "(The product has them in closed form for every backend; a kernel with a method `backward` "
        "brings its own.)",
        "a router that returns a weight without its gradient trains, and learns nothing.",
    ),
    Clause(
        16,
        "recorded_ids",
        "Recorded ids",
        "With recorded ids a row weighs those experts; -1 is no record, or no expert in a slot.",
        "`ids`, recorded logical ids `[T, K]` of any integer dtype, stand in place of selection: "
        "the weights are those of the recorded experts by their unbiased scores, in the order of "
        "the record, whatever a bias, groups or a table would select. A row that is -1 throughout "
        "has no record, and is routed as usual. In any other row a slot of -1 has no expert: it "
        "gets id -1 and weight 0, the others are renormalised without it, and a round of "
        "sparsemixer that has none takes no expert away. An id outside [-1, E) makes its row "
        "padding; the host learns of none. Ids are as unique as those recorded. Sparsemixer weighs "
        "an expert in the round of its slot: by the softmax over those near the best that is left, "
        "0 if it is not near. Scales, zero and shared experts, `expert_map` and `num_valid_tokens` "
        "follow as ever. A row without a record, and one that records what selection gives, have "
        "the bits of a call without `ids`. Gradients flow to logits and scale at the recorded "
        "experts. A backend says in its spec that it takes them "
        '(`BackendSpec(operands={"ids"})`), and is not asked otherwise.',
        "reinforcement learning generates with one engine and trains with another: two scores that "
        "nearly tie select different experts, and the log-probabilities of the same tokens no "
        "longer agree. Positions without a record come as -1, which crashed lookups in a table.",
    ),
    Clause(
        17,
        "counts",
        "Counts",
        "With counts, a call adds to each logical expert how many slots it has; padding adds none.",
        "`counts`, an int32 or int64 tensor `[E]` or `[E + shared_experts]` of any stride, grows: "
        "the element of each logical expert by the number of slots that it has in this call, "
        "whatever an `expert_map` renames it to. Rows of padding and slots without an expert add "
        "nothing. Zero experts count as the experts that they are, and shared slots where the "
        "tensor has elements for them. Nothing else in memory changes, and weights and ids have "
        "the bits of a call without `counts`. Every call adds once: with `out`, gradients, a plan "
        "or a gate too, and so do a run of a compiled or exported program and a replay of a CUDA "
        "graph. Nothing is read on the host. Calls that run at the same time need tensors of "
        "their own. (The `Router` does this for every backend, from the logical ids.)",
        "padding that was counted makes its experts look busy, and counts of physical ids, or of "
        "a layer that counted twice, balance the wrong experts.",
    ),
    Clause(
        18,
        "replicas",
        "Replicas",
        "Row t gets replica t % replica_count of each of its experts; -1 stays -1.",
        "`logical_to_physical` `[E + shared_experts, R]`, of fewer than 2**31 elements, and "
        "`replica_count` `[E + shared_experts]`, int32 or int64 and of any strides, rename ids in "
        "place of an `expert_map`: the id e in row t becomes "
        "`logical_to_physical[e, t % replica_count[e]]`, where t is the row's number among the "
        "`[T]` rows of the call, padding included. The -1 of "
        "padding and of slots without an expert stays. Zero and shared experts are renamed like "
        "others. Entries are physical ids as in an `expert_map`; those from `replica_count[e]` on "
        "are never used. Counts are read on the device alone, so one below 1 counts as 1 and one "
        "above R as R; nothing is read outside the table. Weights have the bits of a call without "
        "replicas, R = 1 is an `expert_map`, a plan is of physical ids, and `counts` and recorded "
        "`ids` are of logical ones. The same holds with `out`, gradients, a gate, compiled and "
        "exported programs and CUDA graphs. A row's ids depend on its number, on no other row, "
        "no rank and no earlier call; clause 10 holds for its logical ids. (The `Router` does "
        "this for every backend, from the logical ids.)",
        "ranks that choose by a random number, or by a counter of their own, send the same tokens "
        "to other slots in each run; a choice that does not change from row to row leaves one "
        "replica with all tokens; and padding that was renamed reaches an expert.",
    ),
    Clause(
        19,
        "shared_weights",
        "Weights of shared experts",
        "With shared_weights, shared columns hold the call's weights; padding keeps the weight 0.",
        "`shared_weights`, `[shared_experts]` or `[T, shared_experts]` of any float dtype and "
        "strides, stand in the shared columns of the weights, rounded to float32, in place of the "
        "spec's `shared_weight`. Rows of padding keep the weight 0, whatever makes them padding "
        "and whatever the weights are there, NaN and infinities too. Ids, and the weights of "
        "selected experts, have the bits of a call without them. A plan that drops the pairs of "
        "least weight looks at them. Gradients flow to them, 0 in rows of padding, and the "
        "gradients of all else stay as they are. The same holds with `out`, maps, replicas and "
        "recorded ids, a gate, compiled and exported programs and CUDA graphs. (The `Router` does "
        "this for every backend, from the weights of a call without them; so the spec's "
        "`shared_weight` must not be 0.)",
        "a model weighs its shared expert by a gate of its own, token by token; a second pass that "
        "wrote those weights gave the tokens of padding an expert.",
    ),
)

CLAUSES = {clause.number: clause for clause in _CLAUSES}
