"""The command line, ``moe-routing``.

Importing it imports no torch, and it works where torch is missing or broken.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    0 fine, 1 something that was asked for is unusable, 2 wrong usage, 130 interrupted.

    :param arguments: what follows the program's name; ``sys.argv[1:]`` where ``None``.
    """
    from moe_routing.cli._app import run
    from moe_routing.cli._show import leave_stdout

    if isinstance(sys.stdout, TextIOWrapper):
        # A name that the terminal's encoding lacks is no error.
        sys.stdout.reconfigure(errors="backslashreplace")
    code = run(sys.argv[1:] if arguments is None else arguments)
    if sys.stdout is not None:
        leave_stdout()
    sys.exit(code)
