"""What Dynamo calls as it is: collectives whose sizes the host reads.

Imported while Dynamo traces, never before: the decorator imports all of Dynamo.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


@torch.compiler.disable  # type: ignore[untyped-decorator] # its decorators carry no types
def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- any function
    """Call a function, and trace nothing of it."""
    return function(*args, **kwargs)
