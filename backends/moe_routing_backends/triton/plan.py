"""From a ``RoutingProblem`` to a kernel's compile-time constants."""

from __future__ import annotations


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def constants(problem):
    spec = problem.spec
    k = problem.topk
    by_group = spec.num_groups > 1 and spec.selection not in ("token_table", "sparsemixer")
    groups = spec.num_groups if by_group else 1
    return {
        "E": problem.num_experts,
        "K": k,
        "SHARED": spec.shared_experts,
        "SCORE": spec.score,
        "SELECTION": spec.selection,
        "RENORMALIZE": spec.renormalize,
        "EPSILON": float(spec.renorm_epsilon),
        "FLOOR": float(spec.renorm_floor),
        "SCALE": float(spec.scale),
        "NUM_GROUPS": groups,
        "TOPK_GROUPS": spec.topk_groups if by_group else 1,
        "TOP2": spec.group_score == "top2_sum",
        "PER_GROUP": spec.topk_per_group,
        "MULTIPLIER": float(spec.logit_multiplier),
        "CAP": float(spec.logit_softcap or 0.0),
        "ZERO_EXPERTS": spec.zero_experts,
        "JITTER": float(spec.jitter),
        "GROUPS": next_power_of_two(groups),
        "SIZE": next_power_of_two(problem.num_experts // groups),
        "N": next_power_of_two(k + spec.shared_experts),
        "UNROLL": k if k <= 16 else max(d for d in range(1, 9) if k % d == 0),
    }
