"""Registers the operators as soon as torch is imported.

It does so whichever of ``import torch`` and ``import moe_routing`` comes first.

``torch.export.load`` finds an operator only if it is registered, and a process that loads a program
may use nothing else of this package. So importing the package is enough; but it does not import
torch, which takes seconds, for a command line that prints its help or a pytest plug-in that is not
used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

OPERATORS = "moe_routing._op"


class WhenTorchIsImported(MetaPathFinder):
    """Finds nothing itself; registers the operators after the first ``import torch``."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 -- importlib's protocol
        target: ModuleType | None = None,  # noqa: ARG002 -- likewise
    ) -> ModuleSpec | None:
        """Let the other finders find torch, and wrap its loader."""
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            # What fails here fails again, and is told, when something of this package is used;
            # torch itself is fine.
            with contextlib.suppress(Exception):
                importlib.import_module(OPERATORS)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign] # of this one loader
        return spec


def register() -> None:
    """Register the operators now if torch has been imported, otherwise once it is."""
    if "torch" in sys.modules:
        importlib.import_module(OPERATORS)
    else:
        sys.meta_path.insert(0, WhenTorchIsImported())
