"""``moe-routing tune`` of ``route``: what is fastest goes into the user's own table."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from moe_routing import RoutingOutput
from moe_routing.reference.compare import compare
from moe_routing_backends.triton.kernels import VARIANTS, supports
from moe_routing_backends.triton.runtime.launcher import ALIGNMENT
from moe_routing_backends.triton.runtime.router import TritonRouter
from moe_routing_backends.triton.tuning import measure as measuring
from moe_routing_backends.triton.tuning.choose import describe_table, table_for
from moe_routing_backends.triton.tuning.measure import LEAST_SETS, changes, tuned
from moe_routing_backends.triton.tuning.store import check_keeping, keep
from moe_routing_backends.triton.tuning.table import Step, key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from moe_routing_backends.triton.kernels.spec import Launch
    from moe_routing_backends.triton.tuning.measure import Clock, Measured, OnStep, Tuned
    from moe_routing_registry import DeviceInfo, RoutingProblem

MOST_SETS = 16
"""Inputs that a measurement takes in turns at most: a power of two, as ``LEAST_SETS`` is."""
CACHE = 8 << 20
"""Bytes of logits that stay in every device's cache.

Up to that a measurement takes more than the least inputs in turns.
"""
SAMPLE = 512
"""Rows that are compared with the oracle, at each end."""


def tune(
    problem: RoutingProblem,
    device: DeviceInfo,
    *,
    tokens: Sequence[int] | None = None,
    on_step: OnStep = lambda _what, _done, _total: None,
    clock: Clock | None = None,
) -> Tuned[Launch, Step]:
    """Measure as ``measure`` does, and keep the steps in the user's own table.

    :raises OSError: the table could not be written; nothing is measured then.
    """
    check_keeping(device)
    measured = measure(problem, device, tokens=tokens, on_step=on_step, clock=clock)
    steps = steps_of(measured.times)
    return tuned(measured, device, steps, partial(keep, device, {key_of(problem): steps}))


def measure(
    problem: RoutingProblem,
    device: DeviceInfo,
    *,
    tokens: Sequence[int] | None = None,
    on_step: OnStep = lambda _what, _done, _total: None,
    clock: Clock | None = None,
) -> Measured[Launch]:
    """Check and time candidates for each number of tokens, as ``tuning/measure.py`` says."""
    said, steps = describe_table(device, problem), table_for(device, problem).steps(problem)
    launches = list(dict.fromkeys([*(step.launch for step in steps), *candidates(problem, device)]))
    return measuring.measure(
        Inputs(problem, device, max(tokens or measuring.TOKENS)),
        launches,
        partial(launch_at, steps),
        said,
        tokens=tokens,
        on_step=on_step,
        clock=clock,
    )


def candidates(problem: RoutingProblem, device: DeviceInfo) -> list[Launch]:
    """Return the launches that are worth a try, few, for each must be compiled."""
    offered = [
        launch
        for variant in VARIANTS.values()
        if variant.runs_on(device)
        for launch in variant.candidates(device)
    ]
    return [launch for launch in offered if supports(problem, launch)]


def steps_of(times: Mapping[int, Mapping[Launch, float]]) -> tuple[Step, ...]:
    """Return the lines of a table: the launches that are chosen.

    >>> from moe_routing_backends.triton.kernels.spec import Launch
    >>> a, b = Launch("cooperative", 1, 1, 1), Launch("thread_per_row", 32, 1, 1)
    >>> times = {1: {a: 1.0, b: 3.0}, 100: {a: 2.0, b: 1.99}, 10000: {a: 9.0, b: 4.0}}
    >>> [step.tokens for step in steps_of(times)]
    [1000, inf]
    """
    return tuple(
        Step(math.inf if tokens is None else tokens, launch) for tokens, launch in changes(times)
    )


def launch_at(steps: Sequence[Step], tokens: int) -> Launch:
    """Return the launch that serves so many tokens."""
    return next(step.launch for step in steps if step.tokens >= tokens)


def shown(launch: Launch) -> str:
    """Name a launch in a few words."""
    share = "" if launch.variant == "cooperative" else f", {launch.threads_per_row} threads a row"
    return f"{launch.variant}, {launch.block_t} rows a program{share}, {launch.num_warps} warps"


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

    def shown(self, launch: Launch) -> str:
        """Name a launch in a few words."""
        return shown(launch)

    def kernels(self, _launch: Launch) -> int:
        """Return 1: a launch is a kernel."""
        return 1

    def serves(self, _launch: Launch, _tokens: int) -> bool:
        """Return true: a launch is worth a try at every size."""
        return True

    def bound(self, launch: Launch) -> TritonRouter:
        """Return a router that calls only this launch."""
        return TritonRouter(self.problem, self.info, (Step(math.inf, launch),))

    def compile(self, router: TritonRouter) -> None:
        """Route a token."""
        self.routed(router, 1)

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
