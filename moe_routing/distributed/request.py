"""What a transport is chosen by: the argument, and what is blocked.

Free of torch.
"""

from __future__ import annotations

from moe_routing_registry import Request


def transport_request(transport: str | None = None) -> Request:
    """Read the argument and the environment, as ``ExpertParallel`` does.

    What names a backend that computes, in a context or in ``MOE_ROUTING_BACKEND``, names no
    transport.

    :raises ValueError: ``MOE_ROUTING_STRICT`` is neither yes nor no.
    """
    gathered = Request.gather()
    return Request(
        transport, "probe" if transport is None else "argument", gathered.blocked, gathered.strict
    )
