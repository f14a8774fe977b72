"""``DeferredSoftmax``: probabilities that are computed when something looks at them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from collections.abc import Callable


class DeferredSoftmax(Tensor):
    """``softmax(logits)`` in float32, computed anew by whatever operation it takes part in.

    A tensor to everyone.

    Gemma4's router returns its probabilities first, and its decoder layer discards them; a kernel
    for nobody would cost as much as the routing. It has no storage: C code that asks for a pointer
    gets an error, not other numbers.

    >>> DeferredSoftmax(torch.zeros(1, 2)) + 0
    tensor([[0.5000, 0.5000]])
    """

    _logits: Tensor

    @staticmethod
    def __new__(cls: type[DeferredSoftmax], logits: Tensor) -> DeferredSoftmax:  # noqa: PYI034 -- torch returns no Self
        """Take the shape and the device of ``logits [T, E]``."""
        make: Callable[..., DeferredSoftmax] = Tensor._make_wrapper_subclass  # noqa: SLF001 -- the documented way
        made = make(cls, logits.shape, dtype=torch.float32, device=logits.device)
        made._logits = logits  # noqa: SLF001 -- its own
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        _types: Any,  # noqa: ANN401 -- torch's protocol
        args: Any = (),  # noqa: ANN401 -- likewise
        kwargs: Any = None,  # noqa: ANN401 -- likewise
    ) -> Any:  # noqa: ANN401 -- torch's protocol
        """Compute, then do what was asked."""
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 -- the documented way
            args, kwargs = tree_map_only(cls, cls._computed, (args, kwargs or {}))
            return func(*args, **kwargs)

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]  # torch types only its own

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes a keyword for its own use
        """Show the probabilities."""
        return repr(self._computed())

    def _computed(self) -> Tensor:
        return torch.softmax(self.__dict__["_logits"], dim=-1, dtype=torch.float32)
