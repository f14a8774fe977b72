"""What a call of ``gate`` hands to a kernel, and what it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing.kernel import RoutingOutput
    from moe_routing.planning.kernel import DispatchPlan, PlanKernel


class RMSNorm(NamedTuple):
    """A norm in front of the router's linear layer: ``x / sqrt(mean(x**2) + eps) * weight``.

    :ivar eps: a number above 0.
    :ivar weight: ``[H]``, any float dtype; ``None`` counts as ones.
    """

    eps: float
    weight: Tensor | None = None


class GateOutput(NamedTuple):
    """What ``gate`` returns with ``return_logits=True``.

    :ivar weights: as of ``RoutingOutput``.
    :ivar ids: likewise.
    :ivar logits: ``[T, E]``, contiguous, what was routed.
    """

    weights: Tensor
    ids: Tensor
    logits: Tensor


class Projection(NamedTuple):
    """What makes the logits of hidden states.

    ``x * r * norm_weight * input_scale * multiplier`` times the transposed ``router_weight``, plus
    ``router_bias``, where r is ``1 / sqrt(mean(x**2) + eps)`` of the row. What is ``None`` is left
    out, and r without an ``eps``.

    :ivar hidden: x, ``[T, H]``.
    :ivar router_weight: ``[E, H]``, of the dtype of ``hidden`` or float32.
    :ivar router_bias: ``[E]``, any float dtype.
    :ivar norm_weight: ``[H]``, likewise.
    :ivar input_scale: ``[H]``, likewise.
    """

    hidden: Tensor
    router_weight: Tensor
    router_bias: Tensor | None = None
    norm_weight: Tensor | None = None
    input_scale: Tensor | None = None
    eps: float | None = None
    multiplier: float = 1.0


class GateKernel(Protocol):
    """A kernel for one ``GateProblem`` on one device, for any number of tokens T >= 1.

    The arguments have been checked. ``hidden`` and ``router_weight`` have unit stride along a row,
    and rows at any stride; vectors are contiguous. Every call reads its operands: nothing is folded
    into the weight ahead. One kernel serves any number of threads and streams at once: memory that
    a call needs beyond its outputs belongs to the call.
    """

    def __call__(self, projection: Projection, logits: Tensor) -> None:
        """Write the logits.

        Products and sums are in float32 or better, and each logit is rounded once to the dtype of
        ``logits``. For an invariant problem the order of summation depends on H alone, so that a
        row has the same bits in every call.

        :param logits: contiguous ``[T, E]``, of the problem's ``logits_dtype``.
        """
        ...


@runtime_checkable
class GatesAndRoutes(Protocol):
    """A ``GateKernel`` that routes the logits too.

    It is called instead of the kernel and of the router's own kernel after it, and returns the same
    bits as those two.
    """

    def routed(  # noqa: PLR0913 -- the operands of `Kernel` after the logits
        self,
        projection: Projection,
        logits: Tensor | None,
        *,
        per_expert_scale: Tensor | None = None,
        bias: Tensor | None = None,
        token_ids: Tensor | None = None,
        expert_table: Tensor | None = None,
        num_valid_tokens: int | Tensor | None = None,
        expert_map: Tensor | None = None,
    ) -> RoutingOutput:
        """Return weights and ids; write the logits too, if there is memory for them.

        :param logits: as for ``GateKernel``, or ``None``: nobody asks for them.

        The other operands are those of ``Kernel``, ``ids`` among them where the problem has it.
        """
        ...


@runtime_checkable
class GatesAndPlans(GatesAndRoutes, Protocol):
    """A ``GatesAndRoutes`` that can do the plan of its ids too, or a part of it."""

    def planned(  # noqa: PLR0913 -- the operands of `routed`, and those of a `PlanKernel`
        self,
        projection: Projection,
        planner: PlanKernel,
        out: DispatchPlan,
        *,
        capacity: int | None = None,
        per_expert_scale: Tensor | None = None,
        bias: Tensor | None = None,
        token_ids: Tensor | None = None,
        expert_table: Tensor | None = None,
        num_valid_tokens: int | Tensor | None = None,
        expert_map: Tensor | None = None,
    ) -> RoutingOutput | None:
        """Return weights and ids, and fill the plan of the ids: what ``routed`` and the planner do.

        ``None`` says that nothing was done: ``routed`` is called then, and the planner after it.
        That may depend on the problems, on shapes and on the call's numbers, but not on what the
        tensors hold.

        :param planner: the kernel that was chosen for the plan, of any backend, with ``out`` and
            ``capacity`` as it takes them. It is for a problem that needs no weights.

        The other operands are those of ``routed``.
        """
        ...
