"""The cases: a pairwise sample that loses no pair, and is the same everywhere.

Each case needs the memory that it says.
"""

import itertools

import pytest
import torch

from moe_routing.conformance import pairwise as module
from moe_routing.conformance import rows
from moe_routing.conformance.cases import LAYOUTS, Case
from moe_routing.conformance.pairwise import EXPERTS, TOPK, everything, pairwise
from moe_routing.conformance.variants import VARIANTS, fits
from moe_routing.families import FAMILIES


@pytest.mark.slow
def test_the_pairwise_sample_is_what_allpairspy_gives():
    assert module._DATA.read_text(encoding="utf-8") == module.text(module.generate())


def test_a_family_that_was_added_since_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(module, "BUILT_IN", (*module.BUILT_IN, "another"))
    with pytest.raises(RuntimeError, match=r"none of another; .*: python -m moe_routing\."):
        pairwise()


def test_every_pair_of_family_and_size_that_can_be_is_in_the_pairwise_sample():
    cases = pairwise()
    sizes = [
        (variant, e, k or e)
        for variant, e, k in itertools.product(VARIANTS, EXPERTS, TOPK)
        if fits(VARIANTS[variant], e, k or e)
    ]
    assert {(v, e) for v, e, _ in sizes} == {(c.variant, c.num_experts) for c in cases}
    assert {(v, k) for v, _, k in sizes} <= {(c.variant, c.topk) for c in cases} | {
        (v, k) for v, e, k in sizes if e == k
    }
    assert {(c.variant, d) for c in cases for d in module.DTYPES} == {
        (c.variant, c.dtype) for c in cases
    }


def test_every_family_is_a_variant():
    assert set(FAMILIES) == {variant.partition("/")[0] for variant in VARIANTS}


@pytest.mark.slow
def test_the_full_list_has_every_size():
    cases = list(everything())
    assert len(cases) > 50_000
    assert {(c.num_experts, c.num_tokens) for c in cases} >= set(
        itertools.product((1, 60, 1024), (1, 2048))
    )


def test_a_case_makes_the_same_tensors_every_time():
    case = Case(variant="gemma4", mapped=True, valid="tensor")
    first, second = case.make(), case.make()
    assert torch.equal(first.logits, second.logits)
    assert (
        set(first.operands)
        == set(second.operands)
        == {"per_expert_scale", "expert_map", "num_valid_tokens"}
    )
    for name in first.operands:
        assert torch.equal(first.operands[name], second.operands[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_strides_and_not_values(layout):
    plain, laid = (
        Case(variant="softmax_topk").make().logits,
        Case(variant="softmax_topk", layout=layout),
    )
    generator = laid.generator()
    expected = laid.logits(generator)[0]
    got = laid.make().logits
    if layout == "repeated_row":
        expected = expected[:1].expand_as(expected)
    if layout == "constant_row":
        expected = expected[:, :1].expand_as(expected)
    assert torch.equal(got, expected)
    assert (got.stride() == plain.stride()) == (layout in ("contiguous", "offset"))
    assert (got.storage_offset() > 0) == (layout in ("sliced", "offset"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nans_come_with_both_signs_and_several_payloads(dtype):
    bits = set()
    for negative, payload in itertools.product((False, True), (0, 3, 5)):
        nan = rows.not_a_number(4, dtype, negative=negative, payload=payload)
        assert nan.isnan().all()
        assert nan.signbit().all() == negative
        bits.add(nan.view(rows._INT_OF_SIZE[dtype.itemsize])[0].item())
    assert len(bits) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_subnormals_are_subnormal_and_neighbours_are_a_unit_apart(dtype):
    kinds = rows.close(64, 8, dtype, torch.Generator().manual_seed(0))
    subnormal = kinds["subnormals"].double().abs()
    assert (subnormal > 0).all()
    assert (subnormal < torch.finfo(dtype).tiny).all()
    steps = kinds["units in the last place above 1"].double().sort().values.diff()
    assert (steps == torch.finfo(dtype).eps).all()
