"""``recording`` and ``replaying``: what a model's routers selected, kept and selected again."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe_routing._check import RECORDED_DTYPES, integer, is_dense, is_dtensor, layout
from moe_routing.integrations.transformers._patch import routed_parts
from moe_routing.integrations.transformers._tapes import TAPE, Part, Tape
from moe_routing.integrations.transformers.routers import made_of
from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

_DIMENSIONS = 3


class Records:
    """The experts that each router of a model selected, forward after forward.

    The ids stay on the routers' device, and nothing waits for them until they are read.
    ``torch.save`` and ``torch.load`` keep records, where this class has been imported.

    :ivar layers: the names of the routers, in the model's order.
    """

    def __init__(self, layers: tuple[str, ...]) -> None:
        """Begin with no forward."""
        self.layers = layers
        self._parts: tuple[list[Part], ...] = tuple([] for _ in layers)

    @property
    def ids(self) -> Tensor:
        """The ids ``[layers, T, K]`` of all forwards, in order.

        The tokens of a forward are as the router saw them: a batch ``[B, S]`` row by row. The dtype
        is the least that holds the ids and -1: int8 up to 128 experts, int16 up to 32,768, else
        int32. The device is that of the first router.

        :raises RuntimeError: there was no forward, or the routers saw different numbers of tokens,
            or forwards of several threads in different orders.
        """
        return torch.cat(self._forwards(), dim=1)

    def sequences(self, batch_size: int) -> Tensor:
        """Return the ids ``[layers, B, S, K]`` of the sequences of a batch.

        Every forward must have been one of that batch, ``[B, L]`` for any L: the prompt and each
        step of ``generate``, for example. The token that was generated last never was an input, and
        has no row. Beam search and assisted generation reorder or discard sequences between steps,
        which is not undone here.

        :param batch_size: B; with ``num_return_sequences=n``, n times the number of prompts.
        :raises TypeError: it is no int.
        :raises ValueError: a forward was not of a batch of that size.
        :raises RuntimeError: there was no forward, or the routers saw different numbers of tokens.
        """
        size = integer("batch_size", batch_size)
        forwards = self._forwards()
        for ids in forwards:
            if size < 1 or ids.shape[1] % size:
                expected = f"a divisor of the {ids.shape[1]} tokens of each forward"
                raise ValueError(refusal("batch_size", expected, size))
        return torch.cat([ids.unflatten(1, (size, -1)) for ids in forwards], dim=2)

    def __repr__(self) -> str:
        """Say how many forwards and tokens there are, without the ids."""
        parts = self._parts[0]
        tokens = sum(len(part.ids) for part in parts)
        return f"Records(layers={len(self.layers)}, forwards={len(parts)}, tokens={tokens})"

    def _forwards(self) -> list[Tensor]:
        """Return the ids ``[layers, T, K]`` of each forward."""
        first = self._parts[0]
        if not first:
            msg = f"the records are empty: no forward of {self.layers[0]} was recorded"
            raise RuntimeError(msg)
        shapes, threads = [part.ids.shape for part in first], [part.thread for part in first]
        for name, parts in zip(self.layers, self._parts, strict=True):
            if [part.ids.shape for part in parts] != shapes:
                msg = (
                    f"the routers saw other tokens: {name} has {len(parts)} forwards with "
                    f"{sum(len(part.ids) for part in parts)} rows, {self.layers[0]} {len(first)} "
                    f"with {sum(len(part.ids) for part in first)}, or another number of experts a "
                    "token"
                )
                raise RuntimeError(msg)
            if [part.thread for part in parts] != threads:
                msg = (
                    f"the routers saw the forwards of several threads in another order: {name} and "
                    f"{self.layers[0]}; run one forward at a time"
                )
                raise RuntimeError(msg)
        dtype = max((parts[0].ids.dtype for parts in self._parts), key=lambda kind: kind.itemsize)
        return [
            torch.stack([part.ids.to(of_layers[0].ids.device, dtype) for part in of_layers])
            for of_layers in zip(*self._parts, strict=True)
        ]


torch.serialization.add_safe_globals([Records, Part])  # torch.load reads them by default


@contextmanager
def recording(model: nn.Module) -> Iterator[Records]:
    """Record which experts the routers of a patched model select inside the block.

    Works compiled or not, in training and in inference. A forward that activation checkpointing
    computes again is not recorded again. Run one forward at a time. A CUDA graph cannot be captured
    inside the block, nor can ``torch.vmap`` batch the model.

    :param model: a model that ``patch`` was called on, all of whose routers it replaced.
    :returns: the records, which grow with each forward of the block.
    :raises TypeError: ``model`` is no module.
    :raises ValueError: ``model`` has no router, one that does not route through ``moe_routing``, or
        is in such a block already.

    >>> from moe_routing.integrations.transformers import patch
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    >>> heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    >>> model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    >>> report = patch(model)
    >>> with recording(model) as records:
    ...     output = model(torch.tensor([[1, 2, 3]]))
    >>> records.ids.shape, records.ids.dtype
    (torch.Size([2, 3, 2]), torch.int8)
    >>> with replaying(model, records):
    ...     again = model(torch.tensor([[1, 2, 3]]))
    >>> torch.equal(output.logits, again.logits)
    True
    """
    tapes = _tapes(model)
    records = Records(tuple(tape.name for tape, _ in tapes))
    try:
        for (tape, _), parts in zip(tapes, records._parts, strict=True):  # noqa: SLF001 -- its own
            tape.record(parts)
        yield records
    finally:
        for tape, _ in tapes:
            tape.end()


@contextmanager
def replaying(model: nn.Module, records: Records | Tensor) -> Iterator[None]:
    """Have the routers of a patched model weigh the experts of a record inside the block.

    Each forward takes the next rows, one for each of its tokens; the forwards of the block must
    take all. A forward that activation checkpointing computes again gets the rows that it had,
    whatever came between, also after the block. All forwards that replay must be in one thread.
    Weights are those of the model's own logits, with gradients; see ``Router.__call__`` for slots
    and rows of -1.

    Not every backend takes recorded ids; the others are passed over. A CUDA graph cannot be
    captured inside the block, nor can ``torch.vmap`` batch the model.

    :param model: a model that ``patch`` was called on, all of whose routers it replaced.
    :param records: what ``recording`` returned, or ids ``[layers, T, K]`` of any integer dtype, a
        layer for each router in the model's order. They are read in the block, so they must not
        change.
    :raises TypeError: an argument has the wrong type or dtype.
    :raises ValueError: ``model`` is none that can replay, the records have another number of
        layers or of experts a token, a forward has more tokens than rows are left, or rows are left
        at the end of the block.
    """
    tapes = _tapes(model)
    ids = _checked(records, tapes)
    try:
        for (tape, _), rows in zip(tapes, ids, strict=True):
            tape.replay(rows)
        yield
    finally:
        left = [tape.end() for tape, _ in tapes]
    for (tape, _), rows in zip(tapes, left, strict=True):
        if rows:
            msg = (
                f"records: expected {ids.shape[1] - rows} rows, as many as tokens were routed, got "
                f"{ids.shape[1]}; at {tape.name}"
            )
            raise ValueError(msg)


def _tapes(model: nn.Module) -> list[tuple[Tape, int]]:
    """Return the tape and K of each router; make the tapes that there are none of yet.

    :raises ValueError: not every router may record and replay.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(refusal("model", "a torch.nn.Module", model))
    modules = dict(model.named_modules())
    parts = list(routed_parts(modules))
    if not parts:
        msg = f"model: expected mixture-of-experts layers, got a {type(model).__name__} without any"
        raise ValueError(msg)
    found = []
    for path, _ in parts:
        router = modules[path]
        name = path or type(router).__name__
        made = made_of(type(router))
        if made is None:
            msg = (
                f"model: expected routers that route through moe_routing, got {name}, which does "
                f"not; patch(model) routes it, or says why not"
            )
            raise ValueError(msg)
        tape: Tape | None = getattr(router, TAPE)
        if tape is not None:
            tape.require_no_block()
        found.append((name, router, made.recipe.topk(router)))
    for name, router, _ in found:
        if getattr(router, TAPE) is None:
            setattr(router, TAPE, Tape(name))
        getattr(router, TAPE).name = name  # in this model, which may be a part of another
    return [(getattr(router, TAPE), topk) for _, router, topk in found]


def _checked(records: object, tapes: list[tuple[Tape, int]]) -> Tensor:
    """Return the ids of records that fit the routers."""
    ids = records.ids if isinstance(records, Records) else records
    if not isinstance(ids, Tensor) or ids.dtype not in RECORDED_DTYPES:
        raise TypeError(refusal("records", "Records, or an integer tensor [layers, T, K]", ids))
    if ids.dim() != _DIMENSIONS or not is_dense(ids) or is_dtensor(ids) or ids.is_meta:
        expected = "a plain, dense tensor [layers, T, K] with data"
        raise ValueError(refusal("records", expected, ids) + layout(ids))
    if len(ids) != len(tapes):
        expected = f"{len(tapes)} layers, one for each router from {tapes[0][0].name} on"
        raise ValueError(refusal("records", expected, ids))
    for tape, topk in tapes:
        if ids.shape[2] != topk:
            expected = f"{topk} experts a token, as {tape.name} selects"
            raise ValueError(refusal("records", expected, ids))
    return ids
