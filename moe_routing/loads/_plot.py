"""The drawing of ``Loads``; matplotlib is imported here alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_routing_registry.text import printable, refusal

if TYPE_CHECKING:
    from moe_routing.loads._loads import Loads

ENDINGS = (".png", ".svg")
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a layer's name is text
    "svg.hashsalt": "moe-routing",  # the same loads give the same file
}


def save(loads: Loads, path: str | Path) -> None:
    """Draw a row for each layer and a column for each expert.

    :raises ValueError: the name of the file ends in something else than .png or .svg, or nothing
        was counted.
    :raises ModuleNotFoundError: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        expected = f"a name that ends in {' or '.join(ENDINGS)}"
        raise ValueError(refusal("path", expected, str(path)))
    worst = loads.worst
    if worst is None:
        msg = "loads: expected a layer with counts, got none"
        raise ValueError(msg)
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = "save_plot: matplotlib is not installed: pip install 'moe-routing[bench]'"
        raise ModuleNotFoundError(msg, name="matplotlib") from error
    experts = len(loads.overall.counts)
    rows = [
        [share * len(load.counts) for share in load.shares]
        + [float("nan")] * (experts - len(load.counts))  # experts that the layer does not have
        for load in loads.layers.values()
    ]
    names = [printable(name) for name in loads.layers]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.0, 1.6 + 0.18 * len(rows)), layout="constrained")
        axes = figure.subplots()
        most = loads.layers[worst].max_over_mean
        image = axes.imshow(
            rows, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0.0, vmax=most
        )
        axes.set_title(str(loads), loc="left", fontsize=9)
        axes.set_xlabel("expert")
        axes.set_yticks(range(len(names)), labels=names, fontsize=6)
        figure.colorbar(image, ax=axes, label="times the mean of the layer")
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)
