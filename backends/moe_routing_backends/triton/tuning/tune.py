"""Measuring launches on the user's device, for ``moe-routing tune``.

What is fastest goes into the user's own table.
"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from moe_routing import RoutingOutput
from moe_routing.reference.compare import compare
from moe_routing_backends.triton.kernels import VARIANTS, supports
from moe_routing_backends.triton.runtime.launcher import ALIGNMENT
from moe_routing_backends.triton.runtime.router import TritonRouter
from moe_routing_backends.triton.tuning.choose import describe_table, table_for
from moe_routing_backends.triton.tuning.store import check_keeping, keep, user_path
from moe_routing_backends.triton.tuning.table import Step, key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from moe_routing_backends.triton.kernels.spec import Launch
    from moe_routing_registry import DeviceInfo, RoutingProblem

    Clock = Callable[[Callable[[], object], torch.device], float]
    OnStep = Callable[[str, int, int], None]

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
LEAST_SETS, MOST_SETS = 4, 16
"""Inputs that a measurement takes in turns: powers of two."""
CACHE = 8 << 20
"""Bytes of logits that stay in every device's cache.

Up to that a measurement takes more than the least inputs in turns.
"""
SAMPLE = 512
"""Rows that are compared with the oracle, at each end."""
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

They took so long in one process, with an H100.
"""
HEAD_START = 1_000_000
"""Clock cycles for which the device waits while the host queues the replays."""


@dataclass(frozen=True, slots=True)
class Measured:
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
    before: Mapping[int, Launch]
    times: Mapping[int, Mapping[Launch, float]]
    wrong: tuple[str, ...]
    unusable: tuple[str, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """Return the lines of a table that it comes to."""
        return steps_of(self.times)


@dataclass(frozen=True, slots=True)
class Timed:
    """The fastest launch for one number of tokens, and the one that served it before.

    Microseconds a call.
    """

    tokens: int
    launch: Launch
    us: float
    launch_before: Launch
    us_before: float


@dataclass(frozen=True, slots=True)
class Tuned:
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
    timed: tuple[Timed, ...]
    steps: tuple[Step, ...]
    wrong: tuple[str, ...]
    unusable: tuple[str, ...]
    not_kept: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a step without an end has ``tokens`` ``None``."""
        plain = asdict(self)
        for step in plain["steps"]:
            step["tokens"] = None if step["tokens"] == math.inf else step["tokens"]
        return plain


def tune(
    problem: RoutingProblem,
    device: DeviceInfo,
    *,
    tokens: Sequence[int] | None = None,
    on_step: OnStep = lambda _what, _done, _total: None,
    clock: Clock | None = None,
) -> Tuned:
    """Measure as ``measure`` does, and keep the steps in the user's own table.

    :raises OSError: the table could not be written; nothing is measured then.
    """
    check_keeping(device)
    measured = measure(problem, device, tokens=tokens, on_step=on_step, clock=clock)
    steps, not_kept = measured.steps, ""
    try:
        keep(device, {key_of(problem): steps})
    except OSError as error:  # a full disk: what was measured is shown all the same
        not_kept = str(error)
    timed = tuple(_timed(T, measured.times[T], launch) for T, launch in measured.before.items())
    return Tuned(
        str(user_path(device)),
        measured.said,
        timed,
        steps,
        measured.wrong,
        measured.unusable,
        not_kept,
    )


def measure(
    problem: RoutingProblem,
    device: DeviceInfo,
    *,
    tokens: Sequence[int] | None = None,
    on_step: OnStep = lambda _what, _done, _total: None,
    clock: Clock | None = None,
) -> Measured:
    """Check and time candidates for each number of tokens.

    Then look for the sizes at which the fastest changes.

    :param tokens: every candidate is timed at each of these; by default at one of ``EVERY`` of
        ``TOKENS``, and then at each of ``TOKENS`` the candidates that are near the fastest there or
        at the next size on either side.
    :param on_step: called before each compilation and each measurement with what is done, how many
        are done, and about how many there are; the first call says what all that takes.
    :param clock: returns the microseconds of a call; CUDA-graph replays where ``None``.
    :raises RuntimeError: the launch in use computes something else than the oracle.
    """
    sizes = sorted(set(tokens or TOKENS))
    full = sizes if tokens else sorted({*sizes[::EVERY], sizes[-1]})
    rounds = 0 if tokens else ROUNDS
    said, steps = describe_table(device, problem), table_for(device, problem).steps(problem)
    launches = list(dict.fromkeys([*(step.launch for step in steps), *candidates(problem, device)]))
    timings = len(full) * len(launches) + rounds * len(sizes) * CONTENDERS
    total = len(launches) + timings
    minutes = max(1, round((len(launches) * COMPILING + timings * MEASURING) / 60))
    on_step(
        f"about {minutes} min: {len(launches)} kernels to compile, about {timings:,} measurements",
        0,
        total,
    )
    inputs = Inputs(problem, device, sizes[-1])
    bench = _Bench(
        inputs, steps, clock or replayed, lambda what, done: on_step(what, min(done, total), total)
    )
    bench.compile(launches)
    for T in full:
        bench.time(T, launches)
    for T in sizes * rounds:
        bench.time(T, _contenders(bench.right(), T))
    while change := _unsettled(bench.right()):
        bench.time(*change)
    on_step("done", total, total)
    before = {T: launch_at(steps, T) for T in sizes}
    return Measured(
        said, before, bench.right(), tuple(bench.wrong.values()), tuple(bench.unusable.values())
    )


def _contenders(times: Mapping[int, Mapping[Launch, float]], tokens: int) -> list[Launch]:
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


def _unsettled(times: Mapping[int, Mapping[Launch, float]]) -> tuple[int, list[Launch]] | None:
    """Return a size between two that are far apart, and the different launches of the two."""
    for (below, first), (above, second) in itertools.pairwise(chosen(times).items()):
        if first != second and above > below + 1 and above > below * BRACKET:
            return max(below + 1, math.isqrt(below * above)), [first, second]
    return None


class _Bench:
    """Candidates of one problem, checked and timed for one number of tokens after another.

    :ivar times: microseconds a call, by size and launch.
    :ivar wrong: what computed something else, and at which size.
    :ivar unusable: what did not compile or run.
    """

    def __init__(
        self,
        inputs: Inputs,
        in_use: Sequence[Step],
        clock: Clock,
        on_step: Callable[[str, int], None],
    ) -> None:
        self.times: dict[int, dict[Launch, float]] = {}
        self.wrong: dict[Launch, str] = {}
        self.unusable: dict[Launch, str] = {}
        self._inputs, self._in_use, self._clock, self._on_step = inputs, in_use, clock, on_step
        self._routers: dict[Launch, TritonRouter] = {}
        self._done = 0

    def right(self) -> dict[int, dict[Launch, float]]:
        """Return the times of what may be used, by rising size."""
        out = {*self.wrong, *self.unusable}
        times = {
            T: {launch: us for launch, us in self.times[T].items() if launch not in out}
            for T in sorted(self.times)
        }
        return {T: found for T, found in times.items() if found}

    def compile(self, launches: Sequence[Launch]) -> None:
        """Call each launch once."""
        for launch in launches:
            self._routers[launch] = TritonRouter(
                self._inputs.problem, self._inputs.info, (Step(math.inf, launch),)
            )
            self._try(
                f"compile {shown(launch)}",
                launch,
                partial(self._inputs.routed, self._routers[launch], 1),
            )

    def time(self, tokens: int, launches: Sequence[Launch]) -> None:
        """Time each launch and the one in use, and keep the least time of each.

        What was not timed at this size before must give the bits of the one in use, and that is
        compared with the oracle.
        """
        inputs, now = self._inputs, launch_at(self._in_use, tokens)
        found = self.times.setdefault(tokens, {})
        asked = dict.fromkeys([now, *launches])
        if asked.keys() - found.keys():
            inputs.expect(self._routers[now], tokens)

        def timed(launch: Launch) -> None:
            router = self._routers[launch]
            if launch in found or inputs.same(router, tokens):
                us = self._clock(inputs.turns(router, tokens), inputs.device)
                found[launch] = min(us, found.get(launch, math.inf))
            else:
                self.wrong[launch] = (
                    f"{shown(launch)} at T = {tokens}: other bits than {shown(now)}"
                )

        for launch in asked:
            self._try(f"T = {tokens}: {shown(launch)}", launch, partial(timed, launch))

    def _try(self, what: str, launch: Launch, work: Callable[[], object]) -> None:
        self._on_step(what, self._done)
        self._done += 1
        if launch in self.wrong or launch in self.unusable:
            return
        try:
            work()
        except Exception as error:  # noqa: BLE001 -- a launch that is too big for this device is an answer, not the end
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            self.unusable[launch] = f"{shown(launch)}: {said}"


def candidates(problem: RoutingProblem, device: DeviceInfo) -> list[Launch]:
    """Return the launches that are worth a try, few, for each must be compiled."""
    offered = [
        launch
        for variant in VARIANTS.values()
        if variant.runs_on(device)
        for launch in variant.candidates(device)
    ]
    return [launch for launch in offered if supports(problem, launch)]


def chosen(times: Mapping[int, Mapping[Launch, float]]) -> dict[int, Launch]:
    """Choose a launch for each size.

    The one of the size below as long as it loses nothing, else the fastest.

    :param times: by rising size.
    """
    found: dict[int, Launch] = {}
    launch = None
    for T, of in times.items():
        best = min(of, key=of.__getitem__)
        if launch is None or of.get(launch, math.inf) > of[best] * (1 + NOISE):
            launch = best
        found[T] = launch
    return found


def steps_of(times: Mapping[int, Mapping[Launch, float]]) -> tuple[Step, ...]:
    """Return the lines of a table.

    The launches that are chosen, each up to half-way to the next, on a scale of ratios.

    >>> from moe_routing_backends.triton.kernels.spec import Launch
    >>> a, b = Launch("cooperative", 1, 1, 1), Launch("thread_per_row", 32, 1, 1)
    >>> times = {1: {a: 1.0, b: 3.0}, 100: {a: 2.0, b: 1.99}, 10000: {a: 9.0, b: 4.0}}
    >>> [step.tokens for step in steps_of(times)]
    [1000, inf]
    """
    launches = chosen(times)
    changes = ((a, b) for a, b in itertools.pairwise(launches) if launches[a] != launches[b])
    steps = [Step(math.isqrt(a * b), launches[a]) for a, b in changes]
    return (*steps, Step(math.inf, launches[max(launches)]))


def launch_at(steps: Sequence[Step], tokens: int) -> Launch:
    """Return the launch that serves so many tokens."""
    return next(step.launch for step in steps if step.tokens >= tokens)


def shown(launch: Launch) -> str:
    """Name a launch in a few words."""
    share = "" if launch.variant == "cooperative" else f", {launch.threads_per_row} threads a row"
    return f"{launch.variant}, {launch.block_t} rows a program{share}, {launch.num_warps} warps"


def replayed(work: Callable[[], object], device: torch.device) -> float:
    """Return the microseconds of a call.

    The median of CUDA graphs that are replayed one right after the other.

    All are queued before the first begins, so that a host that is held up does not count. A graph
    is captured by hand, because ``torch.cuda.graph`` empties the cache of the allocator each time.
    """
    torch.cuda.synchronize(device)  # the inputs were drawn on another stream
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        about = _elapsed([lambda: [work() for _ in range(LEAST_SETS)]] * 2)[-1] / LEAST_SETS
        calls = LEAST_SETS * max(1, min(MOST_CALLS, round(MICROSECONDS / about)) // LEAST_SETS)
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for _ in range(calls):
            work()
        graph.capture_end()
        torch.cuda._sleep(HEAD_START)  # noqa: SLF001 -- there is no other name for it
        return statistics.median(_elapsed([graph.replay] * (REPLAYS + 1))[1:]) / calls


def _elapsed(works: Sequence[Callable[[], object]]) -> list[float]:
    """Return the microseconds of each, on the current stream."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(works) + 1)]
    events[0].record()
    for work, event in zip(works, events[1:], strict=True):
        work()
        event.record()
    events[-1].synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in itertools.pairwise(events)]


def _timed(tokens: int, found: Mapping[Launch, float], before: Launch) -> Timed:
    best = min(found, key=found.__getitem__)
    return Timed(tokens, best, round(found[best], 3), before, round(found[before], 3))


class Inputs:
    """Seeded inputs of one problem, outputs to write into, and what they must hold.

    The inputs of more tokens begin with those of fewer. So the same rows are slow for all sizes: in
    some variants a row of scores that are nearly equal takes longer, and then so does the whole
    call.
    """

    def __init__(self, problem: RoutingProblem, info: DeviceInfo, most: int) -> None:
        """Draw them for up to so many tokens."""
        self.device = torch.device(
            "cpu" if info.type == "cpu" else f"{info.type}:{info.index or 0}"
        )
        self.problem, self.info = problem, info
        generator = torch.Generator(device=self.device).manual_seed(0)
        spec, experts, k = problem.spec, problem.num_experts, problem.topk
        dtype: torch.dtype = getattr(torch, problem.dtype)

        def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device, dtype=dtype)

        self._cached = CACHE // (experts * dtype.itemsize)
        rows = max(LEAST_SETS * most, min(MOST_SETS * most, self._cached))
        rows += -rows % (
            MOST_SETS * ALIGNMENT
        )  # each input begins where kernels for aligned rows can take it
        columns, ids_dtype = k + spec.shared_experts, getattr(torch, problem.ids_dtype)
        self._logits = drawn(rows, experts, dtype=dtype)
        self._weights = torch.empty(rows, columns, device=self.device)
        self._ids = torch.empty(rows, columns, dtype=ids_dtype, device=self.device)
        self._operands: dict[str, Any] = {}
        if spec.per_expert_scale:
            self._operands["per_expert_scale"] = drawn(experts).abs() + 0.5
        if spec.needs_bias:
            self._operands["bias"] = drawn(experts) * 0.1
        if spec.selection == "token_table":
            self._operands["expert_table"] = drawn(64, experts).topk(k).indices
            self._token_ids = torch.arange(most, device=self.device) % 64
        self._expected: RoutingOutput | None = None

    def _sets(self, tokens: int) -> list[tuple[Tensor, RoutingOutput]]:
        """Return the inputs for so many tokens, as many as the cache holds, and their outputs."""
        count = max(
            LEAST_SETS, min(MOST_SETS, 1 << max(1, self._cached // tokens).bit_length() - 1)
        )
        starts = range(0, count * (apart := len(self._logits) // count), apart)
        parts = [slice(start, start + tokens) for start in starts]
        return [
            (self._logits[part], RoutingOutput(self._weights[part], self._ids[part]))
            for part in parts
        ]

    def _others(self, tokens: int) -> dict[str, Any]:
        ids = (
            {"token_ids": self._token_ids[:tokens]}
            if self.problem.spec.selection == "token_table"
            else {}
        )
        return {**self._operands, **ids}

    def routed(self, router: TritonRouter, tokens: int) -> RoutingOutput:
        """Route the first input into outputs that hold nothing right."""
        logits, out = self._sets(tokens)[0]
        out.weights.fill_(torch.nan)  # what stays so was not written
        out.ids.fill_(-7)
        return router(logits, **self._others(tokens), out=out)

    def expect(self, router: TritonRouter, tokens: int) -> None:
        """Route with the launch in use, and compare with the float64 oracle.

        Keep the bits, which all other launches must give too.
        """
        output = self.routed(router, tokens)
        self._expected = RoutingOutput(output.weights.clone(), output.ids.clone())
        for part in {slice(0, SAMPLE).indices(tokens), slice(-SAMPLE, None).indices(tokens)}:
            rows = slice(*part)
            operands = {
                name: v[rows] if name == "token_ids" else v
                for name, v in self._others(tokens).items()
            }
            some = RoutingOutput(output.weights[rows], output.ids[rows])
            logits = self._logits[:tokens][rows]
            problems = compare(
                self.problem.spec, logits, self.problem.topk, some, **operands
            ).problems
            if problems:
                msg = (
                    "the launch in use computes something else than the oracle, so nothing is "
                    f"tuned: {problems[0]}"
                )
                raise RuntimeError(msg)

    def same(self, router: TritonRouter, tokens: int) -> bool:
        """Tell whether a candidate gives the same bits."""
        assert self._expected is not None  # noqa: S101 -- for mypy: `expect` came before
        output = self.routed(router, tokens)
        return torch.equal(output.weights, self._expected.weights) and torch.equal(
            output.ids, self._expected.ids
        )

    def turns(self, router: TritonRouter, tokens: int) -> Callable[[], object]:
        """Return what routes the inputs in turns."""
        sets, others = itertools.cycle(self._sets(tokens)), self._others(tokens)

        def work() -> None:
            logits, out = next(sets)
            router(logits, **others, out=out)

        return work
