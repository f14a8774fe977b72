"""The clauses of the contract of ``balance``: what ``clauses`` is for ``route``."""

from __future__ import annotations

from moe_routing.conformance.clauses import Clause

_CLAUSES = (
    Clause(
        0,
        "honest_spec",
        "The spec is honest",
        "What the backend accepts is summed; what it declines is impossible, or a gap.",
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
        "Scores divided by their sum are added over the tokens of each batch, in float32.",
        "The sum of an expert is that of its scores over the S tokens of a batch, where the scores "
        "of a token are divided by their sum: of `softmax`, `sigmoid` or `sqrtsoftplus`. For "
        "`logsumexp` there is one sum, of `log(sum(e**logits))**2`. Logits become float32 without "
        "loss, and stay float64. A sum is as near as S + E roundings of a term can bring it, for "
        "any B, S and E: logits of 1000 and of -1000 are no special case, since only the ratios of "
        "scores matter. Where the best are counted, scores are first rounded to the dtype of the "
        "logits.",
        "a sigmoid of -1000 is 0 in float32, and the sum of such scores divides by 0; sums in "
        "bfloat16 stop to grow at 256.",
    ),
    Clause(
        2,
        "counts",
        "Counts",
        "Each id counts for its expert; an id outside [0, E) counts for nobody.",
        "The count of an expert is how many ids of the batch are its own, exactly, for any ids of "
        "int32 and int64, also if a token has one twice. An id outside `[0, E)` counts for nobody, "
        "and nothing outside the counts is written. Where the best are counted, those are the K "
        "highest rounded scores of each token; of equal ones any are the best.",
        "ids of padding are -1, and of other ranks' experts past the end; 2**32 + 3 is no 3.",
    ),
    Clause(
        3,
        "tokens_that_count",
        "Tokens that count",
        "A token that does not count adds nothing, whatever it holds.",
        "Where `weights` is a mask, a token that does not count adds neither to sums nor to "
        "counts, and has the gradient 0, whatever its logits and ids hold: NaN and infinity too. "
        "Where the best are counted, `weights` are float32 factors of a token's scores, of its "
        "counts and of its gradient.",
        "padding is often NaN after a few layers, and 0 * NaN is NaN.",
    ),
    Clause(
        4,
        "not_finite",
        "NaN and infinity",
        "NaN in a token that counts reaches every sum of its batch, and no other batch.",
        "NaN among the logits of a token that counts makes every sum of its batch NaN, and the "
        "gradient of that token, and nothing else. A logit of -infinity is a score of 0.",
        "a maximum that ignores NaN hides a model that has diverged.",
    ),
    Clause(
        5,
        "memory",
        "Memory",
        "Logits of unit stride along E, at any stride else; every output is written, no more.",
        "Rows of logits are read at any stride between tokens and batches, and at any offset; they "
        "and the ids and weights stay as they are. Every element of the sums, of the counts and of "
        "the gradient is written, and not a byte before or after.",
        "a kernel that loads 16 bytes at a time goes past the end of rows of odd width.",
    ),
    Clause(
        6,
        "same_bits",
        "The same bits in every run",
        "The same call has the same bits in every run and thread.",
        "A call with the same tensors gives the same bits in every run, and so does its gradient, "
        "whatever other threads compute with the same kernel. A call reads its operands anew, also "
        "where they changed in place since the last one.",
        "sums by atomic additions of floats differ from run to run.",
    ),
    Clause(
        7,
        "gradients",
        "Gradients",
        "The gradient of the logits is right, and has gradients.",
        "With p the scores divided by their sum, g the gradient of the sums and s the derivative "
        "of a score's logarithm, the gradient of a logit is `p * (g - sum(p * g)) * s`, and for "
        "`logsumexp` it is `2 * log(sum(e**logits)) * softmax(logits) * g`: in float32, rounded "
        "once to the dtype of the logits. Only the logits are kept for the way back. Gradients of "
        "the gradient are those of the definition. (What has no `backward` is differentiated by "
        "the product.)",
        "a gradient without the term of the sum pushes all logits the same way.",
    ),
    Clause(
        8,
        "streams_and_graphs",
        "Streams, graphs, devices",
        "No host synchronisation; graphs, streams and the tensors' device are honoured.",
        "No synchronisation with the host; capturable in a CUDA graph after one warm-up call, and "
        "right on replay with other logits and ids; launched on the current stream and on the "
        "logits' own device, whatever the current one is. What a call needs beyond its outputs "
        "belongs to the call: calls on two streams may run at once.",
        "partial sums in one workspace are right until two streams share it.",
    ),
)

CLAUSES = {clause.number: clause for clause in _CLAUSES}
