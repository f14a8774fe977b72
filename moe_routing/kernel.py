"""What a call hands to a kernel, what a kernel is, and what routing returns.

A backend's factory returns a ``Kernel``: any callable with that signature, a plain function too.
What else a kernel can do is optional. Each of the other protocols here is one method or attribute,
and a kernel that has it has the ability; no base class is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing_registry import DeviceInfo, RoutingProblem

    Factory = Callable[[RoutingProblem, DeviceInfo], "Kernel"]


class RoutingOutput(NamedTuple):
    """Weights and ids of the experts of each token.

    :ivar weights: float32 ``[T, K]``, in the order of ``ids``.
    :ivar ids: int32 or int64 ``[T, K]``, by descending selection score, equal scores by ascending
        id.

    With shared experts both have ``K + shared_experts`` columns. Both are contiguous.
    """

    weights: Tensor
    ids: Tensor


NO_OPERANDS: frozenset[str] = frozenset()
REPLAY = frozenset({"ids"})
"""What a call with recorded ids brings of ``OPTIONAL_OPERANDS``."""


MASK = frozenset({"valid"})
"""What a call with a mask of valid tokens brings of them."""


def is_mask(num_valid_tokens: int | Tensor | None) -> bool:
    """Tell whether padding is said by a mask, which stands in place of the number."""
    return isinstance(num_valid_tokens, torch.Tensor) and num_valid_tokens.dtype is torch.bool


class Operands(NamedTuple):
    """The tensors of one routing call, in the order that all of this package uses.

    ``valid``, the mask, stands in ``num_valid_tokens``: a call brings one of the two.

    ``Router.__call__`` describes each of them; ``Kernel.__call__`` takes the same names as keyword
    arguments.
    """

    logits: Tensor
    per_expert_scale: Tensor | None = None
    bias: Tensor | None = None
    token_ids: Tensor | None = None
    expert_table: Tensor | None = None
    num_valid_tokens: int | Tensor | None = None
    expert_map: Tensor | None = None
    ids: Tensor | None = None
    out: RoutingOutput | None = None

    @property
    def optional(self) -> frozenset[str]:
        """Names of the operands that not every backend takes: ``RoutingProblem.operands``."""
        named = NO_OPERANDS if self.ids is None else REPLAY
        return named | MASK if is_mask(self.num_valid_tokens) else named


# Traced code uses these in place of properties, slices, `_asdict` and `_replace` of named tuples,
# which Dynamo of PyTorch 2.8 does not trace.


def fields(values: Any) -> dict[str, Any]:  # noqa: ANN401 -- any named tuple
    """Return a named tuple's fields, by name."""
    return {name: getattr(values, name) for name in type(values)._fields}


def by_name(operands: Operands) -> dict[str, Any]:
    """Return the arguments of ``Router.__call__``, by name: a mask is ``valid`` there."""
    named = fields(operands)
    if is_mask(operands.num_valid_tokens):
        named["valid"] = named.pop("num_valid_tokens")
    return named


def replaced(operands: Operands, **changes: Any) -> Operands:  # noqa: ANN401 -- the fields' own types
    """Return the operands with other values in some fields."""
    return Operands(**{**fields(operands), **changes})


class Kernel(Protocol):
    """A kernel for one ``RoutingProblem`` on one device, for any number of tokens T >= 1.

    The router has checked every argument before it calls: shapes, dtypes and devices fit, operands
    that the spec does not take are ``None``, one-dimensional operands are contiguous, and T is not
    0. ``logits`` may have any strides that ``RoutingProblem.layout`` allows. One kernel serves
    calls with and without gradients, from any number of threads.
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
        """Route ``logits [T, E]``; write into ``out`` if it is given.

        :param per_expert_scale: ``[E]``, any float dtype, for specs with ``per_expert_scale``.
        :param bias: ``[E]``, any float dtype, for specs with ``needs_bias``.
        :param token_ids: ``[T]``, int32 or int64, for specs with ``selection == "token_table"``.
        :param expert_table: ``[vocabulary, K]``, int32 or int64, likewise. Nothing is read outside
            it; a row whose token id is outside, or one of whose entries is outside [0, E), gets ids
            -1 and weights 0.
        :param num_valid_tokens: rows at or past it get ids -1 and weights 0; an int from 0 to T, or
            a 0-d or 1-element integer tensor on the device of any value, which must be read there,
            without a host sync.
        :param expert_map: ``[E + shared_experts]``, int32 or int64: the physical id of each logical
            expert.
        :param out: contiguous outputs to write into.

        If the backend's spec names ``valid`` too, ``num_valid_tokens`` may be a bool mask ``[T]``,
        contiguous: rows in which it is False are padding.

        A kernel of a backend whose spec names ``ids`` in ``BackendSpec.operands`` has one more
        keyword, which comes for problems that have it in ``RoutingProblem.operands``, and for no
        others: ``ids``, recorded logical ids ``[T, K]`` of any integer dtype and contiguous. A row
        that is -1 throughout is routed as usual. Else its experts are those recorded, in their
        order; a slot of -1 has no expert, id -1 and weight 0, and no part in a renormalisation. A
        row with an id outside [-1, E) is padding.

        One that names ``counts`` has the keyword ``counts``, an int32 or int64 tensor ``[E]`` or
        ``[E + shared_experts]`` and contiguous, which comes for problems that have it: the kernel
        adds to each logical expert's element how many slots it has in rows that are no padding.
        Shared experts count if there are elements for them. One that names ``replicas`` has two
        keywords, which come together, both int32 or int64 and contiguous: ``logical_to_physical``
        ``[E + shared_experts, R]`` and ``replica_count`` ``[E + shared_experts]``, in place of an
        ``expert_map``. The id of an expert e in row t is ``logical_to_physical[e, t % c]``, where c
        is ``replica_count[e]`` clamped to [1, R]. Without gradients alone: with them the router
        renames.
        :returns: contiguous outputs, or ``out``.
        """
        ...


Prepared = Callable[[Operands], RoutingOutput]
"""Routes calls that are like an earlier one; see ``Prepares``."""


@runtime_checkable
class Prepares(Protocol):
    """A kernel that takes less host time for calls that are like one that it has routed."""

    def prepared(self, operands: Operands) -> Prepared | None:
        """Return a function for later calls, or ``None``.

        It serves calls of the same shapes, strides, dtypes and devices.

        :param operands: what was routed. Later calls bring the same operands, contiguous where they
            are vectors; ``out`` may come or not, and an int ``num_valid_tokens`` may have another
            value.
        """
        ...


@runtime_checkable
class WarmsUp(Protocol):
    """A kernel that can compile before its first call."""

    def warmup(self) -> None:
        """Compile whatever a later call, or its gradient, would compile."""
        ...


@runtime_checkable
class Differentiates(Protocol):
    """A kernel with a backward of its own.

    The others use the closed form in ``moe_routing.formula``.
    """

    def backward(
        self, grad_weights: Tensor, logits: Tensor, ids: Tensor, per_expert_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of ``logits`` and of ``per_expert_scale``.

        The first has the dtype of ``logits``; the second is empty if the scale is ``None``.

        :param grad_weights: float32 ``[T, K]``, contiguous, of the K selected experts.
        :param ids: ``[T, K]``, contiguous logical ids; -1 in rows of padding, and in slots that
            have no expert where ids were recorded.
        """
        ...


@runtime_checkable
class HasNotes(Protocol):
    """A kernel that has something to say about itself in ``Router.report``.

    :ivar notes: a line each; read whenever a report is asked for.
    """

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth knowing about the kernel now."""
        ...
