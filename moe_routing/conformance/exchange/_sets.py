"""Sets of cases that several checks share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_routing.conformance.exchange.cases import Case

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing.conformance.cases import Profile


def every_mode(_profile: Profile, **words: Any) -> Iterator[Case]:  # noqa: ANN401 -- fields of a Case
    """Yield a case of every way to exchange."""
    yield Case(**words)
    yield Case(padded=True, **words)
    yield Case(reduce="rank", **words)
    yield Case(reduce="rank", padded=True, **words)
    yield Case(reduce="rank", shared=True, **words)


def unreduced(_profile: Profile, **words: Any) -> Iterator[Case]:  # noqa: ANN401 -- likewise
    """Yield the modes in which a row of each slot comes back."""
    yield Case(**words)
    yield Case(padded=True, **words)


def without_sizes(_profile: Profile, **words: Any) -> Iterator[Case]:  # noqa: ANN401 -- likewise
    """Yield the modes in which no sizes are exchanged."""
    yield Case(padded=True, **words)
    yield Case(reduce="rank", padded=True, **words)
    yield Case(reduce="rank", shared=True, **words)
