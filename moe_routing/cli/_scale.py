"""``moe-routing scale``."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.text import Text

from moe_routing.cli._operations import by_option
from moe_routing.cli._show import UsageError, console, count, print_json, table, words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from moe_routing.distributed.scale import Change, Constants, Deployment, Estimate, Network, Way

SCHEMA_VERSION = 1
_COLUMNS = (
    *("way", "rows within", "rows between", "MB within", "MB between", "MB useful", "messages"),
    *("us", "note"),
)
_FINE = 100
"""MB from which on no fraction is shown."""


def _positive(text: str) -> float:
    """Read a number above 0.

    typer's own message depends on the version of typer, and it takes ``nan``.
    """
    return _number(text, "a number above 0", least_is_zero=False)


def _not_negative(text: str) -> float:
    return _number(text, "a number of at least 0", least_is_zero=True)


def _number(text: str, expected: str, *, least_is_zero: bool) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isfinite(value) and (value > 0 or (least_is_zero and value == 0)):
        return value
    msg = f"expected {expected}, got {text!r:.60}"
    raise typer.BadParameter(msg)


def scale(  # noqa: PLR0913 -- the options of the command
    *,
    ranks: Annotated[
        list[str] | None,
        typer.Option(metavar="N,...", help="Numbers of ranks, a GPU each; 8,64,512."),
    ] = None,
    tokens: Annotated[
        list[str] | None, typer.Option(metavar="T,...", help="Tokens of a rank; 64.")
    ] = None,
    hidden_size: Annotated[
        int | None,
        typer.Option(
            "--hidden-size",
            "--hidden",
            parser=count,
            metavar="H",
            help="Columns of a token's row; 7168.",
        ),
    ] = None,
    num_experts: Annotated[
        int | None,
        typer.Option(
            "--experts", "--num-experts", "-e", parser=count, metavar="E", help="Experts; 256."
        ),
    ] = None,
    topk: Annotated[
        int | None,
        typer.Option("--topk", "-k", parser=count, metavar="K", help="Experts a token; 8."),
    ] = None,
    ranks_per_host: Annotated[
        int | None, typer.Option(parser=count, metavar="N", help="Ranks that NVLink connects; 8.")
    ] = None,
    network_rate: Annotated[
        float | None,
        typer.Option(
            parser=_positive,
            metavar="GB/s",
            help="What a rank sends between hosts; 50, assumed, not measured.",
        ),
    ] = None,
    network_latency: Annotated[
        float | None,
        typer.Option(
            parser=_not_negative,
            metavar="US",
            help="Microseconds of each step between hosts; 5, assumed, not measured.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Estimate traffic and time of expert parallelism against ranks and hosts.

    It is a model: nothing is measured here, and no GPU is needed.
    """
    from moe_routing.distributed.scale import Deployment, Network, shipped

    assumed = Network()
    network = Network(
        assumed.rate if network_rate is None else network_rate,
        assumed.latency if network_latency is None else network_latency,
    )
    numbers = _counts("--ranks", ranks) or (8, 64, 512)
    of_each = _counts("--tokens", tokens) or (64,)
    try:
        every = [
            Deployment(
                tokens=T,
                hidden_size=hidden_size or 7168,
                topk=topk or 8,
                num_experts=num_experts or 256,
                ranks=n,
                ranks_per_host=ranks_per_host or 8,
            )
            for n in numbers
            for T in of_each
        ]
    except ValueError as error:
        raise by_option(error) from error
    found = _modelled(every, shipped(), network)
    if as_json:
        print_json(_as_json(found))
    else:
        _show(found, console())


class _Found(NamedTuple):
    """What the model says.

    :ivar by_tokens: for each number of ranks.
    :ivar by_ranks: for each number of tokens.
    """

    constants: Constants
    network: Network
    cases: Sequence[tuple[Deployment, Sequence[Estimate], Way]]
    by_tokens: Sequence[tuple[int, Sequence[Change]]]
    by_ranks: Sequence[tuple[int, Sequence[Change]]]


def _counts(option: str, given: list[str] | None) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(count(word) for word in words(given)))
    except typer.BadParameter as error:
        msg = f"{option}: {error}"
        raise UsageError(msg) from error


def _modelled(every: Sequence[Deployment], constants: Constants, network: Network) -> _Found:
    from moe_routing.distributed.scale import (
        changes_by_ranks,
        changes_by_tokens,
        estimates,
        fastest,
    )

    by_ranks = {sizes.ranks: sizes for sizes in every}
    # The largest group counts, for all smaller ones are tried.
    by_tokens = {sizes.tokens: sizes for sizes in sorted(every, key=lambda one: one.ranks)}
    return _Found(
        constants,
        network,
        [
            (sizes, estimates(sizes, constants, network), fastest(sizes, constants, network))
            for sizes in every
        ],
        [(n, changes_by_tokens(sizes, constants, network)) for n, sizes in by_ranks.items()],
        [(T, changes_by_ranks(sizes, constants, network)) for T, sizes in by_tokens.items()],
    )


def _as_json(found: _Found) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "constants": found.constants.to_dict(),
        "network": {
            "rate_gb_s": found.network.rate,
            "latency_us": found.network.latency,
            "source": "assumed, not measured",
        },
        "cases": [
            {
                **asdict(sizes),
                "hosts": sizes.hosts,
                "replicas": sizes.slots // sizes.num_experts,
                "ranks_reached": sizes.ranks_reached,
                "hosts_reached": sizes.hosts_reached,
                "fastest": str(best),
                "ways": [
                    {
                        "name": str(one.way),
                        **one.way._asdict(),
                        **one.traffic._asdict(),
                        "microseconds": one.microseconds,
                        "note": one.note,
                    }
                    for one in ways
                ],
            }
            for sizes, ways, best in found.cases
        ],
        "changes": {
            "by_tokens": [
                {"ranks": ranks, "from": _changes_as_json("tokens", changes)}
                for ranks, changes in found.by_tokens
            ],
            "by_ranks": [
                {"tokens": tokens, "from": _changes_as_json("ranks", changes)}
                for tokens, changes in found.by_ranks
            ],
        },
        "not_measured": _not_measured(found.constants),
    }


def _changes_as_json(of: str, changes: Sequence[Change]) -> list[dict[str, object]]:
    return [{of: change.start, "way": str(change.way)} for change in changes]


def _not_measured(constants: Constants) -> list[str]:
    """Say what times there are none of."""
    from moe_routing.distributed.scale import WAYS

    absent = dict.fromkeys(
        f"the time of {way.transport}" + ("" if way.shared_batch else f" reduce={way.reduce}")
        for way in WAYS
        if (way.transport, way.reduce) not in constants.device
    )
    largest = max(source.ranks for source in constants.sources)
    further = any(time.peer is None for time in constants.device.values())
    return [
        *absent,
        *(["the latency of each further rank (counted as 0)"] if further else []),
        f"groups of more than {largest} ranks (times are extrapolated)",
        "more than one host",
    ]


def _show(found: _Found, screen: Console) -> None:
    for sizes, ways, best in found.cases:
        screen.print(table(_title(sizes), *_COLUMNS, rows=_rows(ways, best), whole=_COLUMNS[:-1]))
        screen.print(_reached(sizes))
        screen.print()
    screen.print(Text("The fastest way", style="bold"))
    for ranks, changes in found.by_tokens:
        screen.print(f"{ranks} ranks, from 1 token a rank on: {_said(changes)}")
    for tokens, changes in found.by_ranks:
        screen.print(f"T = {tokens:,} a rank, from {changes[0].start} ranks on: {_said(changes)}")
    screen.print()
    for source in found.constants.sources:
        screen.print(
            f"Within a host: fitted to {source.file}: {source.ranks} ranks, {source.device}, "
            f"{source.versions}, {source.date}."
        )
    rate, latency = found.network
    screen.print(
        f"Between hosts: {rate:g} GB/s and {latency:g} us a step, for each rank: assumed, not "
        "measured."
    )
    screen.print(f"Not measured: {'; '.join(_not_measured(found.constants))}.")
    screen.print("Experts are chosen uniformly at random: assumed.")


def _title(sizes: Deployment) -> str:
    hosts = f"{sizes.hosts} hosts" if sizes.hosts > 1 else "1 host"
    replicas = sizes.slots // sizes.num_experts
    copies = f" of {replicas} replicas" if replicas > 1 else ""
    return (
        f"{sizes.ranks} ranks on {hosts}, {sizes.tokens:,} tokens a rank, H = {sizes.hidden_size}, "
        f"E = {sizes.num_experts}{copies}, K = {sizes.topk}, bfloat16"
    )


def _reached(sizes: Deployment) -> str:
    hosts = f" and {sizes.hosts_reached:.2f} of {sizes.hosts} hosts" if sizes.hosts > 1 else ""
    return (
        f"On average a token reaches {sizes.ranks_reached:.2f} of {sizes.ranks} ranks{hosts}. "
        "Sent by each rank: rows one way, MB there and back."
    )


def _rows(ways: Sequence[Estimate], best: Way) -> list[tuple[Text, ...]]:
    rows = []
    for way, sent, took, note in ways:
        cells = (
            f"{sent.rows_within:,.0f}",
            f"{sent.rows_between:,.0f}",
            *map(_megabytes, (sent.bytes_within, sent.bytes_between, sent.useful_bytes)),
            f"{sent.messages:,}",
            "" if took is None else f"{took:,.0f}",
        )
        remark = Text(note, style="dim")
        if way == best:
            remark = Text.assemble(("fastest", "green"), ", " if note else "", remark)
        rows.append((Text(str(way)), *(Text(cell, justify="right") for cell in cells), remark))
    return rows


def _megabytes(number: float) -> str:
    value = number / 1e6
    return f"{value:,.0f}" if value >= _FINE else f"{value:.2f}"


def _said(changes: Sequence[Change]) -> str:
    (_, way), *others = changes
    return "; ".join([str(way), *(f"from {start:,}: {other}" for start, other in others)])
