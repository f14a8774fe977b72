"""What a router records and replays: a tape, from its first block on until ``unpatch``.

Activation checkpointing computes a forward again inside backward, maybe after other forwards. Nodes
of autograd's graph are numbered in the order in which they are made. So a tape keeps the number at
each forward, and the number of the node whose backward runs tells which forward is computed again.

Compiled code calls a tape through the two operators here, which name it by a tensor on the CPU. A
constant would have to be compiled anew for each layer and each block.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import count
from threading import get_ident
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.compiler import is_compiling

from moe_routing import RoutingOutput
from moe_routing.gating.kernel import GateOutput
from moe_routing.private_api import backward_number, is_batched, next_number
from moe_routing.reference.shadow import is_capturing
from moe_routing.replay import least_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_routing._router import Router
    from moe_routing.integrations.transformers._loads import Counting

TAPE = "_moe_routing_tape"
"""Attribute of a patched router that keeps its tape."""
_number = count()
_TAPES: WeakValueDictionary[int, Tape] = WeakValueDictionary()


class Part(NamedTuple):
    """What a router selected in one forward.

    :ivar ids: ``[T, K]``.
    :ivar thread: that the forward ran in.
    """

    ids: Tensor
    thread: int


class Tape:
    """Records and replays the ids of one router.

    :ivar name: of the router in the model.
    :ivar mode: what the block does that the model is in; ``""``: none.
    :ivar parts: what the block that records has recorded, forward by forward.
    :ivar replayed: whether there was a block that replays.
    """

    def __init__(self, name: str) -> None:
        """Begin with nothing."""
        self.name = name
        self.mode: Literal["", "record", "replay"] = ""
        self.parts: list[Part] = []
        self.replayed = False
        self._rows: Tensor | None = None
        self._taken = 0
        self._thread: int | None = None
        self._numbers: list[int] = []
        self._forwards: list[Tensor | None] = []
        self._before_block = 0
        self._forgot = False
        number = next(_number)
        self.key = torch.tensor(number, device="cpu")
        _TAPES[number] = self

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """Leave the tape out of copies of the model: ``type(None)()`` is ``None``."""
        return type(None), ()

    def require_no_block(self) -> None:
        """Raise ``ValueError`` inside a block."""
        if self.mode:
            msg = (
                f"model: expected one outside of recording and replaying, got one in a block that "
                f"{self.mode}s; at {self.name}"
            )
            raise ValueError(msg)

    def record(self, parts: list[Part]) -> None:
        """Append what the router selects to a list."""
        self.mode, self.parts = "record", parts

    def replay(self, rows: Tensor) -> None:
        """Hand out the rows ``[T, K]``."""
        # The backward of forwards before the latest block is over, or its recomputation is refused.
        old = self._before_block
        self._forgot |= any(rows is not None for rows in self._forwards[:old])
        del self._numbers[:old], self._forwards[:old]
        self._before_block = len(self._forwards)
        self.mode, self.replayed, self._rows, self._taken = "replay", True, rows, 0

    def end(self) -> int:
        """End the block; return how many rows nobody took."""
        left = 0 if self._rows is None else len(self._rows) - self._taken
        self.mode, self.parts, self._rows = "", [], None
        return left

    def take(self, of: Tensor, topk: int) -> Tensor | None:
        """Return the rows ``[T, K]`` of a forward, ``None`` if it is routed as usual.

        :param of: ``[..., E]`` or ``[..., H]``, a row for each token.
        """
        number, tokens = backward_number(), of.numel() // of.shape[-1]
        rows = self._next(tokens, of) if number is None else self._again(number)
        if rows is not None and tuple(rows.shape) != (tokens, topk):
            self._refuse(
                f"expected the shape [{len(rows)}, {rows.shape[1]}] of the rows that this forward "
                f"replayed, got [{tokens}, {topk}] in the forward that is computed again"
                if number is not None
                else f"expected {topk} experts a token, as the router selects, got {rows.shape[1]}"
            )
        return rows

    def keep(self, ids: Tensor, num_experts: int) -> None:
        """Append ids ``[..., K]``, unless the forward is one that is computed again."""
        if self.mode != "record" or backward_number() is not None:
            return
        self._refuse_what_repeats(ids)
        kept = ids.detach().reshape(-1, ids.shape[-1]).to(least_dtype(num_experts))
        self.parts.append(Part(kept, get_ident()))

    def _next(self, tokens: int, of: Tensor) -> Tensor | None:
        rows, thread = None, get_ident()
        if self._rows is not None:
            self._refuse_what_repeats(of)
            if self._thread not in {None, thread}:
                self._refuse(
                    "expected the thread of the first forward that replayed, because autograd "
                    "numbers the nodes of each thread separately, got another; unpatch and patch "
                    "the model to change the thread"
                )
            self._thread = thread
            if self._rows.device != of.device:
                self._rows = self._rows.to(of.device)
            start, left = self._taken, len(self._rows) - self._taken
            if tokens > left:
                self._refuse(
                    f"expected {tokens} rows for the tokens of this forward, got {left} left of "
                    f"{len(self._rows)}"
                )
            self._taken += tokens
            rows = self._rows[start : self._taken]
        # A run of forwards without rows counts once: all of them are routed as usual.
        if thread == self._thread and (
            rows is not None or not self._forwards or self._forwards[-1] is not None
        ):
            self._numbers.append(next_number())
            self._forwards.append(rows)
        return rows

    def _again(self, number: int) -> Tensor | None:
        """Return the rows of the forward in which the node of this number was made."""
        # The node that a reentrant or a compiled forward runs in is made just before it.
        forward = bisect_right(self._numbers, number + 1) - 1
        if forward >= 0:
            return self._forwards[forward]
        if self._forgot:
            self._refuse(
                "expected the backward of a checkpointed forward before the second next block that "
                "replays, got it after that"
            )
        return None

    def _refuse_what_repeats(self, of: Tensor) -> None:
        if is_batched(of):
            msg = (
                f"{self.name}: recording and replaying cannot be batched by torch.vmap, which runs "
                "one forward for all"
            )
            raise RuntimeError(msg)
        if is_capturing(of.device):
            msg = (
                f"{self.name}: recording and replaying cannot be captured in a CUDA graph, which "
                "would repeat the rows of its capture"
            )
            raise RuntimeError(msg)

    def _refuse(self, text: str) -> NoReturn:
        msg = f"records: {text}; at {self.name}"
        raise ValueError(msg)


class Taped:
    """Routes as a router does, by the rows of a tape, and records what it selects."""

    def __init__(self, route: Router | Counting, tape: Tape) -> None:
        """Route by ``route``."""
        self._route, self._tape = route, tape

    def __call__(self, logits: Tensor, topk: int, **further: Any) -> RoutingOutput:  # noqa: ANN401 -- the operands of a call
        """Route logits ``[..., E]``."""
        made = self._route(logits, topk, **self._recorded(logits, topk), **further)
        return RoutingOutput(made.weights, self._kept(made.ids, logits.shape[-1]))

    def gate(
        self,
        hidden: Tensor,
        weight: Tensor,
        *,
        topk: int,
        return_logits: Literal[True],
        **further: Any,  # noqa: ANN401 -- likewise
    ) -> GateOutput:
        """Gate hidden states ``[T, H]``."""
        options = {**self._recorded(hidden, topk), **further}
        made = self._route.gate(hidden, weight, topk, return_logits=return_logits, **options)
        return GateOutput(made.weights, self._kept(made.ids, weight.shape[0]), made.logits)

    def _recorded(self, rows: Tensor, topk: int) -> dict[str, Any]:
        """Return ``ids`` for a call with these rows, nothing if it is routed as usual."""
        tape = self._tape
        if not is_compiling():
            ids = tape.take(rows, topk)
        # Compiled code may be computed again after the block.
        elif tape.mode == "replay" or (tape.replayed and torch.is_grad_enabled()):
            ids = torch.ops.moe_routing.recorded_ids(rows, tape.key, topk)
        else:
            ids = None
        return {} if ids is None else {"ids": ids.view(*rows.shape[:-1], topk)}

    def _kept(self, ids: Tensor, num_experts: int) -> Tensor:
        if self._tape.mode != "record":
            return ids
        if is_compiling():
            kept: Tensor = torch.ops.moe_routing.record_ids(ids, self._tape.key, num_experts)
            return kept
        self._tape.keep(ids, num_experts)
        return ids


# Both return what routing goes on with, so no compiler takes them for dead.
_LIBRARY = torch.library.Library("moe_routing", "FRAGMENT")
_LIBRARY.define("recorded_ids(Tensor rows, Tensor tape, SymInt topk) -> Tensor")
_LIBRARY.define("record_ids(Tensor ids, Tensor tape, SymInt num_experts) -> Tensor")


def _tape_of(key: Tensor) -> Tape:
    tape = _TAPES.get(int(key))
    if tape is None:
        msg = (
            "compiled code records or replays for a router that is gone, was unpatched or is in "
            "another process; compile the model again"
        )
        raise RuntimeError(msg)
    return tape


def _recorded_ids(rows: Tensor, key: Tensor, topk: int) -> Tensor:
    """Return int64 ids ``[T, K]`` for rows ``[..., H]``; -1 where routing is as usual."""
    ids = _tape_of(key).take(rows, topk)
    if ids is None:
        return torch.full(
            (rows.numel() // rows.shape[-1], topk), -1, dtype=torch.int64, device=rows.device
        )
    return ids.to(torch.int64, copy=True)


def _recorded_ids_fake(rows: Tensor, _key: Tensor, topk: int) -> Tensor:
    return rows.new_empty((rows.numel() // rows.shape[-1], topk), dtype=torch.int64)


def _record_ids(ids: Tensor, key: Tensor, num_experts: int) -> Tensor:
    _tape_of(key).keep(ids, num_experts)
    return ids.clone()


for _name, _function, _fake in (
    ("recorded_ids", _recorded_ids, _recorded_ids_fake),
    ("record_ids", _record_ids, lambda ids, _key, _num_experts: torch.empty_like(ids)),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # integers have no gradient
    torch.library.register_fake(f"moe_routing::{_name}", _fake, lib=_LIBRARY)
