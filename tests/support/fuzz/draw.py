"""Draw calls: every field, dtype, layout and kind of number.

Usual ones are drawn more often than rare ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fuzz import tensors
from fuzz.calls import Call
from moe_routing import list_backends
from moe_routing.families import FAMILIES
from moe_routing_registry import RoutingSpec
from moe_routing_registry.routing_spec import SCORES, SELECTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DTYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2")
VECTOR_DTYPES = (*DTYPES, "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
FEW_ROUNDS = 8
"""The most experts that sparsemixer selects here."""


def spec(rng: random.Random) -> RoutingSpec:
    """Draw a built-in family with a few changes, or a spec of any fields.

    Draw again until the spec is valid.
    """
    while True:
        with contextlib.suppress(ValueError):  # a field that the selection has no use for
            return _spec(rng)


def _spec(rng: random.Random) -> RoutingSpec:
    if rng.random() < 0.5:
        base = rng.choice(list(FAMILIES.values())).spec
        changes = {name: value for name, value in _fields(rng).items() if rng.random() < 0.12}
        groups = changes.get("num_groups", base.num_groups)
        return base.replace(
            **{**changes, "topk_groups": min(changes.get("topk_groups", base.topk_groups), groups)}
        )
    fields = _fields(rng)
    if rng.random() < 0.5:
        del fields["num_groups"], fields["topk_groups"]
    return RoutingSpec(family="drawn", **fields)


def _fields(rng: random.Random) -> dict[str, Any]:
    num_groups = rng.choice((1, 2, 3, 4, 8, 16))
    return {
        "score": rng.choice(SCORES),
        "selection": rng.choice(SELECTIONS),
        "renormalize": rng.random() < 0.5,
        "renorm_epsilon": _usually(rng, (0.0,), (1e-20, 1e-12, 1e-6, 1.0, 1e30, 2.0**-126)),
        "renorm_floor": _usually(rng, (0.0,), (1e-20, 1e-12, 1e-6, 1.0, 1e30, 2.0**-126)),
        "scale": _usually(rng, (1.0, 2.5), (16.0, 1.5, 0.0, -1.5, 1e-9, 1e9, 1e-30, 1e30)),
        "per_expert_scale": rng.random() < 0.3,
        "num_groups": num_groups,
        "topk_groups": rng.randint(1, num_groups),
        "group_sum": rng.choice((1, 1, 2, 2, 3, 5)),
        "group_by": rng.choice(("selection", "selection", "scores")),
        "topk_per_group": rng.random() < 0.2,
        "logit_softcap": _usually(rng, (None,), (30.0, 50.0, 1.0, 0.01, 5.0, 1e30, 1e-30)),
        "logit_multiplier": _usually(rng, (1.0,), (0.5, 2.0, 0.0625, 10.0, 3.7, 0.1, 1e30, 1e-30)),
        "shared_experts": _usually(rng, (0,), (1, 2, 3)),
        "shared_weight": _usually(rng, (1.0,), (0.4, 0.0, -2.5, 1e-30, 1e30)),
        "zero_experts": _usually(rng, (0,), (1, 2, 5)),
        "jitter": _usually(rng, (0.01,), (0.0, 0.1, 1.0, 1e30)),
    }


def _usually(
    rng: random.Random, often: Sequence[Any], seldom: Sequence[Any], share: float = 0.25
) -> Any:
    return rng.choice(seldom if rng.random() < share else often)


def size(rng: random.Random, of: RoutingSpec, most_experts: int, most_topk: int) -> tuple[int, int]:
    """Draw E and K that go with the spec."""
    while True:
        limit = min(most_experts, _usually(rng, (12, 40, 300), (2000,), 0.05))
        groups = max(of.num_groups, 1)
        experts = groups * rng.randint(1, max(1, limit // groups))
        topk = rng.randint(
            1, min(experts, most_topk, _usually(rng, (1, 4, 8, 16), (experts,), 0.15))
        )
        if of.topk_per_group:
            topk = min(-(-topk // groups) * groups, experts)
        if of.selection == "sparsemixer":
            topk = min(topk, FEW_ROUNDS)
        try:
            of.check_size(experts, topk)
        except ValueError:
            continue
        if topk <= most_topk:
            return experts, topk


@dataclass(frozen=True)
class Limits:
    """What a backend's calls stay within, for the time they take or for what it serves.

    :ivar group_sums: the scores of groups by what top-k looks at; ``None`` for any scores.
    :ivar operands: which of ``BackendSpec.operands`` it takes.
    :ivar not_replayed: selections whose records it does not take.
    :ivar count: calls of a run that names no number.
    :ivar calls_of_a_problem: calls for each spec, E, K and dtypes; more than 1 where a problem is
        compiled.
    """

    dtypes: tuple[str, ...] = DTYPES
    most_experts: int = 2000
    most_topk: int = 2000
    most_tokens: int = 3000
    group_sums: tuple[int, ...] | None = None
    operands: frozenset[str] = frozenset({"ids", "valid"})
    not_replayed: tuple[str, ...] = ()
    count: int = 20_000
    calls_of_a_problem: int = 1


LIMITS = {
    "triton": Limits(
        dtypes=DTYPES[:3],
        most_experts=128,
        most_topk=24,
        most_tokens=8,
        group_sums=(1, 2),
        not_replayed=("token_table", "sparsemixer"),
        count=2000,
    ),
    "torch-compile": Limits(
        most_experts=300, most_topk=32, most_tokens=40, count=200, calls_of_a_problem=10
    ),
}
"""Of the backends that take longer than others or serve less."""


def limits_of(backend: str) -> Limits:
    limits, known = LIMITS.get(backend, Limits()), list_backends().get(backend)
    return limits if known is None else dataclasses.replace(limits, operands=known.operands)


def calls(backend: str, seed: str, count: int) -> Iterator[Call]:
    """Draw calls that the contract allows; the n-th of a seed is the same for every count."""
    limits = limits_of(backend)
    for n in range(count):
        first, repeated = divmod(n, limits.calls_of_a_problem)
        drawn = _call(random.Random(f"{seed} {first}"), limits)  # noqa: S311 -- a test's numbers
        yield _other_numbers(drawn, random.Random(f"{seed} {n}"), limits) if repeated else drawn  # noqa: S311 -- likewise


def _problem(rng: random.Random, limits: Limits) -> tuple[RoutingSpec, int, int, str]:
    while True:
        drawn = spec(rng)
        sums = limits.group_sums
        if sums and not (drawn.group_sum in sums and drawn.group_by == "selection"):
            continue
        if drawn.num_groups <= limits.most_experts and (
            not drawn.topk_per_group or drawn.num_groups <= limits.most_topk
        ):
            return (
                drawn,
                *size(rng, drawn, limits.most_experts, limits.most_topk),
                rng.choice(limits.dtypes),
            )


def _call(rng: random.Random, limits: Limits) -> Call:
    drawn, experts, topk, dtype = _problem(rng, limits)
    layouts = [
        name for name in tensors.LAYOUTS if not (name == "negated" and "float8" in dtype)
    ]  # PyTorch negates none
    training = rng.random() < 0.1
    mapped = _usually(rng, (None,), tensors.MAPS)
    form = Call(
        spec=drawn,
        seed=0,
        tokens=0,
        experts=experts,
        topk=topk,
        dtype=dtype,
        layout=_usually(rng, ("rows",), layouts, 0.5),
        ids_dtype=rng.choice(("int32", "int64")),
        bias_dtype=_usually(rng, ("float32",), VECTOR_DTYPES, 0.5),
        scale_dtype=_usually(rng, ("float32",), VECTOR_DTYPES, 0.5),
        vector_layout=_usually(rng, ("plain",), list(tensors.VECTOR_LAYOUTS)),
        integer_dtype=rng.choice(("int32", "int64")),
        valid=_usually(rng, (None,), tensors.VALID[0 if "valid" in limits.operands else 1 :]),
        mapped=mapped,
        out=None
        if training
        else _usually(rng, (None,), tensors.OUTPUTS),  # refused where gradients are wanted
        training=training,
        counts=_usually(rng, (None,), tensors.COUNTS),
        record=_usually(rng, (None,), _records(drawn, experts, limits)),
        replicas=None if mapped else _usually(rng, (None,), tensors.REPLICAS),  # one renames
    )
    return _other_numbers(form, rng, limits)


def _records(of: RoutingSpec, experts: int, limits: Limits) -> Sequence[str | None]:
    """Return the dtypes that hold E too, which is no expert."""
    if "ids" not in limits.operands or of.selection in limits.not_replayed:
        return (None,)
    return [kind for kind in tensors.RECORDS if experts <= torch.iinfo(getattr(torch, kind)).max]


def _other_numbers(form: Call, rng: random.Random, limits: Limits) -> Call:
    """Draw what may differ between calls of one form.

    A compiler compiles the form once for one token and once for many.
    """
    tokens = rng.choice((0, 1, 2, 3, 5, 8, 17, 40))
    if rng.random() < 0.02 and form.experts <= 64:
        tokens = rng.randint(41, 3000)
    return dataclasses.replace(
        form,
        seed=rng.getrandbits(32),
        tokens=min(tokens, limits.most_tokens),
        values=rng.choice(list(tensors.LOGITS)),
        bias=rng.choice(list(tensors.BIASES)),
        scale=rng.choice(list(tensors.SCALES)),
        table=rng.choice(tensors.TABLES),
    )
