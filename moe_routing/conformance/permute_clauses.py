"""The clauses of the contract of ``permute``: what ``clauses`` is for ``route``.

Those from 4 on have the numbers of ``combine``'s.
"""

from __future__ import annotations

from moe_routing.conformance.clauses import Clause

_CLAUSES = (
    Clause(
        0,
        "honest_spec",
        "The spec is honest",
        "What the backend accepts is permuted; what it declines is impossible, or a gap.",
        "What `supports()` accepts works, and what it declines is tried all the same: built "
        "without asking, it must raise or be wrong. If it works, the backend must accept it, or "
        "give the reason in its spec's `gaps`. A declared gap must be one, in this operation or in "
        "another that the backend computes.",
        "otherwise declining is the easiest way to pass.",
    ),
    Clause(
        1,
        "rows",
        "Rows",
        "The row of its token stands at the place of each pair, bit for bit, in every dtype.",
        "A place p holds a pair if `p < offsets[E]` and `order[p]` is in `[0, T * K)`; its token "
        "is `order[p] // K`. There stands the row of that token, bit for bit: rows of any dtype, "
        "of any number of columns, of any numbers of tokens and places. NaN keeps its payload, and "
        "-0 its sign. `scales` are moved like the rows, whatever their dtype.",
        "a copy through floating-point registers makes a signalling NaN quiet, which changes rows "
        "of packed 4-bit weights and of integers.",
    ),
    Clause(
        2,
        "empty_places",
        "Empty places",
        "Places without a pair are zero, but in a masked plan, where they may hold anything.",
        "In the sorted layout and in blocks a place without a pair of an expert is zero in every "
        "byte: the rest of an expert's last block, what is behind the last expert, the pairs that "
        "were dropped or are of no expert. No row is multiplied by zero for that: rows of NaN "
        "leave zeros too. In a masked plan, of which `counts` says how much is used, such places "
        "may hold anything.",
        "a grouped product multiplies the rest of a block as well; NaN there spoils statistics "
        "that are taken over the whole buffer.",
    ),
    Clause(
        3,
        "quantized",
        "Quantized rows",
        "Quantized rows and their scales have the bits that float32 arithmetic gives.",
        'With `quantize="float8_e4m3fn"`, 128 neighbouring values of a row share a scale (the last '
        "group of a row has the rest): with m the largest of their magnitudes it is `max(m, 1e-10) "
        "/ 448`, and each value becomes `value / scale`, rounded to the nearest float8, of two "
        "nearest to the even one. All of it is in float32, with divisions that round to nearest, "
        "so there is one right result. If a value is NaN, m is NaN, and with it the scale and the "
        "whole group. If one is infinite, the scale is infinite, infinite values become NaN, and "
        "the others 0. The scales of empty places are 0.",
        "a product with an approximate reciprocal gives another float8 for values half-way between "
        "two; a maximum that skips NaN hides it behind a finite scale.",
    ),
    Clause(
        4,
        "memory",
        "Memory",
        "Rows of any strides; contiguous outputs, filled in full and nothing else; T may be 0.",
        "Rows may have any strides and offset, repeat in memory, and stay as they are, and so does "
        "the plan. Results are contiguous and on the device of the rows. Every element of them is "
        "written, and not an element before or after. T may be 0, and H too: then nothing is "
        "launched. Calls may follow each other with gradients, without them and in inference mode.",
        "hidden states are a slice of a wider buffer in some models; a kernel that copies 16 bytes "
        "at a time goes past the end of rows of odd width.",
    ),
    Clause(
        5,
        "any_plan",
        "Plans of any content",
        "Whatever the tensors of a plan hold, nothing outside the rows and results is touched.",
        "The shapes of a plan are checked, what its tensors hold is not: that would need a "
        "synchronisation. Whatever that is, nothing outside the tensors is read or written. A "
        "kernel may go by `order`, by `inverse` or by `counts`, which say the same in a plan. "
        "Where they do not, each element of the result is one of its column in `hidden`, or zero, "
        "or what was in the memory before.",
        "a plan that a graph was captured with, and that nobody filled before its first replay, "
        "sent a copy to addresses of other processes' pages.",
    ),
    Clause(
        6,
        "bad_arguments",
        "Bad arguments",
        "A wrong argument is a ValueError or TypeError that names it, before any launch.",
        "A wrong argument is a `TypeError` or `ValueError` that begins with its name and says what "
        "came (a tensor's shape and dtype, never its elements) and what was expected. That also "
        "holds in calls like an earlier one. A plan of another T, of another device, dtype or "
        "shape is wrong; so are rows to quantize of another dtype than bfloat16, float16 and "
        "float32, or that require gradients. (`moe_routing.permute` does this for every backend.)",
        "a plan of the batch before has the right dtype and rank, and indexes rows that are not "
        "there.",
    ),
    Clause(
        7,
        "same_bits",
        "The same bits, always",
        "A row has the same bits in any batch, place, run and thread.",
        "The row of a token, and its scales, have the same bits for any T, at any place and next "
        "to any rows, in every run, whatever other threads permute with the same kernel. A call "
        "reads its rows and its plan anew, also where they changed in place since the last one.",
        "a scratch buffer that a kernel keeps mixes the rows of two threads.",
    ),
    Clause(
        8,
        "gradients",
        "Gradients",
        "The gradient of a token's row is the sum over its slots, as `combine` without weights.",
        "The gradient of `hidden[t]` is the float32 sum of the gradients of the rows of its pairs, "
        "from slot 0 to slot K - 1, rounded once to the rows' dtype: what `combine` gives without "
        "weights. Gradients at places without a pair reach nothing. It has the same bits in every "
        "run, and is differentiable again. Plain, traced and compiled calls have it.",
        "a backward that adds with atomics gives another sum in every run.",
    ),
    Clause(
        9,
        "traced",
        "Compile, export, fake tensors",
        "torch.compile, torch.export and fake tensors work, and give what the plain call gives.",
        "`torch.compile(fullgraph=True)` with static and dynamic shapes, `torch.export` and a "
        "saved program give what the plain call gives; fake tensors give rows of the right shapes, "
        "and nothing is computed; `torch.library.opcheck` passes. (The product does this for every "
        "backend.)",
        "a compiler that was told a wrong shape reads past the end.",
    ),
    Clause(
        10,
        "streams_and_graphs",
        "Streams, graphs, devices",
        "No host synchronisation; graphs, streams and the tensors' device are honoured.",
        "No synchronisation with the host; capturable in a CUDA graph after one warm-up call, and "
        "right on replay with other rows and another plan; launched on the current stream and on "
        "the rows' own device, whatever the current one is. What a call needs beyond its outputs "
        "belongs to the call: calls on two streams and replays of two graphs may run at once.",
        "a library's one workspace is right until two graphs that share it are replayed at once.",
    ),
)

CLAUSES = {clause.number: clause for clause in _CLAUSES}
