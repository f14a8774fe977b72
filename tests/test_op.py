"""Tracing, fake tensors and gradients.

Contract points 14 and 15 hold, and cost other calls nothing.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from moe_routing import Router, RoutingOutput, RoutingSpec, _op  # noqa: F401 -- registers the operators
from moe_routing.families import FAMILIES

E, K, T = 16, 4, 6
ROUTE = torch.ops.moe_routing.route.default
TRAIN = torch.ops.moe_routing.route_training.default
BACKWARD = torch.ops.moe_routing.route_backward.default
GEMMA = RoutingSpec(family="gemma4", renormalize=True, per_expert_scale=True)

SPECS = {
    **{name: spec.spec for name, spec in FAMILIES.items()},
    "grouped": RoutingSpec(
        family="g", score="sigmoid", selection="scores_plus_bias", renormalize=True,
        renorm_epsilon=1e-20, scale=2.5, num_groups=4, topk_groups=2, group_sum=2,
    ),
    "capped": RoutingSpec(family="c", logit_softcap=5.0, logit_multiplier=0.7, renormalize=True),
    "floor reached": RoutingSpec(family="f", renormalize=True, renorm_floor=0.9),
    "zero and shared": RoutingSpec(family="z", score="sigmoid", zero_experts=4, shared_experts=2),
}  # fmt: skip


def topk_for(spec):
    return {"sparsemixer": 2, "partitioned_softmax": spec.num_groups}.get(spec.family, K)


def operands(spec, dtype=torch.float32):
    torch.manual_seed(0)
    given = {}
    if spec.per_expert_scale:
        given["per_expert_scale"] = torch.rand(E, dtype=dtype)
    if spec.needs_bias:
        given["bias"] = torch.randn(E)
    if spec.selection == "token_table":
        given["token_ids"] = torch.arange(T)
        given["expert_table"] = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    return given


def reference_weights(spec, logits, ids, per_expert_scale=None):
    """Write the weights at fixed ids with autograd's own operations, in the dtype of the logits."""
    if spec.selection == "sparsemixer":
        left, weights = logits, []
        for k in range(ids.shape[1]):
            best = ids[:, k : k + 1]
            top = left.gather(-1, best).detach()
            far = (top - logits.detach()) / logits.detach().abs().maximum(top) > 2 * spec.jitter
            weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, best))
            left = left.scatter(-1, best, -torch.inf)
        return torch.cat(weights, -1)
    x = logits * spec.logit_multiplier
    if spec.logit_softcap:
        x = spec.logit_softcap * torch.tanh(x / spec.logit_softcap)
    score = {
        "softmax": lambda x: x.softmax(-1),
        "sigmoid": torch.sigmoid,
        "sqrtsoftplus": lambda x: torch.nn.functional.softplus(x).sqrt(),
    }
    w = score[spec.score](x).gather(-1, ids)
    if spec.renormalize:
        w = w / (w.sum(-1, keepdim=True) + spec.renorm_epsilon).clamp(min=spec.renorm_floor)
    w = w * spec.scale
    if per_expert_scale is not None:
        w = w * per_expert_scale[ids]
    return w.masked_fill(ids >= E - spec.zero_experts, 0.0)


@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_those_of_autograd_through_the_reference(name):
    spec = SPECS[name]
    topk, given = topk_for(spec), operands(spec)
    logits = torch.randn(T, E, requires_grad=True)
    scale = given.get("per_expert_scale")
    if scale is not None:
        scale.requires_grad_()
    weights, ids = Router(spec)(logits, topk, **given)
    upstream = torch.randn_like(weights)
    weights.backward(upstream)

    logits64 = logits.detach().double().requires_grad_()
    scale64 = None if scale is None else scale.detach().double().requires_grad_()
    reference = reference_weights(spec, logits64, ids[:, :topk].long(), scale64)
    torch.testing.assert_close(weights[:, :topk].double(), reference, rtol=2e-6, atol=1e-7)
    reference.backward(upstream[:, :topk].double())
    torch.testing.assert_close(logits.grad.double(), logits64.grad, rtol=1e-4, atol=1e-6)
    if scale is not None:
        torch.testing.assert_close(scale.grad.double(), scale64.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["gemma4", "sigmoid_bias_topk", "sqrtsoftplus_bias", "softmax_bias_topk"]
)
def test_gradients_are_finite_and_zero_at_nan_and_inf(name):
    spec = SPECS[name]
    logits = torch.randn(T, E)
    logits[0], logits[1, 3], logits[2, 5], logits[3], logits[4] = (
        torch.nan,
        torch.inf,
        torch.nan,
        -torch.inf,
        -200.0,
    )
    logits.requires_grad_()
    weights, _ = Router(spec)(logits, K, **operands(spec))
    weights.sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[~logits.detach().isfinite()] == 0).all()


def test_padding_has_no_gradient_and_an_expert_map_does_not_disturb_it():
    route, logits, scale = Router(GEMMA), torch.randn(T, E, requires_grad=True), torch.rand(E)
    plain, _ = route(logits, K, scale)
    (plain[:3] ** 2).sum().backward()
    expected = logits.grad
    for mapped in (
        torch.randperm(E),
        torch.arange(E) // 2,
        torch.where(torch.arange(E) % 2 == 0, -1, torch.arange(E)),
    ):
        logits.grad = None
        weights, ids = route(logits, K, scale, num_valid_tokens=3, expert_map=mapped)
        (weights**2).sum().backward()
        torch.testing.assert_close(logits.grad, expected)
        assert (ids[3:] == -1).all()
        assert torch.equal(ids[:3].long(), mapped[route(logits.detach(), K, scale).ids[:3].long()])


class Gate(torch.nn.Module):
    def __init__(self, route):
        super().__init__()
        self.route = route
        self.proj = torch.nn.Linear(8, E)
        self.scale = torch.nn.Parameter(torch.rand(E))

    def forward(self, hidden):
        weights, ids = self.route(self.proj(hidden), K, self.scale)
        return weights * 2, ids


def test_a_module_that_routes_compiles_whole_for_any_number_of_tokens():
    gate = Gate(Router(GEMMA))
    compiled = torch.compile(gate, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (7, 2, 33):
            hidden = torch.randn(tokens, 8)
            for ours, traced in zip(gate(hidden), compiled(hidden), strict=True):
                assert torch.equal(ours, traced)


def test_a_compiled_module_trains():
    gate = Gate(Router(GEMMA))
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    hidden = torch.randn(T, 8)
    gate(hidden)[0].square().sum().backward()
    expected = [p.grad.clone() for p in gate.parameters()]
    gate.zero_grad()
    compiled(hidden)[0].square().sum().backward()
    for parameter, grad in zip(gate.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.slow
def test_inductor_compiles_a_call_with_out():
    route, scale = Router(GEMMA), torch.rand(E)

    def into(logits, weights, ids):
        return route(logits * 2, K, scale, out=(weights, ids))

    logits = torch.randn(T, E)
    out = RoutingOutput(torch.full((T, K), torch.nan), torch.full((T, K), -7, dtype=torch.int32))
    with torch.no_grad():
        torch.compile(into, fullgraph=True)(logits, *out)
        expected = route(logits * 2, K, scale)
    assert torch.equal(out.weights, expected.weights)
    assert torch.equal(out.ids, expected.ids)


def test_a_module_that_routes_exports_with_a_dynamic_number_of_tokens():
    gate = Gate(Router(GEMMA)).requires_grad_(requires_grad=False)
    exported = torch.export.export(
        gate, (torch.randn(5, 8),), dynamic_shapes=({0: torch.export.Dim("T")},)
    )
    hidden = torch.randn(9, 8)
    for ours, traced in zip(gate(hidden), exported.module()(hidden), strict=True):
        assert torch.equal(ours, traced)


def test_fake_and_meta_tensors_give_shapes():
    with FakeTensorMode():
        weights, ids = Router(GEMMA)(torch.empty(3, E), K, torch.empty(E), ids_dtype=torch.int64)
        assert (weights.shape, ids.shape, weights.dtype, ids.dtype) == (
            (3, K),
            (3, K),
            torch.float32,
            torch.int64,
        )
    weights, ids = Router(GEMMA)(torch.empty(3, E, device="meta"), K, torch.empty(E, device="meta"))
    assert (weights.shape, ids.device.type) == ((3, K), "meta")


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # torch 2.15's own look
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("int64_ids", [False, True])
@pytest.mark.parametrize(
    "tokens", [2, *(pytest.param(t, marks=pytest.mark.slow) for t in (1, 5, 300))]
)
@pytest.mark.parametrize(
    "name", ["gemma4", "grouped_sigmoid_bias", "hash_sqrtsoftplus", "zero and shared"]
)
def test_opcheck_passes(name, tokens, int64_ids, training):
    spec = SPECS[name]
    given = {
        "per_expert_scale": None,
        "bias": None,
        "token_ids": None,
        "expert_table": None,
        **operands(spec),
    }
    if given["token_ids"] is not None:
        given["token_ids"] = torch.arange(tokens) % T
    logits = torch.randn(tokens, E, requires_grad=training)
    num_valid = torch.tensor([4])
    opcheck(
        TRAIN if training else ROUTE,
        (logits, *given.values(), num_valid, None, spec.to_json(), K, int64_ids, None),
    )


def test_opcheck_of_the_backward_passes():
    ids = torch.randn(T, E).topk(K).indices.int()
    opcheck(
        BACKWARD, (torch.randn(T, K), torch.randn(T, E), ids, torch.rand(E), GEMMA.to_json(), None)
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_few_tokens_compile_with_ids_that_are_flattened(backend, ids_dtype):
    route = Router(GEMMA)

    def flat(logits, scale):
        return route(logits, 2, scale, ids_dtype=ids_dtype).ids.view(-1) + 1

    for tokens in (1, 2, 3, 7, 130):
        torch.compiler.reset()
        logits, scale = torch.randn(tokens, E), torch.rand(E)
        assert torch.equal(
            torch.compile(flat, fullgraph=True, backend=backend)(logits, scale), flat(logits, scale)
        )


EXPORTED = """
import sys
{imports}
program = torch.export.load(sys.argv[1])
logits = torch.linspace(-2, 2, 5 * 16).view(5, 16).flip(1).contiguous()
output = program.module()(logits)
print(type(output).__name__, output.ids.tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports", ["import moe_routing\nimport torch", "import torch\nimport moe_routing"]
)
def test_an_exported_program_that_returns_routing_output_loads_where_only_the_package_was_imported(
    tmp_path, imports
):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.route = Router(RoutingSpec(family="topk_softmax", renormalize=True))

        def forward(self, logits):
            return self.route(logits, 2)

    path = tmp_path / "program.pt2"
    torch.export.save(torch.export.export(Module(), (torch.randn(5, 16),)), path)
    done = subprocess.run(
        [sys.executable, "-c", EXPORTED.format(imports=imports), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"RoutingOutput {[[0, 1]] * 5}\n", done.stderr


def test_an_ordinary_call_does_not_go_through_the_operator():
    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names = (*self.names, str(func))
            return func(*args, **(kwargs or {}))

    with Seen() as seen, torch.no_grad():
        Router(GEMMA)(torch.randn(T, E), K, torch.rand(E))
    assert seen.names
    assert not any("moe_routing" in name for name in seen.names)
