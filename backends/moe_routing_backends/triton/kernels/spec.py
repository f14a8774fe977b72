"""What the kernels of all variants share on the host.

This is the compile-time constant, a launch, and what a variant is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moe_routing_registry import DeviceInfo, RoutingProblem, RoutingSpec

VariantName = Literal["cooperative", "thread_per_row", "filter", "block", "weigh"]

ANY_ROWS = frozenset({"cooperative", "weigh"})
"""Variants that take rows of any alignment, and experts at any distance."""
RUNTIME_ARGUMENTS = 17
"""How many arguments of a forward kernel, the same for all variants, stand before its constants."""
NOT_SPECIALIZED = (
    "T", "valid", "row_stride", "expert_stride", "per_expert_scale", "bias", "token_ids",
    "expert_table", "num_valid_tokens", "expert_map", "counts", "replica_count",
    "most_replicas", "vocabulary",
)  # fmt: skip
"""Arguments whose value or alignment must not select another compiled kernel."""
CHUNK = 8
"""Experts that a thread loads and sorts at a time: 16 bytes of 16-bit logits."""
WIDEST_LIST = 16
"""Longest list of selected experts that a thread keeps in registers.

The other list has ``CHUNK``.
"""
UNROLL_UP_TO = 16
"""Selection rounds up to which a loop over K is unrolled whole."""
WARP = 32
"""Threads a warp on the device that the shipped table was measured on."""


@dataclass(frozen=True)
class KernelSpec:
    """The routing formula and the sizes that a kernel is compiled for: one compile-time constant.

    Kernels read ``SPEC.value.<field>`` and bind what they use to a ``tl.constexpr``: Triton 3.3
    compiles attributes of ``tl.constexpr`` itself only, and no comparison of a bare string with
    one. Triton keeps compiled kernels by the ``repr`` of their constants, so everything that
    kernels read is a field.

    :ivar logit_softcap: 0 where there is none.
    :ivar sums_best_two: a group's score is the sum of its best two experts.
    :ivar sums_to_one: weights are renormalized, and neither epsilon nor floor changes their sum.
    :ivar normalizes_whole_row: weights or selection need the softmax denominator of all experts.
    :ivar counted_columns: columns of the ids whose slots are counted: 0 in calls that count none.
    """

    num_experts: int
    topk: int
    shared_experts: int
    shared_weight: float
    zero_experts: int
    score: str
    selection: str
    renormalize: bool
    renorm_epsilon: float
    renorm_floor: float
    scale: float
    logit_multiplier: float
    logit_softcap: float
    jitter: float
    num_groups: int
    topk_groups: int
    topk_per_group: bool
    sums_best_two: bool
    sums_to_one: bool
    normalizes_whole_row: bool
    counted_columns: int = 0

    @property
    def value(self) -> KernelSpec:
        """Return itself: the interpreter passes constants as they are, not as ``tl.constexpr``."""
        return self


def kernel_spec(problem: RoutingProblem) -> KernelSpec:
    """Return the constant for a problem that ``supports`` accepts.

    It has no words for other scores of groups: kernels of such a problem compute something else,
    which the conformance kit tries.
    """
    spec = problem.spec
    sums_to_one = spec.renormalize and not (spec.renorm_epsilon or spec.renorm_floor)
    return KernelSpec(
        num_experts=problem.num_experts,
        topk=problem.topk,
        shared_experts=spec.shared_experts,
        shared_weight=float(spec.shared_weight),
        zero_experts=spec.zero_experts,
        score=spec.score,
        selection=spec.selection,
        renormalize=spec.renormalize,
        renorm_epsilon=float(spec.renorm_epsilon),
        renorm_floor=float(spec.renorm_floor),
        scale=float(spec.scale),
        logit_multiplier=float(spec.logit_multiplier),
        logit_softcap=float(spec.logit_softcap or 0.0),
        jitter=float(spec.jitter),
        num_groups=spec.num_groups,
        topk_groups=spec.topk_groups,
        topk_per_group=spec.topk_per_group,
        sums_best_two=spec.num_groups > 1 and spec.group_sum > 1,
        sums_to_one=sums_to_one,
        normalizes_whole_row=spec.score == "softmax"
        and (not sums_to_one or spec.selection == "scores_plus_bias"),
    )


@dataclass(frozen=True, slots=True)
class Launch:
    """How one kernel is launched.

    :ivar variant: the kernel.
    :ivar block_t: rows a program.
    :ivar threads_per_row: threads that share a row; 1 for the cooperative variant, whose rows are
        shared by whole warps.
    :ivar num_warps: warps a program.
    :ivar warp_size: threads a warp, where the device has a choice (sub-groups of Intel's GPUs); 0
        says nothing.
    """

    variant: VariantName
    block_t: int
    threads_per_row: int
    num_warps: int
    warp_size: int = 0


class Variant(NamedTuple):
    """One kernel, and what the host must know of it.

    :ivar kernel: the ``triton.jit`` function. The first ``RUNTIME_ARGUMENTS`` of its arguments are
        the same for all variants.
    :ivar supports: tells whether a launch serves a problem, given logits of unit stride whose rows
        are aligned to 16 bytes.
    :ivar constants: returns the kernel's compile-time constants that do not depend on a call, in
        addition to ``SPEC``.
    :ivar candidates: returns the launches that are worth measuring on a device.
    :ivar runs_on: tells whether the kernel compiles and pays on a device.
    """

    kernel: Any
    supports: Callable[[RoutingProblem, Launch], bool]
    constants: Callable[[RoutingProblem, Launch], dict[str, Any]]
    candidates: Callable[[DeviceInfo], Sequence[Launch]]
    runs_on: Callable[[DeviceInfo], bool] = lambda _device: True


def one_warp(variant: VariantName, device: DeviceInfo) -> list[Launch]:
    """Return launches of one warp, with 1 thread a row up to a whole warp a row."""
    wide = max(device.warp_sizes, default=WARP)
    return [
        Launch(variant, wide // threads, threads, 1)
        for threads in (1 << n for n in range(wide.bit_length()))
    ]


def next_power_of_two(n: int) -> int:
    """Return the least power of two that is not below ``n >= 1``."""
    return 1 << (n - 1).bit_length()


def list_width(problem: RoutingProblem) -> int:
    """Return the length of the list of selected experts, shared ones included: 8 or 16."""
    return CHUNK if problem.topk + problem.spec.shared_experts <= CHUNK else WIDEST_LIST


Kind = Literal["logits", "row_sum", "sigmoid_bias", "bias", "grouped"]
APPROXIMATED: Kind = "sigmoid_bias"
"""Biased scores that the filter approximates.

Where the filter does not run, rules for other biased scores apply.
"""


def kind(spec: RoutingSpec) -> Kind:
    """Class a spec by what its kernel does for every expert of a row.

    Launch tables have rules by that kind.

    >>> from moe_routing_registry import RoutingSpec
    >>> kind(RoutingSpec(family="f", renormalize=True)), kind(RoutingSpec(family="f"))
    ('logits', 'row_sum')
    """
    if spec.num_groups > 1:
        return "grouped"
    if spec.needs_bias:
        plain = (
            spec.selection == "scores_plus_bias"
            and spec.logit_multiplier == 1
            and not spec.logit_softcap
        )
        return APPROXIMATED if plain and spec.score == "sigmoid" else "bias"
    exact = spec.renormalize and not (spec.renorm_epsilon or spec.renorm_floor)
    return "row_sum" if spec.score == "softmax" and not exact else "logits"


def selects_by_value(problem: RoutingProblem) -> bool:
    """Tell whether the K highest logits or biased scores of contiguous rows are selected."""
    spec = problem.spec
    by_value = spec.selection in ("logits", "scores_plus_bias", "logits_plus_bias")
    return by_value and problem.layout == "rows" and not spec.topk_per_group
