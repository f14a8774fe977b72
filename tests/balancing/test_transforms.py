"""The losses under torch.func's transforms, in forward mode, and traced with symbolic sizes."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from moe_routing.balancing import load_balancing_loss, sequence_balancing_loss, z_loss

S, E, K, N = 5, 6, 2, 3
LOSSES = {
    **{
        score: lambda x, ids, valid, score=score: load_balancing_loss(
            x, ids, score=score, valid=valid
        )
        for score in ("softmax", "sigmoid", "sqrtsoftplus")
    },
    "z": lambda x, _ids, valid: z_loss(x, valid=valid),
}


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


def drawn(*leading):
    logits = torch.randn(*leading, S, E, dtype=torch.float64)
    return logits, logits.topk(K).indices, torch.rand(*leading, S) < 0.7


def test_forward_derivatives_are_the_backward_ones(loss):
    logits, ids, valid = drawn()
    direction = torch.randn_like(logits)

    def f(x):
        return loss(x, ids, valid)

    backward, close = grad(f)(logits), torch.testing.assert_close
    close(jacfwd(f)(logits), backward)
    close(jvp(f, (logits,), (direction,))[1], (backward * direction).sum())
    close(hessian(f)(logits), jacrev(jacrev(f))(logits))
    with forward_ad.dual_level():
        value = forward_ad.unpack_dual(f(forward_ad.make_dual(logits, direction)))
        close(value.tangent, (backward * direction).sum())


@pytest.mark.parametrize(
    "batched", [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0)], ids=str
)
def test_vmap_over_any_argument_is_a_call_for_each(loss, batched):
    given = [x if dim == 0 else x[0] for x, dim in zip(drawn(N), batched, strict=True)]
    found = vmap(loss, in_dims=batched)(*given)
    each = [
        loss(*(x[n] if dim == 0 else x for x, dim in zip(given, batched, strict=True)))
        for n in range(N)
    ]
    torch.testing.assert_close(found, torch.stack(each))


@pytest.mark.parametrize("masked", [False, True])
def test_a_traced_program_serves_all_sizes(masked):
    def every(x, ids, valid):
        mask = valid if masked else None
        return (
            load_balancing_loss(x, ids, valid=mask)
            + sequence_balancing_loss(x, ids, valid=mask)
            + z_loss(x, valid=mask)
        )

    class Module(torch.nn.Module):
        def forward(self, x, ids, valid):
            return every(x, ids, valid)

    first, auto = drawn(4), torch.export.Dim.AUTO
    sizes = {0: auto, 1: auto}
    exported = torch.export.export(Module(), first, dynamic_shapes=(sizes, sizes, sizes)).module()
    traced = make_fx(every, tracing_mode="symbolic")(*first)
    other = drawn(7)
    for program in (exported, traced):
        torch.testing.assert_close(program(*other), every(*other))


def test_deterministic_algorithms_and_autocast_change_nothing():
    logits, ids, valid = drawn()
    expected = [loss(logits, ids, valid) for loss in LOSSES.values()]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode=True)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = [loss(logits, ids, valid) for loss in LOSSES.values()]
    finally:
        torch.use_deterministic_algorithms(mode=before)
    assert torch.equal(torch.stack(found), torch.stack(expected))
