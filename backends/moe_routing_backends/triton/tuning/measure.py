"""Measuring the launches of an operation on the user's device: which is fastest at which size.

What it measures is an operation's own (``Work``): ``tune.py`` here for ``route``, and
``planning/tune.py`` for ``plan``.
"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch

from moe_routing_backends.triton.tuning.store import user_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from moe_routing_registry import DeviceInfo

    Clock = Callable[[Callable[[], object], torch.device], float]
    OnStep = Callable[[str, int, int], None]

L = TypeVar("L")
"""A launch of the operation: a value that can be hashed."""
LaunchT_contra = TypeVar("LaunchT_contra", contravariant=True)
S = TypeVar("S")
"""A line of the operation's table."""

TOKENS = tuple(
    sorted({round(250_000 ** (n / 59)) for n in range(60)} | {1 << n for n in range(18)})
)
"""Sizes a quarter apart, and the powers of two, which batches mostly are.

A table of fewer keeps slow launches.
"""
EVERY = 4
"""One of so many sizes is measured with every candidate."""
NEAR = 1.25
"""How many times as slow as the fastest a candidate may be, to be measured between two sizes.

It must be that near at a size on either side.
"""
CONTENDERS = 8
"""About so many candidates are measured between two sizes."""
ROUNDS = 2
"""How often these are measured at each size, in passes over all sizes; the least time counts."""
BRACKET = 1.05
"""Ratio of two sizes between which a change of the launch is not looked for any more."""
LEAST_SETS = 4
"""Inputs that a measurement takes in turns at least."""
NOISE = 0.03
"""A launch is changed between two numbers of tokens only for a gain above this."""
MICROSECONDS = 400
"""About how long a replay of a CUDA graph takes.

The resolution of its clock is half a microsecond.
"""
MOST_CALLS = 64
"""Calls in a CUDA graph; capturing each takes the host some microseconds."""
REPLAYS = 9
COMPILING, MEASURING = 3.2, 0.003
"""Seconds that a kernel's compilation and a measurement took on average.

They took so long in one process, for ``route`` with an H100.
"""
HEAD_START = 1_000_000
"""Clock cycles for which the device waits while the host queues the replays."""


class Work(Protocol[LaunchT_contra]):
    """An operation to be measured: its inputs for any number of tokens, and its launches."""

    device: torch.device

    def shown(self, launch: LaunchT_contra) -> str:
        """Name a launch in a few words."""
        ...

    def kernels(self, launch: LaunchT_contra) -> int:
        """Return about how many kernels a launch compiles, over all sizes."""
        ...

    def serves(self, launch: LaunchT_contra, tokens: int) -> bool:
        """Tell whether a launch is worth a try at a size."""
        ...

    def bound(self, launch: LaunchT_contra) -> Any:  # noqa: ANN401 -- the operation's own; below: a kernel
        """Return a kernel that calls only this launch."""
        ...

    def compile(self, kernel: Any) -> None:  # noqa: ANN401 -- likewise
        """Call it for few tokens."""
        ...

    def expect(self, kernel: Any, tokens: int) -> None:  # noqa: ANN401 -- likewise
        """Keep what every launch must give at a size, to the bit.

        :param kernel: of the launch in use.
        :raises RuntimeError: it computes something else than the oracle.
        """
        ...

    def same(self, kernel: Any, tokens: int) -> bool:  # noqa: ANN401 -- likewise
        """Tell whether a kernel gives the same bits."""
        ...

    def turns(self, kernel: Any, tokens: int) -> Callable[[], object]:  # noqa: ANN401 -- likewise
        """Return a call of the kernel, which takes the inputs in turns."""
        ...


@dataclass(frozen=True, slots=True)
class Measured(Generic[L]):
    """What was measured for one problem.

    :ivar said: which table applied before.
    :ivar before: the launch that it has for each size.
    :ivar times: microseconds a call of the launches that were measured at each size, without those
        that are not to be used. Sizes that are not in ``before`` lie between two of which the
        launches differ; only these two were measured there.
    :ivar wrong: launches that computed something else than the contract says, a sentence each.
    :ivar unusable: launches that did not compile or run here, likewise.
    """

    said: str
    before: Mapping[int, L]
    times: Mapping[int, Mapping[L, float]]
    wrong: tuple[str, ...]
    unusable: tuple[str, ...]

    def timed(self) -> tuple[Timed[L], ...]:
        """Return the fastest launch for each size, and the one that served it before."""
        return tuple(_timed(T, self.times[T], launch) for T, launch in self.before.items())


@dataclass(frozen=True, slots=True)
class Timed(Generic[L]):
    """The fastest launch for one number of tokens, and the one that served it before.

    Microseconds a call.
    """

    tokens: int
    launch: L
    us: float
    launch_before: L
    us_before: float


@dataclass(frozen=True, slots=True)
class Tuned(Generic[L, S]):
    """What was tuned for one problem.

    :ivar table: the file in which the steps are kept.
    :ivar before: which table applied before.
    :ivar timed: the fastest launch for each number of tokens.
    :ivar steps: what is kept of it.
    :ivar wrong: candidates that computed something else than the contract says, a sentence each;
        they are not used.
    :ivar unusable: candidates that did not compile or run here, likewise.
    :ivar not_kept: why the steps could not be written into the table, ``""`` where they were.
    """

    table: str
    before: str
    timed: tuple[Timed[L], ...]
    steps: tuple[S, ...]
    wrong: tuple[str, ...]
    unusable: tuple[str, ...]
    not_kept: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; the limit of a step without an end is ``None``."""
        plain: dict[str, Any] = _plain(self)
        return plain


def _plain(value: Any) -> Any:  # noqa: ANN401 -- of any type, to JSON
    """Return dataclasses and named tuples as dictionaries, and no limit as ``None``."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return None if value == math.inf else value


def tuned(
    measured: Measured[L], device: DeviceInfo, steps: tuple[S, ...], keep: Callable[[], object]
) -> Tuned[L, S]:
    """Keep the steps, and return them with what was measured.

    :param keep: writes them into the user's own table.
    """
    not_kept = ""
    try:
        keep()
    except OSError as error:  # a full disk: what was measured is shown all the same
        not_kept = str(error)
    return Tuned(
        str(user_path(device)),
        measured.said,
        measured.timed(),
        steps,
        measured.wrong,
        measured.unusable,
        not_kept,
    )


def measure(  # noqa: PLR0913 -- what is measured, and how
    work: Work[L],
    launches: Sequence[L],
    in_use: Callable[[int], L],
    said: str,
    *,
    tokens: Sequence[int] | None = None,
    on_step: OnStep = lambda _what, _done, _total: None,
    clock: Clock | None = None,
) -> Measured[L]:
    """Check and time candidates for each number of tokens.

    Then look for the sizes at which the fastest changes.

    :param launches: those in use, then the candidates.
    :param in_use: returns the launch that serves so many tokens now.
    :param said: which table that is from.
    :param tokens: every candidate is timed at each of these; by default at one of ``EVERY`` of
        ``TOKENS``, and then at each of ``TOKENS`` the candidates that are near the fastest there or
        at the next size on either side.
    :param on_step: called before each compilation and each measurement with what is done, how many
        are done, and about how many there are; the first call says what all that takes.
    :param clock: returns the microseconds of a call; CUDA-graph replays where ``None``.
    :raises RuntimeError: the launch in use computes something else than the oracle.
    """
    sizes, full = sizes_of(tokens)
    rounds = 0 if tokens else ROUNDS
    served = {T: [launch for launch in launches if work.serves(launch, T)] for T in full}
    timings = sum(map(len, served.values())) + rounds * len(sizes) * CONTENDERS
    kernels = sum(map(work.kernels, launches))
    total = len(launches) + timings
    minutes = max(1, round((kernels * COMPILING + timings * MEASURING) / 60))
    on_step(
        f"about {minutes} min: {kernels} kernels to compile, about {timings:,} measurements",
        0,
        total,
    )
    bench = _Bench(
        work, in_use, clock or replayed, lambda what, done: on_step(what, min(done, total), total)
    )
    bench.compile(launches)
    for T, some in served.items():
        bench.time(T, some)
    for T in sizes * rounds:
        bench.time(T, _contenders(bench.right(), T))
    while change := _unsettled(bench.right()):
        bench.time(*change)
    on_step("done", total, total)
    return Measured(
        said,
        {T: in_use(T) for T in sizes},
        bench.right(),
        tuple(bench.wrong.values()),
        tuple(bench.unusable.values()),
    )


def sizes_of(tokens: Sequence[int] | None) -> tuple[list[int], list[int]]:
    """Return the sizes to measure, and those of them at which every candidate is."""
    sizes = sorted(set(tokens or TOKENS))
    return sizes, sizes if tokens else sorted({*sizes[::EVERY], sizes[-1]})


def _contenders(times: Mapping[int, Mapping[L, float]], tokens: int) -> list[L]:
    """Return the launches that are near the fastest at that size.

    The next measured size on either side counts too.
    """
    below, above = [T for T in times if tokens > T][-1:], [T for T in times if tokens < T][:1]
    sizes = [*below, *([tokens] if tokens in times else []), *above]
    near = [
        launch
        for T in sizes
        for launch, us in times[T].items()
        if us <= NEAR * min(times[T].values())
    ]
    return list(dict.fromkeys(near))


def _unsettled(times: Mapping[int, Mapping[L, float]]) -> tuple[int, list[L]] | None:
    """Return a size between two that are far apart, and the different launches of the two."""
    for (below, first), (above, second) in itertools.pairwise(chosen(times).items()):
        if first != second and above > below + 1 and above > below * BRACKET:
            return max(below + 1, math.isqrt(below * above)), [first, second]
    return None


class _Bench(Generic[L]):
    """Candidates of one problem, checked and timed for one number of tokens after another.

    :ivar times: microseconds a call, by size and launch.
    :ivar wrong: what computed something else, and at which size.
    :ivar unusable: what did not compile or run.
    """

    def __init__(
        self,
        work: Work[L],
        in_use: Callable[[int], L],
        clock: Clock,
        on_step: Callable[[str, int], None],
    ) -> None:
        self.times: dict[int, dict[L, float]] = {}
        self.wrong: dict[L, str] = {}
        self.unusable: dict[L, str] = {}
        self._work, self._in_use, self._clock, self._on_step = work, in_use, clock, on_step
        self._kernels: dict[L, Any] = {}
        self._done = 0

    def right(self) -> dict[int, dict[L, float]]:
        """Return the times of what may be used, by rising size."""
        out = {*self.wrong, *self.unusable}
        times = {
            T: {launch: us for launch, us in self.times[T].items() if launch not in out}
            for T in sorted(self.times)
        }
        return {T: found for T, found in times.items() if found}

    def compile(self, launches: Sequence[L]) -> None:
        """Call each launch once."""
        for launch in launches:
            kernel = self._kernels[launch] = self._work.bound(launch)
            self._try(
                f"compile {self._work.shown(launch)}", launch, partial(self._work.compile, kernel)
            )

    def time(self, tokens: int, launches: Sequence[L]) -> None:
        """Time each launch and the one in use, and keep the least time of each.

        What was not timed at this size before must give the bits of the one in use, and that is
        compared with the oracle.
        """
        work, now = self._work, self._in_use(tokens)
        found = self.times.setdefault(tokens, {})
        asked = dict.fromkeys([now, *launches])
        if asked.keys() - found.keys():
            work.expect(self._kernels[now], tokens)

        def timed(launch: L) -> None:
            kernel = self._kernels[launch]
            if launch in found or work.same(kernel, tokens):
                us = self._clock(work.turns(kernel, tokens), work.device)
                found[launch] = min(us, found.get(launch, math.inf))
            else:
                self.wrong[launch] = (
                    f"{work.shown(launch)} at T = {tokens}: other bits than {work.shown(now)}"
                )

        for launch in asked:
            self._try(f"T = {tokens}: {work.shown(launch)}", launch, partial(timed, launch))

    def _try(self, what: str, launch: L, attempt: Callable[[], object]) -> None:
        self._on_step(what, self._done)
        self._done += 1
        if launch in self.wrong or launch in self.unusable:
            return
        try:
            attempt()
        except Exception as error:  # noqa: BLE001 -- a launch that is too big for this device is an answer, not the end
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            self.unusable[launch] = f"{self._work.shown(launch)}: {said}"


def chosen(times: Mapping[int, Mapping[L, float]]) -> dict[int, L]:
    """Choose a launch for each size.

    The one of the size below as long as it loses nothing, else the fastest.

    :param times: by rising size.
    """
    found: dict[int, L] = {}
    launch: L | None = None
    for T, of in times.items():
        best = min(of, key=of.__getitem__)
        if launch is None or of.get(launch, math.inf) > of[best] * (1 + NOISE):
            launch = best
        found[T] = launch
    return found


def changes(times: Mapping[int, Mapping[L, float]]) -> list[tuple[int | None, L]]:
    """Return the launches that are chosen, each with the size up to which it serves.

    That is half-way to the next, on a scale of ratios; ``None`` for the last.

    >>> times = {1: {"a": 1.0, "b": 3.0}, 100: {"a": 2.0, "b": 1.99}, 10000: {"a": 9.0, "b": 4.0}}
    >>> changes(times)
    [(1000, 'a'), (None, 'b')]
    """
    launches = chosen(times)
    found: list[tuple[int | None, L]] = [
        (math.isqrt(a * b), launches[a])
        for a, b in itertools.pairwise(launches)
        if launches[a] != launches[b]
    ]
    return [*found, (None, launches[max(launches)])]


def replayed(work: Callable[[], object], device: torch.device) -> float:
    """Return the microseconds of a call.

    The median of CUDA graphs that are replayed one right after the other.

    All are queued before the first begins, so that a host that is held up does not count. A graph
    is captured by hand, because ``torch.cuda.graph`` empties the cache of the allocator each time.
    """
    torch.cuda.synchronize(device)  # the inputs were drawn on another stream
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        work()  # nothing is compiled during a capture
        graph = _captured(work, LEAST_SETS)
        # By the device's time, whatever the call costs the host: a graph of fewer calls adds more
        # of its own launch to each.
        about = _elapsed([graph.replay] * 3)[-1] / LEAST_SETS
        many = max(1, min(MOST_CALLS, round(MICROSECONDS / about)) // LEAST_SETS)
        graph = _captured(work, many * LEAST_SETS) if many > 1 else graph
        torch.cuda._sleep(HEAD_START)  # noqa: SLF001 -- there is no other name for it
        return statistics.median(_elapsed([graph.replay] * (REPLAYS + 1))[1:]) / many / LEAST_SETS


def _captured(work: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    for _ in range(calls):
        work()
    graph.capture_end()
    return graph


def _elapsed(works: Sequence[Callable[[], object]]) -> list[float]:
    """Return the microseconds of each, on the current stream."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(works) + 1)]
    events[0].record()
    for work, event in zip(works, events[1:], strict=True):
        work()
        event.record()
    events[-1].synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in itertools.pairwise(events)]


def _timed(tokens: int, found: Mapping[L, float], before: L) -> Timed[L]:
    best = min(found, key=found.__getitem__)
    return Timed(tokens, best, round(found[best], 3), before, round(found[before], 3))
