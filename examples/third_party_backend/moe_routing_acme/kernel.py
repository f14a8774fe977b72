"""The kernel: a tournament in each row of logits, rows over the cores.

A score and its id make one 64-bit key, so that all keys of a row differ and equal scores go to the
lower id. Groups of eight send their highest key up; to find the K best, K times the highest of
those is taken out, and its group asked for its next one. That is E + K (E / 8 + 8) comparisons,
none of them a branch.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch

from moe_routing import RoutingOutput

from . import supports

if TYPE_CHECKING:
    from moe_routing_registry import DeviceInfo, RoutingProblem

LARGEST = np.float32(np.finfo(np.float32).max)
GROUP = 8
NOTHING = np.int64(np.iinfo(np.int64).min)
BLOCK = 32  # rows that share their scratch memory
SOFTMAX, SIGMOID, SQRTSOFTPLUS = 0, 1, 2
SCORE = {"softmax": SOFTMAX, "sigmoid": SIGMOID, "sqrtsoftplus": SQRTSOFTPLUS}
numba.config.THREADING_LAYER = (
    "workqueue"  # OpenMP's waiting threads spin, and would fight torch's for the cores
)
_one_launch = threading.Lock()  # which takes one launch at a time


def build(problem: RoutingProblem, device: DeviceInfo, *, unsupported: bool = False) -> Bound:
    """Return a callable for the problem, which serves any number of tokens.

    The conformance kit says ``unsupported=True`` to try what ``supports`` declines: it must fail or
    be wrong.
    """
    verdict = supports(problem, device)
    if not verdict and not unsupported:
        raise NotImplementedError(verdict.reason)
    return Bound(problem)


class Bound:
    """One problem, bound."""

    def __init__(self, problem: RoutingProblem) -> None:
        """Keep what every call needs."""
        self.spec, self.topk = problem.spec, problem.topk
        self.ids_dtype = {"int32": torch.int32, "int64": torch.int64}[problem.ids_dtype]

    def __call__(
        self,
        logits: torch.Tensor,
        *,
        per_expert_scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        num_valid_tokens: int | torch.Tensor | None = None,
        expert_map: torch.Tensor | None = None,
        out: RoutingOutput | None = None,
        **_nothing: None,
    ) -> RoutingOutput:
        """Route ``logits [T, E]``.

        Return float32 weights and integer ids, both ``[T, K + shared_experts]``. ``token_ids`` and
        ``expert_table`` come as ``None``: the backend declines the selection that takes them.
        """
        spec, (num_tokens, num_experts) = self.spec, logits.shape
        slots = num_experts + spec.shared_experts
        if out is None:
            shape = (num_tokens, self.topk + spec.shared_experts)
            out = RoutingOutput(torch.empty(shape), torch.empty(shape, dtype=self.ids_dtype))
        bias = torch.zeros(num_experts) if bias is None else bias.float()
        scale = (
            torch.ones(num_experts)
            if per_expert_scale is None
            else per_expert_scale.detach().float()
        )
        physical = torch.arange(slots) if expert_map is None else expert_map.long()
        valid = num_tokens if num_valid_tokens is None else min(int(num_valid_tokens), num_tokens)
        with _one_launch:
            _route(
                logits.detach().float().numpy(), bias.detach().numpy(), scale.numpy(),
                physical.numpy(), valid, num_experts - spec.zero_experts, np.float32(spec.scale),
                np.float32(spec.shared_weight), SCORE[spec.score],
                spec.selection == "logits", spec.selection == "scores_plus_bias",
                spec.renormalize, spec.renorm_epsilon, spec.renorm_floor, self.topk,
                out.weights.numpy(), out.ids.numpy(),
            )  # fmt: skip
        return out


LOG2_E = np.float32(1.4426950408889634)
LN_2_HIGH = np.float32(0.693359375)  # few bits, so that its products with small integers are exact
LN_2_LOW = np.float32(math.log(2) - 0.693359375)
ROUND = np.float32(1.5 * 2**23)  # adding and subtracting it rounds to an integer
SOFTPLUS_IS_EXP = -40  # below it, log(1 + e^x) is e^x in double precision
LOWEST = np.float32(-87.0)  # below it, e^d is taken for 0
TERMS = [np.float32(1 / math.factorial(n)) for n in range(8)]
T2, T3, T4, T5, T6, T7 = TERMS[2:]


@numba.njit(error_model="numpy")
def _exp(d, power_bits, result):
    """Write e^d for d <= 0: 2^n times a Taylor polynomial of what is left, |r| <= ln(2)/2.

    LLVM vectorises it.
    """
    power = power_bits.view(np.float32)
    for e in range(len(d)):
        v = max(d[e], LOWEST)
        n = (v * LOG2_E + ROUND) - ROUND
        r = (v - n * LN_2_HIGH) - n * LN_2_LOW
        result[e] = 1 + r * (1 + r * (T2 + r * (T3 + r * (T4 + r * (T5 + r * (T6 + r * T7))))))
        power_bits[e] = (np.int32(n) + 127) << 23
    for e in range(len(d)):
        result[e] = result[e] * power[e] if d[e] > LOWEST else np.float32(0)


@numba.njit(inline="always")
def _score(x, score):
    """Return sigmoid or sqrt(softplus), accurate for any sign."""
    e = math.exp(-abs(x))
    return (
        (e if x < 0 else 1.0) / (1.0 + e)
        if score == SIGMOID
        else math.sqrt(max(x, 0.0) + math.log1p(e))
    )


@numba.njit(inline="always")
def _log_score(x, score):
    """Return the logarithm of the score, up to softmax's common denominator.

    It never underflows.
    """
    if score == SOFTMAX:
        return x
    e = math.exp(-abs(x))
    if score == SIGMOID:
        return min(x, 0.0) - math.log1p(e)
    return 0.5 * (x if x < SOFTPLUS_IS_EXP else math.log(max(x, 0.0) + math.log1p(e)))


@numba.njit(error_model="numpy")
def _scores(x, score, result, exponent, power_bits, exponential):
    """Write the score of every expert of a row; return softmax's denominator."""
    if score == SOFTMAX:
        largest, total = -LARGEST, 0.0
        for e in range(len(x)):
            largest = max(largest, x[e])
        for e in range(len(x)):
            exponent[e] = x[e] - largest
        _exp(exponent, power_bits, exponential)
        for e in range(len(x)):
            total += exponential[e]
        for e in range(len(x)):
            result[e] = exponential[e] / np.float32(total)
        return total
    for e in range(len(x)):
        exponent[e] = -abs(x[e])
    _exp(exponent, power_bits, exponential)
    if score == SIGMOID:
        for e in range(len(x)):
            result[e] = (exponential[e] if x[e] < 0 else np.float32(1)) / (
                np.float32(1) + exponential[e]
            )
    else:
        for e in range(len(x)):
            result[e] = math.sqrt(max(x[e], np.float32(0)) + math.log1p(exponential[e]))
    return 1.0


@numba.njit
def _highest(keys, first):
    """Return the highest key of a group."""
    highest = keys[first]
    for i in range(first + 1, first + GROUP):
        highest = max(highest, keys[i])
    return highest


@numba.njit
def _tournament(bits, keys, sent_up, chosen):
    """Write the ids of the best, from the bits of their scores."""
    num_experts = len(bits)
    for e in range(num_experts):
        # The bits of a float, in the order of floats.
        ordered = bits[e] ^ ((bits[e] >> 31) & 0x7FFFFFFF)
        keys[e] = (np.int64(ordered) << 32) | (num_experts - 1 - e)
    for group in range(len(sent_up)):
        sent_up[group] = _highest(keys, group * GROUP)
    for k in range(len(chosen)):
        best = sent_up[0]
        for group in range(1, len(sent_up)):
            best = max(best, sent_up[group])
        e = num_experts - 1 - (best & 0xFFFFFFFF)
        chosen[k] = e
        keys[e] = NOTHING
        sent_up[e // GROUP] = _highest(keys, e // GROUP * GROUP)


@numba.njit(error_model="numpy")
def _weigh(x, exponential, total, chosen, score, renormalize, epsilon, floor, value):
    """Write the weights of the chosen, renormalised; they are few enough for double precision."""
    if renormalize and epsilon == 0 and floor == 0:  # a ratio of scores, from their logarithms
        highest = -np.inf
        for k in range(len(chosen)):
            value[k] = _log_score(np.float64(x[chosen[k]]), score)
            highest = max(highest, value[k])
        for k in range(len(chosen)):
            value[k] = math.exp(value[k] - highest)
    elif score == SOFTMAX and renormalize:
        # Again in double precision: the float32 differences that `exponential` is made of are off
        # by more than a ratio of small shares may be.
        largest = x.max()
        for k in range(len(chosen)):
            value[k] = math.exp(np.float64(x[chosen[k]]) - largest) / total
    else:
        for k in range(len(chosen)):
            e = chosen[k]
            value[k] = (
                exponential[e] / total if score == SOFTMAX else _score(np.float64(x[e]), score)
            )
    if renormalize:
        denominator = max(value.sum() + epsilon, floor)
        for k in range(len(chosen)):
            value[k] /= denominator


# One signature for all layouts of the logits (":, :" is any strides), and one for each dtype of
# ids: each costs seconds to compile, kept in a cache.
_SIGNATURES = [
    "(f4[:, :], f4[::1], f4[::1], i8[::1], i8, i8, f4, f4, i8, b1, b1, b1, f8, f8, i8, f4[:, ::1], "
    + ids
    + "[:, ::1])"
    for ids in ("i4", "i8")
]


@numba.njit(_SIGNATURES, parallel=True, cache=True, nogil=True, error_model="numpy")
def _route(
    logits, bias, scale, physical, valid, weighing, factor, shared_weight,
    score, on_logits, on_scores, renormalize, epsilon, floor, topk, weights, ids,
):  # fmt: skip
    num_tokens, num_experts = logits.shape
    score_all = on_scores or (
        score == SOFTMAX and not (renormalize and epsilon == 0 and floor == 0)
    )
    for block in numba.prange((num_tokens + BLOCK - 1) // BLOCK):
        x = np.empty(num_experts, np.float32)
        exponent = np.empty(num_experts, np.float32)
        exponential = np.empty(num_experts, np.float32)
        power_bits = np.empty(num_experts, np.int32)
        selected_by = np.empty(num_experts, np.float32)
        keys = np.full((num_experts + GROUP - 1) // GROUP * GROUP, NOTHING)
        sent_up = np.empty(len(keys) // GROUP, np.int64)
        chosen = np.empty(topk, np.int64)
        value = np.empty(topk, np.float64)
        for t in range(block * BLOCK, min(block * BLOCK + BLOCK, num_tokens)):
            if t >= valid:
                weights[t] = 0
                ids[t] = -1
                continue
            # NaN counts as -inf, and infinities as the largest finite numbers; adding 0 makes -0 a
            # +0.
            for e in range(num_experts):
                l = logits[t, e]
                x[e] = min(max(l, -LARGEST), LARGEST) + np.float32(0) if l == l else -LARGEST
            total = (
                _scores(x, score, selected_by, exponent, power_bits, exponential)
                if score_all
                else 1.0
            )
            if not on_scores:
                selected_by[:] = x
            if not on_logits:
                for e in range(num_experts):
                    key = selected_by[e] + bias[e]
                    selected_by[e] = (
                        min(max(key, -LARGEST), LARGEST) + np.float32(0) if key == key else -LARGEST
                    )
            _tournament(selected_by.view(np.int32), keys, sent_up, chosen)
            _weigh(x, exponential, total, chosen, score, renormalize, epsilon, floor, value)
            for k in range(topk):
                # In float32 and in this order, so that what leaves its range, or is NaN, does so
                # where the contract says.
                scaled = np.float32(np.float32(value[k]) * factor) * scale[chosen[k]]
                # Zero experts come last.
                weights[t, k] = scaled if chosen[k] < weighing else np.float32(0)
                ids[t, k] = physical[chosen[k]]
            for slot in range(topk, weights.shape[1]):  # shared experts
                weights[t, slot] = shared_weight
                ids[t, slot] = physical[num_experts + slot - topk]
