"""Cases of ``balance``: made from a few words, the same on every machine."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.balancing.problem import LOGSUMEXP, SCORES, BalanceProblem
from moe_routing.balancing.sums import sums
from moe_routing.conformance.permutation import outcomes, values
from moe_routing.reference import balance_oracle as oracle
from moe_routing_registry.request import preferring

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Generator, Tensor

    from moe_routing.conformance.under_test import BackendUnderTest

DTYPES = ("bfloat16", "float16", "float32", "float64")
KINDS = (*SCORES, "best", LOGSUMEXP)
"""What is summed: a score with the counts of ids, the best scores, or squares of logarithms."""


def problem_of(kind: str, experts: int, topk: int, dtype: str) -> BalanceProblem:
    """Return the problem of a kind."""
    counts: Any = {"best": "best", LOGSUMEXP: ""}.get(kind, "ids")
    score: Any = "softmax" if kind == "best" else kind
    return BalanceProblem(
        score=score, num_experts=experts, dtype=dtype, counts=counts, topk=topk if counts else 0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The arguments of one call."""

    problem: BalanceProblem
    logits: Tensor
    ids: Tensor | None
    weights: Tensor | None

    def but(self, **changes: Any) -> Call:  # noqa: ANN401 -- the fields
        """Return the call with some arguments changed."""
        return replace(self, **changes)

    @property
    def device(self) -> torch.device:
        """The device of all."""
        return self.logits.device

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the call reads, by name."""
        named = {"logits": self.logits, "ids": self.ids, "weights": self.weights}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def outputs(self) -> tuple[Tensor, Tensor]:
        """Tensors on the device of meta, of the shapes and dtypes that a kernel writes."""
        batches, problem = self.logits.shape[0], self.problem
        best = problem.counts == "best"
        wide = problem.dtype == "float64" and not best
        columns = (problem.num_experts,) * 2 if problem.counts else (1, 0)
        dtypes = (
            torch.float64 if wide else torch.float32, torch.float32 if best else torch.int64,
        )  # fmt: skip
        made = [
            torch.empty(batches, some, dtype=dtype, device="meta")
            for some, dtype in zip(columns, dtypes, strict=True)
        ]
        return made[0], made[1]

    def copy_(self, other: Call) -> None:
        """Write the tensors of another call of the same shapes over those of this one."""
        for name, tensor in other.tensors.items():
            self.tensors[name].detach().copy_(tensor)

    def made(self, under_test: BackendUnderTest) -> tuple[Tensor, Tensor]:
        """Call the operation as losses do, with the backend preferred.

        :raises DeclinedError: the backend declines the problem.
        """
        best = self.problem.topk if self.problem.counts == "best" else 0
        with under_test.declining(), preferring(under_test.backend):
            return sums((self.logits,), self.ids, self.weights, self.problem.score, best)

    def launch(self, kernel: Any, out: tuple[Tensor, ...]) -> None:  # noqa: ANN401 -- a BalanceKernel
        """Call a kernel as its protocol says."""
        kernel(self.logits, self.ids, self.weights, *out)

    def must_match(self, made: tuple[Tensor, ...], what: str = "") -> None:
        """Raise ``AssertionError`` that says where a result is wrong."""
        front = f"{what}: " if what else ""
        right = oracle.balance(self.problem, self.logits, self.ids, self.weights)
        for name, some, like in zip(("sums", "counts"), made, self.outputs, strict=True):
            outcomes.must_be_like(front + name, some, like, self.device)
        must_be_near(f"{front}sums", made[0], right.sums)
        outcomes.must_have_bits(f"{front}counts", made[1], right.counts)

    def checked(self, under_test: BackendUnderTest, what: str = "") -> tuple[Tensor, Tensor]:
        """Call the operation, and hold the result against the oracle."""
        # Memory that the allocator hands out next must not happen to hold the right answer.
        poison = [values.around(like, tuple(like.shape), self.device) for like in self.outputs]
        del poison
        made = self.made(under_test)
        self.must_match(made, what)
        return made


def must_be_near(name: str, made: Tensor, right: oracle.Near) -> None:
    """Require values near the right ones, and NaN where NaN is right."""
    value, within = right
    between = outcomes_between(value, within)
    outcomes.must_lie_between(name, made.detach().reshape(value.shape), between)


def outcomes_between(value: Tensor, within: Tensor) -> Any:  # noqa: ANN401 -- a Between
    """Return the least and the greatest right values."""
    from moe_routing.reference.permutation_oracle import Between

    return Between(value - within, value + within)


def _normal(case: Case, generator: Generator) -> Tensor:
    return torch.randn(case.rows, case.num_experts, generator=generator) * 3


def _extreme(case: Case, generator: Generator) -> Tensor:
    """Return rows far from 0, whose logits are near each other, or are not."""
    drawn = torch.randn(case.rows, case.num_experts, generator=generator)
    center = torch.tensor([0.0, 1000.0, -1000.0, -40.0, 40.0, -17.0])
    which = torch.randint(len(center), (case.rows, 1), generator=generator)
    return drawn * torch.where(which % 2 == 0, 1.0, 8.0) + center[which]


def _apart(case: Case, generator: Generator) -> Tensor:
    """Return rows whose highest logits differ by 1 / 16 and more: no rounding decides."""
    order = torch.rand(case.rows, case.num_experts, generator=generator).argsort(-1)
    return order * (-1 / 16)


LOGITS: Mapping[str, Callable[[Case, Generator], Tensor]] = {
    "normal": _normal, "extreme": _extreme, "apart": _apart,
}  # fmt: skip


def _outside(ids: Tensor, experts: int, generator: Generator) -> Tensor:
    """Put ids outside ``[0, E)`` into every third slot."""
    few = [-1, experts, experts + 7, -(2**31), 2**31 - 1]
    few += [2**32, 2**40 + 1, -(2**63)] * (ids.dtype == torch.int64)
    which = torch.randint(len(few), ids.shape, generator=generator)
    there = torch.randint(3, ids.shape, generator=generator) == 0
    return torch.where(there, torch.tensor(few)[which], ids).to(ids.dtype)


IDS: Mapping[str, Callable[[Tensor, int, Generator], Tensor]] = {
    "random": lambda ids, *_: ids,
    "outside": _outside,
    "one": lambda ids, experts, _: torch.full_like(ids, experts - 1),
}
MASKS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "some": lambda drawn: drawn < 2 / 3,
    "none": lambda drawn: drawn < 0,
}
MEMORY = ("contiguous", "sliced", "between_others", "every_second_row", "one_row")
"""Keys of ``permutation.values.MEMORY``: ways in which logits of unit stride lie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call in words.

    :ivar kind: one of ``KINDS``.
    :ivar logits: a key of ``LOGITS``; ``"apart"`` wherever the best are counted.
    :ivar ids: a key of ``IDS``.
    :ivar ids_dtype: their dtype.
    :ivar mask: which tokens count, a key of ``MASKS``; ``""`` for all.
    :ivar memory: how the logits lie, a key of ``permutation.values.MEMORY``.
    :ivar turn: which of the calls of the same shapes it is.
    :ivar seed: the seed that drew the case, where a seed did.
    """

    kind: str = "softmax"
    batches: int = 2
    tokens: int = 33
    num_experts: int = 16
    topk: int = 3
    dtype: str = "bfloat16"
    logits: str = "normal"
    ids: str = "random"
    ids_dtype: str = "int32"
    mask: str = ""
    memory: str = "contiguous"
    turn: int = 0
    seed: int | None = None

    @property
    def family(self) -> str:
        """Losses depend on no routing family."""
        return ""

    @property
    def id(self) -> str:
        """A name for test ids: sizes, and what differs from the usual."""
        words = [f"{self.kind}-B{self.batches}-S{self.tokens}-E{self.num_experts}-K{self.topk}"]
        for field in fields(self)[5:]:
            value = getattr(self, field.name)
            if field.name == "dtype" or value != field.default:
                words.append(f"{field.name}_{value}" if field.name != "dtype" else value)
        return "-".join(words)

    @property
    def rows(self) -> int:
        """Tokens of all batches."""
        return self.batches * self.tokens

    @property
    def problem(self) -> BalanceProblem:
        """What a backend is asked to build for the case."""
        return problem_of(self.kind, self.num_experts, self.topk, self.dtype)

    def but(self, **changes: Any) -> Case:  # noqa: ANN401 -- the fields above
        """Return the case with some words changed."""
        return replace(self, **changes)

    def generator(self) -> Generator:
        """Return random numbers of the case's own."""
        return torch.Generator().manual_seed(zlib.crc32(self.id.encode()))

    def make(self, device: torch.device) -> Call:
        """Make the call on the device; tokens that do not count hold NaN."""
        generator = self.generator()
        shape = (self.batches, self.tokens)
        drawn = LOGITS["apart" if self.kind == "best" else self.logits](self, generator)
        drawn = drawn.to(getattr(torch, self.dtype))
        ids = None
        if self.problem.counts == "ids":
            sizes = (*shape, self.topk)
            every = torch.randint(self.num_experts, sizes, generator=generator)
            every = every.to(getattr(torch, self.ids_dtype))
            ids = IDS[self.ids](every, self.num_experts, generator).to(device)
        weights = None
        if self.mask:
            weights = MASKS[self.mask](torch.rand(shape, generator=generator))
            if self.kind == "best":
                factors = torch.randint(1, 4, shape, generator=generator)
                weights = torch.where(weights, factors, 0).float()
            else:
                drawn[~weights.flatten()] = torch.nan
            weights = weights.to(device)
        laid = values.MEMORY[self.memory](drawn.to(device))
        return Call(problem=self.problem, logits=laid.unflatten(0, shape), ids=ids, weights=weights)
