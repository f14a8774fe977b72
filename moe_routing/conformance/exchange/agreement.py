"""Clause 9: ranks that disagree are told so, all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.conformance.exchange import ranks
from moe_routing.conformance.exchange._check import check
from moe_routing.conformance.exchange.cases import Case
from moe_routing.conformance.requirements import require, require_refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.under_test import BackendUnderTest


@dataclass(frozen=True, slots=True)
class Difference:
    """An argument that is another one on the last rank.

    :ivar argument: its name.
    :ivar values: on the last rank, and on the others.
    :ivar named: what the error begins with, where that is not the argument.
    """

    argument: str
    values: tuple[Any, Any]
    named: str = ""

    @property
    def id(self) -> str:
        """Name for test ids."""
        return self.argument

    @property
    def family(self) -> str:
        """No routing family."""
        return ""


def _differences(_profile: Profile) -> Iterator[Difference]:
    yield Difference("num_experts", (240, 120))
    yield Difference("topk", (3, 2))
    yield Difference("hidden_size", (8, 16))
    yield Difference("dtype", (torch.float16, torch.bfloat16))
    yield Difference("max_tokens", (5, None))
    yield Difference("reduce", ("rank", "none"))
    yield Difference("shared_batch", (True, False))


@check(9, _differences)
def ranks_that_disagree_are_told_so(under_test: BackendUnderTest, case: Difference) -> None:
    """An argument that differs between ranks is an error on every rank, which names it."""
    ranks.need(2)
    world = Case().make(under_test.device)
    words: dict[str, Any] = {"num_experts": 120, "placement": None}
    words[case.argument] = case.values[world.rank < world.ranks - 1]
    message = require_refusal(
        lambda: world.parallel(under_test, **words), case.argument, "ranks that disagree"
    )
    require(f"on rank {world.ranks - 1}" in message, f"the error names no rank: {message!r}")


def _wrong(_profile: Profile) -> Iterator[Difference]:
    yield Difference("num_experts", (0, 120), "group")
    yield Difference("reduce", ("sum", "none"), "group")
    yield Difference("topk", (True, 2), "group")


@check(9, _wrong)
def what_one_rank_is_refused_all_ranks_are_told(
    under_test: BackendUnderTest, case: Difference
) -> None:
    """A wrong argument on one rank is an error on every rank, which says what was wrong."""
    ranks.need(2)
    world = Case().make(under_test.device)
    words: dict[str, Any] = {"num_experts": 120, "placement": None}
    words[case.argument] = case.values[world.rank < world.ranks - 1]
    last = world.rank == world.ranks - 1
    message = require_refusal(
        lambda: world.parallel(under_test, **words),
        case.argument if last else case.named,
        "one wrong rank",
    )
    require(last or f"{case.argument}: " in message, f"the error does not say why: {message!r}")
