"""How ``gate`` is launched, and what ``explain`` says of it."""

import dataclasses
import re
from bisect import bisect_left

import pytest
import torch

from moe_routing.gating import GateProblem
from moe_routing.planning import DispatchPlan, PlanProblem
from moe_routing_backends.triton import HOPPER, notes
from moe_routing_backends.triton.gating.gate import TritonGate
from moe_routing_backends.triton.gating.launches import GROUPS, SLICE, launches_for, order_of
from moe_routing_backends.triton.planning.planner import TritonPlanner
from moe_routing_registry import RoutingSpec

SOFTMAX = RoutingSpec(family="topk_softmax", renormalize=True)
PLAIN = GateProblem(spec=SOFTMAX, num_experts=128, topk=8, hidden_size=2048, dtype="bfloat16")
PROBLEMS = (
    PLAIN,
    dataclasses.replace(PLAIN, norm="rms"),
    dataclasses.replace(PLAIN, norm="rms", input_scale=True),
    dataclasses.replace(PLAIN, float32_weight=True),
    dataclasses.replace(PLAIN, dtype="float32", num_experts=8, topk=2),
)
DEVICES = (HOPPER, dataclasses.replace(HOPPER, arch="sm_80"))


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.arch)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_it_says_up_to_how_many_tokens_the_second_kernel_adds_and_routes(problem, device):
    order, number, _plan, _table = notes(problem, device)
    tokens = int(re.fullmatch("up to ([0-9]+) tokens two kernels, .*", number)[1])
    takes = {launch.logits: launch.takes for launch in launches_for(device, problem)}
    assert takes[tokens * problem.num_experts] != "all"
    assert takes[None] == "all"
    assert order == "logits: float32 sums of slices, one order for any number of tokens"


@pytest.mark.parametrize(("experts", "tokens"), [(32, 4096), (128, 4096), (256, 1024)])
def test_where_any_order_will_do_it_says_from_how_many_tokens_the_product_is_pytorchs(
    experts, tokens
):
    problem = dataclasses.replace(PLAIN, num_experts=experts, invariant=False)
    order, number, _plan, _table = notes(problem, HOPPER)
    assert order == (
        f"logits: float32 sums of slices, from {tokens} tokens PyTorch's product, in any order"
    )
    assert int(re.match("up to ([0-9]+) tokens two kernels", number)[1]) < tokens


@pytest.mark.parametrize(
    ("experts", "shared", "plan"),
    [
        (128, 0, "the second plans one token, and counts pairs of 65 to 4096; else composed"),
        (128, 2, "the second plans one token, and counts pairs of 52 to 3276; else composed"),
        (512, 0, "the second plans one token, and counts pairs of 65 to 1024; else composed"),
        (1024, 0, "composed of two operations"),
    ],
)
def test_it_says_what_of_a_plan_the_second_kernel_does(experts, shared, plan):
    spec = SOFTMAX.replace(shared_experts=shared)
    problem = dataclasses.replace(
        PLAIN, spec=spec, num_experts=experts, norm="rms", input_scale=True
    )
    said = notes(problem, HOPPER)[2]
    assert said.startswith(f"with_plan: {plan}")
    device = dataclasses.replace(HOPPER, index=0)
    gate = TritonGate(problem, device, None)
    columns = problem.topk + shared
    planner = TritonPlanner(PlanProblem(num_experts=experts + shared, topk=columns), device)
    tokens_near = (51, 52, 64, 65, 1024, 1025, 3276, 3277, 4096, 4097)
    counted = []
    for tokens in (1, 2, *tokens_near):
        launch = gate._launches[bisect_left(gate._limits, tokens * experts)]
        pairs = tokens * columns
        parts = [torch.empty(size, device="meta") for size in (pairs, pairs, experts, experts)]
        if launch.takes != "all" and planner.by_router(tokens, DispatchPlan(*parts), None):
            counted.append(tokens)
    least, most = re.findall("([0-9]+) to ([0-9]+)", plan)[0] if "to" in plan.split() else (0, 0)
    expected = [t for t in tokens_near if int(least) <= t <= int(most)]
    assert counted == ([1, *expected] if expected else [])


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_launches_rise_and_only_the_last_has_no_end(problem):
    for device in DEVICES:
        launches = launches_for(device, problem)
        *limits, last = [launch.logits for launch in launches]
        assert last is None
        assert limits == sorted(set(limits))
        assert not any(SLICE % (launch.step or SLICE) for launch in launches)


@pytest.mark.parametrize("size", [1, 100, 2816, 4096, 16_384])
@pytest.mark.parametrize("vectors", [[], [torch.bfloat16], [torch.float32]])
def test_groups_have_every_slice_once_and_no_more_than_the_second_kernel_unrolls(size, vectors):
    order = order_of(PLAIN, vectors, "sm_90")
    slices, group = order.slices_of(size), order.group_of(size)
    assert (slices - 1) * order.slice < size <= slices * order.slice
    assert 1 <= group <= min(slices, 32)
    assert -(-slices // group) <= max(GROUPS, -(-slices // 32))
