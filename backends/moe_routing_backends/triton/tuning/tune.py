"""Measuring launches on the user's device, for ``moe-routing tune``.

What is fastest goes into the user's own table.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from moe_routing import RoutingOutput
from moe_routing.reference.compare import compare
from moe_routing_backends.triton.kernels import VARIANTS, supports
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

TOKENS = tuple(
    sorted({round(250_000 ** (n / 59)) for n in range(60)} | {1 << n for n in range(18)})
)
"""Sizes a quarter apart, and the powers of two, which batches mostly are.

A table of fewer keeps slow launches.
"""
EVERY = 4
"""One of so many sizes is measured with every candidate."""
NEAR = 1.25
"""How much slower than the fastest a candidate may be at a size on either side, to be measured between."""
CONTENDERS = 4
"""About how many are."""
SETS = 4
"""Inputs that a measurement takes in turns."""
SAMPLE = 512
"""Rows that are compared with the oracle, at each end."""
NOISE = 0.03
"""A launch is changed between two numbers of tokens only for a gain above this."""
MILLISECONDS = 10


@dataclass(frozen=True, slots=True)
class Timed:
    """The best launch for one number of tokens, and the one that served it before.

    Microseconds a call.
    """

    tokens: int
    launch: Launch
    us: float
    launch_before: Launch
    us_before: float


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was measured for one problem.

    :ivar table: the file in which the steps are kept.
    :ivar before: which table spoke before.
    :ivar timed: the best launch for each number of tokens.
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
    not_kept: str = ""

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
    on_step: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
    clock: Clock | None = None,
) -> Tuned:
    """Check and time candidates for each number of tokens, and keep the best.

    :param tokens: every candidate is timed at each of these; by default at a few of ``TOKENS``, and
        at the sizes between those only the candidates that are near the fastest on either side: a
        step of the table is then off by one size at most.
    :param on_step: called before each candidate with what is measured, how many are done, and about
        how many there are.
    :param clock: returns the microseconds of a call; CUDA-graph replays where ``None``.
    :raises OSError: the table could not be written; nothing is measured then.
    :raises RuntimeError: the launch in use computes something else than the oracle.
    """
    check_keeping(device)
    measured = measure(problem, device, tokens=tokens, on_step=on_step, clock=clock)
    not_kept = ""
    try:
        keep(device, {key_of(problem): measured.steps})
    except OSError as error:  # a full disk: what was measured is shown all the same
        not_kept = str(error)
    return replace(measured, table=str(user_path(device)), not_kept=not_kept)


def measure(
    problem: RoutingProblem,
    device: DeviceInfo,
    *,
    tokens: Sequence[int] | None = None,
    on_step: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
    clock: Clock | None = None,
) -> Tuned:
    """Do what ``tune`` does, and keep nothing."""
    sizes = sorted(set(tokens or TOKENS))
    first = sizes if tokens else sorted({*sizes[::EVERY], sizes[-1]})
    said, before = describe_table(device, problem), table_for(device, problem).steps(problem)
    now = {T: next(step.launch for step in before if step.tokens >= T) for T in sizes}
    launches = list(dict.fromkeys([*now.values(), *candidates(problem, device)]))
    every = len(first) * len(launches) + (len(sizes) - len(first)) * CONTENDERS
    bench = _Bench(
        problem,
        device,
        launches,
        clock or replayed,
        lambda what, done: on_step(what, min(done, every), every),
    )
    times = {T: bench.times(T, now[T], launches) for T in first}
    for T in sizes:
        if T not in times:
            times[T] = bench.times(T, now[T], _contenders(times, T, now[T]))
    on_step("done", every, every)
    right = [
        {launch: us for launch, us in times[T].items() if launch not in bench.out} for T in sizes
    ]
    timed = [_timed(T, found, now[T]) for T, found in zip(sizes, right, strict=True)]
    steps = steps_of(sizes, right)
    return Tuned(
        "", said, tuple(timed), steps, tuple(bench.wrong.values()), tuple(bench.unusable.values())
    )


def _contenders(
    times: Mapping[int, Mapping[Launch, float]], tokens: int, now: Launch
) -> list[Launch]:
    """Return the launches that are near the fastest at a measured size on either side, and the one in use."""
    below, above = max(T for T in times if tokens > T), min(T for T in times if tokens < T)
    near = [
        launch
        for found in (times[below], times[above])
        for launch, us in found.items()
        if us <= NEAR * min(found.values())
    ]
    return list(dict.fromkeys([now, *near]))


class _Bench:
    """Candidates of one problem, checked and timed for one number of tokens after another.

    :ivar wrong: what computed something else, and at which size.
    :ivar unusable: what did not compile or run.
    """

    def __init__(
        self,
        problem: RoutingProblem,
        device: DeviceInfo,
        launches: Sequence[Launch],
        clock: Clock,
        on_step: Callable[[str, int], None],
    ) -> None:
        self.wrong: dict[Launch, str] = {}
        self.unusable: dict[Launch, str] = {}
        self._problem, self._device, self._clock, self._on_step = problem, device, clock, on_step
        self._routers = {
            launch: TritonRouter(problem, device, (Step(math.inf, launch),)) for launch in launches
        }
        self._done = 0

    @property
    def out(self) -> set[Launch]:
        """What must not be used."""
        return {*self.wrong, *self.unusable}

    def times(self, tokens: int, now: Launch, launches: Sequence[Launch]) -> dict[Launch, float]:
        """Check each launch against the one in use, and that against the oracle.

        Return the microseconds of the right ones.
        """
        inputs = _Inputs(self._problem, self._device, tokens)
        inputs.expect(self._routers[now])
        found: dict[Launch, float] = {}
        for launch in launches:
            self._on_step(f"T = {tokens}: {shown(launch)}", self._done)
            self._done += 1
            if launch in self.out:
                continue
            router = self._routers[launch]
            try:
                if inputs.same(router):
                    found[launch] = self._clock(inputs.turns(router), inputs.device)
                else:
                    self.wrong[launch] = (
                        f"{shown(launch)} at T = {tokens}: other bits than {shown(now)}"
                    )
            except Exception as error:  # noqa: BLE001 -- a launch that is too big for this device is an answer, not the end
                said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                self.unusable[launch] = f"{shown(launch)}: {said}"
        return found


def candidates(problem: RoutingProblem, device: DeviceInfo) -> list[Launch]:
    """Return the launches that are worth a try, few, for each must be compiled."""
    offered = [
        launch
        for variant in VARIANTS.values()
        if variant.runs_on(device)
        for launch in variant.candidates(device)
    ]
    return [launch for launch in offered if supports(problem, launch)]


def steps_of(sizes: Sequence[int], times: Sequence[dict[Launch, float]]) -> tuple[Step, ...]:
    """Choose a launch for each size, the one before as long as it loses nothing.

    Change half-way, on a scale of ratios.

    >>> from moe_routing_backends.triton.kernels.spec import Launch
    >>> a, b = Launch("cooperative", 1, 1, 1), Launch("thread_per_row", 32, 1, 1)
    >>> [step.tokens for step in steps_of([1, 100, 10000], [{a: 1.0, b: 3.0}, {a: 2.0, b: 1.99}, {a: 9.0, b: 4.0}])]
    [1000, inf]
    """
    steps: list[Step] = []
    launch = min(times[0], key=times[0].__getitem__)
    for before, size, found in zip(sizes, sizes[1:], times[1:]):  # noqa: B905 -- pairs of neighbours: lengths differ by one
        best = min(found, key=found.__getitem__)
        if found.get(launch, math.inf) > found[best] * (1 + NOISE):
            steps.append(Step(math.isqrt(before * size), launch))
            launch = best
    return (*steps, Step(math.inf, launch))


def shown(launch: Launch) -> str:
    """Name a launch in a few words."""
    share = "" if launch.variant == "cooperative" else f", {launch.threads_per_row} threads a row"
    return f"{launch.variant}, {launch.block_t} rows a program{share}, {launch.num_warps} warps"


def replayed(work: Callable[[], object], device: torch.device) -> float:
    """Return the microseconds of a call inside a replayed CUDA graph."""
    from triton.testing import do_bench_cudagraph

    with torch.cuda.device(device):
        return float(do_bench_cudagraph(work, rep=MILLISECONDS, return_mode="median")) * 1e3


def _timed(tokens: int, found: dict[Launch, float], before: Launch) -> Timed:
    best = min(found, key=found.__getitem__)
    return Timed(tokens, best, round(found[best], 3), before, round(found[before], 3))


class _Inputs:
    """Seeded inputs of one problem for T tokens, outputs to write into, and what they must hold."""

    def __init__(self, problem: RoutingProblem, info: DeviceInfo, tokens: int) -> None:
        self.device = torch.device(
            "cpu" if info.type == "cpu" else f"{info.type}:{info.index or 0}"
        )
        self._problem = problem
        generator = torch.Generator(device=self.device).manual_seed(tokens)
        spec, experts, k = problem.spec, problem.num_experts, problem.topk

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        self.logits = [
            drawn(tokens, experts).to(getattr(torch, problem.dtype)) for _ in range(SETS)
        ]
        columns, ids_dtype = k + spec.shared_experts, getattr(torch, problem.ids_dtype)
        self.outs = [
            RoutingOutput(
                drawn(tokens, columns),
                torch.empty(tokens, columns, dtype=ids_dtype, device=self.device),
            )
            for _ in range(SETS)
        ]
        self.operands: dict[str, Any] = {}
        if spec.per_expert_scale:
            self.operands["per_expert_scale"] = drawn(experts).abs() + 0.5
        if spec.needs_bias:
            self.operands["bias"] = drawn(experts) * 0.1
        if spec.selection == "token_table":
            self.operands["expert_table"] = drawn(64, experts).topk(k).indices
            self.operands["token_ids"] = torch.arange(tokens, device=self.device) % 64
        self._expected: RoutingOutput | None = None

    def _routed(self, router: TritonRouter) -> RoutingOutput:
        self.outs[0].weights.fill_(torch.nan)  # what stays so was not written
        self.outs[0].ids.fill_(-7)
        return router(self.logits[0], **self.operands, out=self.outs[0])

    def expect(self, router: TritonRouter) -> None:
        """Route with the launch in use, compare with the float64 oracle, and keep the bits that all others must have."""
        output = self._routed(router)
        self._expected = RoutingOutput(output.weights.clone(), output.ids.clone())
        for part in {
            slice(0, SAMPLE).indices(len(output.ids)),
            slice(-SAMPLE, None).indices(len(output.ids)),
        }:
            rows = slice(*part)
            operands = {
                name: v[rows] if name == "token_ids" else v for name, v in self.operands.items()
            }
            some = RoutingOutput(output.weights[rows], output.ids[rows])
            problems = compare(
                self._problem.spec, self.logits[0][rows], self._problem.topk, some, **operands
            ).problems
            if problems:
                msg = f"the launch in use computes something else than the oracle, so nothing is tuned: {problems[0]}"
                raise RuntimeError(msg)

    def same(self, router: TritonRouter) -> bool:
        """Tell whether a candidate gives the same bits."""
        assert self._expected is not None  # noqa: S101 -- for mypy: `expect` came before
        output = self._routed(router)
        return torch.equal(output.weights, self._expected.weights) and torch.equal(
            output.ids, self._expected.ids
        )

    def turns(self, router: TritonRouter) -> Callable[[], object]:
        """Return what routes the inputs in turns."""
        pairs = itertools.cycle(list(zip(self.logits, self.outs, strict=True)))

        def work() -> None:
            logits, out = next(pairs)
            router(logits, **self.operands, out=out)

        return work
