"""The operator ``moe_routing::plan``: what tracing, tensor subclasses and exported programs call.

What a plan does not have (``block_experts``, ``num_dropped``) is an empty tensor there: a schema
has no optional results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree

from moe_routing.planning.kernel import DispatchPlan, RoutedPlan

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.planning.problem import PlanProblem

# So that torch.export.save can write down a program that returns a plan.
for _kind in (DispatchPlan, RoutedPlan):
    _pytree._register_namedtuple(_kind, serialized_type_name=f"moe_routing.{_kind.__name__}")  # noqa: SLF001 -- torch.export's error message names it

_LIBRARY = torch.library.Library("moe_routing", "FRAGMENT")
_LIBRARY.define(
    "plan(Tensor ids, Tensor? weights, int num_experts, int block, SymInt capacity, str layout, "
    "str drop, str? backend) -> (Tensor order, Tensor inverse, Tensor counts, Tensor offsets, "
    "Tensor block_experts, Tensor num_dropped)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_Parts = tuple["Tensor", ...]


def call(
    problem: PlanProblem,
    ids: Tensor,
    capacity: int | None,
    weights: Tensor | None,
    backend: str | None,
) -> DispatchPlan:
    """Call the operator with checked arguments."""
    parts = torch.ops.moe_routing.plan(
        ids,
        weights,
        problem.num_experts,
        problem.block,
        0 if capacity is None else capacity,
        problem.layout,
        problem.drop,
        backend,
    )
    order, inverse, counts, offsets, block_experts, num_dropped = parts
    return DispatchPlan(
        order,
        inverse,
        counts,
        offsets,
        block_experts if problem.layout == "blocks" else None,
        None if problem.drop == "nothing" else num_dropped,
    )


def _plan(  # noqa: PLR0913, PLR0917 -- the operator's schema
    ids: Tensor,
    weights: Tensor | None,
    num_experts: int,
    block: int,
    capacity: int,
    layout: Any,  # noqa: ANN401 -- one of the literals of PlanProblem
    drop: Any,  # noqa: ANN401 -- likewise
    backend: str | None,
) -> _Parts:
    """Plan real tensors."""
    from moe_routing.planning.call import planned

    made = planned(
        ids,
        weights,
        num_experts,
        block if layout == "blocks" else None,
        None if drop == "nothing" else capacity,
        "last" if drop == "nothing" else drop,
        layout == "masked",
        backend,
    )
    return tuple(made.counts.new_empty(0) if part is None else part for part in made)


def _plan_fake(  # noqa: PLR0913, PLR0917 -- the operator's schema
    ids: Tensor,
    weights: Tensor | None,  # noqa: ARG001 -- likewise
    num_experts: int,
    block: int,
    capacity: int,
    layout: Any,  # noqa: ANN401 -- likewise
    drop: Any,  # noqa: ANN401 -- likewise
    backend: str | None,  # noqa: ARG001 -- likewise
) -> _Parts:
    """Return the parts that a real call would, unfilled."""
    from moe_routing.planning.call import shapes
    from moe_routing.planning.problem import PlanProblem

    problem = PlanProblem(
        num_experts=num_experts, topk=ids.shape[1], layout=layout, block=block, drop=drop
    )
    parts = shapes(problem, ids.shape[0], capacity)
    return tuple(ids.new_empty((0,) if part is None else part, dtype=torch.int32) for part in parts)


def _plan_each(
    info: Any,  # noqa: ANN401 -- torch's protocol
    dims: tuple[int | None, ...],
    ids: Tensor,
    weights: Tensor | None,
    *others: Any,  # noqa: ANN401 -- the operator's schema
) -> tuple[_Parts, tuple[int, ...]]:
    """Plan each element of a batch of ``torch.func.vmap``: a plan has no batch of its own."""

    def element(tensor: Tensor | None, dim: int | None, n: int) -> Tensor | None:
        return tensor if tensor is None or dim is None else tensor.select(dim, n)

    plans = [
        torch.ops.moe_routing.plan(element(ids, dims[0], n), element(weights, dims[1], n), *others)
        for n in range(info.batch_size)
    ]
    parts = tuple(torch.stack(each) for each in zip(*plans, strict=True))
    return parts, (0,) * len(parts)


_LIBRARY.impl("plan", _plan, "CompositeExplicitAutograd")
_LIBRARY.impl("plan", torch.library.fallthrough_kernel, "Autograd")  # integers have no gradients
torch.library.register_fake("moe_routing::plan", _plan_fake, lib=_LIBRARY)
torch.library.register_vmap("moe_routing::plan", _plan_each, lib=_LIBRARY)
