"""Clauses 8, 9 and 13: how inputs lie in memory, no tokens at all, and padding."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_routing.conformance.cases import Case
from moe_routing.conformance.checks import _sets, traced
from moe_routing.conformance.checks._check import check
from moe_routing.conformance.requirements import require
from moe_routing.conformance.under_test import NotRunError, must_match, outputs, same_bits
from moe_routing.conformance.variants import VARIANTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_routing import RoutingOutput
    from moe_routing.conformance.cases import Call, Profile
    from moe_routing.conformance.under_test import BackendUnderTest

FAR = 1 << 31
"""The first element offset that a signed 32-bit integer cannot hold."""


@check(8, _sets.in_every_layout)
def any_strides_are_read_as_they_lie(under_test: BackendUnderTest, case: Case) -> None:
    """Logits of every layout are read where they lie.

    They are sliced, offset, transposed, expanded, or every second column.
    """
    call = case.make(under_test.device)
    before = call.logits.clone()
    output = under_test.check(call)
    require(same_bits(call.logits.contiguous(), before.contiguous()), "logits: were changed")
    dense = case.make(under_test.device)
    dense.logits = call.logits.contiguous()
    require(
        torch.equal(under_test.route(dense).ids, output.ids),
        "the same values in contiguous memory give other ids",
    )


@check(8, _sets.where(_sets.of_every_family, tokens=257))
def row_strides_cost_no_copy(under_test: BackendUnderTest, case: Case) -> None:
    """A call allocates no more for a slice of the logits' columns than for contiguous logits."""
    dense, sliced = case.make(under_test.device), case.but(layout="sliced").make(under_test.device)
    for call in (dense, sliced):
        under_test.route(call)  # whatever is built, is built now
    expected, got = (_allocated(under_test, call) for call in (dense, sliced))
    size = dense.logits.nbytes
    require(
        got < expected + size,
        f"contiguous logits of {size} bytes allocate {expected}, sliced ones {got}",
    )


def _allocated(under_test: BackendUnderTest, call: Any) -> int:  # noqa: ANN401 -- a Call
    """Return the bytes that a call allocates.

    By the allocator where it counts them, else by watching torch's operators.
    """
    if under_test.device.type == "cuda":
        torch.cuda.synchronize(under_test.device)
        torch.cuda.reset_peak_memory_stats(under_test.device)
        start = torch.cuda.memory_allocated(under_test.device)
        under_test.route(call)
        return int(torch.cuda.max_memory_allocated(under_test.device) - start)
    watched = _Allocations()
    with watched:
        under_test.route(call)
    return watched.bytes


class _Allocations(TorchDispatchMode):
    """Adds up the storages that operators return and did not get."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.bytes = 0
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 -- torch's protocol
        result = func(*args, **(kwargs or {}))
        self.operators.append(str(func))
        given = {t.untyped_storage().data_ptr() for t in _tensors_in((args, kwargs))}
        new = [t.untyped_storage() for t in _tensors_in(result)]
        self.bytes += sum(s.nbytes() for s in new if s.data_ptr() not in given)
        return result


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:  # noqa: ANN401 -- a tree of anything
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors_in(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors_in(part)


@check(8, _sets.where(_sets.of_every_family, tokens=3, dtype="bfloat16"), capability="large_sizes")
def offsets_past_2_31_are_read(under_test: BackendUnderTest, case: Case) -> None:
    """The third of three rows begins past element 2**31 of its storage.

    A 32-bit offset would wrap.
    """
    stride = FAR // 2 + 64
    storage = _huge(under_test.device, 2 * stride + case.num_experts, torch.bfloat16)
    call = case.make(under_test.device)
    far = storage.as_strided((3, case.num_experts), (stride, 1))
    far.copy_(call.logits)
    call.logits = far
    under_test.check(call)


def _many_elements(profile: Profile) -> list[Case]:
    tokens = FAR // 1024 + 3
    return (
        [Case(variant="gemma4", num_experts=1024, topk=8, num_tokens=tokens, dtype="bfloat16")]
        if profile == "full"
        else []
    )


@check(8, _many_elements, capability="large_sizes")
def more_than_2_31_logits_are_routed(under_test: BackendUnderTest, case: Case) -> None:
    """T*E past 2**31: the last rows are right."""
    if under_test.device.type == "cpu":
        msg = "2**31 logits are for accelerators"
        raise NotRunError(msg)
    last = case.but(num_tokens=4096).make(under_test.device)
    logits = _huge(under_test.device, case.num_tokens * case.num_experts, torch.bfloat16).view(
        case.num_tokens, -1
    )
    logits.zero_()
    logits[-4096:] = last.logits
    call = case.but(num_tokens=1).make(under_test.device)
    call.logits = logits
    output = under_test.route(call)
    last = last.but(**call.operands)
    must_match(last, type(output)(output.weights[-4096:], output.ids[-4096:]))


def _huge(device: torch.device, elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Allocate without touching: on a CPU only the pages that are written take memory."""
    try:
        return torch.empty(elements, dtype=dtype, device=device)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        msg = f"{elements * dtype.itemsize / 2**30:.1f} GiB cannot be allocated: {error}"
        raise NotRunError(msg) from error


@check(9, _sets.of_every_variant)
def no_tokens_give_empty_outputs(under_test: BackendUnderTest, case: Case) -> None:
    """T = 0 gives empty outputs of the right shape and dtype, and launches nothing.

    Outputs that are given are returned.
    """
    call = case.but(num_tokens=0).make(under_test.device)
    shape = (0, case.topk + case.spec.shared_experts)
    given = outputs(*shape, torch.int64, under_test.device)
    with _Allocations() as watched:
        output = under_test.route(call)
        call.ids_dtype = torch.int64
        returned = under_test.route(call, given)
    require(
        output.weights.shape == shape and output.ids.shape == shape,
        f"expected {shape}, got {tuple(output.ids.shape)}",
    )
    require(
        output.weights.dtype == torch.float32 and output.ids.dtype == torch.int32,
        f"got {output.ids.dtype}",
    )
    require(returned.ids is given.ids, "out: not what was returned")
    allowed = ("empty", "fill", "detach", "view", "slice")  # the kit's own outputs and poison
    launched = [name for name in watched.operators if not any(word in name for word in allowed)]
    require(not launched, f"launched {launched}")


BY_TABLE = [variant for variant, spec in VARIANTS.items() if spec.selection == "token_table"]


def _masked(profile: Profile) -> Iterator[Case]:
    for case in _sets.of_every_family(profile):
        yield case.but(valid="mask")
        yield case.but(valid="mask", mapped=True, recorded=True, ids_dtype="int64")
    for case in _sets.of_every_variant("smoke", variants=_sets.FEW[:2]):
        yield case.but(valid="mask", num_tokens=1)
        yield case.but(valid="mask", num_tokens=0)


@check(13, _masked)
def a_mask_says_which_rows_are_padding(under_test: BackendUnderTest, case: Case) -> None:
    """Rows where ``valid`` is False are blank, whatever they hold; the others are as without it."""
    call = case.make(under_test.device)
    drawn = call.operands["valid"]
    assert drawn is not None  # noqa: S101 -- for mypy: the case has a mask
    apart = torch.stack((drawn, ~drawn), dim=1)[:, 0]
    plain = under_test.check(call.but(valid=None))
    for what, mask in (
        ("drawn", drawn),
        ("its opposite", ~drawn),
        ("with strides", apart),
        ("all True", torch.ones_like(drawn)),
        ("all False", torch.zeros_like(drawn)),
    ):
        some = replace(call, logits=call.logits.clone())
        some.logits[~mask] = torch.nan
        output = under_test.route(some.but(valid=mask))
        must_match(some.but(valid=mask), output)
        for name, got, expected in zip(("weights", "ids"), output, plain, strict=True):
            same = same_bits(got[mask], expected[mask])
            require(same, f"a mask, {what}: {name} of its rows are not those without it")


@check(13, _sets.of_every_family, capability="gradients")
def gradients_of_masked_rows_are_zero(under_test: BackendUnderTest, case: Case) -> None:
    """No gradient comes from a row where ``valid`` is False."""
    masked = case.but(valid="mask")
    traced.compare_gradients(under_test, masked, masked.make(under_test.device))


@check(13, _sets.of_every_family, capability="compile")
def masks_are_traced(under_test: BackendUnderTest, case: Case) -> None:
    """A compiled call gives the bits of the plain one; export and opcheck pass."""
    masked = case.but(valid="mask")
    traced.compiles_as_one_graph(under_test, masked)
    traced.exports(under_test, masked)
    traced.the_operator_passes_opcheck(under_test, masked)
    traced.the_operator_of_training_passes_opcheck(under_test, masked)


@check(13, _sets.where(_sets.of_every_variant, variants=BY_TABLE))
def tokens_without_experts_are_padding(under_test: BackendUnderTest, case: Case) -> None:
    """A row is padding if its token id, or an entry of that token, is out of range.

    The token id is outside the table, or the entry is outside [0, E). The other rows are as ever.
    """
    for integer in (torch.int32, torch.int64):
        for vocabulary in (1, 97):
            call = _with_a_table(case, integer, vocabulary, under_test.device)
            ids, table = call.operands["token_ids"], call.operands["expert_table"]
            assert ids is not None  # noqa: S101 -- for mypy
            assert table is not None  # noqa: S101 -- likewise
            every_third = torch.arange(0, len(call.logits), 3)
            rows = torch.arange(0, vocabulary, 3)
            strays = _with_strays(ids, every_third, vocabulary)
            entries = _with_strays(table, rows * case.topk + rows % case.topk, case.num_experts)
            plain = under_test.check(call)
            for changed in (
                {"token_ids": strays},
                {"expert_table": entries},
                {"token_ids": strays, "expert_table": entries},
            ):
                _must_blank_only_strays(under_test, call.but(**changed), plain)


def _with_a_table(case: Case, integer: torch.dtype, vocabulary: int, device: torch.device) -> Call:
    """Return the case's call with a table of that many tokens, which lists the experts in turn."""
    call = case.make(device)
    listed = (
        torch.arange(vocabulary * case.topk, device=device).view(vocabulary, case.topk)
        % case.num_experts
    )
    tokens = torch.arange(len(call.logits), device=device) % vocabulary
    return call.but(token_ids=tokens.to(integer), expert_table=listed.to(integer))


def _with_strays(values: torch.Tensor, places: torch.Tensor, end: int) -> torch.Tensor:
    """Return the values with numbers outside [0, end) at those places.

    Some of these numbers are inside again if they are cut to 32 bits.
    """
    limits = torch.iinfo(values.dtype)
    strays = [-1, end, end + 1, -end, limits.max, limits.min]
    if values.dtype == torch.int64:
        strays += [2**32, 2**40 + 1, -(2**32)]
    changed = values.flatten().clone()
    enough = torch.tensor(strays, dtype=values.dtype, device=values.device).repeat(len(places))
    changed[places.to(values.device)] = enough[: len(places)]
    return changed.view(values.shape)


def _must_blank_only_strays(under_test: BackendUnderTest, call: Call, plain: RoutingOutput) -> None:
    output = under_test.check(call)
    kept = output.ids[:, 0] >= 0
    same = same_bits(output.ids[kept], plain.ids[kept]) and same_bits(
        output.weights[kept], plain.weights[kept]
    )
    require(same, "tokens without experts change other rows")


@check(13, _sets.of_every_variant)
def padding_is_blank(under_test: BackendUnderTest, case: Case) -> None:
    """Rows at or past num_valid_tokens get ids -1 and weights 0, whatever they hold.

    The others are as ever.
    """
    call = case.make(under_test.device)
    plain = under_test.route(call)
    tokens = len(call.logits)
    for valid in (0, 1, tokens // 2, tokens, tokens + 5):
        call.logits[valid:] = torch.nan
        for given in (
            valid,
            *(
                torch.tensor(valid, dtype=d, device=under_test.device)
                for d in (torch.int32, torch.int64)
            ),
        ):
            padded = call.but(
                num_valid_tokens=given if not isinstance(given, torch.Tensor) else given.view(1)
            )
            output = under_test.check(padded)
            require(
                same_bits(output.ids[:valid], plain.ids[:valid]),
                "padding changes the ids of other rows",
            )
        call = case.make(under_test.device)
    on_device = [
        torch.tensor(n, device=under_test.device) for n in (2**31, 2**63 - 1, -1, -(2**63))
    ]
    # More than T are all, fewer than 0 are none.
    for given in (2**31, 2**63 - 1, 2**63, 2**70, *on_device):
        under_test.check(call.but(num_valid_tokens=given))
