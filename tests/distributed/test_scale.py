"""The model of traffic and time: its maths, the transport's own bytes, and the kept results."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_routing.distributed import ExchangeProblem, Tokens
from moe_routing.distributed.scale import (
    WAYS,
    Change,
    Constants,
    Deployment,
    DeviceTime,
    Network,
    Source,
    Way,
    changes_by_ranks,
    changes_by_tokens,
    estimates,
    expected_reached,
    fastest,
    microseconds,
    shipped,
    traffic,
)
from moe_routing.distributed.scale.traffic import MOST_RANKS_TO_SUM_ON
from moe_routing_backends import all_to_all
from moe_routing_backends.all_to_all import exchange

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LAYER = Deployment(tokens=64, hidden_size=7168, topk=8, num_experts=256, ranks=16)
ON_RANKS = [way for way in WAYS if not way.shared_batch]
SYMMETRIC = Constants(
    {
        **shipped().device,
        ("symmetric", "none"): DeviceTime(10.0, 1.0, 340.0),
        ("symmetric", "rank"): DeviceTime(15.0, 1.0, 200.0),
    },
    shipped().host,
    (Source("", "", "", "", 64),),
)


@st.composite
def deployments(draw):
    """Sizes of all kinds: one host or several, more experts than ranks or fewer."""
    host = draw(st.integers(1, 8))
    ranks = draw(st.integers(2, host)) if host > 1 and draw(st.booleans()) else None
    ranks = ranks or host * draw(st.integers(2, 6))
    experts = draw(
        st.sampled_from([ranks * draw(st.integers(1, 8))])
        | st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0])
    )
    return Deployment(
        tokens=draw(st.integers(1, 5000)),
        hidden_size=draw(st.integers(1, 9000)),
        topk=draw(st.integers(1, min(experts, 16))),
        num_experts=experts,
        ranks=ranks,
        ranks_per_host=host,
        element_bytes=draw(st.sampled_from([1, 2, 4])),
    )


@pytest.mark.parametrize(
    ("groups", "slots", "topk"),
    [
        (groups, slots, topk)
        for slots in (1, 6, 8)
        for groups in range(1, slots + 1)
        if slots % groups == 0
        for topk in range(slots + 1)
    ],
)
def test_the_expected_number_of_groups_is_the_mean_over_all_choices(groups, slots, topk):
    each = slots // groups
    found = [len({slot // each for slot in c}) for c in itertools.combinations(range(slots), topk)]
    assert expected_reached(groups, slots, topk) == pytest.approx(sum(found) / len(found))


@pytest.mark.parametrize(("groups", "slots", "topk"), [(8, 256, 8), (64, 256, 8), (16, 128, 4)])
def test_the_expected_number_of_groups_is_the_mean_of_random_choices(groups, slots, topk):
    draw = random.Random(0)  # noqa: S311 -- a seed
    times = 4000
    found = sum(
        len({slot // (slots // groups) for slot in draw.sample(range(slots), topk)})
        for _ in range(times)
    )
    assert expected_reached(groups, slots, topk) == pytest.approx(found / times, rel=0.02)


@given(deployments())
def test_a_token_reaches_no_more_hosts_than_ranks_and_no_more_ranks_than_experts(sizes):
    hosts, ranks = sizes.hosts_reached, sizes.ranks_reached
    close = 1 + 1e-9
    assert 1 / close <= hosts <= min(sizes.hosts, ranks) * close
    assert ranks <= min(sizes.ranks, sizes.topk) * close


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 30))
def test_more_experts_a_token_reach_no_fewer_groups(groups, each, topk):
    assume(topk < groups * each)
    fewer = expected_reached(groups, groups * each, topk)
    assert fewer <= expected_reached(groups, groups * each, topk + 1)


@pytest.mark.parametrize("way", ON_RANKS, ids=str)
@given(sizes=deployments())
def test_what_is_useful_is_sent_and_padding_only_adds_to_it(way, sizes):
    sent = traffic(sizes, way)
    moved = sent.bytes_within + sent.bytes_between
    assert moved >= sent.useful_bytes * (1 - 1e-9)
    row = 2 * sizes.hidden_size * sizes.element_bytes
    rows = sent.rows_within + sent.rows_between
    assert rows >= sent.useful_bytes / row * (1 - 1e-9)
    if way.reduce == "rank":  # never more rows than with reduce="none"
        assert sent.rows_within <= traffic(sizes, way._replace(reduce="none")).rows_within + 1e-6
    if sizes.hosts == 1:
        assert (sent.rows_between, sent.bytes_between) == (0, 0)


@pytest.mark.parametrize("way", WAYS, ids=str)
@given(sizes=deployments())
def test_more_tokens_send_more_and_take_no_less(way, sizes):
    more = replace(sizes, tokens=sizes.tokens + 1)
    assert sum(traffic(more, way)[2:4]) > sum(traffic(sizes, way)[2:4])
    before, after = (microseconds(one, way, SYMMETRIC, Network()) for one in (sizes, more))
    assert before is None or after is None or before <= after


@pytest.mark.parametrize("way", WAYS, ids=str)
@given(sizes=deployments(), rate=st.floats(1, 100), latency=st.floats(0, 100))
def test_a_slower_network_takes_no_less(way, sizes, rate, latency):
    fast = microseconds(sizes, way, SYMMETRIC, Network(2 * rate, latency))
    slow = microseconds(sizes, way, SYMMETRIC, Network(rate, latency + 1))
    assert fast is None or fast <= slow
    if fast is not None and sizes.hosts > 1 and way.graph:
        assert fast < slow


@pytest.mark.parametrize("sizes", [LAYER, replace(LAYER, ranks=8), replace(LAYER, ranks=512)])
def test_of_an_all_reduce_all_ranks_together_send_what_the_links_of_a_ring_carry(sizes):
    sent = traffic(sizes, WAYS[-1])
    tokens = sizes.tokens * sizes.hidden_size * sizes.element_bytes
    link = 2 * (sizes.ranks - 1) / sizes.ranks * tokens
    across = sizes.hosts if sizes.hosts > 1 else 0
    assert sent.bytes_between * sizes.ranks == pytest.approx(across * link)
    assert sent.bytes_within * sizes.ranks == pytest.approx((sizes.ranks - across) * link)


@pytest.fixture
def of_four(monkeypatch):
    """Return what hears every all-to-all of a rank of four, whose peers send what they get."""
    heard = []

    def all_to_all(rows, splits, places, _group):
        each = rows.flatten(1).shape[1] * rows.element_size()
        own = len(rows) // 4 if splits.send is None else splits.send[0]
        heard.append(((len(rows) if splits.send is None else sum(splits.send)) - own) * each)
        return torch.cat((rows, rows.new_zeros(places, *rows.shape[1:])))[:places]

    monkeypatch.setattr(exchange, "all_to_all", all_to_all)
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield heard
    distributed.destroy_process_group()


def calls_of(way, sizes):
    """Dispatch random tokens, and combine; return the ids."""
    problem = ExchangeProblem(
        ranks=sizes.ranks,
        experts_per_rank=sizes.num_experts // sizes.ranks,
        reduce=way.reduce,
        max_tokens=sizes.tokens if way.padded else 0,
    )
    group = distributed.group.WORLD
    transport = exchange.AllToAll(problem, torch.device("cpu"), group)
    hidden = torch.randn(sizes.tokens, sizes.hidden_size).bfloat16()
    ids = torch.rand(sizes.tokens, sizes.num_experts).topk(sizes.topk).indices.int()
    received = transport.dispatch(Tokens(hidden, ids, torch.rand(sizes.tokens, sizes.topk)))
    transport.combine(received.rows, received)
    return ids


@pytest.mark.parametrize("way", [w for w in WAYS if w.transport == "all-to-all"], ids=str)
def test_the_bytes_are_those_that_the_transport_sends(way, of_four):
    sizes = Deployment(tokens=3000, hidden_size=40, topk=4, num_experts=16, ranks=4)
    ids = calls_of(way, sizes)
    sent = traffic(sizes, way)
    assert sent.messages == 3 * len(of_four)
    if way.padded:
        assert sum(of_four) == sent.bytes_within
    else:
        assert sum(of_four) == pytest.approx(sent.bytes_within, rel=0.02)
        # To the byte with the numbers of this draw in place of the expected ones.
        ranks = ids // 4
        if way.reduce == "none":
            rows, with_row, counts = int((ranks > 0).sum()), 0, 4
        else:
            rows = sum(int((ranks == rank).any(1).sum()) for rank in (1, 2, 3))
            with_row, counts = 8 * sizes.topk, 1
        assert sum(of_four) == rows * (2 * 80 + with_row) + 3 * (20 + 4 * counts)


def test_the_limit_of_sums_on_ranks_is_the_backends():
    assert MOST_RANKS_TO_SUM_ON == all_to_all.MOST_RANKS


def test_a_time_is_the_sum_of_its_parts():
    way = Way("all-to-all", "none", padded=True, graph=True)
    constants = Constants(
        {way[:2]: DeviceTime(50.0, 2.0, 100.0)}, {("all-to-all", "none", True): 300.0}, ()
    )
    network = Network(rate=10.0, latency=7.0)
    sizes = Deployment(
        tokens=1, hidden_size=498, topk=1, num_experts=4, ranks=4, ranks_per_host=2
    )  # 1,996 bytes to each other rank
    took = 50 + 2 * 3 + 1996 / 100e3 + 3 * 7 + 2 * 1996 / 10e3
    assert microseconds(sizes, way, constants, network) == pytest.approx(took)
    eager = way._replace(graph=False)
    assert microseconds(sizes, eager, constants, network) == 300.0
    assert microseconds(sizes, Way("symmetric", "none", False, True), constants, network) is None  # noqa: FBT003
    assert microseconds(sizes, eager, constants._replace(host={}), network) is None


def test_what_was_not_measured_has_no_time_and_says_so():
    notes = {one.way: (one.microseconds, one.note) for one in estimates(LAYER, shipped())}
    assert notes[WAYS[-1]] == (None, "not measured")
    assert notes[WAYS[0]] == (None, "within one host only")
    assert notes[WAYS[2]][1] == "extrapolated, network assumed"
    two = estimates(replace(LAYER, ranks=2))
    assert [one.note for one in two if one.way.transport == "all-to-all"] == [""] * 4
    many = {one.way: one for one in estimates(replace(LAYER, ranks=128))}
    assert many[WAYS[3]].note == "sums on up to 64 ranks"
    assert many[WAYS[3]].microseconds is None


def test_symmetric_memory_ends_where_the_group_leaves_the_host():
    changes = changes_by_ranks(replace(LAYER, ranks=64), SYMMETRIC)
    assert {way.transport for start, way in changes if start <= 8} == {"symmetric"}
    assert {way.transport for start, way in changes if start > 8} == {"all-to-all"}
    assert Change(16, fastest(LAYER, SYMMETRIC)) in changes


@pytest.mark.parametrize("ranks", [2, 8, 64, 512])
@pytest.mark.parametrize("constants", [shipped(), SYMMETRIC], ids=["shipped", "symmetric"])
def test_changes_are_where_the_fastest_way_changes(ranks, constants):
    sizes = replace(LAYER, ranks=ranks)
    changes = changes_by_tokens(sizes, constants)
    assert changes[0].start == 1
    for before, (start, way) in itertools.pairwise(changes):
        at = (fastest(replace(sizes, tokens=T), constants) for T in (start - 1, start))
        assert tuple(at) == (before.way, way)


def test_without_constants_nothing_is_the_fastest():
    with pytest.raises(ValueError, match="constants: expected the times of one way at least"):
        fastest(LAYER, Constants({}, {}, ()))


def test_constants_survive_json():
    assert Constants.from_dict(json.loads(json.dumps(SYMMETRIC.to_dict()))) == SYMMETRIC


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tokens": 0}, "tokens: expected an int of at least 1, got 0"),
        ({"ranks": 1}, "ranks: expected an int of at least 2, got 1"),
        ({"ranks": 24}, "ranks: expected a divisor or a multiple of the 256 experts, got 24"),
        ({"topk": 257}, "topk: expected at most 256, the experts, got 257"),
        (
            {"ranks_per_host": 5},
            "ranks: expected up to 5, the ranks of a host, or a multiple of them, got 16",
        ),
    ],
)
def test_sizes_that_cannot_be_are_named(wrong, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        replace(LAYER, **wrong)


@pytest.mark.parametrize(("groups", "slots", "topk"), [(3, 8, 2), (0, 8, 2), (2, 8, 9)])
def test_groups_that_cannot_be_are_named(groups, slots, topk):
    with pytest.raises(ValueError, match=r"^(groups|topk): expected"):
        expected_reached(groups, slots, topk)


def test_the_constants_and_the_page_say_what_the_kept_results_say():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "scale_constants.py", "--check"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def script(monkeypatch):
    """Return the script that fits."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    # It imports `tables`; what other tests import by this name is of docs/, and comes back.
    monkeypatch.setitem(sys.modules, "tables", None)
    del sys.modules["tables"]
    import scale_constants

    return scale_constants


def result(path, ranks, names):
    """Write a result whose times are those of known constants."""
    results = []
    for name, way in names.items():
        for hidden_size, experts in ((2816, 128), (7168, 256)):
            for tokens in (1, 64, 4096):
                sizes = Deployment(
                    tokens=tokens, hidden_size=hidden_size, topk=8, num_experts=experts, ranks=ranks
                )
                us = microseconds(sizes, way, SYMMETRIC, Network())
                how = "graph" if way.graph else "eager"
                row = {"name": name, "how": how, "tokens": tokens, "hidden_size": hidden_size}
                results.append({**row, "microseconds": us})
    other = {"name": "transformers all_to_all", "how": "eager", "tokens": 1, "hidden_size": 2816}
    about = {"device": "a card", "with": "torch", "date": "today", "ranks": ranks, "K": 8}
    path.write_text(json.dumps({**about, "results": [*results, {**other, "microseconds": 9.0}]}))
    return path


def test_constants_are_found_again_in_times_that_they_made(script, tmp_path):
    names = {
        "symmetric reduce=none": Way("symmetric", "none", padded=False, graph=True),
        "symmetric reduce=rank": Way("symmetric", "rank", padded=False, graph=True),
        "all-to-all reduce=none padded": Way("all-to-all", "none", padded=True, graph=True),
        "all-to-all reduce=none": Way("all-to-all", "none", padded=False, graph=False),
    }
    paths = [result(tmp_path / f"h100-x{ranks}.json", ranks, names) for ranks in (2, 4)]
    rows, sources = script.read(paths)
    assert [source.ranks for source in sources] == [2, 4]
    assert len(rows) == 2 * 4 * 6
    found = script.fitted(rows, sources)
    for key in (("symmetric", "none"), ("symmetric", "rank")):
        assert found.device[key] == pytest.approx(SYMMETRIC.device[key], rel=1e-3)
    fixed, peer, rate = SYMMETRIC.device["all-to-all", "none"]
    assert found.device["all-to-all", "none"] == pytest.approx((fixed, peer or 0.0, rate), rel=1e-2)
    assert found.host == {
        ("all-to-all", "none", False): SYMMETRIC.host["all-to-all", "none", False]
    }
    table = list(script.in_docs(rows, found))
    assert "names the fastest way for 12." in table[-3]
    assert table[-1].startswith("Constants that are fitted to 2 ranks alone miss the times of 4 ra")


def test_from_groups_of_one_size_no_time_of_a_further_rank_follows(script, tmp_path):
    way = Way("symmetric", "none", padded=False, graph=True)
    rows, sources = script.read([result(tmp_path / "x.json", 4, {"symmetric reduce=none": way})])
    found = script.fitted(rows, sources).device["symmetric", "none"]
    assert found == DeviceTime(pytest.approx(13.0, rel=1e-3), None, pytest.approx(340.0, rel=1e-3))


def test_eager_calls_without_replays_are_refused(script, tmp_path):
    way = Way("all-to-all", "none", padded=False, graph=False)
    rows, sources = script.read([result(tmp_path / "x.json", 2, {"all-to-all reduce=none": way})])
    with pytest.raises(SystemExit, match="expected replays of a graph in the results too"):
        script.error(rows[0], script.fitted(rows, sources))


def test_the_model_is_free_of_torch():
    code = (
        "import sys, moe_routing.distributed.scale as scale; scale.shipped(); "
        "print(sorted({'torch', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
