"""``moe-routing transformers``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from moe_routing.cli._show import Unusable, UsageError, console, mark, print_json, table

if TYPE_CHECKING:
    from rich.console import Console

    from moe_routing.integrations.transformers import PatchReport


def transformers(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A model_type of transformers, or a folder with a config.json."
        ),
    ],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show what patch() would replace in a model of transformers, layer by layer.

    No weights are read or made.
    """
    report = _patched(model)
    if as_json:
        print_json({"model": model, **report.to_dict()})
    else:
        _show(console(), model, report)
    raise typer.Exit(0 if report.replaced and not report.left else 1)


def _patched(model: str) -> PatchReport:
    if importlib.util.find_spec("transformers") is None:
        msg = "transformers is not installed; pip install 'moe-routing[transformers]'"
        raise Unusable(msg)
    import warnings

    import torch
    from transformers import AutoModel

    from moe_routing import MoeRoutingWarning
    from moe_routing.integrations.transformers import patch

    config = _config(model)
    try:
        with torch.device("meta"):
            built = AutoModel.from_config(config)
    except (ImportError, ValueError) as error:
        first = str(error).partition("\n")[0]
        msg = f"{model} cannot be built here: {first}"
        raise Unusable(msg) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MoeRoutingWarning)  # the report says it
        return patch(built)


def _config(model: str) -> Any:  # noqa: ANN401 -- a configuration of transformers
    from transformers import CONFIG_MAPPING, AutoConfig

    if model in CONFIG_MAPPING:
        return CONFIG_MAPPING[model]()
    if not (Path(model) / "config.json").is_file():
        msg = (
            "MODEL: expected a model_type of transformers or a folder with a config.json, "
            f"got {model!r}"
        )
        raise UsageError(msg)
    return AutoConfig.from_pretrained(model)


def _show(screen: Console, model: str, report: PatchReport) -> None:
    if not report.layers:
        screen.print(
            mark(screen, "problem")
            + Text(f"{model} has no mixture-of-experts layer with its configuration's values")
        )
        return
    ok = not report.left
    screen.print(
        mark(screen, "ok" if ok else "problem")
        + Text(f"{model}: {str(report).partition(chr(10))[0]}")
    )
    rows = [
        (names, first.router, first.routing or "its own code", first.reason)
        for names, first in report.runs()
    ]
    screen.print(table(None, "Layers", "Router", "Now", "Why", rows=rows))
