"""What each rank of ``test_expert_parallel.py`` does.

A case is a function of a group, and holds if it raises nothing on any rank. Cases share one start
of the processes; each has a group of its own, so that one that fails leaves the others alone.
"""

from __future__ import annotations

import gc
import os
import re
import traceback
import weakref
from functools import partial
from itertools import product
from pathlib import Path

import ranks
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import moe_routing
from moe_routing._registry import registry
from moe_routing.distributed import ExpertParallel
from moe_routing_registry import ANY, BackendSpec, Target

E, K, H, T = 6, 3, 5, 4  # E is a multiple of 2 and 3 ranks
SMILE = "\U0001f600"
"""What is long in JSON and in UTF-8."""
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def run(rank, number, seed):
    """Run every case, and return what was wrong, by its name."""
    wrong: dict[str, str] = {}
    for name, function in CASES.items():
        torch.manual_seed(seed)  # every rank draws the batches of all ranks
        try:
            function(distributed.new_group(timeout=ranks.TIMEOUT), rank, number)
        except Exception:  # noqa: BLE001 -- it is the result
            wrong[name] = traceback.format_exc()
    return wrong


def raised(call):
    try:
        call()
    except Exception as error:  # noqa: BLE001 -- it is the result
        return error
    return None


def refuses(call, kind, text):
    """Require an error of exactly that type, with a text that begins so and shows no elements."""
    error = raised(call)
    assert type(error) is kind, f"expected {kind.__name__} {text!r}, got {error!r}"
    assert re.match(text, str(error)), f"expected {text!r}, got {error!r}"
    assert "tensor(" not in str(error)


class Batch:
    """The tokens of every rank, the experts, and what one rank with all of them computes."""

    def __init__(self, number, tokens=None, dtype=torch.float32, **sizes):
        experts, topk, columns = (
            sizes.get(*size) for size in (("experts", E), ("topk", K), ("columns", H))
        )
        self.experts = experts
        self.tokens = [T] * number if tokens is None else tokens
        self.hidden = [torch.randn(t, columns).to(dtype) for t in self.tokens]
        self.ids = [torch.randint(-1, experts + 1, (t, topk)) for t in self.tokens]
        self.weights = [torch.rand(t, topk) for t in self.tokens]
        self.matrices = torch.randn(experts, columns, columns).to(dtype)

    def of(self, rank):
        return self.hidden[rank], self.ids[rank], self.weights[rank]

    def whole(self):
        """Return the result of one rank that has all experts, for the tokens of each rank."""
        plan = moe_routing.plan(torch.cat(self.ids), self.experts)
        rows = computed(moe_routing.permute(torch.cat(self.hidden), plan), plan, self.matrices)
        return moe_routing.combine(rows, plan, torch.cat(self.weights)).split(self.tokens)

    def mine(self, ep):
        return self.matrices[list(ep.local_experts)]

    def through(self, ep, rank):
        rows, plan = ep.dispatch(*self.of(rank))
        return ep.combine(computed(rows, plan, self.mine(ep)))

    def holds(self, ep, rank):
        """Require what one rank computes, to the bit where that is promised."""
        got, expected = self.through(ep, rank), self.whole()[rank]
        if ep.problem.reduce == "none":
            assert torch.equal(got, expected), (got, expected)
        else:
            assert_close(got, expected)


def computed(rows, plan, matrices):
    """Multiply each row by its expert's matrix, in a sum whose order no other row changes.

    Rows behind those of experts become NaN: they may hold anything.
    """
    of = torch.repeat_interleave(torch.arange(len(plan.counts)), plan.counts.long())
    used = (
        (rows[: len(of)].unsqueeze(2) * matrices[of]).sum(1)
        if len(matrices)
        else rows[:0] @ matrices.new_empty(matrices.shape[1:])
    )
    nothing = rows.new_full((len(rows) - len(of), matrices.shape[2]), torch.nan)
    return torch.cat((used, nothing))


# arguments

CONSTRUCTOR = [
    ({"num_experts": 2.0}, TypeError, "num_experts: expected an int, got 2.0"),
    ({"num_experts": True}, TypeError, "num_experts: expected an int, got True"),
    ({"num_experts": 0}, ValueError, "num_experts: expected an int from 1 to "),
    ({"num_experts": 5000}, ValueError, "num_experts: expected an int from 1 to 4096, got 5000"),
    ({"num_experts": 7}, ValueError, "num_experts: expected a multiple of the group's . ranks, or"),
    ({"placement": "000000"}, TypeError, "placement: expected a rank from 0 to . for each of 6 ex"),
    ({"placement": 3}, TypeError, "placement: expected a rank from 0 to .* got 3"),
    ({"placement": [0.0] * E}, TypeError, "placement: expected a rank from 0"),
    ({"placement": torch.zeros(E)}, TypeError, "placement: .* got a Tensor of shape .6., dtype to"),
    ({"placement": torch.zeros(E, 1).int()}, TypeError, r"placement: .* got a Tensor of shape \[6"),
    ({"placement": [0] * (E - 1)}, ValueError, "placement: expected a rank from 0 to . for each o"),
    ({"placement": [0, 1, 9, 0, 1, 0]}, ValueError, r"placement: .* got \[0, 1, 9, 0, 1, 0\]"),
    ({"placement": [-1] * E}, ValueError, "placement: expected a rank from 0 to "),
    ({"reduce": "sum"}, ValueError, "reduce: expected 'none' or 'rank', got 'sum'"),
    ({"reduce": None}, ValueError, "reduce: expected 'none' or 'rank', got None"),
    ({"reduce": torch.zeros(3)}, ValueError, "reduce: expected 'none' or 'rank', got a Tensor of"),
    ({"shared_batch": 1}, TypeError, "shared_batch: expected True or False, got 1"),
    ({"max_tokens": 0}, ValueError, "max_tokens: expected an int from 1 to .*, or None, got 0"),
    ({"max_tokens": 1.5}, TypeError, "max_tokens: expected an int from 1 to .*, or None, got 1.5"),
    ({"max_tokens": 2**31 - 1}, ValueError, "max_tokens: expected an int from 1 to "),
    ({"max_tokens": 2**28, "topk": 8}, ValueError, "max_tokens: expected an int from 1 to "),
    ({"capacity": 8}, ValueError, "capacity: expected None, or max_tokens too, got 8"),
    ({"capacity": 0, "max_tokens": 8}, ValueError, "capacity: expected an int from 1 to .*, got 0"),
    ({"capacity": True, "max_tokens": 8}, TypeError, "capacity: expected an int from 1 to .*True"),
    ({"topk": 65}, ValueError, "topk: expected an int from 1 to 64, or None, got 65"),
    ({"topk": "2"}, TypeError, "topk: expected an int from 1 to 64, or None, got '2'"),
    ({"hidden_size": -1}, ValueError, "hidden_size: expected an int from 1 to .*, got -1"),
    ({"hidden_size": torch.tensor(3)}, TypeError, r"hidden_size: .* got a Tensor of shape \[\]"),
    ({"dtype": "float32"}, TypeError, "dtype: expected a torch.dtype or None, got 'float32'"),
    ({"device": 0}, TypeError, "device: expected a torch.device, a str or None, got 0"),
    ({"device": "nowhere"}, ValueError, "device: expected one that is here and that .* got 'nowhe"),
    ({"device": "cuda:99"}, ValueError, "device: expected one that is here and that .* 'cuda:99'"),
    ({"device": "meta"}, ValueError, "device: expected one that is here and that .* got 'meta'"),
    ({"transport": 3}, TypeError, "transport: expected a name, or None, got 3"),
    ({"transport": "A\nname"}, ValueError, "transport: expected 1 to 100 of the characters"),
    ({"transport": "x" * 9999}, ValueError, "transport: expected 1 to 100 of the characters"),
    ({"transport": SMILE * 999}, ValueError, "transport: expected 1 to 100 of the char"),
    ({"timeout": "60"}, TypeError, "timeout: expected a number of seconds, got '60'"),
    ({"timeout": True}, TypeError, "timeout: expected a number of seconds, got True"),
    ({"timeout": 0}, ValueError, "timeout: expected from 0.001 to 1e.09 seconds, got 0"),
    ({"timeout": 1e-9}, ValueError, "timeout: expected from 0.001 to 1e.09 seconds, got 1e-09"),
    ({"timeout": 10**400}, ValueError, "timeout: expected from 0.001 to 1e.09 seconds, got 1000"),
    ({"timeout": float("nan")}, ValueError, "timeout: expected from 0.001 to 1e.09 seconds, got n"),
]  # fmt: skip


TOLD = "group: expected every rank to be served, got from rank {} {}: "


def made(group, **arguments):
    return ExpertParallel(group, **{"num_experts": E, **arguments})


@case
def a_wrong_argument_on_every_rank(group, _rank, _number):
    for arguments, kind, text in CONSTRUCTOR:
        refuses(partial(made, group, **arguments), kind, text)


@case
def a_wrong_argument_on_one_rank_is_an_error_on_every_rank(group, rank, number):
    for n, (arguments, kind, text) in enumerate(CONSTRUCTOR):
        wrong = n % number
        if rank == wrong:
            refuses(partial(made, group, **arguments), kind, text)
        else:
            told = (
                f"group: expected every rank to be served, got from rank {wrong} {kind.__name__}: "
            )
            refuses(lambda: made(group), ValueError, told + text)


@case
def a_group_that_is_none(_group, _rank, _number):
    expected = "group: expected a ProcessGroup, or None for all ranks, got "
    refuses(lambda: made("all"), TypeError, expected + "'all'")
    refuses(lambda: made([0, 1]), TypeError, expected + r"\[0, 1\]")


DIFFER = {
    "num_experts": (E, 2 * E, E),
    "placement": ([0] * E, [1] * E, [0] * E),
    "reduce": ("none", "rank", "none"),
    "shared_batch": (False, True, False),
    "max_tokens": (8, None, 8),
    "topk": (3, 4, 3),
    "hidden_size": (None, 5, 5),
    "dtype": (torch.float16, torch.float32, None),
    "transport": (None, "all-to-all", None),
}


@case
def an_argument_that_differs_is_an_error_on_every_rank(group, rank, _number):
    for name, values in DIFFER.items():
        text = f"{name}: expected the same on every rank, got .* on rank 0, .* on rank 1"
        refuses(lambda n=name, v=values: made(group, **{n: v[rank]}), ValueError, text)
    made(group)  # and the group is as good as before


@case
def no_transport_is_an_error_on_every_rank(group, rank, _number):
    error = raised(lambda: made(group, transport="all-reduce"))
    assert type(error) is moe_routing.BackendUnavailableError
    assert "all-reduce" in str(error)
    error = raised(lambda: made(group, transport="all-to-al"))
    assert "unknown backend 'all-to-al': did you mean 'all-to-all'" in str(error), error
    os.environ["MOE_ROUTING_BLOCK"] = "all-to-all" if rank == 0 else ""
    try:
        error = raised(lambda: made(group))
    finally:
        del os.environ["MOE_ROUTING_BLOCK"]
    if rank == 0:
        assert type(error) is moe_routing.BackendUnavailableError, error
    else:
        assert type(error) is ValueError, error
        assert "got from rank 0 BackendUnavailableError: no backend" in str(error)


def tokens_that_are_wrong():
    hidden, ids, weights = torch.randn(T, H), torch.zeros(T, K, dtype=torch.int64), torch.rand(T, K)
    meta = {"device": "meta"}
    for name, wrong, kind, text in [
        ("hidden", None, TypeError, r"a tensor \[T, H\], got None"),
        ("hidden", torch.randn(H), ValueError, r"a dense .* rank 2, got a Tensor of shape \[5\]"),
        ("hidden", hidden.to_sparse(), ValueError, "a dense tensor"),
        ("hidden", hidden.to("meta"), ValueError, "device cpu, on which the ranks exchange, got a"),
        ("ids", ids.tolist(), TypeError, r"an int32 or int64 tensor \[T, K\], got a list of"),
        ("ids", ids.short(), TypeError, r"an int32 or int64 tensor \[T, K\], got a Tensor of shap"),
        ("ids", ids[:, 0], ValueError, r"a dense tensor \[4, K\], got a Tensor of shape \[4\]"),
        ("ids", ids[1:], ValueError, r"a dense tensor \[4, K\], got a Tensor of shape \[3, 3\]"),
        ("ids", ids[:, :0], ValueError, r"1 to 64 columns, got a Tensor of shape \[4, 0\]"),
        ("ids", ids.repeat(1, 30), ValueError, "1 to 64 columns, got a Tensor of shape .4, 90."),
        ("ids", torch.zeros(T, K, dtype=torch.int64, **meta), ValueError, "device cpu, on which"),
        ("weights", 0.5, TypeError, r"a tensor \[4, 3\] of bfloat16, float16 or float32, got 0.5"),
        ("weights", weights.double(), TypeError, r"a tensor \[4, 3\] of .* dtype torch.float64"),
        ("weights", weights[:, 1:], ValueError, r"a dense .* shape \[4, 3\], got a Tensor of sha"),
        ("weights", weights.to("meta"), ValueError, "device cpu, on which the ranks exchange"),
        ("scales", 1, TypeError, r"a tensor \[T, S\], got 1"),
        ("scales", torch.ones(T), ValueError, r"a dense tensor .* of rank 2, got a Tensor of shap"),
        ("scales", torch.ones(T + 1, 1), ValueError, "4 rows, as hidden has, got a Tensor of shap"),
        ("scales", torch.ones(T, 1, **meta), ValueError, "device cpu, on which the ranks exchange"),
    ]:  # fmt: skip
        right = {"hidden": hidden, "ids": ids, "weights": weights, "scales": None}
        yield {**right, name: wrong}, kind, f"{name}: expected {text}"


@case
def wrong_tokens_are_refused_before_anything_is_sent(group, rank, number):
    ep, batch = made(group), Batch(number)
    if rank == 0:  # alone: the others would wait for what it sends
        for arguments, kind, text in tokens_that_are_wrong():
            refuses(partial(ep.dispatch, **arguments), kind, text)
            refuses(partial(ep.dispatch_rows, **arguments), kind, text)
    batch.holds(ep, rank)
    ep = made(group, max_tokens=T, topk=K, hidden_size=H, dtype=torch.float32)
    hidden, ids, weights = torch.randn(T, H), torch.zeros(T, K, dtype=torch.int32), torch.ones(T, K)
    for arguments, kind, text in [
        ((hidden.double(), ids, weights), TypeError, "hidden: expected dtype float32, as was stat"),
        ((hidden[:, 1:], ids, weights), ValueError, "hidden: expected 5 columns, as was stated, g"),
        ((hidden, ids[:, 1:], weights), ValueError, "ids: expected 3 columns, got a Tensor of sha"),
        ([torch.cat((t, t)) for t in (hidden, ids, weights)], ValueError, "hidden: .* max_tokens="),
    ]:  # fmt: skip
        refuses(partial(ep.dispatch, *arguments), kind, text)


@case
def wrong_results_are_refused_and_the_call_may_be_made_again(group, rank, number):
    ep, batch = made(group), Batch(number)
    nothing = "rows: expected results of what dispatch returned, got nothing dispatched since the"
    refuses(lambda: ep.combine(torch.zeros(3, H)), ValueError, nothing)
    rows, plan = ep.dispatch(*batch.of(rank))
    results = computed(rows, plan, batch.mine(ep))
    received = ep.dispatch_rows(*batch.of(rank))
    wrong = [
        (None, TypeError, r"rows: expected a tensor \[P, H\], got None"),
        (torch.zeros(len(rows) + 1, H), ValueError, r"rows: expected \d+ rows, as many as"),
        (torch.zeros(len(rows), H).int(), TypeError, "rows: expected dtype bfloat16, float16 or"),
        (torch.zeros(len(rows)), ValueError, "rows: expected a dense tensor"),
        (torch.zeros(len(rows), 1, H), ValueError, r"rows: expected a dense tensor \[P, H\] of r"),
        (torch.zeros(len(rows), H, device="meta"), ValueError, "rows: expected device cpu, on w"),
    ]
    for value, kind, text in wrong:
        refuses(lambda v=value: ep.combine(v), kind, text)
        refuses(lambda v=value: ep.combine_rows(v, received), kind, text)
    refuses(
        lambda: ep.combine_rows(rows, None), TypeError, "received: expected what dispatch_rows ret"
    )
    assert torch.equal(ep.combine(results), batch.whole()[rank])
    refuses(lambda: ep.combine(results), ValueError, nothing)


@case
def rows_that_differ_between_ranks_are_an_error_on_every_rank(group, rank, number):
    for reduce in ("none", "rank"):
        ep, batch = made(group, reduce=reduce), Batch(number)
        odd = rank == number - 1
        for name, arguments in {
            "hidden_size": (torch.randn(T, H + odd), torch.zeros(T, K).int(), torch.ones(T, K)),
            "topk": (torch.randn(T, H), torch.zeros(T, K + odd).int(), torch.ones(T, K + odd)),
            "dtypes": (
                torch.randn(T, H).to(torch.float16 if odd else torch.bfloat16),
                *(torch.zeros(T, K).int(), torch.ones(T, K)),
            ),
            "gradients": (
                torch.randn(T, H, requires_grad=odd), torch.zeros(T, K).int(), torch.ones(T, K)
            ),
        }.items():  # fmt: skip
            other = 0 if odd else number - 1
            text = f"hidden: expected the same {name} on every rank, got .* others on rank {other}"
            refuses(partial(ep.dispatch, *arguments), ValueError, text)
        arguments = (torch.randn(T, H), torch.zeros(T, K).int(), torch.ones(T, K))
        text = "hidden: expected the same scales on every rank, got "
        scaled = partial(ep.dispatch, *arguments, scales=torch.ones(T, 1 + odd))
        refuses(scaled, ValueError, text)
        batch.holds(ep, rank)  # and the next call is served
        torch.manual_seed(number)  # the columns that differ took more numbers


@case
def a_rank_that_makes_none_is_waited_for_as_long_as_was_said(group, rank, number):
    if rank == number - 1:
        return
    text = "group: expected every rank to make an ExpertParallel within 2 s, got no word from one"
    refuses(lambda: made(group, timeout=2), TimeoutError, text)


# groups


@case
def a_group_of_some_ranks(_group, rank, number):
    inside = [0, number - 1]
    group = distributed.new_group(inside, timeout=ranks.TIMEOUT)
    if rank not in inside:
        text = "group: expected one that this process is in, got one that it is not in"
        refuses(lambda: made(group), ValueError, text)
        return
    ep = made(group)
    assert (ep.rank, ep.problem.ranks) == (inside.index(rank), 2)
    Batch(2).holds(ep, ep.rank)
    alone = distributed.new_group([rank], use_local_synchronization=True)
    Batch(1).holds(made(alone), 0)


@case
def all_ranks_by_none_and_the_group_of_a_mesh(group, rank, number):
    mesh = DeviceMesh("cpu", list(range(number)), mesh_dim_names=("experts",))
    for given in (None, group, mesh.get_group("experts")):
        ep = made(given)
        assert ep.group is (distributed.group.WORLD if given is None else given)
        assert (ep.rank, ep.device, ep.report.winner) == (rank, torch.device("cpu"), "all-to-all")
        Batch(number).holds(ep, rank)
    text = "group: expected a ProcessGroup, or None for all ranks, got a DeviceMesh"
    refuses(lambda: made(mesh), TypeError, text)


@case
def two_at_once_on_one_group(group, rank, number):
    first, second = Batch(number), Batch(number, experts=2 * E)
    one, other = made(group), made(group, num_experts=2 * E, reduce="rank")
    rows, plan = one.dispatch(*first.of(rank))
    more, its_plan = other.dispatch(*second.of(rank))
    assert torch.equal(one.combine(computed(rows, plan, first.mine(one))), first.whole()[rank])
    got = other.combine(computed(more, its_plan, second.mine(other)))
    assert_close(got, second.whole()[rank])


@case
def rows_that_lie_between_are_those_of_their_own_dispatch(group, rank, number):
    """``dispatch_rows`` keeps nothing in the object: calls may overlap."""
    ep, batches = made(group), [Batch(number), Batch(number)]
    received = [ep.dispatch_rows(*batch.of(rank)) for batch in batches]
    for batch, part in zip(batches, received, strict=True):
        plan = moe_routing.plan(part.ids, len(ep.local_experts))
        rows = computed(moe_routing.permute(part.rows, plan), plan, batch.mine(ep))
        got = ep.combine_rows(moe_routing.combine(rows, plan, part.weights), part)
        assert torch.equal(got, batch.whole()[rank])


# values

KINDS = [
    {"reduce": "none"}, {"reduce": "rank"}, {"reduce": "none", "max_tokens": 9},
    {"reduce": "rank", "max_tokens": 9},
]  # fmt: skip
"""What a transport is asked for, where each rank has tokens of its own."""


@case
def any_placement_and_any_numbers_of_tokens_give_what_one_rank_gives(group, rank, number):
    for _, dtype, kind in product(range(3), (torch.float32, torch.bfloat16, torch.float16), KINDS):
        tokens = torch.randint(0, 10, (number,)).tolist()
        topk = int(torch.randint(1, 9, ()))
        placement = [None, torch.randint(0, number, (E,))][int(torch.randint(0, 2, ()))]
        batch = Batch(number, tokens, dtype=dtype, topk=topk)
        ep = made(group, placement=placement, **kind)
        got, expected = batch.through(ep, rank), batch.whole()[rank]
        assert got.dtype is dtype
        if kind["reduce"] == "none":
            assert torch.equal(got, expected), (dtype, kind, tokens, topk, placement)
        else:  # each rank's sum is rounded
            rough = {} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.1}
            assert_close(got, expected, **rough)


@case
def a_placement_is_a_list_a_tuple_or_a_tensor_and_may_leave_ranks_without_experts(
    group, rank, number
):
    for placement in ([0] * E, (number - 1,) * E, torch.tensor([0, number - 1] * (E // 2))):
        for kind in KINDS:
            ep = made(group, placement=placement, **kind)
            here = [e for e, at in enumerate(list(placement)) if int(at) == rank]
            assert ep.local_experts == tuple(here)
            Batch(number).holds(ep, rank)


@case
def ids_of_no_expert_repeated_ids_and_ids_beyond_int32(group, rank, number):
    odd = torch.tensor([
        [0, 0, 0], [E - 1, E - 1, -1], [-1, -1, -1], [2**32, 2**32 + 1, 0],
        [E, -E, 2**63 - 1], [-(2**63), 1, 1], [E - 1, 0, 2**31 + 1], [1, 2**40 + 1, 2],
    ])  # fmt: skip
    for kind, placement in product(KINDS, (None, [n % number for n in range(E)])):
        batch = Batch(number, [len(odd)] * number)
        batch.ids = [odd] * number
        ep = made(group, placement=placement, **kind)
        batch.holds(ep, rank)
        batch.ids = [odd.clamp(-(2**31), 2**31 - 1).int()] * number
        batch.holds(ep, rank)
    batch = Batch(number)  # all tokens go to one expert, all slots of each
    batch.ids = [torch.full((T, K), E - 1)] * number
    for kind in KINDS:
        batch.holds(made(group, **{**kind, "max_tokens": T}), rank)


@case
def ranks_without_tokens(group, rank, number):
    for kind, tokens in product(KINDS, ([0] * number, [0] * (number - 1) + [3], [9] + [0] * 9)):
        batch = Batch(number, tokens[:number])
        batch.matrices.requires_grad_()
        for hidden in batch.hidden:
            hidden.requires_grad_()
        ep = made(group, **kind)
        batch.holds(ep, rank)
        batch.through(ep, rank).sum().backward()
        assert batch.hidden[rank].grad.shape == batch.hidden[rank].shape


@case
def rows_without_columns(group, rank, number):
    for kind in KINDS:
        ep = made(group, **kind)
        rows, plan = ep.dispatch(torch.empty(T, 0), torch.zeros(T, K).int(), torch.ones(T, K))
        assert rows.shape[1] == 0
        assert int(plan.counts[0]) == (number * T * K if rank == 0 else 0)
        assert ep.combine(rows).shape == (T, 0)


@case
def fp8_rows_with_scales_arrive_bit_for_bit(group, rank, number):
    for kind, dtype in product(KINDS, (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)):
        batch = Batch(number, columns=256)
        every = [
            torch.randint(-128, 128, (T, 256), dtype=torch.int8).view(dtype) for _ in range(number)
        ]
        scales = [torch.rand(T, 2) for _ in range(number)]
        ep = made(group, **kind)
        (rows, moved), plan = ep.dispatch(every[rank], *batch.of(rank)[1:], scales=scales[rank])
        whole = moe_routing.plan(torch.cat(batch.ids), E)
        first, end = (
            int(whole.offsets[e]) for e in (ep.local_experts[0], ep.local_experts[-1] + 1)
        )
        assert plan.counts.tolist() == whole.counts[list(ep.local_experts)].tolist()
        expected = moe_routing.permute(torch.cat(every), whole, scales=torch.cat(scales))
        used = end - first
        assert torch.equal(rows[:used].view(torch.int8), expected.rows[first:end].view(torch.int8))
        assert torch.equal(moved[:used], expected.scales[first:end])
        assert ep.combine(rows.float()).shape == (T, 256)  # and the results are of another dtype


@case
def weights_in_half_and_operands_that_are_views(group, rank, number):
    for kind, dtype in product(KINDS, (torch.float16, torch.bfloat16)):
        batch = Batch(number)
        batch.weights = [weights.to(dtype).T.contiguous().T for weights in batch.weights]
        batch.hidden = [torch.randn(2 * T, 2 * H)[::2, ::2] for _ in range(number)]
        batch.ids = [torch.randint(-1, E, (K, T)).T for _ in range(number)]
        assert not any(part[0].is_contiguous() for part in (batch.weights, batch.hidden, batch.ids))
        batch.holds(made(group, **kind), rank)
    batch.hidden = [torch.randn(1, H).expand(T, H) for _ in range(number)]
    batch.holds(made(group), rank)


@case
def results_of_another_width_and_of_transposed_weights(group, rank, number):
    ep, batch = made(group), Batch(number)
    wide = torch.randn(E, 7, H).mT  # each expert's matrix is a view that is transposed
    rows, plan = ep.dispatch(*batch.of(rank))
    got = ep.combine(computed(rows, plan, wide[list(ep.local_experts)]))
    batch.matrices = wide
    assert got.shape == (T, 7)
    assert torch.equal(got, batch.whole()[rank])


@case
def one_batch_that_all_ranks_share(group, _rank, _number):
    for placement in (None, [0] * E):
        ep = made(group, reduce="rank", shared_batch=True, placement=placement)
        assert ep.report.winner == "all-reduce"
        batch = Batch(1)
        rows, plan = ep.dispatch(*batch.of(0))
        assert_close(ep.combine(computed(rows, plan, batch.mine(ep))), batch.whole()[0])
        received = ep.dispatch_rows(*batch.of(0))
        sums = torch.randn(T, H)
        expected = sums * (received.ids >= 0).any(1, keepdim=True)
        sums[(received.ids < 0).all(1)] = torch.nan  # of tokens without an expert here: anything
        distributed.all_reduce(expected, group=group)
        assert_close(ep.combine_rows(sums, received), expected)
    refused = raised(lambda: made(group, shared_batch=True))
    assert "pass reduce='rank'" in str(refused), refused


# gradients


@case
def modes_without_gradients_and_what_was_made_in_them(group, rank, number):
    for kind, mode in product(KINDS, (torch.no_grad, torch.inference_mode)):
        batch = Batch(number)
        batch.matrices.requires_grad_()
        with mode():
            ep = made(group, **kind, placement=[number - 1 - n % number for n in range(E)])
            got = batch.through(ep, rank)
            assert not got.requires_grad
            assert_close(got, batch.whole()[rank])
        for hidden in batch.hidden:
            hidden.requires_grad_()
        got = batch.through(ep, rank)
        got.sum().backward()
        assert batch.hidden[rank].grad.abs().sum() >= 0


def gradients_of(batch, group, rank, through, **kind):
    """Return those of this rank's tokens, and the sum over ranks of the experts'."""
    hidden, weights = (batch.of(rank)[n].detach().clone().requires_grad_() for n in (0, 2))
    matrices = batch.matrices.detach().clone().requires_grad_()
    ep = made(group, **kind)
    up = torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)
    out = through(ep, hidden, batch.ids[rank], weights, matrices[list(ep.local_experts)])
    out.backward(up)
    if matrices.grad is None:  # of a rank without experts
        matrices.grad = torch.zeros_like(matrices)
    distributed.all_reduce(matrices.grad, group=group)
    return out.detach(), hidden.grad, weights.grad, matrices.grad


def layer(ep, hidden, ids, weights, matrices):
    rows, plan = ep.dispatch(hidden, ids, weights)
    return ep.combine(computed(rows, plan, matrices))


@case
def activation_checkpointing_computes_and_sends_it_all_again(group, rank, number):
    for kind in KINDS:
        batch = Batch(number, [T, 0, 7][:number])
        expected = gradients_of(batch, group, rank, layer, **kind)
        calls = []

        def counted(*arguments, calls=calls):
            calls.append(arguments)
            return layer(*arguments)

        def again(*arguments, counted=counted):
            return checkpoint(counted, *arguments, use_reentrant=False)

        got = gradients_of(batch, group, rank, again, **kind)
        assert len(calls) == 2
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)


@case
def a_rank_whose_experts_have_nothing_to_do_takes_part_in_the_way_back(group, rank, number):
    """Where a rank's results come from nothing that it received, its collectives still match."""

    def lazy(ep, hidden, ids, weights, matrices):
        rows, plan = ep.dispatch(hidden, ids, weights)
        if not int(plan.counts.sum()):
            return ep.combine(torch.zeros(rows.shape)) + 0 * matrices.sum()
        return ep.combine(computed(rows, plan, matrices))

    for kind in (*KINDS, {"reduce": "rank", "shared_batch": True}):
        batch = Batch(1 if "shared_batch" in kind else number)
        batch.ids = [torch.zeros(T, K).int()] * number  # all on rank 0
        if len(batch.tokens) < number:
            batch.hidden, batch.weights = batch.hidden * number, batch.weights * number
        expected = gradients_of(batch, group, rank, layer, **kind)
        got = gradients_of(batch, group, rank, lazy, **kind)
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)


@case
def gradients_of_gradients(group, rank, number):
    def twice(hidden, weights, through):
        out = through(hidden.sin(), weights)
        first = torch.autograd.grad(out.square().sum(), (hidden, weights), create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in first), (hidden, weights))

    for kind in KINDS:
        batch, ep = Batch(number), made(group, **kind)
        leaves = [part.requires_grad_() for part in (*batch.hidden, *batch.weights)]
        hidden, ids, weights = batch.of(rank)
        got = twice(hidden, weights, lambda h, w: layer(ep, h, ids, w, batch.mine(ep)))  # noqa: B023 -- called here
        assert leaves
        plan = moe_routing.plan(ids, E)
        expected = twice(
            hidden, weights,
            lambda h, w: moe_routing.combine(
                computed(moe_routing.permute(h, plan), plan, batch.matrices), plan, w  # noqa: B023 -- likewise
            ),
        )  # fmt: skip
        for one, other in zip(got, expected, strict=True):  # terms cancel each other
            assert (one - other).abs().max() <= 1e-4 * other.abs().max()


@case
def experts_that_torch_compiles(group, rank, number):
    def product(rows, matrix):
        return (rows @ matrix).relu()

    batch = Batch(number)
    compiled = torch.compile(product, backend="eager")
    eager = gradients_of(batch, group, rank, partial(plain, product))
    got = gradients_of(batch, group, rank, partial(plain, compiled))
    for one, other in zip(got, eager, strict=True):
        assert_close(one, other)


def plain(product, ep, *tokens_and_matrices):
    *tokens, matrices = tokens_and_matrices
    rows, plan = ep.dispatch(*tokens)
    parts = rows.split([*plan.counts.tolist(), len(rows) - int(plan.counts.sum())])
    return ep.combine(torch.cat([*map(product, parts[:-1], matrices), parts[-1]]))


@case
def a_layer_that_torch_compiles_as_a_whole(group, rank, number):
    for kind in KINDS:
        batch = Batch(number)
        expected = gradients_of(batch, group, rank, layer, **kind)
        torch.compiler.reset()
        compiled = torch.compile(layer, backend="eager")
        got = gradients_of(batch, group, rank, compiled, **kind)
        for one, other in zip(got, expected, strict=True):
            assert_close(one, other)


@case
def nothing_is_kept_after_combine(group, rank, number):
    ep, batch = made(group), Batch(number)
    hidden, ids, weights = batch.of(rank)
    rows, plan = ep.dispatch(hidden.requires_grad_(), ids, weights)
    kept = weakref.ref(rows.grad_fn)
    out = ep.combine(computed(rows, plan, batch.mine(ep)))
    assert ep._last is None
    out.sum().backward()
    del rows, plan, out
    gc.collect()
    assert kept() is None
    again = checkpoint(layer, ep, hidden, ids, weights, batch.mine(ep), use_reentrant=False)
    again.sum().backward()
    assert ep._last is None


@case
def an_error_between_dispatch_and_combine_leaves_the_next_call_right(group, rank, number):
    ep, batch = made(group), Batch(number)
    ep.dispatch(*batch.of(rank))  # and every rank gives up
    Batch(number).holds(ep, rank)


@case
def a_loss_that_does_not_use_the_output_goes_back_through_zeros(group, rank, number):
    for kind in KINDS:
        batch, ep = Batch(number), made(group, **kind)
        hidden, ids, weights = batch.of(rank)
        out = layer(ep, hidden.requires_grad_(), ids, weights, batch.mine(ep))
        (0 * out.sum() if rank == 0 else out.sum()).backward()
        assert bool(hidden.grad.any()) == (rank != 0 and bool(((ids >= 0) & (ids < E)).any()))


@case
def tensors_of_a_mesh_are_refused(group, rank, number):
    mesh = DeviceMesh("cpu", list(range(number)))
    ep, (hidden, ids, weights) = made(group), Batch(number).of(rank)
    text = "expected a tensor of this rank, .to_local() perhaps, got a DTensor"
    whole = DTensor.from_local(hidden, mesh, [Replicate()])
    error = raised(lambda: ep.dispatch(whole, ids, weights))
    assert type(error) is TypeError, error
    assert str(error).startswith(f"hidden: {text}"), error
    rows, _ = ep.dispatch(hidden, ids, weights)
    error = raised(lambda: ep.combine(DTensor.from_local(rows, mesh, [Replicate()])))
    assert str(error).startswith(f"rows: {text}"), error
    assert ep.combine(rows).shape == (T, H)


@case
def as_many_bytes_are_sent_as_the_page_says(group, rank, number):
    every_byte, returned = [], []
    plainly = distributed.all_to_all_single

    def counted(received, sent, *rest, **options):
        every_byte.append(sent.numel() * sent.element_size())
        returned.append(received.numel() * received.element_size())
        return plainly(received, sent, *rest, **options)

    for kind in KINDS:
        most = kind.get("max_tokens")
        batch, ep = Batch(number), made(group, **kind)
        batch.ids = [torch.rand(T, E).argsort(1)[:, :K] for _ in range(number)]
        hidden, ids, weights = batch.of(rank)
        every_byte.clear()
        distributed.all_to_all_single = counted
        try:
            out = layer(ep, hidden.requires_grad_(), ids, weights.requires_grad_(), batch.mine(ep))
            forward, came_back = list(every_byte), returned[-1]
            out.sum().backward()
        finally:
            distributed.all_to_all_single = plainly
        reached = sum(len({e // (E // number) for e in row}) for row in ids.tolist())
        if kind["reduce"] == "none":
            places = number * most * K if most else T * K
            of_ids = 4 * places if most else 0
            dispatched, combined = places * 4 * H + of_ids, places * 4 * H
        else:
            places = number * most if most else reached
            dispatched, combined = places * (4 * H + 4 * K + 4 * K), places * 4 * H
            of_ids = 0  # they come with the weights, also on the way back of gradients
        kinds = E // number if kind["reduce"] == "none" else 1
        sizes = [] if most else [4 * number * (kinds + 5)]
        assert forward[: len(sizes)] == sizes
        assert sum(forward[len(sizes) : -1]) == dispatched
        assert came_back == combined
        if most:
            assert sum(every_byte[len(forward) :]) == dispatched + combined - of_ids


# transports of others

made_by = {}


class Counted:
    """Another's transport, around ours."""

    def __init__(self, kernel, group):
        self.inner, self.calls = kernel(group), []
        made_by["transport"] = self

    def dispatch(self, tokens):
        self.calls.append("dispatch")
        return self.inner.dispatch(tokens)

    def combine(self, rows, received):
        self.calls.append("combine")
        return self.inner.combine(rows, received)


def build_counted(problem, device):
    from moe_routing_backends.all_to_all.exchange import build

    kernel = build(problem, device)
    return lambda group: Counted(kernel, group)


def build_nothing(problem, device):
    msg = f"no library for {problem} on {device.type}"
    raise RuntimeError(msg)


def build_for_no_group(_problem, _device):
    def kernel(group):
        msg = f"no buffers for {group.size()} ranks {600 * SMILE}"
        raise RuntimeError(msg)

    return kernel


class registered:  # noqa: N801 -- used like a function of contextlib
    """Have one more transport inside the block, on the ranks where ``here``."""

    def __init__(self, name, factory, priority, *, here=True):
        self.name, self.here = name, here
        self.spec = BackendSpec(
            name=name,
            factories={"exchange": f"{__name__}:{factory}"},
            targets=(Target(ANY),),
            priority=priority,
        )

    def __enter__(self):
        if self.here:
            registry().register(self.spec)

    def __exit__(self, *_raised):
        if self.here:
            registry().unregister(self.name)


@case
def a_transport_of_others_is_chosen_by_priority_or_by_name(group, rank, number):
    for priority, named, chosen in [
        (90, None, True), (10, None, False), (10, "counted", True), (90, "all-to-all", False)
    ]:  # fmt: skip
        made_by.clear()
        with registered("counted", "build_counted", priority):
            ep = made(group, transport=named)
            assert ep.report.winner == ("counted" if chosen else "all-to-all")
            assert ep.report.asked_by == ("probe" if named is None else "argument")
            Batch(number).holds(ep, rank)
            if chosen:
                assert made_by["transport"].calls == ["dispatch", "combine"]
            assert made_by.keys() == ({"transport"} if chosen else set())


@case
def who_computes_is_not_who_transports(group, rank, number):
    with moe_routing.prefer("eager"):
        ep = made(group)
        assert ep.report.winner == "all-to-all"
        Batch(number).holds(ep, rank)


@case
def a_transport_that_cannot_be_built_is_passed_over_on_every_rank_and_said(group, rank, number):
    with registered("broken", "build_nothing", 90):
        ep = made(group)
        assert ep.report.winner == "all-to-all"
        assert "no library for exchange ranks=" in str(ep.report)
        Batch(number).holds(ep, rank)
        error = raised(lambda: made(group, transport="broken"))
        assert type(error) is moe_routing.BackendUnavailableError
        assert "no library for exchange" in str(error)


@case
def a_transport_that_one_rank_lacks_is_an_error_on_every_rank(group, rank, number):
    with registered("counted", "build_counted", 90, here=rank == 0):
        others = ", ".join(f"'all-to-all' on rank {other}" for other in range(1, number))
        text = f"transport: expected the same on every rank, got 'counted' on rank 0, {others}"
        refuses(lambda: made(group), ValueError, text)
        error = raised(lambda: made(group, transport="counted"))
        if rank == 0:
            text = "group: expected every rank to be served, got from rank 1 UnknownNameError: unkn"
            assert str(error).startswith(text), error
        else:
            assert "unknown backend 'counted'" in str(error), error
        made(group, transport="all-to-all")
    factory = "build_nothing" if rank == 0 else "build_counted"
    with registered("counted", factory, 90):  # it fails on one rank alone
        text = (
            "transport: expected the same on every rank, got 'all-to-all' on rank 0, 'counted' on"
        )
        refuses(lambda: made(group), ValueError, text)
    factory = "build_for_no_group" if rank == 0 else "build_counted"
    with registered("counted", factory, 90):  # it is made nowhere, since one rank cannot make it
        if rank == 0:
            refuses(lambda: made(group), RuntimeError, f"no buffers for {number} ranks")
        else:
            text = (
                "group: expected every rank to be served, got from rank 0 RuntimeError: no buffer"
            )
            refuses(lambda: made(group), ValueError, text)
    made(group)


# what needs processes of its own


def without_a_group(_rank, _number):
    distributed.destroy_process_group()
    error = raised(lambda: made(None))
    return [type(error).__name__, str(error)]


def brought(rank, number):
    """Use the transport that an installed distribution brings."""
    torch.manual_seed(0)
    ep = made(None)
    Batch(number).holds(ep, rank)
    return [ep.report.winner, ep.report.eligible[0].distribution, ep._exchange.calls]


def dying(rank, number, folder):
    """Let the last rank die between two calls, and go on without it."""
    torch.manual_seed(0)
    ep, batch = made(None), Batch(number)
    batch.holds(ep, rank)
    rows, plan = ep.dispatch(*batch.of(rank))
    if rank == number - 1:
        os._exit(17)
    first = raised(lambda: ep.combine(computed(rows, plan, batch.mine(ep))))
    again = raised(lambda: made(None, timeout=2))
    distributed.destroy_process_group()
    ranks.start(Path(folder) / "survivors", rank, number - 1)
    ep = made(None)
    for _ in range(3):
        Batch(number - 1).holds(ep, rank)
    return [isinstance(first, RuntimeError), type(again).__name__, str(again), ep.problem.ranks]
