"""Who computes the sums of losses: the preferred backend in plain calls, the formulas elsewhere."""

import subprocess
import sys
import threading

import pytest
import torch
from mutants import Mutant, registered
from mutants.balancing import WithABackward
from torch.func import grad, jvp, vmap

import moe_routing
from moe_routing.balancing import (
    BalanceProblem,
    call,
    load_balancing_loss,
    sequence_balancing_loss,
    z_loss,
)
from moe_routing.balancing import sums as sums_module
from moe_routing.integrations.transformers import _balance
from moe_routing_registry import BackendUnavailableError

E, K = 6, 2
CALLS = []


class Recording(WithABackward):
    """Notes what it is asked for."""

    def make(self, *operands):
        CALLS.append(("sums", str(self.problem)))
        return super().make(*operands)

    def gradient(self, *operands):
        CALLS.append(("gradient", str(self.problem)))
        return super().gradient(*operands)


@pytest.fixture
def backend(monkeypatch):
    CALLS.clear()
    monkeypatch.setattr(call, "_kernels", {})
    with registered(Mutant(Recording, "", operation="balance")) as name:
        yield name


def drawn(*leading, dtype=torch.float32):
    logits = torch.randn(*leading, E).to(dtype)
    return logits, logits.topk(K).indices


LOSSES = {
    "balance softmax E=6 K=2 float32": load_balancing_loss,
    "balance sigmoid E=6 K=2 float32": lambda x, ids: sequence_balancing_loss(
        x, ids, score="sigmoid"
    ),
    "balance logsumexp E=6 float32": lambda x, _: z_loss(x),
    "balance softmax E=6 best 2 float32": lambda x, _: _balance.load_balancing_loss(
        (x.flatten(0, 1),), E, K
    ),
}


@pytest.mark.parametrize("problem", LOSSES)
def test_a_plain_call_and_its_way_back_are_the_preferred_backends(backend, problem):
    logits, ids = drawn(2, 5)
    leaf = logits.requires_grad_()
    with moe_routing.prefer(backend):
        loss = LOSSES[problem](leaf, ids)
    assert [("sums", problem)] == CALLS
    # Another thread, where nobody prefers anything, as CUDA's way back has one.
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert [("sums", problem), ("gradient", problem)] == CALLS
    other = logits.detach().clone().requires_grad_()
    expected = LOSSES[problem](other, ids)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(leaf.grad, other.grad)
    assert len(CALLS) == 2


def test_a_gradient_that_is_to_have_gradients_is_the_formulas(backend):
    logits, ids = drawn(5)
    leaf = logits.requires_grad_()
    with moe_routing.prefer(backend):
        loss = load_balancing_loss(leaf, ids)
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        torch.autograd.grad(first.square().sum(), leaf)
    assert [what for what, _ in CALLS] == ["sums"]


def test_transforms_and_traces_are_the_formulas(backend):
    logits, ids = drawn(3, 5)
    with moe_routing.prefer(backend):
        vmap(load_balancing_loss)(logits, ids)
        jvp(lambda x: load_balancing_loss(x, ids), (logits,), (logits,))
        seen = list(CALLS)
        grad(lambda x: load_balancing_loss(x, ids))(logits)
        program = torch.export.export(_Loss(), (logits, ids))
    assert [what for what, _ in seen if what == "gradient"] == []
    assert not any("moe_routing" in str(node.target) for node in program.graph.nodes)


class _Loss(torch.nn.Module):
    def forward(self, logits, ids):
        return load_balancing_loss(logits, ids)


def test_a_backend_without_the_operation_is_an_error_where_it_is_named():
    with (
        moe_routing.prefer("all-to-all"),
        pytest.raises(BackendUnavailableError, match="'balance'"),
    ):
        load_balancing_loss(*drawn(5))


def test_without_tokens_no_kernel_is_asked_for(backend):
    with moe_routing.prefer(backend):
        leaf = torch.zeros(0, E, requires_grad=True)
        loss = load_balancing_loss(leaf, torch.zeros(0, K, dtype=torch.int64)) + z_loss(leaf)
        loss.backward()
    assert loss == 0.0
    assert leaf.grad.shape == (0, E)
    assert CALLS == []


def test_explain_says_who_computes_a_problem():
    problem = BalanceProblem(score="sigmoid", num_experts=E, dtype="bfloat16", topk=K)
    report = moe_routing.explain(problem, device="cpu")
    assert report.winner == "eager"
    assert report.to_dict()["problem"] == {
        "operation": "balance",
        "score": "sigmoid",
        "num_experts": E,
        "dtype": "bfloat16",
        "counts": "ids",
        "topk": K,
    }


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_float64_is_as_exact_as_float64_near_where_a_softplus_is_an_exponential(score):
    logits = torch.linspace(-38.0, -12.0, 40, dtype=torch.float64).view(10, 4)
    ids = torch.zeros(10, 1, dtype=torch.int64)
    scores = {
        "softmax": torch.exp,
        "sigmoid": torch.sigmoid,
        "sqrtsoftplus": lambda x: torch.log1p(x.exp()).sqrt(),
    }[score](logits)
    expected = 4 * (scores / scores.sum(-1, keepdim=True)).mean(0)[0]
    found = load_balancing_loss(logits, ids, score=score)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0.0)


def test_other_numbers_of_experts_than_the_logits_have_are_named():
    with pytest.raises(ValueError, match=r"^num_experts: expected 6, as of logits, got 7"):
        _balance.load_balancing_loss((torch.zeros(4, E),), E + 1, K)


@pytest.mark.parametrize(
    "case",
    [
        (1 << 25, (5, 5, 5), (0, 1, 2), ["sums", "gradient"]),
        (1 << 25, (5, 5, 5), (0, 2), ["sums", "gradient"]),
        (2 * 5 * E, (5, 5, 5), (0, 1, 2), ["sums"] * 2 + ["gradient"] * 2),
        (0, (5, 5, 5), (1,), ["sums"] * 3 + ["gradient"]),
        (1 << 25, (5, 5, 3, 3, 5), (0, 2, 3), ["sums"] * 3 + ["gradient"] * 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_layers_are_one_step_of_autograd_and_neighbours_that_are_alike_one_call(
    backend, monkeypatch, case, masked
):
    """Layers that need no gradient get none, and are not computed on the way back."""
    together, rows, needed, found = case
    masked = masked and len(set(rows)) == 1  # a mask is for tokens that all layers have
    monkeypatch.setattr(sums_module, "TOGETHER", together)
    layers = [torch.randn(size, E, requires_grad=n in needed) for n, size in enumerate(rows)]
    mask = torch.tensor([[1, 0, 2, 1, 1]]) if masked else None
    with moe_routing.prefer(backend):
        loss = _balance.load_balancing_loss(tuple(layers), E, K, mask)
    loss.backward()
    assert [what for what, _ in CALLS] == found
    whole = torch.cat([layer.detach() for layer in layers]).requires_grad_()
    its = None if mask is None else mask.repeat(1, len(rows))
    expected = _balance.load_balancing_loss((whole,), E, K, its)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for n, gradient in enumerate(whole.grad.split(rows)):
        if n in needed:
            torch.testing.assert_close(layers[n].grad, gradient)
        else:
            assert layers[n].grad is None


def test_importing_the_problem_imports_no_torch():
    script = "import sys, moe_routing.balancing.problem; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stdout == "False\n"


@pytest.mark.slow
@pytest.mark.parametrize("problem", LOSSES)
def test_torch_compile_computes_them_where_it_is_named(problem):
    logits, ids = drawn(2, 5)
    ours, right = (logits.clone().requires_grad_() for _ in range(2))
    with moe_routing.prefer("torch-compile"):
        loss = LOSSES[problem](ours, ids)
    expected = LOSSES[problem](right, ids)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, right.grad)
