"""Proof that a router is the one that we know.

Its class, and a fingerprint of the code that it would run.

A name proves nothing: a class of the same name may come with a checkpoint, a library may have
replaced ``forward``, and the next release may compute something else. So the functions that a class
holds now are read from their source, brought into a form without comments, docstrings, annotations
and decorators, and hashed. ``fingerprints.json`` says which hash of which class is which recipe;
``tests/integrations/fingerprints.py`` compares it with releases.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing.integrations.transformers._fingerprint import (
    RefusedError,
    fingerprint,
    require_own_methods,
)
from moe_routing.integrations.transformers._recipes import RECIPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_routing.integrations.transformers._recipes import Recipe

_PACKAGE = "transformers.models."


@cache
def known() -> Mapping[str, Mapping[str, str]]:
    """Return ``"gemma4.Gemma4TextRouter"`` -> fingerprint -> name of the recipe."""
    told: dict[str, dict[str, str]] = json.loads(
        Path(__file__).with_name("fingerprints.json").read_text()
    )
    return told


def recipe_of(cls: type) -> Recipe:
    """Return the recipe of a class, or raise ``RefusedError`` with what is not as it is known."""
    path = path_of(cls)
    if path not in known():
        msg = f"{cls.__module__}.{cls.__qualname__} is no router that is known here"
        raise RefusedError(msg)
    require_own_methods(cls)
    found = fingerprint(cls)
    if found not in known()[path]:
        msg = (
            f"the code of {path} is none that is known (fingerprint {found}): it was changed, or "
            "this transformers is newer"
        )
        raise RefusedError(msg)
    return RECIPES[known()[path][found]]


def path_of(cls: type) -> str:
    """Return ``"gemma4.Gemma4TextRouter"`` for a class of transformers, ``""`` for any other."""
    folder = cls.__module__.removeprefix(_PACKAGE).partition(".")[0]
    expected = f"{_PACKAGE}{folder}.modeling_{folder}"
    return f"{folder}.{cls.__qualname__}" if cls.__module__ == expected else ""


def short(cls: type) -> str:
    """Name a class of transformers by its model, ``gemma4.Gemma4TextRouter``; others whole."""
    module = cls.__module__
    if module.startswith("transformers."):
        module = module.rpartition(".modeling_")[2]
    return f"{module}.{cls.__qualname__}"
