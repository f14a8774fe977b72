"""The layouts of other engines' records, field by field: dtype, axes, layers, bytes.

Each is built here as its engine builds it: vLLM 0.32 and 0.33 (``routed_experts_capturer.py``,
``serial_utils.py``), SGLang 0.5.23 (``state_capturer/``), Megatron-Core 0.16
(``router_replay.py``).
"""

import base64
import io
import re

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from moe_routing.replay import (
    from_megatron,
    from_sglang,
    from_vllm,
    least_dtype,
    to_megatron,
    to_sglang,
    to_vllm,
)

T, DEPTH, K, E = 5, 4, 2, 200
MOE = [1, 3]
"""The hidden layers with routers; the others are dense."""


def drawn(num_experts=E, layers=2):
    return torch.randint(num_experts, (layers, T, K))


def by_token(record, dtype):
    """Write each id where an engine puts it: token, hidden layer, slot; dense layers are 0."""
    made = np.zeros((T, DEPTH, K), dtype)
    for place, layer in enumerate(MOE):
        for token in range(T):
            for slot in range(K):
                made[token, layer, slot] = record[place, token, slot].item()
    return made


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("num_experts", "theirs", "ours"),
    [
        (128, np.uint8, torch.int8),
        (256, np.uint8, torch.int16),
        (257, np.uint16, torch.int16),
        (65_536, np.uint16, torch.int32),
    ],
)
def test_vllm_has_tokens_first_in_unsigned_bytes_or_words(num_experts, theirs, ours):
    record = drawn(num_experts)
    record[0, 0, 0] = num_experts - 1
    array = by_token(record, theirs)
    for given_ in (array, npy(array), torch.tensor(array)):
        read = from_vllm(given_, num_experts=num_experts, layers=MOE)
        assert (read.dtype, read.is_contiguous()) == (ours, True)
        assert torch.equal(read.long(), record)
    written = to_vllm(record, num_experts=num_experts, layers=MOE, num_layers=DEPTH)
    assert written.dtype == theirs
    assert np.array_equal(written, array)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
def test_vllms_axes_are_read_in_any_integer_dtype(dtype):
    record = drawn()
    array = by_token(record, dtype)
    array.flags.writeable = False
    assert torch.equal(from_vllm(array, num_experts=E, layers=MOE).long(), record)


def test_views_of_arrays_are_read_and_masked_arrays_are_not():
    array = np.arange(12).reshape(3, 2, 2) % 4
    assert torch.equal(
        from_vllm(array[::-1], num_experts=4), from_vllm(array[::-1].copy(), num_experts=4)
    )
    with pytest.raises(TypeError, match=r"^routed_experts: expected an integer array"):
        from_vllm(np.ma.masked_array(array, mask=array == 0), num_experts=4)


def test_sglang_has_tokens_first_in_int32_in_base64_without_a_shape():
    record = drawn()
    record[0, 0] = -1
    text = base64.b64encode(by_token(record, "<i4").tobytes()).decode()
    read = from_sglang(text, num_experts=E, topk=K, num_layers=DEPTH, layers=MOE)
    assert read.dtype is torch.int16
    assert torch.equal(read.long(), record)
    assert to_sglang(record, num_experts=E, layers=MOE, num_layers=DEPTH) == text


def test_megatron_has_a_tensor_of_int64_for_each_router():
    record = drawn(num_experts=64)
    recorded = [record[0], record[1]]
    read = from_megatron(recorded, num_experts=64)
    assert read.dtype is torch.int8
    assert torch.equal(read.long(), record)
    written = to_megatron(read, num_experts=64)
    assert [ids.dtype for ids in written] == [torch.int64, torch.int64]
    assert all(map(torch.equal, written, recorded))


def test_the_rows_of_a_batch_can_be_brought_into_megatrons_order():
    sequences = drawn(layers=2 * 3).view(2, 3, T, K)  # [layers, B, S, K]
    by_position = sequences.transpose(1, 2).flatten(1, 2)
    for row, (position, sequence) in enumerate(np.ndindex(T, 3)):
        assert torch.equal(by_position[:, row], sequences[:, sequence, position])


@example(1, 4, 3, 128, 0)  # E itself has no place in the dtype of the ids
@example(1, 4, 3, 32_768, 0)
@given(
    st.integers(1, 3), st.integers(0, 4), st.integers(1, 3), st.integers(1, 70_000), st.integers()
)
def test_what_is_written_is_read_again(layers, tokens, topk, num_experts, seed):
    generator = torch.Generator().manual_seed(seed % 2**32)
    record = torch.randint(num_experts, (layers, tokens, topk), generator=generator)
    least = record.to(least_dtype(num_experts))
    assert torch.equal(least.long(), record)
    back = [
        from_sglang(
            to_sglang(least, num_experts=num_experts),
            num_experts=num_experts,
            topk=topk,
            num_layers=layers,
        ),
        from_megatron(to_megatron(least, num_experts=num_experts), num_experts=num_experts),
    ]
    if num_experts <= 65_536:
        written = to_vllm(least, num_experts=num_experts)
        back += [from_vllm(form, num_experts=num_experts) for form in (written, npy(written))]
    for read in back:
        assert read.dtype is least.dtype
        assert torch.equal(read, least)


RECORD = torch.zeros(2, T, K, dtype=torch.int64)
OUTSIDE = torch.full((2, T, K), 4)
EXPECTED_NPY = "routed_experts: expected a .npy file in base64"
HUGE = b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999, 99999, 1), }\n"
SGLANG = {"num_experts": 4, "topk": K, "num_layers": 2}


def headed(header):
    """Return a file of NumPy's with that header and nothing after it, in base64."""
    length = len(header).to_bytes(2, "little")
    return base64.b64encode(b"\x93NUMPY\x01\x00" + length + header).decode()


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: from_vllm(None, num_experts=4), TypeError, "routed_experts: expected an integer"),
        (lambda: from_vllm(np.zeros((1, 1, 1)), num_experts=4), TypeError, "routed_experts: exp"),
        (lambda: from_vllm(np.array(["a"]), num_experts=4), TypeError, "routed_experts: expected"),
        (lambda: from_vllm(RECORD[0], num_experts=4), ValueError, "routed_experts: expected shape"),
        (lambda: from_vllm(RECORD, num_experts=0), ValueError, "num_experts: expected"),
        (lambda: from_vllm(RECORD, num_experts=True), TypeError, "num_experts: expected"),
        (lambda: from_vllm(OUTSIDE, num_experts=4), ValueError, "routed_experts: expected ids in"),
        (lambda: from_vllm(OUTSIDE, num_experts=5, layers=[T]), ValueError, "layers: expected dif"),
        (lambda: from_vllm(OUTSIDE, num_experts=5, layers=[0, 0]), ValueError, "layers: expected"),
        (lambda: from_vllm(OUTSIDE, num_experts=5, layers=[-1]), ValueError, "layers: expected"),
        (lambda: from_vllm(OUTSIDE, num_experts=5, layers=2), TypeError, "layers: expected"),
        (lambda: from_vllm("???", num_experts=4), ValueError, "routed_experts: expected a base64"),
        (lambda: from_vllm("AAAA", num_experts=4), ValueError, "routed_experts: expected a .npy"),
        (lambda: from_vllm(headed(b"{'descr': (((\n"), num_experts=4), ValueError, EXPECTED_NPY),
        (lambda: from_vllm(headed(HUGE), num_experts=4), ValueError, EXPECTED_NPY),
        (lambda: from_vllm(RECORD.to("meta"), num_experts=4), ValueError, "routed_experts: expec"),
        (
            lambda: to_megatron(RECORD.to("meta"), num_experts=4),
            ValueError,
            "records: expected ids",
        ),
        (lambda: least_dtype("4"), TypeError, "num_experts: expected an int"),
        (lambda: least_dtype(2**31), ValueError, "num_experts: expected an int from 1"),
        (
            lambda: from_vllm(npy(np.zeros((1, 1, 1))), num_experts=4),
            TypeError,
            "routed_experts: expected a dense tensor of",
        ),
        (
            lambda: to_vllm(RECORD - 1, num_experts=4),
            ValueError,
            r"records: expected ids in [0, 4)",
        ),
        (lambda: to_vllm(RECORD, num_experts=65_537), ValueError, "num_experts: expected at most"),
        (lambda: to_vllm(RECORD.float(), num_experts=4), TypeError, "records: expected a dense"),
        (lambda: to_vllm(RECORD[0], num_experts=4), ValueError, "records: expected shape [layers"),
        (lambda: to_vllm(RECORD, num_experts=4, layers=MOE), ValueError, "num_layers: expected"),
        (lambda: to_vllm(RECORD, num_experts=4, num_layers=4), ValueError, "num_layers: expected"),
        (
            lambda: to_vllm(RECORD, num_experts=4, layers=[1], num_layers=4),
            ValueError,
            "layers: expected 2 layers, as records has",
        ),
        (lambda: from_sglang(b"", **SGLANG), TypeError, "routed_experts: expected a base64 string"),
        (lambda: from_sglang("AAAA", **SGLANG), ValueError, "routed_experts: expected int32 [T, 2"),
        (lambda: from_sglang("", **SGLANG | {"topk": 2**63}), ValueError, "topk: expected a num"),
        (lambda: from_sglang("", **SGLANG | {"topk": 0}), ValueError, "topk: expected a number"),
        (lambda: from_sglang("", **SGLANG | {"num_layers": None}), TypeError, "num_layers: expect"),
        (lambda: to_sglang(RECORD - 2, num_experts=4), ValueError, "records: expected ids in [-1"),
        (lambda: from_megatron(RECORD, num_experts=4), TypeError, "recorded: expected a list"),
        (lambda: from_megatron([], num_experts=4), ValueError, "recorded: expected a tensor for"),
        (lambda: from_megatron([None], num_experts=4), TypeError, "recorded: expected an integer"),
        (lambda: from_megatron([RECORD], num_experts=4), ValueError, "recorded: expected tensors"),
        (
            lambda: from_megatron([RECORD[0], RECORD[0, :1]], num_experts=4),
            ValueError,
            f"recorded: expected tensors [T, K], of one shape [{T}, {K}]",
        ),
        (lambda: to_megatron(RECORD - 1, num_experts=4), ValueError, "records: expected ids in [0"),
    ],
)
def test_what_is_wrong_is_named(call, error, said):
    with pytest.raises(error, match="^" + re.escape(said)):
        call()
