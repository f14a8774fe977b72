"""A correct backend, what a mutant of it is, and how one is registered.

Each is a small change of ``Reference``, a correct backend without any thought of speed. ``MUTANTS``
names the check that must catch it; ``tests/conformance/test_mutants.py`` holds the kit to that.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from moe_routing._registry import registry
from moe_routing.kernel import MASK, REPLAY, RoutingOutput
from moe_routing.reference import oracle, replicas_oracle
from moe_routing.reference.counts_oracle import counted
from moe_routing_registry import ANY, BackendSpec, Target, Verdict
from moe_routing_registry.problem import OPTIONAL_OPERANDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from moe_routing_registry import DeviceInfo, RoutingProblem


class Reference:
    """A correct backend: the oracle's steps, rounded to float32 at the end.

    Mutants change one step.
    """

    def __init__(self, problem: RoutingProblem, device: DeviceInfo) -> None:
        self.spec, self.topk = problem.spec, problem.topk
        self.ids_dtype = {"int32": torch.int32, "int64": torch.int64}[problem.ids_dtype]
        del device

    @torch.no_grad()
    def __call__(
        self, logits: Tensor, *, out: RoutingOutput | None = None, **operands: Any
    ) -> RoutingOutput:
        """Route, step by step."""
        logits = self.read(logits)
        selection = {name: operands.get(name) for name in ("bias", "token_ids", "expert_table")}
        ids = self.select(logits, **selection)
        if operands.get("ids") is not None:
            ids = self.replay(operands["ids"], ids, logits.shape[1])
        weights = self.weigh(logits, ids, operands.get("bias"), operands.get("per_expert_scale"))
        if operands.get("counts") is not None:
            padding = operands.get("num_valid_tokens")
            logical = self.finish(weights, ids, logits.shape[1], num_valid_tokens=padding)[1]
            self.count(operands["counts"], logical, logits.shape[1])
        finish = {name: operands.get(name) for name in ("num_valid_tokens", "expert_map")}
        weights, ids = self.finish(weights, ids, logits.shape[1], **finish)
        if operands.get("replica_count") is not None:
            ids = self.choose(ids, operands["logical_to_physical"], operands["replica_count"])
        shape = (len(ids), ids.shape[1])
        if out is None:
            device = logits.device
            out = RoutingOutput(
                torch.empty(shape, device=device),
                torch.empty(shape, dtype=self.ids_dtype, device=device),
            )
        self.write(out, weights, ids)
        return out

    def read(self, logits: Tensor) -> Tensor:
        """Return the logits where they lie."""
        return logits

    def select(self, logits: Tensor, **operands: Tensor | None) -> Tensor:
        """Return the ids of the selected."""
        return oracle.select(self.spec, logits, self.topk, **operands)

    def replay(self, recorded: Tensor, usual: Tensor, num_experts: int) -> Tensor:
        """Return the recorded ids, the usual ones in rows without a record."""
        return oracle.replayed(recorded, usual, num_experts)

    def weigh(
        self, logits: Tensor, ids: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        """Return their weights."""
        del bias
        return oracle.weights_at(self.spec, logits, ids, per_expert_scale=scale)

    def finish(
        self, weights: Tensor, ids: Tensor, num_experts: int, **operands: Any
    ) -> RoutingOutput:
        """Append shared slots, rename, blank the padding."""
        return oracle.finish(self.spec, weights, ids, num_experts, **operands)

    def count(self, counts: Tensor, ids: Tensor, num_experts: int) -> None:
        """Add the slots of logical ids to the counts of their experts."""
        del num_experts
        counts += counted(ids, len(counts)).to(counts.dtype)

    def choose(self, ids: Tensor, table: Tensor, count: Tensor) -> Tensor:
        """Return the physical ids of logical ones."""
        return replicas_oracle.physical(ids, table, count)

    def write(self, out: RoutingOutput, weights: Tensor, ids: Tensor) -> None:
        """Write the outputs."""
        out.weights.copy_(weights)
        out.ids.copy_(ids)


@dataclass(frozen=True, slots=True)
class Mutant:
    """A wrong backend.

    :ivar caught_by: name of the check that must catch it.
    :ivar saying: regular expression of what the check must say: that a mutant crashes proves
        nothing.
    :ivar variants: the variants whose cases are enough to catch it; all of them where empty.
    :ivar operation: what the factory builds kernels of.
    :ivar gaps: those of its spec, like ``operands``.
    :ivar others: factories of other operations, by operation.
    """

    factory: Callable[[RoutingProblem, DeviceInfo], Any]
    caught_by: str
    saying: str = ""
    variants: tuple[str, ...] = ()
    supports: Callable[[RoutingProblem, DeviceInfo], Verdict] | None = None
    only_on: str = ""
    operation: str = "route"
    gaps: Mapping[str, str] = field(default_factory=dict)
    operands: frozenset[str] = REPLAY | MASK
    others: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The class's name, as a backend is named."""
        return "mutant-" + "".join(
            f"-{c.lower()}" if c.isupper() else c for c in self.factory.__name__
        ).strip("-")


MUTANTS: list[Mutant] = []
EVERY_OPERAND = frozenset(OPTIONAL_OPERANDS)


def caught_by(
    check: str,
    *variants: str,
    saying: str,
    supports: Any = None,
    only_on: str = "",
    operands: frozenset[str] = REPLAY | MASK,
) -> Callable[[Any], Any]:
    """Enter a mutant into the table.

    :param check: the check that must catch it.
    :param saying: what the check must say, a regular expression.
    """

    def enter(factory: Any) -> Any:
        MUTANTS.append(
            Mutant(factory, check, saying, variants, supports, only_on, operands=operands)
        )
        return factory

    return enter


@contextlib.contextmanager
def registered(mutant: Mutant) -> Iterator[str]:
    """Register a mutant as a backend inside the block, and yield its name.

    The reference is a mutant of nothing.
    """
    factory = f"{mutant.factory.__module__}:{mutant.factory.__name__}"
    spec = BackendSpec(
        name=mutant.name,
        factories={mutant.operation: factory, **mutant.others},
        targets=(Target(ANY),),
        supports=mutant.supports,
        gaps=mutant.gaps,
        operands=mutant.operands,
    )
    registry().register(spec)
    try:
        yield spec.name
    finally:
        registry().unregister(spec.name)
