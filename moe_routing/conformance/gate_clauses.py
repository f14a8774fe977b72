"""The clauses of the contract of ``gate``: what ``clauses`` is for ``route``."""

from __future__ import annotations

from moe_routing.conformance.clauses import Clause

_CLAUSES = (
    Clause(
        0,
        "honest_spec",
        "The spec is honest",
        "What the backend accepts is gated; what it declines is impossible, or a gap.",
        "What `supports()` accepts works, and what it declines is tried all the same: built "
        "without asking, it must raise or be wrong. If it works, the backend must accept it, or "
        "give the reason in its spec's `gaps`. A declared gap must be one, in this operation or in "
        "another that the backend computes.",
        "otherwise declining is the easiest way to pass.",
    ),
    Clause(
        1,
        "logits",
        "Logits",
        "Logits are the exact ones to within a derived bound of float32 arithmetic.",
        "A logit is the sum of H terms, `hidden * norm * norm.weight * input_scale * "
        "input_multiplier * router_weight`, plus `router_bias`; without a norm that factor is 1. "
        "Products and sums are in float32 or better, in any order, and nothing is rounded to a "
        "shorter dtype on the way; `torch.autocast` changes none of it. The bound of a logit's "
        "error is derived from the roundings of such arithmetic "
        "(`moe_routing/reference/gate_oracle.py`): it grows with the sum of the terms' "
        "magnitudes, and is well below a step of bfloat16 up to some thousand columns. "
        "Hidden states are bfloat16, float16 or float32, the router weight has their dtype or "
        "float32; H is 1 to 16,384, E 1 to 1,024.",
        "logits out of a bfloat16 product, or a scale that was folded into bfloat16 weights, move "
        "whole points of a benchmark.",
    ),
    Clause(
        2,
        "routing",
        "Routing",
        "Weights and ids are what `route` makes of the logits that are returned.",
        "Weights and ids are right for the logits that `return_logits=True` returns, by all "
        "clauses of `route`: every family and modifier, padding, expert maps, tables, shared and "
        "zero experts, counts, replicas and shared weights. The same call without the logits has "
        "the same bits, and so has `with_plan`, whose plan is that of the ids. So a selection is "
        "right within what clause 1 allows, and exact given the logits.",
        "a fused kernel that selects on logits other than those that it returns trains on one "
        "router and serves another.",
    ),
    Clause(
        3,
        "rounding",
        "Rounded logits",
        "With logits_dtype, logits are rounded once, before selection.",
        "With `logits_dtype` bfloat16 or float16, logits are rounded to it once, to the nearest, "
        "and the rounded ones are routed: equal ones go to the lower id, as in a model whose "
        "linear layer returns that dtype. For an invariant call they are the float32 logits of "
        "the same call, rounded.",
        "selected before the rounding, the experts are not those of the model.",
    ),
    Clause(
        4,
        "memory",
        "Memory",
        "Operands of any strides and float dtypes are read as they lie; outputs are contiguous.",
        "Hidden states, router weight and vectors may have any strides and offsets, and the "
        "vectors any float dtype; they stay as they are. Weights, ids and logits are contiguous, "
        "float32, `ids_dtype` and `logits_dtype`. T = 0 gives empty outputs, and launches nothing.",
        "hidden states are slices of wider rows; a bias in float32 was read as bfloat16.",
    ),
    Clause(
        5,
        "out_of_range",
        "Rows out of range",
        "A row that is not finite, or leaves float32's range, spoils no other and has valid ids.",
        "Where hidden states are NaN or infinite, or a term, a sum or the sum of squares leaves "
        "float32's range, the logits of the row have no stated value. The row's weights and ids "
        "are still right for the logits that it has, and every other row is as without it.",
        "one overflow in a batch of requests must not reach the other requests.",
    ),
    Clause(
        6,
        "batch_invariance",
        "Batch invariance",
        "With invariant=True the bits of a row depend on no other row, nor on where it stands.",
        "With `invariant=True`, the default, the bits of a row's logits, weights and ids do not "
        "depend on the other rows, on how many there are or where it stands, nor on its strides, "
        "for one device, dtype, version of the software and number of threads. So H is summed in "
        "one order for every T. A backend that cannot do that declines, with the code "
        "`invariance`. With `invariant=False` the order may depend on T.",
        "PyTorch's linear layer sums in an order for each number of tokens: with float32 logits "
        "every row changes, and one token in a hundred gets another expert in some layer, so "
        "log-probabilities of training are not those of inference.",
    ),
    Clause(
        7,
        "determinism",
        "Determinism",
        "The same call gives the same bits in every run; all operands are read anew.",
        "The same call gives the same bits in every run, whatever was gated before or is gated by "
        "other threads. Every operand is read at each call, also those that changed in place since "
        "the last one: nothing is folded into the weight ahead.",
        "a scale folded into the weights at the first call is wrong after the first step of "
        "training.",
    ),
    Clause(
        8,
        "bad_arguments",
        "Bad arguments",
        "A wrong argument is a ValueError or TypeError that names it, before any launch.",
        "A wrong argument is a `TypeError` or `ValueError` that begins with its name and says what "
        "came (a tensor's shape and dtype, never its elements) and what was expected, before "
        "anything is launched. That includes the arguments of `route`. (`Gate` does this for every "
        "backend.)",
        "a scale of another length was read past its end.",
    ),
    Clause(
        9,
        "gradients",
        "Gradients",
        "Gradients flow to hidden states, weight, biases, norm and scales, equal to autograd.",
        "Gradients flow from the weights and the returned logits to `hidden`, `router_weight`, "
        "`router_bias`, the norm's weight, `input_scale` and `per_expert_scale`, equal to autograd "
        "through the oracle at the chosen ids; selection has none. A row of padding adds nothing, "
        "whatever its hidden states are. (The product computes them for every backend.)",
        "padding holds whatever was in memory, and 0 times NaN in the gradient of the router "
        "weight spoils every expert.",
    ),
    Clause(
        10,
        "traced",
        "Compile, export, fake tensors",
        "torch.compile, torch.export and fake tensors work, and give what the plain call gives.",
        "`torch.compile(fullgraph=True)` with static and dynamic shapes, `torch.export` and a "
        "saved program give the bits of the plain call; fake tensors give outputs of the right "
        "shapes; `torch.library.opcheck` passes. (The operator `moe_routing::gate` does this for "
        "every backend.)",
        "a graph break in every layer costs a model more than its routing.",
    ),
    Clause(
        11,
        "streams_and_graphs",
        "Streams, graphs, devices",
        "No host synchronisation; graphs, streams and the tensors' device are honoured.",
        "No synchronisation with the host; capturable in a CUDA graph after one warm-up call, and "
        "right on replay with other hidden states; launched on the current stream and on the "
        "hidden states' own device, whatever the current one is. What a call needs beyond its "
        "outputs belongs to the call: calls on two streams and replays of two graphs may run at "
        "once.",
        "a workspace for partial sums that a kernel keeps is right until two graphs are replayed "
        "at once.",
    ),
)

CLAUSES = {clause.number: clause for clause in _CLAUSES}
