"""The clauses of the contract of ``exchange``: what ``clauses`` is for ``route``."""

from __future__ import annotations

from moe_routing.conformance.clauses import Clause

_CLAUSES = (
    Clause(
        0,
        "honest_spec",
        "The spec is honest",
        "What the transport accepts it exchanges; what it declines is impossible, or a gap.",
        "What `supports()` accepts works, and what it declines is tried all the same: built "
        "without asking, it must raise or be wrong. If it works, the transport must accept it, or "
        "give the reason in its spec's `gaps`. A declared gap must be one.",
        "otherwise declining is the easiest way to pass.",
    ),
    Clause(
        1,
        "rows",
        "Rows",
        "A rank gets the rows of its experts bit for bit, by expert, source rank, token and slot.",
        "`dispatch` returns on each rank the rows of its own experts: for each slot of a token of "
        "any rank whose expert is there, that token's row, bit for bit, in any dtype. `scales` are "
        "moved like the rows. They are ordered by expert, then by source rank, token and slot: "
        "the order of a plan of all ranks' tokens. `plan.counts` says how many an expert has. "
        "`dispatch_rows` returns them as they arrive, with ids of this rank's experts counted from "
        "0, and -1 in slots without one.",
        "a backend of torch.distributed knows few dtypes, and fp8 rows went as bfloat16; an order "
        "that depends on which message came first gives sums of gradients that differ from run to "
        "run.",
    ),
    Clause(
        2,
        "results",
        "Results",
        "A token gets the weighted sum of its experts, within rounding; unreduced, the same bits.",
        "`combine` returns to each token the sum over its slots of weight times the expert's "
        'result, of as many columns as the results have. With `reduce="none"` it is one float32 '
        "sum in the order of slots, rounded once: the bits of one rank that has all experts, for "
        'any number of ranks. With `reduce="rank"` each rank makes that sum over its own experts, '
        "rounds it to the results' dtype, and the token's rank adds the ranks' sums in float32, in "
        "the order of ranks. Where ranks share the batch, they may be added in any order, each "
        "addition rounded to the results' dtype.",
        "a model that is served on two ranks and trained on four otherwise has other "
        "log-probabilities in each.",
    ),
    Clause(
        3,
        "edges",
        "No expert, no token",
        "Padding, repeated ids, unlike numbers of tokens, and ranks without any, are exchanged.",
        "An id outside `[0, num_experts)` has no expert: nothing arrives for it, and it adds "
        "nothing. Ids may repeat in a row. T may differ between ranks and be 0 on some or on all "
        "of them. A placement may give a rank any number of experts, none among them.",
        "the last batch of a data-parallel rank is empty, and a rank that then left out the "
        "exchange stopped all others for ever.",
    ),
    Clause(
        4,
        "memory",
        "Memory",
        "Operands of any strides stay as they are; what no expert computed is not read.",
        "Operands may have any strides and offset, and stay as they are. Results are contiguous "
        "and on the device of the tokens. Rows of results that belong to no expert may hold "
        "anything, NaN among them: a grouped product leaves them unwritten.",
        "a transport that multiplied padding by zero spread NaN to every token.",
    ),
    Clause(
        5,
        "bad_arguments",
        "Bad arguments",
        "A wrong argument is a ValueError or TypeError that names it, before anything is sent.",
        "A wrong argument is a `TypeError` or `ValueError` that begins with its name and says what "
        "came (a tensor's shape and dtype, never its elements) and what was expected, before "
        "anything is sent. (`ExpertParallel` does this for every transport.)",
        "a rank that fails after the others have sent leaves them waiting.",
    ),
    Clause(
        6,
        "same_bits",
        "The same bits, always",
        "The same tokens give the same bits in every run, and layers in flight do not meet.",
        "The same call gives the same bits in every run, whatever was exchanged before. A call "
        "reads its operands anew, also where they changed in place since the last one. Two layers "
        "may be in flight at once: each `combine` belongs to its own `dispatch`.",
        "a transport's one buffer is right until a second layer is dispatched before the first "
        "one's results are back.",
    ),
    Clause(
        7,
        "gradients",
        "Gradients",
        "Gradients flow through both exchanges to tokens, weights and the experts' results.",
        "Gradients flow through both exchanges: to `hidden` the sum over a token's slots of what "
        "the experts' ranks return, to `weights` on the token's rank, and to the experts' results. "
        "They equal autograd through one rank with all experts, within rounding. Where ranks share "
        "the batch, every rank gets the whole gradient of `hidden` and `weights`.",
        "a collective without a gradient trains the experts, and not the router.",
    ),
    Clause(
        8,
        "streams_and_graphs",
        "Streams and graphs",
        "With max_tokens, nothing is read on the host, and calls can be captured in a CUDA graph.",
        "With `max_tokens` stated, or where no sizes are needed, a call does not synchronise with "
        "the host, and can be captured in a CUDA graph after a warm-up call; its replays are right "
        "with other tokens, ids and weights.",
        "a read of the sizes in every layer costs a decode step more than the experts.",
    ),
    Clause(
        9,
        "agreement",
        "Agreement",
        "Ranks that disagree get an error on every rank.",
        "Ranks that make an `ExpertParallel` with different numbers of experts, K, columns, dtypes "
        "or modes get a `ValueError` that says which rank said what, on every rank and within the "
        "stated time-out. So do ranks of which one got a wrong argument, or cannot use the "
        "transport. (`ExpertParallel` does this for every transport.)",
        "one rank with another configuration otherwise stops all of them, without a word.",
    ),
    Clause(
        10,
        "capacity",
        "Capacity",
        "With a capacity that was too small, tokens are NaN or right, and every rank is told.",
        "With `capacity=C` a rank may keep C rows for each other rank: of slots, or with "
        '`reduce="rank"` of tokens. A token of which a row found no place is NaN in all columns; '
        "the others are as they are without a capacity. If there is such a token on any rank, "
        "`check()` raises `CapacityError` on every rank, and so does `dispatch` after it; if there "
        "is none, neither raises. A capacity that all rows fit into changes nothing. A transport "
        "that needs no places may ignore it.",
        "rows that are dropped without a word give outputs that look right.",
    ),
)

CLAUSES = {clause.number: clause for clause in _CLAUSES}
