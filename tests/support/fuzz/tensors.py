"""The numbers and layouts that calls are drawn from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import random

    from torch import Tensor

MAX = torch.finfo(torch.float32).max
EXTREMES = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    MAX,
    -MAX,
    MAX / 2,
    1e30,
    -1e30,
    2.0**-149,
    -(2.0**-149),
    2.0**-126,
    17.5,
    -90.0,
    -104.0,
    88.8,
)


def _normal(*size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*size, generator=generator)


def _of(values: tuple[float, ...], size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.tensor(values)[torch.randint(len(values), size, generator=generator)]


def _hostile(T: int, E: int, generator: torch.Generator) -> Tensor:
    """Logits of models, with NaN, infinities and zeros of both signs in rows of every mixture."""
    x = _normal(T, E, generator=generator) * 4
    share = torch.rand(T, 1, generator=generator)
    special = _of((torch.nan, torch.inf, -torch.inf, 0.0, -0.0), (T, E), generator)
    return torch.where(torch.rand(T, E, generator=generator) < share, special, x)


def _nothing_finite(T: int, E: int, generator: torch.Generator) -> Tensor:
    few = _of((torch.nan, -torch.inf, torch.inf), (T, 3), generator)
    return few.gather(1, torch.randint(3, (T, E), generator=generator))


def _wide(T: int, E: int, generator: torch.Generator) -> Tensor:
    """Every exponent of float32, subnormal ones too, and both signs."""
    exponent = torch.rand(T, E, generator=generator) * 276 - 149
    return _normal(T, E, generator=generator).sign() * exponent.exp2()


def _close(T: int, E: int, generator: torch.Generator) -> Tensor:
    """Numbers some units in the last place apart, around a number for each row."""
    around = _normal(T, 1, generator=generator) * 4
    return around * (1 + torch.randint(-3, 4, (T, E), generator=generator) * 2.0**-23)


def _far(T: int, E: int, generator: torch.Generator) -> Tensor:
    """Twos of each number below one expert that is far above."""
    x = _normal(T, -(-E // 2), generator=generator).repeat(1, 2)[:, :E]
    x[:, E // 3] = 2.0 ** (torch.arange(T) % 40)
    return x


def _spread(T: int, E: int, generator: torch.Generator) -> Tensor:
    """Rows at different places, where scores saturate or underflow."""
    return (
        _normal(T, E, generator=generator) * 3 + (torch.rand(T, 1, generator=generator) - 0.5) * 250
    )


LOGITS = {
    "normal": lambda T, E, g: _normal(T, E, generator=g),
    "large": lambda T, E, g: _normal(T, E, generator=g) * 10.0 ** (torch.arange(T) % 8)[:, None],
    "small": lambda T, E, g: _normal(T, E, generator=g) * 10.0 ** -(torch.arange(T) % 8)[:, None],
    "ties": lambda T, E, g: (_normal(T, E, generator=g) * 2).round() / 2,
    "constant": lambda T, E, g: _normal(T, 1, generator=g).mul(5).repeat(1, E),
    "zeros": lambda T, E, g: _of((0.0, -0.0), (T, E), g),
    "hostile": _hostile,
    "nothing_finite": _nothing_finite,
    "extremes": lambda T, E, g: _of(EXTREMES, (T, E), g),
    "subnormal": lambda T, E, g: (_normal(T, E, generator=g) * 3000).round() * 2.0**-149,
    "wide": _wide,
    "close": _close,
    "far": _far,
    "spread": _spread,
}
"""Kinds of logits: functions of T, E and a generator."""


def _some(most: float, few: float, E: int, generator: torch.Generator) -> Tensor:
    """Small numbers, of which ``most`` is the scale, with ``few`` in an eighth of the places."""
    x = _normal(E, generator=generator) * most
    return torch.where(torch.rand(E, generator=generator) < 0.125, few, x)


BIASES = {
    "small": lambda E, g: _normal(E, generator=g) * 0.1,
    "zero": lambda E, g: _of((0.0, -0.0), (E,), g),
    "equal": lambda E, g: _normal(1, generator=g).repeat(E),
    "large": lambda E, g: _normal(E, generator=g) * 1e9,
    "negative": lambda E, g: -1 - torch.rand(E, generator=g) * 100,
    "some_masked": lambda E, g: _some(0.1, -1e9, E, g),
    "some_low": lambda E, g: _some(0.1, -1e4, E, g),
    "some_nan": lambda E, g: _some(0.1, torch.nan, E, g),
    "some_inf": lambda E, g: _some(0.1, torch.inf, E, g),
    "some_minus_inf": lambda E, g: _some(0.1, -torch.inf, E, g),
    "not_finite": lambda E, g: _of((torch.nan, torch.inf, -torch.inf, 0.1), (E,), g),
    "extremes": lambda E, g: _of(EXTREMES, (E,), g),
    "beyond_in_twos": lambda E, g: (
        MAX * (0.3 + 0.7 * torch.rand(E, generator=g))
    ),  # whose sum float32 cannot hold
    "subnormal": lambda E, g: (_normal(E, generator=g) * 3000).round() * 2.0**-149,
    "wide": lambda E, g: _wide(1, E, g)[0],
    "ties": lambda E, g: (_normal(E, generator=g) * 2).round() / 4,
}
"""Kinds of biases: functions of E and a generator."""

SCALES = {
    "near_one": lambda E, g: torch.rand(E, generator=g) + 0.5,
    "signed": lambda E, g: _normal(E, generator=g),
    "zeros": lambda E, g: _of((0.0, -0.0, 1.0, -2.0), (E,), g),
    "large": lambda E, g: _normal(E, generator=g) * 1e9,
    "small": lambda E, g: _normal(E, generator=g) * 1e-9,
    "some_nan": lambda E, g: _some(1.0, torch.nan, E, g),
    "some_inf": lambda E, g: _some(1.0, torch.inf, E, g),
    "not_finite": lambda E, g: _of((torch.nan, torch.inf, -torch.inf, 0.0, 0.7), (E,), g),
    "extremes": lambda E, g: _of(EXTREMES, (E,), g),
}
"""Kinds of ``per_expert_scale``."""


TABLES = ("inside", "repeated", "outside")


def table(  # noqa: PLR0913, PLR0917 -- what a table is made of
    kind: str, T: int, E: int, topk: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return token ids and their table.

    ``repeated`` names some experts twice; ``outside`` has ids and entries out of range, far and
    near.
    """
    vocabulary = int(torch.randint(1, 60, (), generator=generator))
    entries = torch.rand(vocabulary, E, generator=generator).argsort(1)[:, :topk]
    token_ids = torch.randint(vocabulary, (T,), generator=generator)
    if kind == "repeated":
        entries = torch.randint(E, (vocabulary, topk), generator=generator)
    if kind == "outside":
        far = (2**31 - 1, -(2**31), 2**31, 2**32, 2**32 + 1, -(2**40), 2**63 - 1, -(2**63))
        few = [
            n
            for n in (-1, -vocabulary, vocabulary, vocabulary + 1, *far)
            if torch.iinfo(dtype).min <= n <= torch.iinfo(dtype).max
        ]
        chosen = torch.tensor(few)[torch.randint(len(few), (T,), generator=generator)]
        token_ids = torch.where(torch.rand(T, generator=generator) < 0.3, chosen, token_ids)
        few = [
            n for n in (-1, E, E + 1, *far) if torch.iinfo(dtype).min <= n <= torch.iinfo(dtype).max
        ]
        chosen = torch.tensor(few)[torch.randint(len(few), entries.shape, generator=generator)]
        entries = torch.where(
            torch.rand(entries.shape, generator=generator) < 0.3 / topk, chosen, entries
        )
    return token_ids.to(dtype), entries.to(dtype)


RECORDS = ("int8", "int16", "int32", "int64", "uint8")


def record(kind: str, T: int, E: int, K: int, generator: torch.Generator) -> Tensor:
    """Return recorded ids ``[T, K]`` of that dtype, with rows of every kind.

    Some rows have no record, some have slots without an expert, as far as the dtype has a -1, and
    some have a number that no expert has.
    """
    ids = torch.randint(E, (T, K), generator=generator)
    row, slot = torch.rand(T, 1, generator=generator), torch.rand(T, K, generator=generator)
    if kind != "uint8":
        ids[(row < 0.5) & (slot < 0.4)] = -1
        ids[(row < 0.2).squeeze(1)] = -1
    wrong = E if kind == "uint8" or T % 2 else -2
    return torch.where((row > 0.9) & (slot < 0.3), wrong, ids).to(getattr(torch, kind))


VALID = (
    "mask",
    *(
        f"{form} {size}"
        for form in ("int", "scalar", "vector")
        for size in ("none", "some", "more", "most", "negative", "least")
        if form != "int" or size not in ("negative", "least")  # an int below 0 is refused
    ),
)


def valid(kind: str, T: int, dtype: torch.dtype, rng: random.Random) -> tuple[int | Tensor, int]:
    """Return the argument ``num_valid_tokens``, and its value."""
    form, _, size = kind.partition(" ")
    most = torch.iinfo(dtype).max if form != "int" else 2**70
    value = {
        "none": 0,
        "some": rng.randint(0, T),
        "more": T + 1,
        "most": most,
        "negative": -1,
        "least": -most - 1,
    }[size]
    if form == "int":
        return value, value
    return torch.tensor([value] if form == "vector" else value, dtype=dtype), value


MAPS = ("larger", "shared")


def expert_map(kind: str, slots: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return physical ids: of a larger range, or some elsewhere (-1) and some shared."""
    if kind == "larger":
        return torch.randperm(slots * 3 + 5, generator=generator)[:slots].to(dtype)
    return torch.randint(-1, max(1, slots // 2), (slots,), generator=generator).to(dtype)


COUNTS = ("experts", "shared too", "every second")


def counts(kind: str, experts: int, shared: int, dtype: torch.dtype) -> Tensor:
    """Return counts that earlier calls left: of the experts alone, or of shared experts too."""
    length = experts if kind == "experts" else experts + shared
    left = torch.arange(2 * length, dtype=dtype) - 3
    return left[::2] if kind == "every second" else left[:length]


REPLICAS = ("few", "wild counts")


def replicas(
    kind: str, slots: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return a table of replicas and their numbers, which may be outside the table too."""
    most = int(torch.randint(1, 6, (), generator=generator))
    low, high = (1, most + 1) if kind == "few" else (-3, most + 9)
    table = torch.randint(-1, 9 * slots, (slots, most), generator=generator).to(dtype)
    return table, torch.randint(low, high, (slots,), generator=generator).to(dtype)


OUTPUTS = ("aligned", "odd")


def outputs(
    kind: str, T: int, columns: int, ids_dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Return outputs to write into, and the storage around them, which is filled with 7.

    :param kind: ``"odd"`` outputs begin 3 elements into their storage, ``"aligned"`` ones 16.
    """
    before = {"aligned": 16, "odd": 3}[kind]
    whole = [
        torch.full((before + T * columns + 5,), 7, dtype=dtype)
        for dtype in (torch.float32, ids_dtype)
    ]
    weights, ids = (w[before : before + T * columns].view(T, columns) for w in whole)
    return (weights, ids), [part for w in whole for part in (w[:before], w[before + T * columns :])]


def _inside(x: Tensor, whole: tuple[int, ...], where: tuple[slice | int, ...]) -> Tensor:
    """Return ``x`` in larger storage, whose other elements would win."""
    storage = torch.full(whole, 99.0 if x.is_floating_point() else 99).to(x.dtype)
    storage[where] = x
    return storage[where]


LAYOUTS = {
    "rows": lambda x: x.contiguous(),
    "apart": lambda x: _inside(x, (len(x), x.shape[1] + 3), (slice(None), slice(2, -1))),
    "every_other": lambda x: _inside(
        x, (len(x), 2 * x.shape[1]), (slice(None), slice(None, None, 2))
    ),
    "every_other_row": lambda x: _inside(x, (2 * len(x), x.shape[1]), (slice(None, None, 2),)),
    "offset": lambda x: _inside(x.flatten(), (x.numel() + 1,), (slice(1, None),)).view(x.shape),
    "transposed": lambda x: x.t().contiguous().t(),
    "one_row_repeated": lambda x: x[:1].expand(x.shape),
    "one_column_repeated": lambda x: x[:, :1].expand(x.shape),
    "one_number": lambda x: x[:1, :1].expand(x.shape),
    "negated": lambda x: torch._neg_view(-x),
}
"""Layouts of logits. Some repeat a row or a column, which changes what the call routes."""


VECTOR_LAYOUTS = {
    "plain": lambda x: x,
    "strided": lambda x: _inside(x, (len(x), 2), (slice(None), 0)),
    "offset": lambda x: _inside(x, (len(x) + 1,), (slice(1, None),)),
    "one_number": lambda x: x[:1].expand(x.shape),
}
"""Layouts of the operands with one dimension."""
