"""What checks of ``torch.export`` share."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn


def saved_and_loaded(module: nn.Module, arguments: tuple[Any, ...]) -> nn.Module:
    """Export a module with these arguments, save the program, and return what loading it gives."""
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, arguments), file)
    file.seek(0)
    with warnings.catch_warnings():
        # PyTorch 2.11 says this of the parameters that it reads.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.export.load(file).module()
