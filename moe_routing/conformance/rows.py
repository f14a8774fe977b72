"""Rows of logits: ordinary ones, and every awkward kind that broke some engine.

Each kind has a name for messages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Kinds = dict[str, Tensor]

_INT_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def ordinary(
    num_tokens: int, num_experts: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Return ``[T, E]`` normal logits of standard deviation 2, rounded to ``dtype``.

    Bfloat16 ones tie now and then.
    """
    return (torch.randn(num_tokens, num_experts, generator=generator) * 2).to(dtype)


def _shuffled(row: Tensor, generator: torch.Generator) -> Tensor:
    return row[torch.randperm(len(row), generator=generator)]


def ties(num_experts: int, topk: int, dtype: torch.dtype, generator: torch.Generator) -> Kinds:
    """Return rows with equal logits.

    A row is equal everywhere, across the boundary of the K best, on few levels, or zeros of both
    signs.
    """
    place = torch.arange(num_experts)
    near = (place - topk).abs() <= 2  # noqa: PLR2004 -- two on either side
    across = torch.where(near, -float(topk), -place.double())
    half = torch.rand(num_experts, generator=generator) < 0.5  # noqa: PLR2004 -- half
    zeros = torch.zeros(num_experts).masked_fill(half, -0.0)
    levels = torch.randint(0, 3, (num_experts,), generator=generator)
    rows = {
        "all equal to 0": torch.zeros(num_experts),
        "all equal to -3": torch.full((num_experts,), -3.0),
        "all equal to the largest": torch.full((num_experts,), torch.finfo(dtype).max),
        "ties across the K boundary": across.flip(0),
        "ties across the K boundary, shuffled": _shuffled(across, generator),
        "two levels": (levels > 0).float(),
        "three levels": levels.float() - 1,
        "both zeros": zeros,
        "both zeros and one above": zeros.scatter(0, torch.tensor([num_experts // 2]), 1.0),
        "zeros above negatives": torch.where(levels == 0, zeros, -levels.float()),
    }
    return {name: row.to(dtype) for name, row in rows.items()}


def not_a_number(num_experts: int, dtype: torch.dtype, *, negative: bool, payload: int) -> Tensor:
    """Return a row of NaNs of that sign.

    Their fraction bits are all ones above ``payload`` zeros.
    """
    bits = torch.full((num_experts,), torch.nan, dtype=dtype).view(_INT_OF_SIZE[dtype.itemsize])
    fraction_bits = round(-torch.tensor(torch.finfo(dtype).eps, dtype=torch.float64).log2().item())
    bits |= ((1 << fraction_bits) - 1) >> payload << payload
    return (bits | torch.iinfo(bits.dtype).min if negative else bits).view(dtype)


def non_finite(
    num_experts: int, topk: int, dtype: torch.dtype, generator: torch.Generator
) -> Kinds:
    """Return rows with NaN of both signs and several payloads, and rows with infinities.

    Of a row's logits, between one and all are such.
    """
    base = ordinary(1, num_experts, dtype, generator)[0]
    place = torch.randperm(num_experts, generator=generator)
    inf = torch.full_like(base, torch.inf)
    nan = not_a_number(num_experts, dtype, negative=False, payload=0)
    minus_nan = not_a_number(num_experts, dtype, negative=True, payload=3)
    return {
        "one NaN": torch.where(place == 0, nan, base),
        "one NaN with the sign bit": torch.where(place == 0, minus_nan, base),
        "half NaN": torch.where(place % 2 == 0, nan, base),
        "half NaN of both signs": torch.where(
            place % 4 == 0,
            nan,
            torch.where(place % 4 == 2, minus_nan, base),  # noqa: PLR2004 -- half
        ),
        "fewer than K not NaN": torch.where(place < topk - 1, base, nan),
        "all NaN": nan,
        "all NaN with the sign bit": minus_nan,
        "one +inf": torch.where(place == 0, inf, base),
        "more than K +inf": torch.where(place <= topk, inf, base),
        "all +inf": inf,
        "one -inf": torch.where(place == 0, -inf, base),
        "fewer than K not -inf": torch.where(place < topk - 1, base, -inf),
        "all -inf": -inf,
        "NaN and -inf": torch.where(place % 2 == 0, nan, -inf),
        "NaN, +inf and -inf": torch.where(
            place % 3 == 0, nan, torch.where(place % 3 == 1, inf, -inf)
        ),
        "+inf among the largest": torch.where(place == 0, inf, torch.finfo(dtype).max),
        "NaN among the lowest": torch.where(place % 2 == 0, nan, torch.finfo(dtype).min),
    }


def close(num_experts: int, _topk: int, dtype: torch.dtype, generator: torch.Generator) -> Kinds:
    """Return logits that only exact selection tells apart.

    A unit in the last place, saturated scores, subnormals.
    """
    order = torch.randperm(num_experts, generator=generator)
    one = torch.ones(num_experts, dtype=dtype).view(_INT_OF_SIZE[dtype.itemsize])
    integers = _INT_OF_SIZE[dtype.itemsize]
    few = (order % 128).to(integers)  # a bfloat16 has 128 values between 1 and 2
    fine = torch.linspace(0, 1, num_experts, dtype=torch.float64)[order]
    return {
        "units in the last place above 1": (one + few).view(dtype),
        "units in the last place below -1": -(one + few).view(dtype),
        "subnormals": (few * 2 - 1).abs().to(integers).view(dtype),
        "negative subnormals": -(few + 1).view(dtype),
        "saturated sigmoids": (20 + 40 * fine).to(dtype),
        "sigmoids near 0": (-20 - 40 * fine).to(dtype),
        "sigmoids that underflow": (-110 - 90 * fine).to(dtype),
        "small differences": (1 + fine / 64).to(dtype),
        "tiny logits": (fine * 2**-12).to(dtype),
    }


def extreme(num_experts: int, _topk: int, dtype: torch.dtype, generator: torch.Generator) -> Kinds:
    """Return sorted, one-hot and far-apart logits, and ones of the largest magnitude."""
    base = ordinary(1, num_experts, torch.float32, generator)[0]
    largest = torch.finfo(dtype).max
    index = torch.arange(num_experts)
    rows = {
        "one-hot": torch.where(index == num_experts // 3, 50.0, 0.0),
        "one low": torch.where(index == num_experts // 3, -50.0, 0.0),
        "sorted": base.sort().values,
        "reverse-sorted": base.sort(descending=True).values,
        "far apart": base * 50,
        "all below -1": -2 - base.abs() * 10,
        "the largest and the lowest": torch.where(index % 2 == 0, largest, -largest),
        "one lowest": torch.where(index == 0, -largest, base),
    }
    return {name: row.to(dtype) for name, row in rows.items()}


KINDS: dict[str, Callable[[int, int, torch.dtype, torch.Generator], Kinds]] = {
    "ties": ties,
    "non_finite": non_finite,
    "close": close,
    "extreme": extreme,
}
