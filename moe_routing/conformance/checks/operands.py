"""Clauses 1, 4 to 8 and 13: operands of every dtype, value, form and layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from moe_routing._router import Router
from moe_routing.conformance.cases import Case
from moe_routing.conformance.checks import _sets
from moe_routing.conformance.checks._check import check
from moe_routing.conformance.checks.sizes import BIASED
from moe_routing.conformance.requirements import require
from moe_routing.conformance.under_test import must_match, outputs, same_bits
from moe_routing.conformance.variants import VARIANTS
from moe_routing.reference.compare import renaming_problems

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from moe_routing import RoutingOutput
    from moe_routing.conformance.cases import Call, Profile
    from moe_routing.conformance.under_test import BackendUnderTest

EIGHT_BITS = (
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)  # fmt: skip
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, *EIGHT_BITS)
INTEGERS = (torch.int32, torch.int64)
RARE_DTYPES = ("float64", "float8_e4m3fn", "float8_e5m2")
"""Dtypes of logits other than those of the pairwise sample."""


def _once(profile: Profile) -> Iterator[Case]:
    """Yield every variant in the smallest size, whatever the profile."""
    del profile
    return _sets.of_every_variant("smoke")


def _rare(profile: Profile) -> Iterator[Case]:
    for case in _sets.of_every_family(profile):
        for dtype in RARE_DTYPES:
            yield case.but(dtype=dtype)


@check(4, _rare)
def logits_of_rare_dtypes_are_read(under_test: BackendUnderTest, case: Case) -> None:
    """Float64 and 8-bit logits are read as what they are, in float32."""
    under_test.check(case.make(under_test.device))


@check(6, _once)
def operands_of_every_dtype_are_read(under_test: BackendUnderTest, case: Case) -> None:
    """A bias or scale of any float dtype, and integers of either width, are read as they are."""
    call = case.but(mapped=True, valid="tensor").make(under_test.device)
    for name, value in _tensors(call):
        if value.is_floating_point():
            # Values with digits that every dtype cuts at another place.
            fine = value.double() * 1.0001
            dtypes: tuple[torch.dtype, ...] = FLOATS
        else:
            fine, dtypes = value, INTEGERS
        for dtype in dtypes:
            _must_be_right(under_test, call.but(**{name: fine.to(dtype)}), f"{name} of {dtype}")


def _must_be_right(under_test: BackendUnderTest, call: Call, what: str) -> RoutingOutput:
    """Route and compare; the message says with which operand."""
    output = under_test.route(call)
    try:
        must_match(call, output)
    except AssertionError as error:
        msg = f"{what}: {error}"
        raise AssertionError(msg) from error
    return output


def _tensors(call: Call) -> list[tuple[str, Tensor]]:
    return [
        (name, value) for name, value in call.operands.items() if isinstance(value, torch.Tensor)
    ]


HOSTILE = (
    torch.nan, torch.inf, -torch.inf, 3.4e38, -3.4e38, 1e30, -1e30, 1e9, -1e9, 1e5, -1e5,
    0.0, -0.0, 1e-30, -1e-30, 1e-42,
)  # fmt: skip
"""Values of every sign and magnitude, the last one subnormal."""


@check(1, _sets.where(_sets.of_every_variant, variants=BIASED))
def biases_of_every_value_are_ranked_right(under_test: BackendUnderTest, case: Case) -> None:
    """Biases of every sign and magnitude rank as they are.

    NaN counts as -inf, and what is equal goes to the lower id.
    """
    call = case.make(under_test.device)
    small = cast("torch.Tensor", call.operands["bias"]).float()
    hostile = torch.tensor(HOSTILE, device=under_test.device)
    place = torch.arange(case.num_experts, device=under_test.device)
    lowest = torch.tensor((torch.nan, -torch.inf, -3.4e38, -1e9), device=under_test.device)
    some = place % 5 == 1
    biases = {
        "of every value": torch.where(some, hostile[place // 5 % len(hostile)], small),
        "NaN, and NaN with the sign bit": torch.where(
            some, torch.where(place % 2 == 0, torch.nan, -torch.nan), small
        ),
        "NaN, but for fewer than K": torch.where(place % 31 == 7, small, torch.nan),  # noqa: PLR2004 -- anywhere
        "of the lowest alone": lowest[place % len(lowest)],
        "of +inf and NaN": torch.where(place % 3 == 0, torch.inf, torch.nan),
        "beyond float32": torch.where(
            some,
            1e300,
            torch.where(place % 5 == 2, -1e300, small.double()),  # noqa: PLR2004 -- likewise
        ),
    }
    for what, bias in biases.items():
        _must_be_right(under_test, call.but(bias=bias), f"biases {what}")


SCALES = (-1.5, 0.0, -0.0, 2.0, 1e-4, -1e-4, 1e30, -1e30)


@check(
    6,
    _sets.where(
        _sets.of_every_variant,
        variants=[name for name, spec in VARIANTS.items() if spec.per_expert_scale],
    ),
)
def scales_of_every_sign_are_used(under_test: BackendUnderTest, case: Case) -> None:
    """Weights take the sign and the size of their expert's scale, and are 0 where it is 0."""
    call = case.make(under_test.device)
    scale = torch.tensor(SCALES, device=under_test.device).repeat(case.num_experts)[
        : case.num_experts
    ]
    for what, values in (
        ("of every sign", scale),
        ("all negative", -1 - scale.abs()),
        ("all zero", torch.zeros_like(scale)),
    ):
        _must_be_right(under_test, call.but(per_expert_scale=values), f"scales {what}")


@check(13, _once)
def num_valid_tokens_may_have_any_form(under_test: BackendUnderTest, case: Case) -> None:
    """An int and tensors of shape [] and [1] mean the same, past int32 too.

    A negative number on the device leaves no row.
    """
    call = case.make(under_test.device)
    for valid in (0, 7, case.num_tokens, 2**31, 2**32 + 1, 2**40):
        forms: list[int | Tensor] = [valid, *_on_the_device(valid, under_test.device)]
        for form in forms:
            _must_be_right(
                under_test,
                call.but(num_valid_tokens=form),
                f"num_valid_tokens {_form(form)} {valid}",
            )
    for form in _on_the_device(-3, under_test.device):
        _must_be_right(
            under_test, call.but(num_valid_tokens=form), f"num_valid_tokens {_form(form)} -3"
        )


def _on_the_device(value: int, device: torch.device) -> list[Tensor]:
    fitting = [dtype for dtype in INTEGERS if value <= torch.iinfo(dtype).max]
    return [
        torch.tensor(value, dtype=dtype, device=device).view(shape)
        for dtype in fitting
        for shape in ((), (1,))
    ]


def _form(value: int | Tensor) -> str:
    return (
        f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else "int"
    )


@check(6, _once)
def arguments_may_have_any_form(under_test: BackendUnderTest, case: Case) -> None:
    """Arguments mean the same in every form.

    The forms: K that a configuration says, a scale by position, and every way to ask for an ids
    dtype and outputs.
    """
    call = case.but(mapped=True).make(under_test.device)
    plain = under_test.check(call)
    columns = call.topk + call.spec.shared_experts
    configured = Router(
        call.spec, topk=call.topk, num_experts=case.num_experts, backend=under_test.backend
    )
    operands: dict[str, Any] = dict(call.operands)
    scale = operands.pop("per_expert_scale", None)

    def out(dtype: torch.dtype) -> RoutingOutput:
        return outputs(len(call.logits), columns, dtype, under_test.device)

    forms: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
        "nothing else": (torch.int32, {}),
        "ids_dtype int32": (torch.int32, {"ids_dtype": torch.int32}),
        "ids_dtype int64": (torch.int64, {"ids_dtype": torch.int64}),
        "out": (torch.int32, {"out": out(torch.int32)}),
        "out with int64 ids": (torch.int64, {"out": out(torch.int64)}),
        "out as a tuple": (torch.int64, {"out": tuple(out(torch.int64)), "ids_dtype": torch.int64}),
    }
    for what, (dtype, extras) in forms.items():
        for topk in (None, call.topk):
            output = configured(call.logits, topk, scale, **operands, **extras)
            said = f"{what}, K {'left out' if topk is None else 'given'}"
            require(
                output.ids.dtype == dtype,
                f"{said}: expected ids of {dtype}, got {output.ids.dtype}",
            )
            given = extras.get("out")
            require(
                given is None or output.ids is given[1], f"{said}: the ids are not those of out"
            )
            same = torch.equal(output.ids.long(), plain.ids.long()) and same_bits(
                output.weights, plain.weights
            )
            require(same, f"{said}: not the outputs of the plain call")


@check(6, _once)
def physical_ids_may_be_any_number(under_test: BackendUnderTest, case: Case) -> None:
    """An expert_map may hold any physical ids that the ids' dtype holds.

    Up to 2**31 - 1, or 2**63 - 1, neighbours too.
    """
    call = case.but(valid="tensor").make(under_test.device)
    slots = case.num_experts + case.spec.shared_experts
    order = torch.randperm(slots, generator=case.generator()).to(under_test.device)
    for largest, of_map, of_ids in (
        (2**31 - 1, torch.int32, torch.int32),
        (2**31 - 1, torch.int64, torch.int32),
        (2**31 - 1, torch.int32, torch.int64),
        (2**32 + 7, torch.int64, torch.int64),
        (2**63 - 1, torch.int64, torch.int64),
    ):
        mapped = call.but(expert_map=(largest - order.long()).to(of_map))
        mapped.ids_dtype = of_ids
        _must_be_right(
            under_test, mapped, f"physical ids up to {largest}, a map of {of_map}, ids of {of_ids}"
        )


@check(6, _once)
def experts_may_share_a_physical_id_or_be_elsewhere(
    under_test: BackendUnderTest, case: Case
) -> None:
    """Entries of -1 and equal ones come out as they stand.

    No weight and no other id is another than without the map.
    """
    call = case.but(valid="tensor").make(under_test.device)
    place = torch.arange(case.num_experts + case.spec.shared_experts, device=under_test.device)
    for of_map, of_ids in ((torch.int32, torch.int64), (torch.int64, torch.int32)):
        call.ids_dtype = of_ids
        plain = under_test.check(call)
        for what, physical in (
            ("two experts share each id", place // 2),
            ("all experts share one id", torch.zeros_like(place)),
            ("every second expert is elsewhere", torch.where(place % 2 == 0, -1, place // 2)),
            ("all experts are elsewhere", torch.full_like(place, -1)),
        ):
            expert_map = physical.to(of_map)
            mapped = under_test.route(call.but(expert_map=expert_map))
            for problem in renaming_problems(plain, mapped, expert_map):
                require(condition=False, problem=f"{what}, a map of {of_map}: {problem}")


BY_TABLE = tuple(variant for variant, spec in VARIANTS.items() if spec.selection == "token_table")


def _tables(profile: Profile) -> Iterator[Case]:
    """Yield a table of usual experts, and one with more experts than a 16-bit number counts."""
    for variant in BY_TABLE:
        yield Case(variant=variant, num_tokens=64)
        if profile != "smoke":
            yield Case(variant=variant, num_tokens=64, num_experts=70_001, topk=4)


@check(1, _tables)
def large_tables_are_read_to_their_end(under_test: BackendUnderTest, case: Case) -> None:
    """A vocabulary of 131,101 tokens, and entries up to E - 1, are read exactly."""
    vocabulary = 131_101
    call = case.make(under_test.device)
    tokens = (
        torch.linspace(0, vocabulary - 1, case.num_tokens, dtype=torch.float64)
        .round()
        .long()
        .flip(0)
    )
    entries = (
        torch.arange(vocabulary * case.topk).view(vocabulary, case.topk) * 7919 % case.num_experts
    )
    for dtype in INTEGERS:
        operands = {"token_ids": tokens.to(dtype), "expert_table": entries.to(dtype)}
        _must_be_right(
            under_test,
            call.but(**{k: v.to(under_test.device) for k, v in operands.items()}),
            f"a table of {dtype}",
        )


@check(8, _sets.of_every_family)
def operands_with_strides_are_read_as_they_lie(under_test: BackendUnderTest, case: Case) -> None:
    """Vectors and tables with strides and offsets are read where they lie.

    They are every third element of others, or start somewhere in others.
    """
    call = case.but(mapped=True).make(under_test.device)
    plain = under_test.check(call)
    for name, value in _tensors(call):
        around = torch.full(
            (3, *value.shape),
            torch.iinfo(torch.int32).max,
            dtype=value.dtype,
            device=under_test.device,
        )
        apart = torch.full(
            (*value.shape, 3),
            torch.iinfo(torch.int32).max,
            dtype=value.dtype,
            device=under_test.device,
        )
        for how, inside in (("with strides", apart[..., 1]), ("with an offset", around[1])):
            inside.copy_(value)
            output = under_test.route(call.but(**{name: inside}))
            require(
                same_bits(output.ids, plain.ids) and same_bits(output.weights, plain.weights),
                f"{name} {how}",
            )


@check(5, _sets.of_every_family)
def small_weights_keep_their_digits(under_test: BackendUnderTest, case: Case) -> None:
    """Scores around 1e-8 keep all their digits in the weights, under biases of 10,000 too."""
    call = case.make(under_test.device)
    call.logits = (call.logits / 4 - 18.4).to(call.logits.dtype)
    if call.spec.score == "softmax":
        call.logits[:, 0] = 0  # takes nearly all the probability
    if call.spec.needs_bias:
        bias = torch.full((case.num_experts,), 1e4, device=under_test.device)
        bias[0] = 0
        call = call.but(bias=bias)
    under_test.check(call)


@check(7, _sets.of_every_family)
def a_family_requires_its_operands_and_takes_no_others(
    under_test: BackendUnderTest, case: Case
) -> None:
    """What the family's spec takes must come, and what it does not take must not.

    The error begins with the name.
    """
    call = case.make(under_test.device)
    spec, device = call.spec, under_test.device
    numbers, tokens = (
        torch.ones(case.num_experts, device=device),
        torch.zeros(case.num_tokens, dtype=torch.int64, device=device),
    )
    by_table = spec.selection == "token_table"
    for name, taken, value in (
        ("per_expert_scale", spec.per_expert_scale, numbers),
        ("bias", spec.needs_bias, numbers),
        ("token_ids", by_table, tokens),
        ("expert_table", by_table, tokens.view(-1, 1).expand(-1, case.topk).contiguous()),
    ):
        wrong: dict[str, Any] = {**call.operands, name: None if taken else value}
        try:
            under_test.router(spec)(call.logits, call.topk, **wrong)
        except (TypeError, ValueError) as error:
            require(
                str(error).startswith(f"{name}:"), f"the error does not begin with {name}: {error}"
            )
            continue
        require(
            condition=False, problem=f"{name} {'missing' if taken else 'uncalled for'}: no error"
        )
