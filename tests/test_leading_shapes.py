"""Logits of any leading shape are routed as rows, and answered in that shape."""

import copy
import math

import pytest
import torch

import moe_routing
from moe_routing import Router, RoutingOutput
from moe_routing.conformance.variants import VARIANTS

E, K = 8, 2
ROUTE = Router(VARIANTS["gemma4/shared"])
SCALE = torch.linspace(0.5, 1.5, E)
COLUMNS = K + 2
LEADING = [(), (1,), (0,), (2, 3), (2, 0, 3), (1, 2, 3, 4)]


@pytest.fixture(params=LEADING, ids=str)
def logits(request):
    return torch.randn(*request.param, E)


def as_rows(logits, **operands):
    return ROUTE(logits.reshape(math.prod(logits.shape[:-1]), E), K, SCALE, **operands)


def same(output, rows, leading):
    for tensor, flat in zip(output, rows, strict=True):
        assert tensor.shape == (*leading, COLUMNS)
        assert tensor.is_contiguous()
        assert torch.equal(tensor, flat.view(tensor.shape))


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_a_call_gives_what_its_rows_give(logits, ids_dtype):
    for _ in range(3):  # the first call, and calls like it
        output = ROUTE(logits, K, SCALE, ids_dtype=ids_dtype)
        assert type(output) is RoutingOutput
        same(output, as_rows(logits, ids_dtype=ids_dtype), logits.shape[:-1])


def test_outputs_of_the_leading_shape_are_written(logits):
    shape = (*logits.shape[:-1], COLUMNS)
    out = (torch.full(shape, torch.nan), torch.full(shape, -7, dtype=torch.int32))
    output = ROUTE(logits, K, SCALE, out=out)
    assert output.weights is out[0]
    assert output.ids is out[1]
    same(output, as_rows(logits), logits.shape[:-1])


def test_masks_and_recorded_ids_have_the_leading_shape(logits):
    leading = logits.shape[:-1]
    mask, recorded = torch.rand(leading) < 0.5, torch.randint(-1, E, (*leading, K))
    given = {"valid": mask.reshape(-1), "ids": recorded.reshape(-1, K)}
    same(ROUTE(logits, K, SCALE, valid=mask, ids=recorded), as_rows(logits, **given), leading)


def test_a_mask_or_a_record_of_another_shape_is_refused_by_name():
    logits = torch.randn(2, 3, E)
    for name, value in (
        ("valid", torch.ones(6, dtype=torch.bool)),
        ("ids", torch.zeros(6, K).int()),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected shape \[2, 3"):
            ROUTE(logits, K, SCALE, **{name: value})


def test_gradients_have_the_shape_of_the_logits(logits):
    ours, rows = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    upstream = torch.randn(*logits.shape[:-1], COLUMNS)
    ROUTE(ours, K, SCALE).weights.backward(upstream)
    as_rows(rows).weights.backward(upstream.view(-1, COLUMNS))
    assert torch.equal(ours.grad, rows.grad)


def test_token_ids_have_the_leading_shape():
    route = Router(VARIANTS["hash_sqrtsoftplus"])
    table = torch.stack([torch.randperm(E)[:K] for _ in range(5)])
    logits, tokens = torch.randn(2, 3, E), torch.tensor([[0, 1, 2], [4, 3, 9]])
    output = route(logits, K, token_ids=tokens, expert_table=table)
    rows = route(logits.view(6, E), K, token_ids=tokens.view(6), expert_table=table)
    assert torch.equal(output.weights, rows.weights.view(2, 3, K))
    assert output.ids[1, 2].tolist() == [-1, -1]  # not in the table
    one = route(logits[0, 1], K, token_ids=tokens[0, 1], expert_table=table)
    assert one.ids.tolist() == table[1].tolist()


@pytest.mark.parametrize(
    ("logits", "copies"),
    [
        (torch.randn(3, 4, E), False),
        (torch.randn(3, 4, 2 * E)[..., :E], False),  # rows of a wider buffer
        (torch.randn(3, 4, 2 * E)[..., ::2], False),
        (torch.randn(3, 4, E).transpose(0, 1), True),
        (torch.randn(2 * E)[::2], False),
    ],
    ids=["contiguous", "sliced", "strided", "transposed", "one row"],
)
def test_nothing_is_copied_where_the_rows_can_be_viewed(logits, copies):
    read = []
    route = Router(VARIANTS["topk_softmax"])
    route(logits, K)
    latest = route._calls.latest

    def seen(operands):
        read.append(operands.logits)
        return latest.route(operands)

    route._calls.latest = latest._replace(route=seen)
    route(logits, K)
    assert len(read) == 1
    assert (read[0].data_ptr() != logits.data_ptr()) is copies


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_as_one_graph(dynamic):
    def step(logits, out=None):
        return ROUTE(logits, K, SCALE, out=out)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for leading in ((), (2, 3), (2, 3, 4)):
        logits = torch.randn(*leading, E)
        same(compiled(logits), as_rows(logits), leading)
        shape = (*leading, COLUMNS)
        out = (torch.empty(shape), torch.empty(shape, dtype=torch.int32))
        with torch.no_grad():
            compiled(logits, out)
        same(out, as_rows(logits), leading)


@pytest.mark.parametrize("strict", [False, True])
def test_it_exports_with_dynamic_leading_sizes(strict):
    class Layer(torch.nn.Module):
        def forward(self, logits):
            return ROUTE(logits, K, SCALE)

    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.export.export(
        Layer(), (torch.randn(2, 3, E),), dynamic_shapes=(sizes,), strict=strict
    )
    logits = torch.randn(5, 7, E)
    same(program.module()(logits), as_rows(logits), (5, 7))


def test_it_maps_and_differentiates_as_rows_do():
    logits = torch.randn(4, 2, 3, E)
    mapped = torch.vmap(lambda some: tuple(ROUTE(some, K, SCALE)))(logits)
    same(mapped, as_rows(logits), (4, 2, 3))
    total = torch.func.grad(lambda some: ROUTE(some, K, SCALE).weights.square().sum())
    assert torch.equal(total(logits), total(logits.view(-1, E)).view(logits.shape))


def test_fake_logits_give_fake_outputs_of_the_shape():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weights, ids = ROUTE(torch.randn(2, 3, E), K, torch.ones(E))
    assert weights.shape == ids.shape == (2, 3, COLUMNS)


def test_a_copied_router_and_a_watched_one_take_any_shape():
    logits = torch.randn(2, 3, E)
    same(copy.deepcopy(ROUTE)(logits, K, SCALE), as_rows(logits), (2, 3))
    watched = Router(ROUTE.spec, verify=True)
    same(watched(logits, K, SCALE), as_rows(logits), (2, 3))
    assert (watched.health().compared, watched.health().ok) == (1, True)


def outputs(*shape):
    return torch.empty(shape), torch.empty(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"logits": torch.tensor(1.0)}, r"logits: expected a dense tensor \[..., E\] of rank 1 or"),
        ({"topk": 2.5}, "topk: expected an int, got 2.5"),
        ({"topk": E + 1}, "topk: expected 1 <= topk"),
        (
            {"num_valid_tokens": 3},
            r"num_valid_tokens: expected None, because rows of logits of sha",
        ),
        ({"token_ids": torch.zeros(6).long()}, r"token_ids: expected shape \[2, 3\], as the logit"),
        ({"out": outputs(6, COLUMNS)}, r"out: expected contiguous tensors of shape \[2, 3, 4\], "),
        ({"out": outputs(2, 3, K)}, r"out: expected contiguous tensors of shape \[2, 3, 4\], got "),
        (
            {"out": tuple(t.transpose(0, 1) for t in outputs(3, 2, COLUMNS))},
            r"out: expected contiguous tensors of shape \[2, 3, 4\]",
        ),
        ({"out": 3}, r"out: expected a pair of tensors"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(wrong, said):
    arguments = {"logits": torch.randn(2, 3, E), "topk": K, "per_expert_scale": SCALE, **wrong}
    with pytest.raises((ValueError, TypeError), match=f"^{said}"):
        ROUTE(**arguments)


def test_outputs_in_the_memory_of_logits_that_are_copied_are_refused_too():
    memory = torch.randn(2 * 3 * E)
    logits = memory.view(3, 2, E).transpose(0, 1)
    out = (memory[: 6 * COLUMNS].view(2, 3, COLUMNS), outputs(2, 3, COLUMNS)[1])
    with pytest.raises(ValueError, match=r"^out: expected tensors that share no memory"):
        ROUTE(logits, K, SCALE, out=out)


def test_a_plan_is_of_rows():
    with pytest.raises(ValueError, match=r"^logits: expected a dense tensor \[T, E\] of rank 2"):
        ROUTE.with_plan(torch.randn(2, 3, E), K, SCALE)
    with pytest.raises(ValueError, match=r"^ids: expected a dense tensor \[T, K\] of rank 2"):
        moe_routing.plan(torch.zeros(2, 3, K, dtype=torch.int32), E)
