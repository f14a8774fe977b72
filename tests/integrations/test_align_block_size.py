"""The block formats of vLLM and SGLang and the layouts of DeepGEMM, over ``moe_routing.plan``.

Each field is held against the format, stated again in Python loops.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ENGINES = Path(__file__).with_name("engines")
ADAPTERS = ROOT / "examples" / "integrations"
SIZES = [
    (0, 8, 2, 16),
    (1, 64, 8, 16),
    (3, 5, 1, 1),
    (5, 3, 3, 2),
    (7, 16, 4, 3),
    (33, 16, 4, 8),
    (300, 128, 8, 64),
]
"""T, E, K and the block: fewer pairs than experts and more, and blocks that divide nothing."""


@pytest.fixture
def adapter(monkeypatch):
    """Return what imports an adapter."""
    monkeypatch.syspath_prepend(str(ADAPTERS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.endswith(("_align_block_size", "_layouts")):
            del sys.modules[name]


def drawn(tokens, experts, topk, lowest=0):
    """Return random ids from the lowest one to E - 1, and in int32."""
    return torch.randint(lowest, experts, (tokens, topk), dtype=torch.int32)


def in_blocks(of_pair, experts, block):
    """Return the pairs by expert, filled up to blocks by the number of pairs, and the experts.

    :param of_pair: the expert of each pair, ``None`` for a pair that has no place.
    :param experts: the experts in their order.
    """
    pairs, of_block = [], []
    for expert in experts:
        mine = [pair for pair, its in enumerate(of_pair) if its == expert]
        while mine:
            some, mine = mine[:block], mine[block:]
            pairs += some + [len(of_pair)] * (block - len(some))
            of_block.append(expert)
    return pairs, of_block


def assert_is(tensor, expected):
    assert tensor.dtype == torch.int32
    assert tensor.is_contiguous()
    assert tensor.tolist() == expected


# vLLM


def vllm_sizes(pairs, experts, block, padded):
    """Return the number of places and of blocks that vLLM allocates."""
    places = pairs + experts * (block - 1)
    if padded:
        while places % block:
            places += 1
    if pairs < experts:
        places = min(pairs * block, places)
    blocks = 0
    while blocks * block < places:
        blocks += 1
    return places, blocks


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("maps", ["no map", "a map", "a map, other ranks ignored"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_vllms_block_format(adapter, size, maps, padded):
    tokens, experts, topk, block = size
    ids = drawn(tokens, experts, topk, lowest=-1)  # -1 pads
    # Every second expert is on this rank.
    local = [expert // 2 if expert % 2 else -1 for expert in range(experts)]
    ignored = maps == "a map, other ranks ignored"
    named = {"pad_sorted_ids": padded, "ignore_invalid_experts": ignored}
    if maps != "no map":
        named["expert_map"] = torch.tensor(local, dtype=torch.int32)

    of_pair = [None if expert < 0 else expert for expert in ids.flatten().tolist()]
    if ignored:
        of_pair = [None if e is None or local[e] < 0 else local[e] for e in of_pair]
    pairs, of_block = in_blocks(of_pair, range(experts), block)
    if maps == "a map":
        of_block = [local[expert] for expert in of_block]
    used = len(pairs)
    places, blocks = vllm_sizes(ids.numel(), experts, block, padded)
    pairs += [ids.numel()] * (places - len(pairs))
    of_block += [-1] * (blocks - len(of_block))

    align = adapter("vllm_align_block_size").moe_align_block_size
    made = align(ids, block, experts, **named)
    for part, expected in zip(made, (pairs, of_block, [used]), strict=True):
        assert_is(part, expected)


def test_the_example_of_vllms_docs(adapter):
    """Its ids count from 1, so there is an expert more than it says."""
    ids = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]], dtype=torch.int32)
    pairs, experts, used = adapter("vllm_align_block_size").moe_align_block_size(ids, 4, 5)
    assert pairs[:16].tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert experts[:4].tolist() == [1, 2, 3, 4]
    assert used.tolist() == [16]


def test_the_scatter_index_of_vllm_is_refused(adapter):
    with pytest.raises(ValueError, match=r"^return_scatter_idx: expected False, got True"):
        adapter("vllm_align_block_size").moe_align_block_size(
            drawn(2, 4, 2), 16, 4, return_scatter_idx=True
        )


# SGLang


def sglang_sizes(pairs, experts, block):
    """Return the number of places and of blocks that SGLang allocates."""
    buckets = experts + 1
    places = pairs * block if pairs < buckets else pairs + buckets * (block - 1)
    while places % 4:
        places += 1
    blocks = 0
    while blocks * block < places:
        blocks += 1
    return places, blocks


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sglangs_block_format(adapter, size, ignored):
    tokens, experts, topk, block = size
    ids = drawn(tokens, experts, topk, lowest=-1)  # -1: another rank's, or padding
    of_pair = [None if ignored and e < 0 else e for e in ids.flatten().tolist()]
    pairs, of_block = in_blocks(of_pair, range(-1, experts), block)
    used, inactive = len(pairs), of_block.count(-1)
    places, blocks = sglang_sizes(ids.numel(), experts, block)
    pairs += [ids.numel()] * (places - len(pairs))
    of_block += [-1] * (blocks - len(of_block))

    align = adapter("sglang_align_block_size").moe_align_block_size
    made = align(ids, block, experts, ignored)
    for part, expected in zip(made, (pairs, of_block, [used]), strict=True):
        assert_is(part, expected)
    counted = align(
        ids, block, experts, ignored, return_inactive_prefix_count=True, pad_expert_ids=True
    )
    assert torch.equal(counted[0], made[0])
    assert torch.equal(counted[1], made[1])
    assert_is(counted[2], [used, inactive])


def test_sglangs_ids_may_be_of_any_value(adapter):
    align = adapter("sglang_align_block_size").moe_align_block_size
    far = torch.tensor([[2**63 - 1, -(2**63), 0, 4, 3]])
    near = torch.tensor([[-1, -1, 0, -1, 3]])
    for part, expected in zip(align(far, 2, 4), align(near, 2, 4), strict=True):
        assert torch.equal(part, expected)


def test_with_sglangs_own_bucket_there_may_be_4095_experts(adapter):
    align = adapter("sglang_align_block_size").moe_align_block_size
    assert align(drawn(2, 4095, 2), 16, 4095)[2].tolist()
    with pytest.raises(ValueError, match=r"^num_experts: expected an int up to 4095, got 4096"):
        align(drawn(2, 4096, 2), 16, 4096)


# DeepGEMM


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_deep_gemms_contiguous_layout(adapter, size):
    tokens, experts, topk, block = size
    ids = drawn(tokens, experts, topk, lowest=-1)
    layout = adapter("deep_gemm_layouts").contiguous(ids, experts, alignment=block)
    of_pair = ids.flatten().tolist()
    pairs, of_block = in_blocks(of_pair, range(experts), block)
    rows = len(layout.experts)
    assert rows % block == 0
    assert rows >= len(pairs)
    pairs += [ids.numel()] * (rows - len(pairs))
    assert_is(layout.experts, [-1 if p == ids.numel() else of_pair[p] for p in pairs])
    assert_is(layout.tokens, [pair // topk for pair in pairs])
    expected = [pairs.index(p) if of_pair[p] >= 0 else -1 for p in range(ids.numel())]
    assert_is(layout.inverse.flatten(), expected)
    # What its scheduler reads: the first row of each block names the block's expert.
    assert layout.experts.tolist()[::block][: len(of_block)] == of_block


@pytest.mark.parametrize("most", [1, 3, 40])
def test_deep_gemms_masked_layout(adapter, most):
    tokens, experts, topk = 33, 6, 2
    ids = drawn(tokens, experts, topk, lowest=-1)
    layout = adapter("deep_gemm_layouts").masked(ids, experts, most)
    of_pair = ids.flatten().tolist()
    mine = [[p for p, its in enumerate(of_pair) if its == e][:most] for e in range(experts)]
    assert_is(layout.experts, [len(pairs) for pairs in mine])
    assert_is(
        layout.tokens,
        [[pair // topk for pair in pairs] + [tokens] * (most - len(pairs)) for pairs in mine],
    )
    expected = [-1] * len(of_pair)
    for expert, pairs in enumerate(mine):
        for place, pair in enumerate(pairs):
            expected[pair] = expert * most + place
    assert_is(layout.inverse.flatten(), expected)


def test_rows_through_a_layout_and_back_are_those_of_each_expert(adapter):
    """The same products as a loop over the experts."""
    tokens, experts, topk, width = 20, 5, 2, 8
    ids, x = drawn(tokens, experts, topk), torch.randn(tokens, width)
    weights = torch.randn(experts, width, width)
    expected = torch.einsum("th,tkhg->tkg", x, weights[ids.long()])
    x = torch.cat([x, torch.zeros(1, width)])  # the row of places without a token
    layouts = adapter("deep_gemm_layouts")

    rows = layouts.contiguous(ids, experts, alignment=4)
    of_row = weights[rows.experts.clamp_min(0).long()]
    made = torch.einsum("mh,mhg->mg", x[rows.tokens.long()], of_row)
    torch.testing.assert_close(made[rows.inverse.long()], expected)

    rows = layouts.masked(ids, experts, most=tokens * topk)
    made = torch.bmm(x[rows.tokens.long()], weights)
    torch.testing.assert_close(made.flatten(0, 1)[rows.inverse.long()], expected)


# Types

SAME = """
from {engine} import moe_align_block_size as theirs
from {ours} import moe_align_block_size as ours

function = theirs
function = ours
"""
PAIRS = {
    "vllm_align_block_size": "vllm.model_executor.layers.fused_moe.moe_align_block_size",
    "sglang_align_block_size": "sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size",
}


@pytest.mark.slow
@pytest.mark.parametrize("ours", PAIRS)
def test_an_adapter_may_be_called_wherever_the_engines_function_is(ours, tmp_path):
    """By mypy, without the project's settings, which skip vLLM."""
    file = tmp_path / "same.py"
    file.write_text(SAME.format(engine=PAIRS[ours], ours=ours))
    sources = (ENGINES, ADAPTERS, ROOT, ROOT / "registry", ROOT / "backends")
    options = ["--config-file=", "--strict", "--namespace-packages", "--follow-imports=silent"]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(file)],
        cwd=tmp_path,
        env={"MYPYPATH": os.pathsep.join(map(str, sources)), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
