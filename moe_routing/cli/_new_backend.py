"""``moe-routing new-backend``."""

from __future__ import annotations

import importlib.util
import shlex
from typing import Annotated

import typer

from moe_routing.cli._show import UsageError, command, console

_RESERVED = ("all", "none")
"""What options take in place of names."""


def new_backend(
    name: Annotated[
        str, typer.Argument(help="Name of the backend: lower case words joined by hyphens.")
    ],
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="Where to write it: a new or an empty directory.")
    ],
) -> None:
    """Write a distribution with a backend that works and conforms, to start from."""
    from moe_routing._registry import registry
    from moe_routing.conformance.new_backend import files, package_of, write

    known = registry()
    if name in {*known.backends, *(failure.name for failure in known.failures), *_RESERVED}:
        msg = (
            f"name: expected one that is free, got {name!r}, which is taken; "
            "`moe-routing doctor` lists the backends"
        )
        raise UsageError(msg)
    try:
        files(name)  # whose errors are of the name
        if importlib.util.find_spec(package := package_of(name)) is not None:
            msg = (
                f"name: expected one that is free, got {name!r}: there is a package {package} here"
            )
            raise UsageError(msg)
        written = write(name, directory)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    screen = console()
    for path in written:
        screen.print(str(path), soft_wrap=True)
    screen.print("Next:")
    for line in (
        f"pip install -e {shlex.quote(directory)}",
        "moe-routing doctor",
        f"moe-routing conformance {name}",
    ):
        command(screen, line, indent=2)
