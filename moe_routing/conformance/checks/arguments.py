"""Clause 7: wrong arguments, one by one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from moe_routing.conformance.cases import Case
from moe_routing.conformance.checks._check import check
from moe_routing.conformance.requirements import require, require_refusal
from moe_routing.conformance.variants import VARIANTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_routing import RoutingSpec
    from moe_routing.conformance.cases import Call
    from moe_routing.conformance.under_test import BackendUnderTest

T, E, K = 5, 64, 8


@dataclass(frozen=True, slots=True)
class Wrong:
    """One wrong argument.

    :ivar argument: its name, which the error must name.
    :ivar what: what is wrong with it.
    :ivar variant: the spec that is called.
    :ivar value: makes the wrong value from the right call.
    :ivar others: makes the right operands that the call has too.
    """

    argument: str
    what: str
    variant: str
    value: Callable[[Call], Any]
    others: Callable[[Call], dict[str, Any]] = lambda _: {}

    @property
    def id(self) -> str:
        """Name for test ids."""
        return f"{self.argument}-{self.what.replace(' ', '_')}"

    @property
    def family(self) -> str:
        """The family that is called."""
        return self.variant.partition("/")[0]


def _integers(call: Call, *shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int64, device=call.logits.device)


def _with_table(call: Call) -> dict[str, Any]:
    return {"logical_to_physical": _integers(call, E + call.spec.shared_experts, 3)}


def _with_count(call: Call) -> dict[str, Any]:
    return {"replica_count": _integers(call, E + call.spec.shared_experts)}


def _replicas() -> list[Wrong]:
    """Return what can be wrong with a table of replicas, and with their numbers."""

    def table(what: str, value: Callable[[Call], Any]) -> Wrong:
        return Wrong("logical_to_physical", what, "softmax_topk", value, _with_count)

    return [
        *(
            replace(wrong, others=_with_table)
            for wrong in _vector("replica_count", "gemma4/shared", E + 2, integer=True)
        ),
        Wrong("replica_count", "missing", "softmax_topk", lambda _: None, _with_table),
        table("missing", lambda _: None),
        table("too short", lambda call: _integers(call, E - 1, 3)),
        table("without a column", lambda call: _integers(call, E, 0)),
        table("of 2**31 elements", lambda call: _integers(call, E, 1).expand(E, 2**31 // E)),
        table("of rank 1", lambda call: _integers(call, E)),
        table("of floats", lambda call: _integers(call, E, 3).float()),
        table("of int16", lambda call: _integers(call, E, 3).short()),
        table("on another device", lambda call: _integers(call, E, 3).to("meta")),
        table("a list", lambda _: [[0, 1, 2]] * E),
        Wrong(
            "logical_to_physical", "with an expert_map", "softmax_topk",
            lambda call: _integers(call, E, 3),
            lambda call: _with_count(call) | {"expert_map": _integers(call, E)},
        ),
    ]  # fmt: skip


def _shared_weights() -> list[Wrong]:
    """Return what can be wrong with weights of shared experts."""

    def wrong(what: str, value: Callable[[Call], Any], variant: str = "gemma4/shared") -> Wrong:
        return Wrong("shared_weights", what, variant, value)

    return [
        *_vector("shared_weights", "gemma4/shared", 2),
        wrong("of other rows", lambda call: torch.zeros(3, 2, device=call.logits.device)),
        wrong("a number", lambda _: 1.0),
        wrong("sparse", lambda call: torch.zeros(2, device=call.logits.device).to_sparse()),
        wrong(
            "without shared experts", lambda call: torch.zeros(2, device=call.logits.device),
            "softmax_topk",
        ),
    ]  # fmt: skip


def _vector(argument: str, variant: str, length: int, *, integer: bool = False) -> list[Wrong]:
    """Return what can be wrong with a one-dimensional operand."""
    dtype, other = (torch.int64, torch.float32) if integer else (torch.float32, torch.int64)
    return [
        Wrong(
            argument,
            "too short",
            variant,
            lambda call: torch.zeros(length - 1, dtype=dtype, device=call.logits.device),
        ),
        Wrong(
            argument,
            "too long",
            variant,
            lambda call: torch.zeros(length + 1, dtype=dtype, device=call.logits.device),
        ),
        Wrong(
            argument,
            "of rank 2",
            variant,
            lambda call: torch.zeros(1, length, dtype=dtype, device=call.logits.device),
        ),
        Wrong(
            argument,
            "of another dtype",
            variant,
            lambda call: torch.zeros(length, dtype=other, device=call.logits.device),
        ),
        Wrong(
            argument,
            "on another device",
            variant,
            lambda _: torch.zeros(length, dtype=dtype, device="meta"),
        ),
        Wrong(argument, "a list", variant, lambda _: [0] * length),
    ]


def _missing_or_uncalled_for(
    argument: str, variant: str, length: int, dtype: torch.dtype
) -> list[Wrong]:
    return [
        Wrong(argument, "missing", variant, lambda _: None),
        Wrong(
            argument,
            "uncalled for",
            "softmax_topk",
            lambda call: torch.zeros(length, dtype=dtype, device=call.logits.device),
        ),
    ]


def _outputs(
    call: Call, tokens: int = T, columns: int = K, weights: torch.dtype = torch.float32
) -> Any:  # noqa: ANN401 -- a wrong value
    device = call.logits.device
    return (
        torch.empty(tokens, columns, dtype=weights, device=device),
        torch.empty(tokens, columns, dtype=torch.int32, device=device),
    )


def _in_one_memory(weights: torch.Tensor) -> Any:  # noqa: ANN401 -- likewise
    return weights, weights.view(torch.int32)


def _within(operand: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return an output in the memory of a contiguous operand."""
    assert operand is not None  # noqa: S101 -- for mypy: the variant has one
    return operand.flatten().view(dtype)[: T * K].view(T, K)


def _ids_within(call: Call, operand: str) -> Any:  # noqa: ANN401 -- likewise
    operands: dict[str, Any] = dict(call.operands)
    return _outputs(call)[0], _within(operands[operand], torch.int32)


def _table(call: Call) -> torch.Tensor:
    return cast("torch.Tensor", call.operands["expert_table"])


def _always(value: object) -> Callable[[Call], object]:
    return lambda _: value


WRONG = (
    *(
        Wrong("topk", f"{value!r}", "gemma4", _always(value))
        for value in (0, -1, E + 1, 2.5, "8", True, None)
    ),
    Wrong("topk", "more than the kept groups hold", "grouped_sigmoid_bias", lambda _: E // 2 + 1),
    Wrong("topk", "no multiple of the groups", "partitioned_softmax", lambda _: K + 1),
    Wrong("logits", "of rank 0", "softmax_topk", lambda call: call.logits[0, 0]),
    Wrong("logits", "of integers", "softmax_topk", lambda call: call.logits.long()),
    Wrong("logits", "complex", "softmax_topk", lambda call: call.logits.to(torch.complex64)),
    Wrong("logits", "a list", "softmax_topk", lambda call: call.logits.tolist()),
    Wrong(
        "num_groups", "no divisor of E", "grouped_sigmoid_bias",
        lambda call: call.logits[:, :60],
    ),
    *_vector("per_expert_scale", "gemma4", E),
    *_missing_or_uncalled_for("per_expert_scale", "gemma4", E, torch.float32),
    *_vector("bias", "sigmoid_bias_topk", E),
    *_missing_or_uncalled_for("bias", "sigmoid_bias_topk", E, torch.float32),
    *_vector("token_ids", "hash_sqrtsoftplus", T, integer=True),
    *_missing_or_uncalled_for("token_ids", "hash_sqrtsoftplus", T, torch.int64),
    Wrong("expert_table", "missing", "hash_sqrtsoftplus", lambda _: None),
    Wrong(
        "expert_table", "of K columns too few", "hash_sqrtsoftplus",
        lambda call: _table(call)[:, 1:],
    ),
    Wrong("expert_table", "of rank 1", "hash_sqrtsoftplus", lambda call: _table(call)[0]),
    Wrong("expert_table", "of floats", "hash_sqrtsoftplus", lambda call: _table(call).float()),
    *_vector("expert_map", "gemma4/shared", E + 2, integer=True),
    *(
        Wrong("num_valid_tokens", f"{value!r}", "softmax_topk", _always(value))
        for value in (-1, 2.0, True, "3")
    ),
    Wrong(
        "num_valid_tokens", "of two elements", "softmax_topk",
        lambda call: call.logits.new_zeros(2, dtype=torch.int64),
    ),
    Wrong(
        "num_valid_tokens", "of rank 2", "softmax_topk",
        lambda call: call.logits.new_zeros(1, 1, dtype=torch.int64),
    ),
    Wrong("num_valid_tokens", "of floats", "softmax_topk", lambda call: call.logits.new_zeros(1)),
    Wrong(
        "num_valid_tokens", "of uint8", "softmax_topk",
        lambda call: call.logits.new_zeros(1, dtype=torch.uint8),
    ),
    Wrong("valid", "a list", "softmax_topk", lambda _: [True] * T),
    Wrong("valid", "of integers", "softmax_topk", lambda call: call.logits[:, 0].long()),
    Wrong("valid", "of one row too few", "softmax_topk", lambda call: call.logits[1:, 0] > 0),
    Wrong("valid", "of rank 2", "softmax_topk", lambda call: call.logits > 0),
    Wrong("num_valid_tokens", "a mask", "softmax_topk", lambda call: call.logits[:, 0] > 0),
    Wrong("ids", "a list", "softmax_topk", lambda _: [[0] * K] * T),
    Wrong("ids", "of floats", "softmax_topk", lambda call: call.logits[:, :K]),
    Wrong("ids", "of bools", "softmax_topk", lambda call: call.logits[:, :K] > 0),
    Wrong(
        "ids", "of one row too few", "softmax_topk",
        lambda call: _outputs(call, tokens=T - 1)[1],
    ),
    Wrong(
        "ids", "of shared slots too", "gemma4/shared",
        lambda call: _outputs(call, columns=K + 2)[1],
    ),
    Wrong("ids", "of rank 1", "softmax_topk", lambda call: _outputs(call)[1][0]),
    *_vector("counts", "softmax_topk", E, integer=True),
    Wrong(
        "counts", "of int16", "softmax_topk",
        lambda call: torch.zeros(E, dtype=torch.int16, device=call.logits.device),
    ),
    Wrong(
        "counts", "one element for all", "softmax_topk",
        lambda call: torch.zeros(1, dtype=torch.int64, device=call.logits.device).expand(E),
    ),
    Wrong(
        "counts", "in the logits", "softmax_topk",
        lambda call: call.logits.view(torch.int32)[1],
    ),
    *_replicas(),
    *_shared_weights(),
    Wrong("ids_dtype", "int16", "softmax_topk", lambda _: torch.int16),
    Wrong("out", "of one row too few", "softmax_topk", lambda call: _outputs(call, tokens=T - 1)),
    Wrong(
        "out", "of one column too many", "softmax_topk",
        lambda call: _outputs(call, columns=K + 1),
    ),
    Wrong(
        "out", "of float64 weights", "softmax_topk",
        lambda call: _outputs(call, weights=torch.float64),
    ),
    Wrong(
        "out", "one memory for both", "softmax_topk",
        lambda call: _in_one_memory(_outputs(call)[0]),
    ),
    Wrong(
        "out", "weights in the logits", "softmax_topk",
        lambda call: (_within(call.logits, torch.float32), _outputs(call)[1]),
    ),
    Wrong(
        "out", "ids in the scale", "gemma4",
        lambda call: (_outputs(call)[0], _within(call.operands["per_expert_scale"], torch.int32)),
    ),
    *(
        Wrong(
            "out", f"ids in the {what}", "softmax_topk",
            partial(_ids_within, operand=operand),
            lambda call: _with_table(call) | _with_count(call),
        )
        for what, operand in (("table", "logical_to_physical"), ("count", "replica_count"))
    ),
    Wrong(
        "out", "not contiguous", "softmax_topk",
        lambda call: tuple(t[:, ::2] for t in _outputs(call, columns=2 * K)),
    ),
)  # fmt: skip


@check(7, lambda _: WRONG)
def wrong_arguments_raise_and_are_named(under_test: BackendUnderTest, case: Wrong) -> None:
    """A wrong argument raises an error that names it, and says what came and what was expected.

    The error is a TypeError or ValueError.
    """
    call = Case(variant=case.variant, num_experts=E, topk=K, num_tokens=T).make(under_test.device)
    call = call.but(**case.others(call))
    arguments: dict[str, Any] = {
        "logits": call.logits,
        "topk": K,
        "ids_dtype": None,
        "out": None,
        **call.operands,
    }
    value = case.value(call)
    if case.argument == "num_groups":
        arguments["logits"], arguments["bias"] = value, call.operands["bias"][:60]  # type: ignore[index]  # the variant has one
    else:
        arguments[case.argument] = value
    if arguments["ids_dtype"] is None:
        del arguments["ids_dtype"]
    message = require_refusal(
        lambda: under_test.router(call.spec)(**arguments),
        case.argument,
        f"{case.argument} {case.what}",
    )
    if isinstance(value, (int, float, str)):
        require(repr(value) in message, f"the error does not hold the value {value!r}: {message!r}")


@dataclass(frozen=True, slots=True)
class WrongSpec:
    """A field of a spec with a value that no model can have."""

    argument: str
    value: Any
    family: str = "grouped_sigmoid_bias"

    @property
    def id(self) -> str:
        """Name for test ids."""
        return f"{self.argument}-{self.value}"


WRONG_SPECS = (
    WrongSpec("num_groups", -1),
    WrongSpec("num_groups", 0),
    WrongSpec("topk_groups", 0),
    WrongSpec("topk_groups", 9),
    WrongSpec("group_sum", 0),
    WrongSpec("group_by", "median"),
    WrongSpec("selection", "score"),
    WrongSpec("scale", float("nan")),
    WrongSpec("logit_softcap", 0.0),
    WrongSpec("logit_softcap", 30.0, "sparsemixer"),
    WrongSpec("renormalize", True, "sparsemixer"),  # noqa: FBT003 -- the value
    WrongSpec("num_groups", 2, "sparsemixer"),
    WrongSpec("topk_per_group", True, "hash_sqrtsoftplus"),  # noqa: FBT003 -- the value
)


@check(7, lambda _: WRONG_SPECS)
def wrong_specs_raise_and_name_the_field(_subject: BackendUnderTest, case: WrongSpec) -> None:
    """A spec that no model can have cannot be constructed.

    Nor can one with a field that its selection does not use.
    """
    try:
        wrong: RoutingSpec = VARIANTS[case.family].replace(**{case.argument: case.value})
    except ValueError as error:
        # Too many topk_groups and too few num_groups are the same mistake.
        named = str(error).partition(":")[0]
        require(
            named in (case.argument, "topk_groups"),
            f"the error does not begin with the field's name: {error}",
        )
        return
    msg = f"{case.argument} = {case.value!r}: no error, but {wrong}"
    raise AssertionError(msg)
