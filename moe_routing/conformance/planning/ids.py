"""What the ids and weights of a case hold, and how they lie in memory."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Generator, Tensor

    Draw = Callable[[int, int, int, Generator], Tensor]
    """Makes int64 ids ``[T, K]`` from T, K, E and a generator."""


def _random(tokens: int, topk: int, experts: int, generator: Generator) -> Tensor:
    return torch.randint(experts, (tokens, topk), generator=generator)


def _sorted(tokens: int, topk: int, experts: int, generator: Generator) -> Tensor:
    drawn = _random(tokens, topk, experts, generator)
    return drawn.view(-1).sort().values.view(tokens, topk)


def _repeated(tokens: int, topk: int, experts: int, generator: Generator) -> Tensor:
    return _random(tokens, 1, experts, generator).repeat(1, topk)


def _in_turn(tokens: int, topk: int, experts: int, generator: Generator) -> Tensor:
    del generator
    return torch.arange(tokens * topk).view(tokens, topk) % experts


def _padding(tokens: int, topk: int, experts: int, generator: Generator) -> Tensor:
    drawn = _random(tokens, topk, experts, generator)
    drawn[tokens - tokens // 3 :] = -1
    return drawn


def _other_ranks(tokens: int, topk: int, experts: int, generator: Generator) -> Tensor:
    return _random(tokens, topk, 4 * experts, generator) - 2 * experts


def strays(experts: int) -> tuple[int, ...]:
    """Return numbers outside [0, E), all of which int32 holds."""
    return (-1, experts, experts + 1, -experts, 2 * experts, 2**31 - 1, -(2**31), 4095, 4096, 4097)


def wide_strays(experts: int) -> tuple[int, ...]:
    """Return numbers that only int64 holds; most are in [0, E) if they are cut to 32 bits."""
    low = (2**32, 2**32 + experts - 1, -(2**32), 2**40 + experts // 2, 2**63 - 1, -(2**63))
    return (*low, -(2**32) - 1, 2**31, -(2**31) - 1)


def _every_second(values: tuple[int, ...], drawn: Tensor) -> Tensor:
    """Return the ids with those values at every second pair."""
    flat = drawn.view(-1)
    enough = torch.tensor(values).repeat(len(flat))[: len(flat[1::2])]
    flat[1::2] = enough
    return drawn


def _strays(tokens: int, topk: int, experts: int, generator: Generator) -> Tensor:
    outside = tuple(n for n in strays(experts) if not 0 <= n < experts)
    return _every_second(outside, _random(tokens, topk, experts, generator))


def _wide(tokens: int, topk: int, experts: int, generator: Generator) -> Tensor:
    return _every_second(wide_strays(experts), _random(tokens, topk, experts, generator))


KINDS: Mapping[str, Draw] = MappingProxyType(
    {
        "random": _random,
        "ascending": _sorted,
        "descending": lambda *sizes: _sorted(*sizes).flip(0, 1),
        "in_turn": _in_turn,
        "repeated": _repeated,
        "first_expert": lambda *sizes: torch.zeros_like(_random(*sizes)),
        "last_expert": lambda *sizes: torch.full_like(_random(*sizes), sizes[2] - 1),
        "both_ends": lambda *sizes: _random(sizes[0], sizes[1], 2, sizes[3]) * (sizes[2] - 1),
        "padding": _padding,
        "other_ranks": _other_ranks,
        "none": lambda *sizes: torch.full_like(_random(*sizes), -1),
        "strays": _strays,
        "wide_strays": _wide,
    }
)
"""Ids by kind. ``wide_strays`` are for int64."""

INSIDE = (
    "random", "ascending", "descending", "in_turn", "repeated", "first_expert", "last_expert",
    "both_ends",
)  # fmt: skip
"""Kinds without an id outside [0, E)."""
OUTSIDE = ("padding", "other_ranks", "none", "strays")


def _drawn_weights(tokens: int, topk: int, generator: Generator) -> Tensor:
    return torch.randn(tokens, topk, generator=generator)


def _of(values: tuple[float, ...]) -> Callable[[int, int, Generator], Tensor]:
    """Return a function that draws from those values."""

    def draw(tokens: int, topk: int, generator: Generator) -> Tensor:
        which = torch.randint(len(values), (tokens, topk), generator=generator)
        return torch.tensor(values)[which]

    return draw


WEIGHTS: Mapping[str, Callable[[int, int, Generator], Tensor]] = MappingProxyType(
    {
        "random": _drawn_weights,
        "close": lambda *sizes: 1 + _drawn_weights(*sizes) * 1e-6,
        "equal": _of((0.25,)),
        "ties": _of((0.5, 0.25, 0.125)),
        "zeros": _of((0.0, -0.0)),
        "negative": lambda *sizes: -_drawn_weights(*sizes).abs(),
        "tiny": _of((0.0, -0.0, 1e-45, -1e-45, 1e-38, 2e-38)),
        "nan": _of((torch.nan, -torch.nan)),
        "nan_and_inf": _of((torch.nan, -torch.nan, -torch.inf)),
        "not_finite": _of((torch.nan, -torch.nan, torch.inf, -torch.inf, 3.4e38, -3.4e38, 0.0)),
    }
)
"""Weights ``[T, K]`` by kind. -inf and NaN count the same."""


def _zeros(values: Tensor, *shape: int) -> Tensor:
    # What lies between the values is zeros: an id of an expert, so that reading it shows.
    return values.new_zeros(shape)


def _sliced(values: Tensor) -> Tensor:
    tokens, topk = values.shape
    return _zeros(values, tokens, topk + 3)[:, 1 : topk + 1].copy_(values)


def _of_every_second_row(values: Tensor) -> Tensor:
    tokens, topk = values.shape
    return _zeros(values, 2 * tokens, topk)[1::2].copy_(values)


MEMORY: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "contiguous": lambda values: values.contiguous(),
        "transposed": lambda values: values.t().contiguous().t(),
        "every_second": lambda values: _zeros(values, len(values), 2 * values.shape[1])[
            :, ::2
        ].copy_(values),
        "every_second_row": _of_every_second_row,
        "sliced": _sliced,
        "offset": lambda values: _zeros(values, len(values) + 1, values.shape[1])[1:].copy_(values),
        "repeated_row": lambda values: values[:1].contiguous().expand(values.shape),
        "repeated_column": lambda values: values[:, :1].contiguous().expand(values.shape),
    }
)
"""Ways to lie in memory. The last two repeat the first row or column, with a stride of 0."""
