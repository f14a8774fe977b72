"""The spec of the acme backend.

The registry imports this file to choose, so it imports neither torch nor numba.
"""

from typing import Any

from moe_routing_registry import BackendSpec, DeviceInfo, RejectCode, Target, Verdict, hookimpl

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
SELECTIONS = ("logits", "scores_plus_bias", "logits_plus_bias")


def supports(problem: Any, _device: DeviceInfo) -> Verdict:  # noqa: ANN401 -- of either operation
    """Say whether this backend can build the problem; cheap, and asked once for each problem."""
    if problem.operation == "plan":
        return Verdict.yes()
    spec = problem.spec
    if spec.score not in SCORES or spec.selection not in SELECTIONS:
        return Verdict.no(
            RejectCode.FAMILY, f"has no {spec.score} scores selected by {spec.selection}"
        )
    if spec.num_groups > 1:
        return Verdict.no(RejectCode.FAMILY, "has no expert groups")
    if spec.logit_softcap is not None or spec.logit_multiplier != 1.0:
        return Verdict.no(RejectCode.FAMILY, "transforms no logits")
    return Verdict.yes()


@hookimpl
def moe_routing_backends() -> list[BackendSpec]:
    """Register the backends."""
    return [
        BackendSpec(
            name="acme",
            factories={
                "route": "moe_routing_acme.kernel:build",
                "plan": "moe_routing_acme.plan:build",
            },
            targets=(Target("cpu"),),
            requirements=("numba>=0.61",),
            supports=supports,
            summary="one pass over each row, compiled by numba",
        )
    ]
