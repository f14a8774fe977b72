"""Shadow mode: live calls are compared with the oracle, and never changed.

``Router(spec, verify=True)`` compares every call, ``verify=0.01`` one in a hundred,
``MOE_ROUTING_VERIFY=sample:0.01`` does so for every router of the process. What is found goes to
the logger ``moe_routing.verify`` and to ``route.health()``; neither a wrong backend nor a failing
comparison raises in the caller's path.

Ids that ``expert_map`` renamed do not tell which expert they were where experts share one. So a
call with a map is routed again without it: that is compared, and what came out of the call must be
the same, renamed.

A comparison takes milliseconds and waits for the device. While a CUDA graph is captured none is
made, and a graph that is replayed (``torch.compile(mode="reduce-overhead")`` too) runs no Python:
its calls are not seen.
"""

from __future__ import annotations

import logging
import random
import uuid
import weakref
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from moe_routing.kernel import is_mask
from moe_routing.reference.compare import compare, renaming_problems
from moe_routing_registry.containment import PluginFailure, contained
from moe_routing_registry.locks import ForkSafeLock

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_routing.kernel import Operands, Prepared, RoutingOutput
    from moe_routing.reference.compare import Comparison
    from moe_routing_registry import RoutingSpec

ROWS = 1024
"""Most rows of a call that are compared: a random stretch of them."""

_log = logging.getLogger("moe_routing.verify")


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What shadow mode has seen of one router.

    :ivar rate: the share of calls that are compared; 0 without shadow mode.
    :ivar calls: calls seen.
    :ivar compared: calls compared with the oracle.
    :ivar rows: rows compared.
    :ivar near_ties: rows that differ from the exact selection where float32 cannot tell the scores
        apart: allowed.
    :ivar wrong: calls that differ from the oracle in any other way.
    :ivar failures: comparisons that could not be made, because the kit itself raised.
    :ivar latest: what was wrong or failed last, or ``""``.
    """

    rate: float = 0.0
    calls: int = 0
    compared: int = 0
    rows: int = 0
    near_ties: int = 0
    wrong: int = 0
    failures: int = 0
    latest: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong and every comparison could be made."""
        return not (self.wrong or self.failures)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


class Shadow:
    """Compares a share of one router's calls with the oracle, and counts.

    :ivar key: names it inside compiled programs, in this process only.
    """

    def __init__(self, rate: float) -> None:
        """Watch that share of calls."""
        self.key = uuid.uuid4().hex
        self._health = Health(rate=rate)
        self._lock = ForkSafeLock()
        _shadows[self.key] = self
        # A generator of its own, so that the caller's seeds stay as they are.
        self._sampling = random.Random()  # noqa: S311 -- sampling

    def health(self) -> Health:
        """Return the counts so far."""
        return self._health

    def observe(  # noqa: PLR0913, PLR0917 -- what was called, and what to compare it with
        self,
        spec: RoutingSpec,
        topk: int,
        operands: Operands,
        output: RoutingOutput,
        route: Prepared,
        wrong_in: Callable[[slice], list[str]] | None = None,
    ) -> None:
        """Compare the output of a call with the oracle, if the call is sampled; never raises.

        :param route: routes again.
        :param wrong_in: says what else is wrong in some rows.
        """
        logits = operands.logits
        chosen = self._sampling.random() < self._health.rate and not is_capturing(logits.device)
        self._count(calls=1, compared=int(chosen))
        if not chosen:
            return
        try:
            with contained("comparing it"):
                first = self._sampling.randrange(max(1, len(logits) - ROWS + 1))
                rows = slice(first, first + ROWS)
                found = _compare(spec, topk, operands, output, route, rows)
                if wrong_in is not None:
                    found.problems += wrong_in(rows)
        except (
            PluginFailure
        ) as failure:  # the caller's call has succeeded: nothing may come in its way
            self._count(failures=1, latest=failure.sentence)
            _log.exception(
                "a routing call of family %s could not be compared with the oracle", spec.family
            )
            return
        self._count(rows=found.rows, near_ties=found.near_ties)
        if not found.ok:
            latest = "; ".join(found.problems)
            self._count(wrong=1, latest=latest)
            _log.warning(
                "routing of family %s, logits %s %s on %s, K=%d is wrong: %s",
                spec.family, list(logits.shape), logits.dtype, logits.device, topk, latest,
            )  # fmt: skip

    def _count(self, *, latest: str | None = None, **more: int) -> None:
        with self._lock:
            counts = {name: getattr(self._health, name) + number for name, number in more.items()}
            said = self._health.latest if latest is None else latest
            self._health = replace(self._health, latest=said, **counts)


_shadows: weakref.WeakValueDictionary[str, Shadow] = weakref.WeakValueDictionary()
_shared: dict[float, Shadow] = {}


def shadow_of(key: str) -> Shadow | None:
    """Return the shadow that watches the calls of a router.

    An operator calls this function; it knows only the router's key.

    A compiled or exported program outlives its router, and may have come from another process: then
    nothing watches it, and the logger says so once.
    """
    found = _shadows.get(key)
    if found is None:
        _say_unwatched(key)
    return found


def shared(rate: float) -> Shadow:
    """Return what watches the routers of that rate that compiled functions make."""
    return _shared.setdefault(rate, Shadow(rate))


@cache
def _say_unwatched(_key: str) -> None:
    _log.warning(
        "a compiled or exported program asks for shadow mode (verify=), but the router that it was "
        "made from is gone or in another process: its calls are not compared"
    )


def is_capturing(device: torch.device) -> bool:
    """Tell whether a CUDA graph captures what is launched on a device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@torch.no_grad()
def _compare(  # noqa: PLR0913, PLR0917 -- private; the caller's own arguments
    spec: RoutingSpec,
    topk: int,
    operands: Operands,
    output: RoutingOutput,
    route: Prepared,
    rows: slice,
) -> Comparison:
    part = operands._asdict()
    logits, expert_map, _ = part.pop("logits"), part.pop("expert_map"), part.pop("out")
    if part["token_ids"] is not None:
        part["token_ids"] = part["token_ids"][rows]
    if part["ids"] is not None:
        part["ids"] = part["ids"][rows]
    if is_mask(part["num_valid_tokens"]):
        part["valid"] = part.pop("num_valid_tokens")[rows]
    elif part["num_valid_tokens"] is not None:
        part["num_valid_tokens"] = max(0, int(part["num_valid_tokens"]) - rows.start)
    if expert_map is None:
        return compare(spec, logits[rows], topk, _rows(output, rows), **part)
    plain = route(operands._replace(expert_map=None, out=None))
    found = compare(spec, logits[rows], topk, _rows(plain, rows), **part)
    if found.ok:
        found.problems += renaming_problems(_rows(plain, rows), _rows(output, rows), expert_map)
    return found


def _rows(output: RoutingOutput, rows: slice) -> RoutingOutput:
    return type(output)(output.weights[rows], output.ids[rows])
