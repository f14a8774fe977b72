"""What the tests of the integration share.

It has the routers and models of the presets' tests, and compares outputs.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import torch
import transformers

globals().update(
    runpy.run_path(
        str(Path(__file__).parents[1] / "test_models_against_transformers.py"), run_name="against"
    )
)


def is_here(case):
    """Whether this transformers has the model's configuration and the router's class."""
    if (case.config or case.model) not in transformers.CONFIG_MAPPING:
        return False
    folder, _, name = case.router.partition(".")
    file = Path(transformers.__file__).parent / "models" / folder / f"modeling_{folder}.py"
    return file.exists() and f"class {name}(" in file.read_text()


def parts(output):
    """Split an output into weights ``[T, K]``, ids ``[T, K]`` and the rest.

    Dense scores and sorted pairs belong to the rest.
    """
    ids = [
        item
        for item in output
        if isinstance(item, torch.Tensor) and item.dtype == torch.int64 and item.dim() > 1
    ]
    weights = [
        item for item in output if ids and item.is_floating_point() and item.shape == ids[0].shape
    ]
    return (
        weights,
        ids,
        [item for item in output if not any(item is other for other in weights + ids)],
    )


def in_order_of_ids(output):
    """Return the output with each token's experts in ascending order.

    Some routers of transformers leave them unsorted.
    """
    weights, ids, rest = parts(output)
    if not ids:
        return rest
    order = ids[0].argsort()
    return [*rest, weights[0].gather(1, order), ids[0].gather(1, order)]


def assert_same_items(ours, theirs):
    for mine, its in zip(ours, theirs, strict=True):
        if isinstance(its, torch.Tensor):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-8)  # dtypes and shapes too
        else:
            assert mine == its
