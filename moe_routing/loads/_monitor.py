"""``LoadMonitor``: a tensor of counts for each layer of a model."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_routing import _check
from moe_routing.loads._loads import Load, Loads
from moe_routing_registry.text import refusal


class LoadMonitor:
    """Counts what the experts of each layer get, and reads nothing until it is asked.

    ``monitor["layers.3"]`` is a tensor for ``route(..., counts=...)``: int64, and zeros when the
    layer is named for the first time. ``patch(model, loads=monitor)`` of
    ``moe_routing.integrations.transformers`` has the routers of a model fill it.

    :ivar num_experts: E of the layers that ``monitor[layer]`` makes.
    :ivar counts: the tensor of each layer, by its name, in the order in which they came.

    >>> import moe_routing
    >>> monitor, route = LoadMonitor(num_experts=4), moe_routing.get_router("mixtral")
    >>> logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [4.0, 0.0, 5.0, 1.0]])
    >>> _ = route(logits, 2, counts=monitor["layers.0"])
    >>> loads = monitor.read()
    >>> loads.layers["layers.0"].counts, loads.layers["layers.0"].max_over_mean
    ((1, 1, 2, 0), 2.0)
    >>> monitor.reset()
    >>> monitor["layers.0"].tolist()
    [0, 0, 0, 0]
    """

    def __init__(
        self, num_experts: int | None = None, *, device: torch.device | str = "cpu"
    ) -> None:
        """Hold no layer yet.

        :param num_experts: E of the layers that ``monitor[layer]`` makes, with shared experts if
            those are to be counted. Layers of routers that ``patch`` replaced need none: they have
            the E of their router, and are where it computes.
        :param device: where ``monitor[layer]`` makes tensors.
        :raises TypeError: an argument has the wrong type.
        :raises ValueError: ``num_experts`` is no number of experts.
        """
        self.num_experts = None if num_experts is None else _check.experts(num_experts)
        self.counts: dict[str, Tensor] = {}
        self._device = _device_of(device)

    def __getitem__(self, layer: str) -> Tensor:
        """Return the counts of a layer, zeros if it has none yet.

        :raises TypeError: the layer is no name.
        :raises ValueError: the layer is new, and the monitor was made without ``num_experts``.
        """
        _check_layer(layer)
        if layer in self.counts:
            return self.counts[layer]
        if self.num_experts is None:
            expected = f"an int for the layer {layer!r}, which no router has filled yet"
            raise ValueError(refusal("num_experts", expected, None))
        return self.on(layer, self.num_experts, self._device)

    def on(self, layer: str, num_experts: int, device: torch.device | str) -> Tensor:
        """Return the counts of a layer on a device: new ones, or those that it has, moved there.

        :raises TypeError: an argument has the wrong type.
        :raises ValueError: the layer has counts of another number of experts, or there is no such
            device.
        """
        _check_layer(layer)
        counts = self.counts.get(layer)
        if counts is not None and counts.shape[0] != num_experts:
            expected = f"{counts.shape[0]}, as the counts of {layer!r} have"
            raise ValueError(refusal("num_experts", expected, num_experts))
        if counts is not None and counts.device == device:
            return counts
        num_experts, device = _check.experts(num_experts), _device_of(device)
        # So that calls outside that mode count too.
        with torch.inference_mode(False):  # noqa: FBT003 -- Dynamo takes no keyword here
            if counts is None or counts.is_meta:
                counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
            else:
                counts = counts.to(device)
        self.counts[layer] = counts
        return counts

    def read(self) -> Loads:
        """Copy all counts to the host, which waits for the devices, and return them as loads."""
        return Loads({layer: Load(tuple(counts.tolist())) for layer, counts in self.counts.items()})

    def reset(self) -> None:
        """Set all counts to 0, in place: captured graphs and compiled programs go on with them."""
        for counts in self.counts.values():
            counts.zero_()


def _check_layer(layer: object) -> None:
    if not isinstance(layer, str):
        raise TypeError(refusal("layer", "a str", layer))


def _device_of(device: object) -> torch.device:
    if isinstance(device, torch.device):
        return device
    if not isinstance(device, str):
        raise TypeError(refusal("device", "a torch.device or its name", device))
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(refusal("device", "the name of a torch.device", device)) from error
