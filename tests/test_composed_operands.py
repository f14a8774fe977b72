"""Counts and replicas: a backend that names them gets them, for others the router does the work."""

import dataclasses
from itertools import product

import pytest
import torch

import moe_routing
from moe_routing._registry import registry
from moe_routing.reference.counts_oracle import counted
from moe_routing.reference.replicas_oracle import physical
from moe_routing_registry import ANY, BackendSpec, Target, Verdict

E, K, T = 16, 4, 9
SPEC = moe_routing.list_routers()["mixtral"]
NONE, COUNTS, REPLICAS = frozenset(), frozenset({"counts"}), frozenset({"replicas"})
GOT, ASKED = [], []


class Kernel:
    """A kernel of a third party, which notes what it gets."""

    def __init__(self, problem, device):
        self.named = problem.operands
        self.route = registry().build("eager", dataclasses.replace(problem, operands=NONE), device)

    def __call__(
        self, logits, *, counts=None, logical_to_physical=None, replica_count=None,
        expert_map=None, **operands,
    ):  # fmt: skip
        given = {"counts": counts, "table": logical_to_physical, "count": replica_count}
        GOT.append((self.named, {name: t for name, t in given.items() if t is not None}))
        weights, ids = self.route(logits, **operands)
        if counts is not None:
            counts += counted(ids, len(counts)).to(counts.dtype)
        if replica_count is not None:
            ids = physical(ids, logical_to_physical, replica_count).int()
        if expert_map is not None:
            ids = expert_map[ids].int()
        return moe_routing.RoutingOutput(weights, ids)


def build(problem, device):
    return Kernel(problem, device)


def supports(problem, device):  # noqa: ARG001 -- as the registry calls it
    ASKED.append(problem.operands)
    return Verdict.yes()


@pytest.fixture(params=[NONE, COUNTS, REPLICAS, COUNTS | REPLICAS], ids=sorted)
def named(request):
    spec = BackendSpec(
        name="third", factories={"route": f"{__name__}:build"}, targets=(Target(ANY),),
        operands=request.param, supports=supports,
    )  # fmt: skip
    registry().register(spec)
    GOT.clear()
    ASKED.clear()
    yield request.param
    registry().unregister("third")


def zeros(length=E, dtype=torch.int64):
    return torch.zeros(length, dtype=dtype)


@pytest.mark.parametrize("verify", [False, True])
def test_a_backend_gets_what_it_names_and_the_router_does_the_rest(named, verify):
    route = moe_routing.Router(SPEC, backend="third", verify=verify)
    logits = torch.randn(T, E)
    wide = torch.randint(0, 1000, (E, 6))
    replicas = {"logical_to_physical": wide[:, ::2], "replica_count": torch.arange(E) % 4}
    ids = route(logits, K).ids
    expected = physical(ids, replicas["logical_to_physical"], replicas["replica_count"].clamp(1))
    tensors = None, zeros(), zeros(dtype=torch.int32), zeros(3 * E)[::3]
    for counts, training, times in product(tensors, (False, True), (1, 2)):
        GOT.clear()
        before = None if counts is None else counts.clone()
        output = route(logits.requires_grad_(training), K, counts=counts, **replicas)
        assert output.weights.requires_grad == training, times
        assert torch.equal(output.ids.long(), expected)
        if counts is not None:
            assert torch.equal(counts - before, counted(ids, E).to(counts.dtype))
        ((of_kernel, given), *_) = GOT
        asked = named if counts is not None else named & REPLICAS
        assert of_kernel == (asked if given else NONE)  # the kernel of plain calls
        counts_inside = counts is not None and "counts" in named
        # Derivatives, shadow mode and a router that counts need logical ids.
        needs_logical = training or verify or (counts is not None and not counts_inside)
        chooses_inside = "replicas" in named and not needs_logical
        assert set(given) == {
            *(["counts"] if counts_inside else []),
            *(["table", "count"] if chooses_inside else []),
        }
        assert all(tensor.is_contiguous() for tensor in given.values())
    assert set(ASKED) <= {NONE, named, named & REPLICAS}
    assert route.report.winner == "third"
    assert route.health().ok


def test_a_map_is_applied_once_whoever_counts(named):  # noqa: ARG001 -- for each
    route = moe_routing.Router(SPEC, backend="third")
    logits, places, counts = torch.randn(T, E), torch.randperm(E) + 7, zeros()
    ids = route(logits, K).ids
    for training in (False, True):
        output = route(logits.requires_grad_(training), K, counts=counts, expert_map=places)
        assert torch.equal(output.ids, places[ids].int())
    assert torch.equal(counts, 2 * counted(ids, E))


def test_calls_with_and_without_take_turns(named):  # noqa: ARG001 -- likewise
    route = moe_routing.Router(SPEC, backend="third")
    counts = zeros()
    for times in (1, 2, 3):
        logits = torch.randn(T, E)
        plain = route(logits, K)
        assert torch.equal(route(logits[None], K, counts=counts).ids[0], plain.ids)
        assert counts.sum() == times * T * K


def test_no_backend_is_passed_over_for_what_the_router_does(named):
    report = moe_routing.explain(SPEC, operands=("counts", "replicas"), backend="third")
    assert report.winner == "third"
    assert "with counts, replicas" in str(report.problem)
    assert [named] == ASKED
    assert moe_routing.explain(SPEC, operands=("counts", "ids"), backend="third").winner is None


def test_warm_up_builds_what_calls_use(named):
    route = moe_routing.Router(SPEC, backend="third")
    route.warmup(E, K, dtype=torch.float32, operands=named)
    kernel = route.resolve("cpu", torch.float32, E, K, operands=named).kernel
    assert kernel.named == named
    assert kernel is route.resolve("cpu", torch.float32, E, K, operands=COUNTS | REPLICAS).kernel


def test_a_tensor_that_is_no_plain_memory_reaches_no_kernel(named):  # noqa: ARG001 -- likewise
    class Own(torch.Tensor):
        pass

    route = moe_routing.Router(SPEC, backend="third")
    logits, counts = torch.randn(T, E), zeros()
    for one in (counts, counts.as_subclass(Own)):
        GOT.clear()
        route(logits, K, counts=one)
        assert all(type(tensor) is torch.Tensor for _, given in GOT for tensor in given.values())
    assert counts.sum() == 2 * T * K
