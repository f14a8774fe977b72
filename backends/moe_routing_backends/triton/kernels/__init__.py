"""The kernels: a file for each variant of the forward kernel, and one for the backward kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_routing_backends.triton.kernels import block, cooperative, filter, thread_per_row, weigh  # noqa: A004 -- a variant's name
from moe_routing_backends.triton.kernels.spec import kernel_spec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_routing_backends.triton.kernels.spec import Launch, Variant, VariantName
    from moe_routing_registry import RoutingProblem

VARIANTS: Mapping[VariantName, Variant] = {
    "cooperative": cooperative.VARIANT,
    "thread_per_row": thread_per_row.VARIANT,
    "filter": filter.VARIANT,
    "block": block.VARIANT,
}
"""The kernels that select, which launch tables name."""
OF_LAUNCHES: Mapping[VariantName, Variant] = {**VARIANTS, "weigh": weigh.VARIANT}
"""The kernels of all launches: ``weigh`` serves calls with recorded ids, and no others do."""


def supports(problem: RoutingProblem, launch: Launch) -> bool:
    """Tell whether a launch serves a problem.

    The logits are aligned, and the variant runs on the device.
    """
    weighs, replays = launch.variant == "weigh", "ids" in problem.operands
    return weighs == replays and OF_LAUNCHES[launch.variant].supports(problem, launch)


def constants(problem: RoutingProblem, launch: Launch) -> dict[str, Any]:
    """Return the compile-time constants of a launch that do not depend on a call."""
    variant = OF_LAUNCHES[launch.variant]
    return {
        "SPEC": kernel_spec(problem),
        **variant.constants(problem, launch),
        "BLOCK_T": launch.block_t,
    }
