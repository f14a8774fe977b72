"""torch.func, higher derivatives, DTensor, lazy negation and fake-tensor modes.

Each gives right results, or an error that names it.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import moe_routing
from moe_routing import Router, RoutingSpec
from moe_routing._registry import registry
from moe_routing.formula import weights_backward
from moe_routing_registry import BackendSpec, Target

T, E, K = 4, 8, 2
SPECS = {
    "softmax of the selected": RoutingSpec(family="t1", renormalize=True),
    "softmax of all": RoutingSpec(family="t2", scale=2.5),
    "sigmoid with a bias": RoutingSpec(
        family="t3", score="sigmoid", selection="scores_plus_bias", renormalize=True
    ),
    "root of softplus, epsilon": RoutingSpec(
        family="t4", score="sqrtsoftplus", renormalize=True, renorm_epsilon=0.25
    ),
    "capped and scaled": RoutingSpec(
        family="t5", renormalize=True, logit_softcap=5.0, per_expert_scale=True
    ),
    "shared and zero experts": RoutingSpec(
        family="t6", score="sigmoid", shared_experts=2, zero_experts=3
    ),
}


def given_for(spec):
    given = {}
    if spec.needs_bias:
        given["bias"] = torch.randn(E)
    if spec.per_expert_scale:
        given["per_expert_scale"] = torch.rand(E) + 0.5
    return given


def reference(spec, ids, logits, per_expert_scale=None):
    """Write the weights at fixed ids with PyTorch's own operations."""
    x = (
        spec.logit_softcap * torch.tanh(logits / spec.logit_softcap)
        if spec.logit_softcap
        else logits
    )
    score = {
        "softmax": lambda x: x.softmax(-1),
        "sigmoid": torch.sigmoid,
        "sqrtsoftplus": lambda x: torch.nn.functional.softplus(x).sqrt(),
    }[spec.score](x)
    w = score.gather(-1, ids)
    if spec.renormalize:
        w = w / (w.sum(-1, keepdim=True) + spec.renorm_epsilon)
    w = w * spec.scale
    if per_expert_scale is not None:
        w = w * per_expert_scale[ids]
    return w.masked_fill(ids >= E - spec.zero_experts, 0.0) if spec.zero_experts else w


@pytest.fixture(params=SPECS)
def case(request):
    """Return two functions of the logits that compute the same weights.

    One routes, the other uses PyTorch's operations.
    """
    spec = SPECS[request.param]
    route, given, logits = Router(spec), given_for(spec), torch.randn(T, E)
    ids = route(logits, K, **given).ids[:, :K].long()
    scale = given.get("per_expert_scale")

    def ours(l):
        return route(l, K, **given).weights[..., :K]

    return ours, lambda l: reference(spec, ids, l, scale), logits


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


def summed(f):
    return lambda l: (f(l).pow(2) * torch.arange(1.0, K + 1)).sum()


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: grad(summed(f)),
        jacrev,
        jacfwd,
        lambda f: hessian(summed(f)),
        lambda f: jacrev(jacrev(summed(f))),
        lambda f: lambda l: jvp(f, (l,), (torch.ones_like(l),))[1],
        lambda f: lambda l: jvp(grad(summed(f)), (l,), (torch.ones_like(l),))[1],
        lambda f: lambda l: torch.autograd.functional.hessian(summed(f), l),
        lambda f: lambda l: torch.autograd.functional.jacobian(f, l, vectorize=True),
    ],
    ids=[
        "grad",
        "jacrev",
        "jacfwd",
        "hessian",
        "jacrev twice",
        "jvp",
        "jvp of grad",
        "autograd's hessian",
        "vectorised",
    ],
)
def test_transforms_give_what_pytorchs_own_operations_give(case, transform):
    ours, theirs, logits = case
    close(transform(ours)(logits), transform(theirs)(logits))


def test_vmap_routes_each_element(case):
    ours, _, logits = case
    batch = torch.stack([logits, -logits, logits * 2], dim=1)
    for transform in (lambda f: f, lambda f: grad(summed(f)), jacrev):
        expected = torch.stack([transform(ours)(batch[:, n]) for n in range(3)])
        close(vmap(transform(ours), in_dims=1)(batch), expected)


def test_vmap_over_other_operands_and_ids():
    spec = RoutingSpec(
        family="t7",
        score="sigmoid",
        selection="scores_plus_bias",
        renormalize=True,
        per_expert_scale=True,
    )
    route = Router(spec)
    logits, biases, scales = torch.randn(T, E), torch.randn(3, E), torch.rand(3, E)
    valid = torch.tensor([[1], [2], [4]])

    def call(bias, scale, valid):
        return tuple(route(logits, K, scale, bias=bias, num_valid_tokens=valid))

    weights, ids = vmap(call)(biases, scales, valid)
    for n in range(3):
        expected = call(biases[n], scales[n], valid[n])
        assert torch.equal(ids[n], expected[1])
        assert torch.equal(weights[n], expected[0])
    per_scale = vmap(grad(lambda s: route(logits, K, s, bias=biases[0]).weights.pow(2).sum()))(
        scales
    )
    close(
        per_scale[1],
        grad(lambda s: route(logits, K, s, bias=biases[0]).weights.pow(2).sum())(scales[1]),
    )


def test_forward_mode_without_functorch_carries_tangents(case):
    ours, theirs, logits = case
    tangents = []
    ours(logits)  # a warm call must not serve the next ones
    ours(logits)
    for f in (ours, theirs):
        with forward_ad.dual_level():
            tangents.append(
                forward_ad.unpack_dual(
                    f(forward_ad.make_dual(logits, torch.ones_like(logits)))
                ).tangent
            )
    close(*tangents)


class OwnBackward:
    """Routes as eager does, and goes back in a way that autograd does not see."""

    def __init__(self, problem):
        self.problem, self.plain = problem, Router(problem.spec, backend="eager")

    def __call__(self, logits, **_operands):
        return self.plain(logits.detach(), self.problem.topk)

    def backward(self, grad_weights, logits, ids, scale):
        with torch.no_grad():
            return weights_backward(self.problem.spec, grad_weights, logits, ids, scale)


def build_own(problem, _device):
    return OwnBackward(problem)


@pytest.mark.parametrize(
    "transform", [hessian, lambda f: lambda l: torch.autograd.functional.hessian(f, l)]
)
def test_a_backward_of_a_kernels_own_is_differentiated_by_the_closed_form(transform):
    spec = RoutingSpec(family="t8", renormalize=True)
    registry().register(
        BackendSpec(
            name="own-backward",
            factories={"route": f"{__name__}:build_own"},
            targets=(Target("cpu"),),
        )
    )
    try:
        logits = torch.randn(T, E)
        ours = transform(summed(lambda l: Router(spec, backend="own-backward")(l, K).weights))(
            logits
        )
        close(
            ours, transform(summed(lambda l: Router(spec, backend="eager")(l, K).weights))(logits)
        )
    finally:
        registry().unregister("own-backward")


def test_the_operators_gradient_has_a_derivative_too(case):
    ours, theirs, logits = case
    compiled = torch.compile(
        ours, fullgraph=True, backend="eager"
    )  # the operator itself, without AOTAutograd
    second = []
    for f in (compiled, theirs):
        x = logits.clone().requires_grad_()
        (first,) = torch.autograd.grad(summed(f)(x), x, create_graph=True)
        second.append(torch.autograd.grad(first.pow(2).sum(), x)[0])
    close(*second)


def negated(tensor):
    """Return a tensor of the same values whose memory holds their negatives."""
    lazy = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert lazy.is_neg()
    assert torch.equal(lazy, tensor)
    return lazy


def test_lazily_negated_operands_count_with_their_sign():
    spec = RoutingSpec(
        family="t9",
        score="sigmoid",
        selection="scores_plus_bias",
        renormalize=True,
        per_expert_scale=True,
    )
    route = Router(spec)
    logits, scale, bias = torch.randn(T, E), torch.rand(E), torch.randn(E)
    expected = route(logits, K, scale, bias=bias)
    for _ in range(2):
        for l, s, b in (
            (negated(logits), scale, bias),
            (logits, negated(scale), bias),
            (logits, scale, negated(bias)),
        ):
            got = route(l, K, s, bias=b)
            assert torch.equal(got.ids, expected.ids)
            assert torch.equal(got.weights, expected.weights)
    out = moe_routing.RoutingOutput(
        negated(torch.zeros(T, K)), torch.zeros(T, K, dtype=torch.int32)
    )
    if out.weights.is_contiguous():
        route(logits, K, scale, bias=bias, out=out)
        assert torch.equal(out.weights, expected.weights)
    x = logits.clone().requires_grad_()
    y = logits.clone().requires_grad_()
    upstream = torch.randn(T, K)
    route(x, K, scale, bias=bias).weights.backward(upstream)
    route(y, K, scale, bias=bias).weights.backward(negated(upstream))
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("first", ["fake", "real"])
def test_a_call_inside_a_fake_mode_leaves_no_fakes_behind(first):
    # 256 < T * E: eager selects by torch.topk, with a tensor that it keeps for the next call of
    # that E.
    logits, route = (
        torch.randn(40, 56),
        Router(RoutingSpec(family=f"fake-{first}", renormalize=True)),
    )
    if first == "real":
        route(logits, 3)
        route(logits, 3)
    for faked in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            output = route(mode.from_tensor(logits) if faked else logits, 3)
            assert (output.weights.shape, output.ids.dtype) == ((40, 3), torch.int32)
    with FakeTensorMode():
        Router(RoutingSpec(family="warm-fake", renormalize=True)).warmup(56, 3, dtype=torch.float32)
    for some in (route, Router(RoutingSpec(family="warm-fake", renormalize=True))):
        assert torch.equal(
            some(logits, 3).ids.long(), logits.sort(descending=True, stable=True).indices[:, :3]
        )


SHARDED = """
import os, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
import moe_routing

rank, port = int(sys.argv[1]), sys.argv[2]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
spec = moe_routing.RoutingSpec(
    family="sharded", score="sigmoid", selection="scores_plus_bias", renormalize=True,
    per_expert_scale=True, shared_experts=1,
)
route = moe_routing.Router(spec)
plain = lambda *given, **named: tuple(route(*given, **named))
compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
torch.manual_seed(0)
for tokens in (6, 5, 1):  # evenly, unevenly, and with a rank that has no row
    logits, scale, bias = torch.randn(tokens, 8), torch.rand(8), torch.randn(8)
    upstream = torch.randn(tokens, 3)
    plain_logits, plain_scale = logits.clone().requires_grad_(), scale.clone().requires_grad_()
    expected = route(plain_logits, 2, plain_scale, bias=bias)
    expected.weights.backward(upstream)
    for place in (Shard(0), Replicate(), Shard(1)):
        result = Shard(0) if place == Shard(0) else Replicate()
        for spread in (lambda t: t, lambda t: distribute_tensor(t, mesh, [Replicate()])):
            for call in (route, compiled) if tokens == 6 else (route,):
                x = distribute_tensor(logits, mesh, [place]).requires_grad_()
                s = spread(scale.clone()).requires_grad_()
                torch.compiler.reset()
                with torch.no_grad():
                    weights, ids = call(x, 2, s, bias=spread(bias))
                placed = (weights.placements, ids.placements)
                assert placed == ((result,), (result,)), (place, placed)
                assert weights.shape == (tokens, 3)
                assert torch.equal(ids.full_tensor(), expected.ids), place
                assert torch.equal(weights.full_tensor(), expected.weights), place
                weights, ids = call(x, 2, s, bias=spread(bias))
                weights.backward(distribute_tensor(upstream, mesh, [result]))
                torch.testing.assert_close(x.grad.full_tensor(), plain_logits.grad)
                got = s.grad.full_tensor() if isinstance(s.grad, DTensor) else s.grad
                torch.testing.assert_close(got, plain_scale.grad)
    x = distribute_tensor(logits, mesh, [Shard(0)])
    padded = route(x, 2, scale, bias=bias, num_valid_tokens=1)
    whole = route(logits, 2, scale, bias=bias, num_valid_tokens=1)
    assert torch.equal(padded.ids.full_tensor(), whole.ids)
try:
    route(distribute_tensor(logits[None], mesh, [Replicate()]), 2, scale, bias=bias)
except ValueError as error:
    assert str(error).startswith("logits: expected [T, E], because they are a DTensor"), error
else:
    raise AssertionError("logits of three dimensions were accepted")
try:
    out = tuple(t.detach() for t in expected)
    route(distribute_tensor(logits, mesh, [Shard(0)]), 2, scale, bias=bias, out=out)
except ValueError as error:
    assert str(error).startswith("out: expected None with logits that are a DTensor"), error
else:
    raise AssertionError("out was accepted")
dist.destroy_process_group()
print("same")
"""


@pytest.mark.slow
def test_row_sharded_and_replicated_dtensors_are_routed_on_two_processes(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = tmp_path / "sharded.py"
    script.write_text(textwrap.dedent(SHARDED))
    command = [sys.executable, str(script)]
    ranks = [
        subprocess.Popen(
            [*command, str(r), port], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for r in (0, 1)
    ]
    said = [rank.communicate() for rank in ranks]
    assert [out for out, _ in said] == ["same\n"] * 2, "\n".join(err[-3000:] for _, err in said)
