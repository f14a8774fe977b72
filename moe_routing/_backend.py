"""What a backend's factory returns, and what routing returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing_registry import DeviceInfo, RoutingProblem


class RoutingOutput(NamedTuple):
    """Weights and ids of the experts of each token.

    :ivar weights: float32 ``[T, K]``, in the order of ``ids``.
    :ivar ids: int32 or int64 ``[T, K]``, by descending selection score, equal scores by ascending id.

    With shared experts both have ``K + shared_experts`` columns.
    """

    weights: Tensor
    ids: Tensor


class BoundRouter(Protocol):
    """A kernel bound to one ``RoutingProblem`` on one device, for any number of tokens T >= 1.

    The router has checked every argument before it calls: shapes, dtypes and devices fit, operands that the spec does
    not take are ``None``, one-dimensional operands are contiguous, and T is not 0. ``logits`` may have any strides
    that ``RoutingProblem.layout`` allows.
    """

    def __call__(  # noqa: PLR0913 -- one argument an operand of the maths; keywords, so that a reader sees which
        self,
        logits: Tensor,
        *,
        per_expert_scale: Tensor | None = None,
        bias: Tensor | None = None,
        token_ids: Tensor | None = None,
        expert_table: Tensor | None = None,
        num_valid_tokens: int | Tensor | None = None,
        expert_map: Tensor | None = None,
        out: RoutingOutput | None = None,
    ) -> RoutingOutput:
        """Route ``logits [T, E]``; write into ``out`` where it is given.

        :param per_expert_scale: ``[E]``, any float dtype, where ``spec.per_expert_scale``.
        :param bias: ``[E]``, any float dtype, where ``spec.needs_bias``.
        :param token_ids: ``[T]``, int32 or int64, where ``spec.selection == "token_table"``.
        :param expert_table: ``[vocabulary, K]``, int32 or int64, likewise.
        :param num_valid_tokens: rows at or past it get ids -1 and weights 0; an int, or a 0-d or 1-element integer
            tensor on the device, which must be read there, without a host sync.
        :param expert_map: ``[E + shared_experts]``, int32 or int64: the physical id of each logical expert.
        :param out: contiguous outputs to write into.
        """
        ...


if TYPE_CHECKING:
    Factory = Callable[[RoutingProblem, DeviceInfo], BoundRouter]
