"""How long an exchange takes, and the fastest way: the traffic, and constants that were measured.

Between hosts nothing was measured: a ``Network`` is an assumption.
"""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_routing.distributed.scale.traffic import (
    MOST_RANKS_TO_SUM_ON,
    WAYS,
    Deployment,
    Traffic,
    Way,
    traffic,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


CONSTANTS = Path(__file__).with_name("constants.json")
"""Written by ``benchmarks/scale_constants.py`` from kept results."""
MOST_TOKENS = 65536
"""Of a rank, up to which changes are looked for."""
_PER_US = 1e3
"""Bytes in a microsecond at 1 GB/s."""


class Network(NamedTuple):
    """What a rank gets of the network between hosts: assumed, not measured.

    The defaults are a port of 400 Gbit/s for each rank, at its full rate, and a round number.

    :ivar rate: GB/s (1e9 bytes) that a rank sends.
    :ivar latency: microseconds that each step of an exchange takes longer.
    """

    rate: float = 50.0
    latency: float = 5.0


class DeviceTime(NamedTuple):
    """What the device's part of an exchange takes within a host.

    :ivar fixed: microseconds, whatever is sent.
    :ivar peer: microseconds for each other rank; ``None`` where groups of one size were measured:
        then ``fixed`` has it for that size, and more ranks take no longer than that.
    :ivar rate: GB/s (1e9 bytes) of the bytes sent within the host, the rank's own work on its rows
        included.
    """

    fixed: float
    peer: float | None
    rate: float


class Source(NamedTuple):
    """A result that constants were fitted to.

    :ivar file: in the repository.
    :ivar device: the name of the GPU.
    :ivar versions: of torch and Triton.
    :ivar date: of the measurement.
    :ivar ranks: of the group, on one host.
    """

    file: str
    device: str
    versions: str
    date: str
    ranks: int


class Constants(NamedTuple):
    """What was measured.

    :ivar device: by transport and ``reduce``.
    :ivar host: microseconds of the host for a call without a graph, by transport, ``reduce`` and
        whether it is padded.
    :ivar sources: what they were fitted to.
    """

    device: Mapping[tuple[str, str], DeviceTime]
    host: Mapping[tuple[str, str, bool], float]
    sources: tuple[Source, ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Constants:
        """Read what ``to_dict`` returned."""
        return cls(
            {
                (one["transport"], one["reduce"]): DeviceTime(
                    one["fixed_us"], one["peer_us"], one["rate_gb_s"]
                )
                for one in values["device"]
            },
            {
                (one["transport"], one["reduce"], one["padded"]): one["host_us"]
                for one in values["host"]
            },
            tuple(Source(**one) for one in values["sources"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "sources": [source._asdict() for source in self.sources],
            "device": [
                {
                    "transport": transport,
                    "reduce": reduce,
                    "fixed_us": time.fixed,
                    "peer_us": time.peer,
                    "rate_gb_s": time.rate,
                }
                for (transport, reduce), time in self.device.items()
            ],
            "host": [
                {"transport": transport, "reduce": reduce, "padded": padded, "host_us": us}
                for (transport, reduce, padded), us in self.host.items()
            ],
        }


@functools.cache
def shipped() -> Constants:
    """Return the constants that come with the package.

    >>> shipped().sources[0].device
    'NVIDIA H200'
    """
    return Constants.from_dict(json.loads(CONSTANTS.read_text(encoding="utf-8")))


def microseconds(
    sizes: Deployment, way: Way, constants: Constants, network: Network
) -> float | None:
    """Return how long ``dispatch`` and ``combine`` take together, without the experts.

    The device takes ``fixed + peer (n - 1) + bytes within / rate``, and between hosts
    ``calls * latency + bytes between / network rate`` more. Without a graph host and device work
    side by side, and the slower one counts.

    :returns: ``None`` if this way was not measured.

    >>> sizes = Deployment(tokens=64, hidden_size=7168, topk=8, num_experts=256, ranks=2)
    >>> way = Way("all-to-all", "none", padded=True, graph=True)
    >>> constants = Constants({("all-to-all", "none"): DeviceTime(60.0, None, 200.0)}, {}, ())
    >>> microseconds(sizes, way, constants, Network())  # 60 us, and 14.7 MB at 200 GB/s
    133.41056
    """
    device = constants.device.get((way.transport, way.reduce))
    host = 0.0 if way.graph else constants.host.get((way.transport, way.reduce, way.padded))
    if device is None or host is None:
        return None
    sent = traffic(sizes, way)
    took = device.fixed + (device.peer or 0.0) * (sizes.ranks - 1)
    took += sent.bytes_within / (device.rate * _PER_US)
    if sizes.hosts > 1:
        took += way.calls * network.latency + sent.bytes_between / (network.rate * _PER_US)
    return max(host, took)


class Estimate(NamedTuple):
    """One way, for some sizes.

    :ivar microseconds: of ``dispatch`` and ``combine``; ``None`` where ``note`` says why not.
    :ivar note: why it has no time, or what its time is besides measured constants; ``""`` for a
        time within what was measured.
    """

    way: Way
    traffic: Traffic
    microseconds: float | None
    note: str


def estimates(
    sizes: Deployment, constants: Constants | None = None, network: Network | None = None
) -> tuple[Estimate, ...]:
    """Return what each way of ``WAYS`` sends and takes.

    :param constants: those that were measured; ``None``: the package's.
    :param network: between hosts; ``None``: the assumed one.

    >>> sizes = Deployment(tokens=64, hidden_size=7168, topk=8, num_experts=256, ranks=16)
    >>> [one.note for one in estimates(sizes) if one.way.transport == "symmetric"]
    ['within one host only', 'within one host only']
    """
    constants, network = constants or shipped(), network or Network()
    largest = max((source.ranks for source in constants.sources), default=0)
    beyond = [
        *(["extrapolated"] if sizes.ranks > largest else []),
        *(["network assumed"] if sizes.hosts > 1 else []),
    ]
    found = []
    for way in WAYS:
        note = _refused(sizes, way)
        time = None if note else microseconds(sizes, way, constants, network)
        note = ", ".join(beyond) if time is not None else note or "not measured"
        found.append(Estimate(way, traffic(sizes, way), time, note))
    return tuple(found)


def _refused(sizes: Deployment, way: Way) -> str:
    """Say why the transport does not take this group, if it does not."""
    if way.transport == "symmetric" and sizes.hosts > 1:
        return "within one host only"
    summing = way.transport == "all-to-all" and way.reduce == "rank"
    if summing and sizes.ranks > MOST_RANKS_TO_SUM_ON:
        return f"sums on up to {MOST_RANKS_TO_SUM_ON} ranks"
    return ""


def fastest(
    sizes: Deployment, constants: Constants | None = None, network: Network | None = None
) -> Way:
    """Return the way that takes least, of those with a time for tokens of each rank's own.

    :raises ValueError: no such way was measured.

    >>> sizes = Deployment(tokens=1, hidden_size=7168, topk=8, num_experts=256, ranks=64)
    >>> fastest(sizes).transport  # of several hosts
    'all-to-all'
    """
    times = {
        one.way: one.microseconds
        for one in estimates(sizes, constants, network)
        if one.microseconds is not None and not one.way.shared_batch
    }
    if not times:
        msg = "constants: expected the times of one way at least, got none"
        raise ValueError(msg)
    return min(times, key=lambda way: times[way])


class Change(NamedTuple):
    """Where the fastest way changes.

    :ivar start: the tokens of a rank, or the ranks, from which on it is the fastest.
    """

    start: int
    way: Way


def changes_by_tokens(
    sizes: Deployment, constants: Constants | None = None, network: Network | None = None
) -> tuple[Change, ...]:
    """Return the fastest way from 1 token of a rank on, and from where another one is faster.

    :param sizes: its tokens do not count.
    """

    def at(tokens: int) -> Way:
        return fastest(replace(sizes, tokens=tokens), constants, network)

    doubled = [2**power for power in range(MOST_TOKENS.bit_length())]
    found = [Change(1, at(1))]
    for low, high in itertools.pairwise(doubled):
        found += _changes(at, low, high)
    return tuple(found)


def _changes(at: Callable[[int], Way], low: int, high: int) -> list[Change]:
    """Return the changes behind ``low``, up to ``high``, by halving."""
    if at(low) == at(high):
        return []
    if high - low == 1:
        return [Change(high, at(high))]
    middle = (low + high) // 2
    return _changes(at, low, middle) + _changes(at, middle, high)


def changes_by_ranks(
    sizes: Deployment, constants: Constants | None = None, network: Network | None = None
) -> tuple[Change, ...]:
    """Return the fastest way from the least group on, and from where another one is faster.

    Every number of ranks is tried that these experts and hosts can have, up to that of the sizes.
    """
    found: list[Change] = []
    for ranks in range(2, sizes.ranks + 1):
        try:
            smaller = replace(sizes, ranks=ranks)
        except ValueError:
            continue
        way = fastest(smaller, constants, network)
        if not found or found[-1].way != way:
            found.append(Change(ranks, way))
    return tuple(found)
