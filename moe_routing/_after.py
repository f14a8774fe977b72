"""What becomes of the logical ids of a call: they are counted, and renamed then.

A kernel of a backend that names ``counts`` or ``replicas`` does it itself. For the others a call
routes without its ``expert_map``, and the router counts the logical ids, and renames them last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from moe_routing import _check, _counts, _replicas
from moe_routing._autograd import apply_map
from moe_routing._replicas import Replicas
from moe_routing.kernel import RoutingOutput, by_name, fields, replaced

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from moe_routing.kernel import Operands
    from moe_routing.planning.kernel import DispatchPlan


class After(NamedTuple):
    """What a call asks for besides routing."""

    counts: Tensor | None
    replicas: Replicas | None

    @property
    def optional(self) -> frozenset[str]:
        """Names of what there is, of ``RoutingProblem.operands``."""
        return frozenset(name for name, value in self._asdict().items() if value is not None)

    @property
    def keywords(self) -> dict[str, Tensor]:
        """Return the arguments of a kernel; ``counts`` are contiguous."""
        named = {} if self.counts is None else {"counts": self.counts}
        if self.replicas is None:
            return named
        table, count = self.replicas
        return {
            **named,
            "logical_to_physical": table.contiguous(),
            "replica_count": count.contiguous(),
        }

    @property
    def tensors(self) -> list[Tensor]:
        """Return the tensors that there are."""
        return [t for t in (self.counts, *(self.replicas or ())) if t is not None]

    def only(self, names: frozenset[str]) -> After:
        """Return the part of it that is named."""
        return After(
            self.counts if "counts" in names else None,
            self.replicas if "replicas" in names else None,
        )


def asked(
    counts: Tensor | None,
    logical_to_physical: Tensor | None,
    replica_count: Tensor | None,
    expert_map: object,
) -> After:
    """Return what a call asks for, whose operands are checked next."""
    return After(counts, _replicas.given(logical_to_physical, replica_count, expert_map))


def check_call(
    after: After, operands: Operands, shared: int, planned: DispatchPlan | None = None
) -> None:
    """Check what a router's call brings for it, and ``expert_map``, which its kernel does not see.

    :param planned: the plan that the call is to fill.
    """
    out = operands.out
    if out is not None:
        out = _check.as_output(out)
        operands = replaced(operands, out=out)
    _check.check_dense(operands)
    if operands.expert_map is not None and not is_dynamo_compiling():
        _check.check_addresses(operands)
    written: dict[str, object] = {}
    for parts in (out, planned):
        written |= {} if parts is None else fields(parts)
    check(after, operands.logits, -1, shared, by_name(replaced(operands, out=None)), written)


def check(  # noqa: PLR0913, PLR0917 -- the shape that all must fit, and what they must not meet
    after: After,
    like: object,
    dim: int,
    shared: int,
    read: Mapping[str, object],
    written: Mapping[str, object],
) -> None:
    """Require tensors that can count and rename, and a map of as many experts.

    What is wrong with other arguments is left to the call itself, which checks all but the map.

    :param like: the tensor whose size in dimension ``dim`` is E: logits, or a router's weight.
    :param shared: how many shared experts there are.
    :param read: everything else that the call reads, by name.
    :param written: the call's outputs, by name.
    :raises TypeError: one of them has the wrong type or dtype.
    :raises ValueError: it has the wrong shape, device or memory.
    """
    if not isinstance(like, Tensor) or not _check.is_dense(like) or not like.dim():
        return
    experts = like.shape[dim]
    operands, outputs = _tensors(read), _tensors(written)
    if after.replicas is not None:
        _replicas.check(after.replicas, experts + shared, like.device, operands, outputs)
        operands |= fields(after.replicas)
    if after.counts is not None:
        of_out = {f"the {name} of out": tensor for name, tensor in outputs.items()}
        _counts.check(after.counts, experts, shared, like.device, operands | of_out)
    if read["expert_map"] is not None:
        _check.check_vector("expert_map", read["expert_map"], experts + shared, like, integer=True)


def served(
    kernel: Callable[[Operands, After], RoutingOutput], taken: frozenset[str], shared: int
) -> Callable[[Operands, After], RoutingOutput]:
    """Return what routes and does all that is asked, with a kernel that does what is ``taken``.

    :param kernel: takes ``counts`` that are contiguous.
    :param shared: how many shared experts there are.
    """

    def route(operands: Operands, after: After) -> RoutingOutput:
        inside = after.only(taken)
        if inside.counts is not None and not inside.counts.is_contiguous():
            # A kernel writes contiguous memory; what it counts is added to where they lie.
            fresh = torch.zeros_like(inside.counts, memory_format=torch.contiguous_format)
            output = route(operands, after._replace(counts=fresh))
            inside.counts.add_(fresh)
            return output
        left = after.only(after.optional - taken)
        if not left.optional:
            return kernel(operands, inside)
        weights, ids = kernel(operands._replace(expert_map=None), inside)
        experts, out = operands.logits.shape[-1], None if operands.out is None else ids
        return RoutingOutput(weights, done(left, ids, experts, shared, operands.expert_map, out))

    return route


def _tensors(named: Mapping[str, object]) -> dict[str, Tensor]:
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def done(  # noqa: PLR0913, PLR0917 -- the ids, how they are laid out, and what becomes of them
    after: After,
    ids: Tensor,
    num_experts: int,
    shared: int,
    expert_map: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """Count the logical ``ids [..., C]``, and return the physical ones.

    :param out: the logical ids themselves, if the physical ones are to stand there.
    """
    if after.counts is not None:
        _counts.add(after.counts, ids, num_experts, shared)
    return renamed(ids, expert_map if after.replicas is None else after.replicas, out)


def renamed(ids: Tensor, renaming: Tensor | Replicas | None, out: Tensor | None) -> Tensor:
    """Return the physical ids of logical ones, in ``out`` if the logical ones are there.

    :param renaming: an ``expert_map``, or replicas.
    """
    if renaming is None:
        return ids
    if isinstance(renaming, Replicas):
        physical = _replicas.chosen(ids, renaming)
    else:
        physical = apply_map(ids, renaming)
    return physical if out is None else out.copy_(physical)
