"""The points of the contract: number, name, and why each is there. ``docs/contract.md`` tells them at length."""

from __future__ import annotations

from typing import NamedTuple


class Point(NamedTuple):
    """One point of the contract.

    :ivar number: its number; 0 is the card's honesty, without which the others say little.
    :ivar name: a few words, as in test ids.
    :ivar rule: the rule in a sentence.
    """

    number: int
    name: str
    rule: str


_POINTS = (
    Point(0, "honest_card", "What the card accepts works; what it declines cannot be had, or is a gap with a reason."),
    Point(1, "order_and_ties", "Ids come by descending selection score, equal scores by ascending id, -0 equal to +0."),
    Point(2, "valid_ids", "Ids are unique and in [0, E), whatever the input."),
    Point(3, "non_finite", "NaN counts as -inf, logits are clamped to float32's range, weights are never NaN or inf."),
    Point(4, "exact_selection", "Selection is exact in float32, and made on the logits where that is the same."),
    Point(5, "gathered_weights", "Weights are gathered from the unbiased scores, never recovered by subtracting the bias."),
    Point(6, "weights_and_dtypes", "Weights are float32, within rtol 2e-6; ids are int32, or int64 on request; contiguous."),
    Point(7, "bad_arguments", "A wrong argument is a ValueError or TypeError that names it, before any launch."),
    Point(8, "strides", "Any strides and offsets, past 2**31 elements too; row strides cost no copy."),
    Point(9, "no_tokens", "No tokens: empty outputs, and nothing is launched."),
    Point(10, "batch_invariance", "A row's bits do not depend on the other rows, their number or its position."),
    Point(11, "determinism", "The same input gives the same bits in every run."),
    Point(12, "streams_and_graphs", "No host synchronisation; CUDA graphs, current stream and tensor's device are honoured."),
    Point(13, "padding", "Rows at or past num_valid_tokens get ids -1 and weights 0, without a synchronisation."),
    Point(14, "compile_and_export", "torch.compile(fullgraph=True), torch.export and fake tensors work, and opcheck passes."),
    Point(15, "gradients", "Gradients flow from the weights to logits and scale; selection has none."),
)  # fmt: skip

POINTS = {point.number: point for point in _POINTS}
