"""Options that several commands have, said once."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_routing.cli._show import count

Experts = Annotated[
    int | None,
    typer.Option(
        "--experts", "--num-experts", "-e", parser=count, metavar="E",
        help="Experts; the model's own, else 128.",
    ),
]  # fmt: skip
Topk = Annotated[
    int | None,
    typer.Option(
        "--topk", "-k", parser=count, metavar="K",
        help="Experts a token; the model's own, else 8.",
    ),
]  # fmt: skip
Block = Annotated[
    int | None, typer.Option(parser=count, metavar="N", help="Plans in blocks of so many places.")
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option(metavar="DTYPE,...", help="Of the logits: bf16, fp16, fp32; bf16."),
]
