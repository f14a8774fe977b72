"""What a rank sends, by arithmetic: expected rows, bytes and messages.

Experts are chosen uniformly at random: each set of K experts is as likely as any other. That is an
assumption. With L of the S slots on a group of ranks, all K experts of a token are elsewhere with
probability C(S - L, K) / C(S, K).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from moe_routing_registry.text import refusal

if TYPE_CHECKING:
    from moe_routing.distributed.problem import Reduce

MOST_RANKS_TO_SUM_ON = 64
"""Of the transport ``all-to-all`` with ``reduce="rank"``; a test compares it with the backend's."""
_ID, _WEIGHT = 4, 4
"""Bytes of an int32 id and a float32 weight."""
_FORM = 20
"""Bytes that say to each rank what must not differ, where sizes are exchanged."""


def expected_reached(groups: int, slots: int, topk: int) -> float:
    """Return how many groups a token reaches on average, its own among them.

    Each group has ``slots / groups`` of the slots. A token has ``topk`` different slots, of which
    each set is as likely as any other. So a group is reached with probability
    1 - C(S - S / n, K) / C(S, K), and n times that is the expectation.

    :param groups: n: ranks, or hosts.
    :param slots: S, a multiple of n: the experts, with their replicas.
    :param topk: K, at most S.
    :raises ValueError: n does not divide S, or K is larger than S.

    >>> round(expected_reached(8, 256, 8), 2)
    5.29
    >>> expected_reached(256, 256, 8)
    8.0
    """
    if groups < 1 or slots % groups:
        raise ValueError(refusal("groups", f"a divisor of {slots} slots", groups))
    if not 0 <= topk <= slots:
        raise ValueError(refusal("topk", f"0 to {slots}, the slots", topk))
    elsewhere = math.comb(slots - slots // groups, topk)
    # The ratio of integers is rounded once.
    return groups * (1 - elsewhere / math.comb(slots, topk))


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """The sizes of an MoE layer and of the group of ranks that it is spread over.

    :ivar tokens: T, of each rank; ``max_tokens`` is T too.
    :ivar hidden_size: H, the columns of a token's row.
    :ivar topk: K, the experts of a token, all different.
    :ivar num_experts: E, a multiple of the ranks, or a divisor of them: then each expert has
        ``ranks / num_experts`` replicas, one on each rank.
    :ivar ranks: n, at least 2.
    :ivar ranks_per_host: the ranks that reach each other without the network. Each host has as
        many, or there is one host.
    :ivar element_bytes: of a column: 2 for bfloat16.

    >>> Deployment(tokens=64, hidden_size=7168, topk=8, num_experts=256, ranks=64).hosts
    8
    """

    tokens: int
    hidden_size: int
    topk: int
    num_experts: int
    ranks: int
    ranks_per_host: int = 8
    element_bytes: int = 2

    def __post_init__(self) -> None:
        """Require sizes that can be.

        :raises ValueError: names the size.
        """
        for name in (
            *("tokens", "hidden_size", "topk", "num_experts", "ranks_per_host", "element_bytes"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(refusal(name, "an int of at least 1", getattr(self, name)))
        if self.ranks < 2:  # noqa: PLR2004 -- one rank sends nothing
            raise ValueError(refusal("ranks", "an int of at least 2", self.ranks))
        if self.topk > self.num_experts:
            expected = f"at most {self.num_experts}, the experts"
            raise ValueError(refusal("topk", expected, self.topk))
        if self.num_experts % self.ranks and self.ranks % self.num_experts:
            expected = f"a divisor or a multiple of the {self.num_experts} experts"
            raise ValueError(refusal("ranks", expected, self.ranks))
        if self.ranks > self.ranks_per_host and self.ranks % self.ranks_per_host:
            expected = f"up to {self.ranks_per_host}, the ranks of a host, or a multiple of them"
            raise ValueError(refusal("ranks", expected, self.ranks))

    @property
    def hosts(self) -> int:
        """The hosts of the group."""
        return max(1, self.ranks // self.ranks_per_host)

    @property
    def slots(self) -> int:
        """S, the experts with their replicas: as many on each rank."""
        return max(self.num_experts, self.ranks)

    @property
    def ranks_reached(self) -> float:
        """How many ranks a token reaches on average, its own among them."""
        return expected_reached(self.ranks, self.slots, self.topk)

    @property
    def hosts_reached(self) -> float:
        """How many hosts a token reaches on average, its own among them."""
        return expected_reached(self.hosts, self.slots, self.topk)


class Way(NamedTuple):
    """A way to exchange: a transport, and how it is called.

    :ivar transport: ``"all-to-all"``, ``"all-reduce"`` (of a batch that every rank holds) or
        ``"symmetric"``.
    :ivar reduce: as ``ExpertParallel`` takes it.
    :ivar padded: whether as many rows go to each rank as ``max_tokens`` tokens can make.
    :ivar graph: whether a CUDA graph makes the call; else the host does, each time.

    >>> str(Way("all-to-all", "rank", padded=True, graph=True))
    'all-to-all rank padded, graph'
    """

    transport: str
    reduce: Reduce
    padded: bool
    graph: bool

    def __str__(self) -> str:
        """Name it in a few words."""
        if self.shared_batch:
            return f"{self.transport}, shared batch"
        padded = " padded" if self.padded else ""
        return f"{self.transport} {self.reduce}{padded}, {'graph' if self.graph else 'eager'}"

    @property
    def shared_batch(self) -> bool:
        """Whether every rank holds the same tokens: another problem than the other ways solve."""
        return self.transport == "all-reduce"

    @property
    def calls(self) -> int:
        """The steps there and back, of which each waits for the one before it."""
        if self.transport != "all-to-all":
            return 2 if self.transport == "symmetric" else 1
        # Of each row its ids, and, where sums are made on each rank, weights with them; the rows;
        # and back. Without padding sizes come first, and say the ids of reduce="none".
        return 3 if self.reduce == "none" or self.padded else 4


WAYS = (
    Way("symmetric", "none", padded=False, graph=True),
    Way("symmetric", "rank", padded=False, graph=True),
    Way("all-to-all", "none", padded=True, graph=True),
    Way("all-to-all", "rank", padded=True, graph=True),
    Way("all-to-all", "none", padded=False, graph=False),
    Way("all-to-all", "rank", padded=False, graph=False),
    Way("all-reduce", "rank", padded=False, graph=True),
)
"""The ways to choose from; and the all-reduce, for its traffic.

Padded calls without a graph send the same as with one, and take the host's time too.
"""


class Traffic(NamedTuple):
    """What a rank sends to other ranks, on average.

    :ivar rows_within: rows to ranks of its host in ``dispatch``; as many come back.
    :ivar rows_between: rows to ranks of other hosts.
    :ivar bytes_within: bytes to ranks of its host, there and back, with ids, weights and padding.
    :ivar bytes_between: bytes to ranks of other hosts.
    :ivar useful_bytes: bytes of the rows that experts compute, there and back, within and between.
    :ivar messages: how often it sends to a rank, there and back.
    """

    rows_within: float
    rows_between: float
    bytes_within: float
    bytes_between: float
    useful_bytes: float
    messages: int


def traffic(sizes: Deployment, way: Way) -> Traffic:
    """Return what a rank sends in one ``dispatch`` and one ``combine``.

    Results have as many columns and bytes as the tokens. What a rank keeps for itself is left out.

    >>> sizes = Deployment(tokens=64, hidden_size=7168, topk=8, num_experts=256, ranks=16)
    >>> sent = traffic(sizes, Way("all-to-all", "none", padded=False, graph=False))
    >>> sent.rows_within, sent.rows_between  # of 512 rows each rank gets 32
    (224.0, 256.0)
    >>> sent = traffic(sizes, Way("all-to-all", "none", padded=True, graph=True))
    >>> sent.rows_within, sent.rows_between  # room for 512 rows on each rank
    (3584.0, 4096.0)
    """
    near = min(sizes.ranks, sizes.ranks_per_host) - 1
    far = sizes.ranks - 1 - near
    row = sizes.hidden_size * sizes.element_bytes
    if way.shared_batch:
        return _of_a_ring(sizes, row)
    # To each other rank:
    if way.reduce == "none":
        most, used = float(sizes.tokens * sizes.topk), sizes.tokens * sizes.topk / sizes.ranks
        with_row = 0 if _sizes_say_ids(way) else _ID
        counts = sizes.slots // sizes.ranks
    else:
        most, used = float(sizes.tokens), sizes.tokens * sizes.ranks_reached / sizes.ranks
        with_row = (_ID + _WEIGHT) * sizes.topk
        counts = 1
    rows = most if way.padded else used
    exchanged = way.transport == "all-to-all" and not way.padded
    sent = rows * (2 * row + with_row) + (_FORM + 4 * counts if exchanged else 0)
    return Traffic(
        rows_within=near * rows,
        rows_between=far * rows,
        bytes_within=near * sent,
        bytes_between=far * sent,
        useful_bytes=(near + far) * used * 2 * row,
        messages=way.calls * (near + far),
    )


def _sizes_say_ids(way: Way) -> bool:
    return way.transport == "all-to-all" and way.reduce == "none" and not way.padded


def _of_a_ring(sizes: Deployment, row: int) -> Traffic:
    """Return what a rank of a ring sends, whose ranks of a host are neighbours.

    In 2 (n - 1) steps each rank sends 1 / n of the rows to the next rank. One rank of each host
    has its next rank on another host; the average rank sends that share of its rows there.
    """
    rows = 2 * (sizes.ranks - 1) / sizes.ranks * sizes.tokens
    share = sizes.hosts / sizes.ranks if sizes.hosts > 1 else 0.0
    return Traffic(
        rows_within=rows * (1 - share),
        rows_between=rows * share,
        bytes_within=rows * row * (1 - share),
        bytes_between=rows * row * share,
        useful_bytes=rows * row,
        messages=2 * (sizes.ranks - 1),
    )
