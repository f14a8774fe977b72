"""A random call as a few words of data, from which its tensors are made again.

The data fits on a line, and it can be shrunk.
"""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fuzz import tensors
from moe_routing_registry import RoutingSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a call is made of; ``seed`` draws the numbers in it.

    :ivar row: the one row of the drawn logits that is kept, after shrinking; ``None`` for all.
    """

    spec: RoutingSpec
    seed: int
    tokens: int
    experts: int
    topk: int
    dtype: str = "float32"
    layout: str = "rows"
    values: str = "normal"
    row: int | None = None
    ids_dtype: str = "int32"
    bias: str = "small"
    bias_dtype: str = "float32"
    scale: str = "near_one"
    scale_dtype: str = "float32"
    vector_layout: str = "plain"
    table: str = "inside"
    integer_dtype: str = "int64"
    valid: str | None = None
    mapped: str | None = None
    out: str | None = None
    counts: str | None = None
    record: str | None = None
    replicas: str | None = None
    training: bool = False

    def to_json(self) -> str:
        """One line; what is as by default is left out."""
        said = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        said["spec"] = json.loads(self.spec.to_json())
        return json.dumps(
            {k: v for k, v in said.items() if v != type(self).__dataclass_fields__[k].default}
        )

    @classmethod
    def from_json(cls, text: str) -> Call:
        said = json.loads(text)
        return cls(**{**said, "spec": RoutingSpec(**said["spec"])})


@dataclass
class Operands:
    """The tensors of a call, and what is known of them without reading a device.

    :ivar given: keyword arguments of ``Router.__call__``, without ``num_valid_tokens``,
        ``expert_map``, ``out``, ``counts`` and ``replicas``.
    :ivar valid: the argument ``num_valid_tokens``; ``counted`` is its value.
    """

    given: dict[str, Tensor]
    valid: int | Tensor | None = None
    counted: int | None = None
    expert_map: Tensor | None = None
    out: tuple[Tensor, Tensor] | None = None
    around_out: list[Tensor] = field(default_factory=list)
    counts: Tensor | None = None
    replicas: tuple[Tensor, Tensor] | None = None


def build(call: Call) -> Operands:
    """Make the tensors of a call."""
    generator = torch.Generator().manual_seed(call.seed)
    rng = random.Random(call.seed)  # noqa: S311 -- numbers of a test
    spec, E, dtype = call.spec, call.experts, getattr(torch, call.dtype)
    values = tensors.LOGITS[call.values](call.tokens, E, generator).to(dtype)
    integer = getattr(torch, call.integer_dtype)
    given = _of_rows(call, generator)
    made: dict[str, Tensor] = {}
    if spec.needs_bias:
        made["bias"] = tensors.BIASES[call.bias](E, generator).to(getattr(torch, call.bias_dtype))
    if spec.per_expert_scale:
        made["per_expert_scale"] = tensors.SCALES[call.scale](E, generator).to(
            getattr(torch, call.scale_dtype)
        )
    if spec.selection == "token_table":
        token_ids, table = tensors.table(call.table, call.tokens, E, call.topk, integer, generator)
        made["token_ids"], given["expert_table"] = token_ids, table
    if call.row is not None:
        values = values[call.row : call.row + 1]
        if "token_ids" in made:
            made["token_ids"] = made["token_ids"][call.row : call.row + 1]
    given["logits"] = tensors.LAYOUTS[call.layout](values).detach().requires_grad_(call.training)
    given |= {
        name: tensors.VECTOR_LAYOUTS[call.vector_layout](vector) for name, vector in made.items()
    }
    operands = Operands(given)
    T, columns = len(values), call.topk + spec.shared_experts
    if call.valid not in (None, "mask"):
        operands.valid, operands.counted = tensors.valid(call.valid, T, integer, rng)
    if call.mapped is not None:
        renamed = tensors.expert_map(call.mapped, E + spec.shared_experts, integer, generator)
        operands.expert_map = tensors.VECTOR_LAYOUTS[call.vector_layout](renamed)
    if call.out is not None:
        operands.out, operands.around_out = tensors.outputs(
            call.out, T, columns, getattr(torch, call.ids_dtype)
        )
    _add_after(operands, call, generator)
    return operands


def _add_after(operands: Operands, call: Call, generator: torch.Generator) -> None:
    """Make what the router does not hand to a kernel."""
    E, shared, integer = call.experts, call.spec.shared_experts, getattr(torch, call.integer_dtype)
    if call.counts is not None:
        operands.counts = tensors.counts(call.counts, E, shared, integer)
    if call.replicas is not None:
        operands.replicas = tensors.replicas(call.replicas, E + shared, integer, generator)


def _of_rows(call: Call, generator: torch.Generator) -> dict[str, Tensor]:
    """Make the record and the mask, of the rows that are kept."""
    made, rows = {}, slice(None) if call.row is None else slice(call.row, call.row + 1)
    if call.record is not None:
        made["ids"] = tensors.record(
            call.record, call.tokens, call.experts, call.topk, generator
        )[rows]  # fmt: skip
    if call.valid == "mask":
        made["valid"] = (torch.rand(call.tokens, generator=generator) < 0.7)[rows]
    return made


def simpler(call: Call, row: int | None) -> Iterator[Call]:
    """Yield calls with one thing less in them.

    Examples are the row that fails alone, and a default instead of a drawn value.
    """
    if row is not None and call.row is None:
        yield dataclasses.replace(call, row=row)
    for f in dataclasses.fields(call):
        if (
            f.default is not dataclasses.MISSING
            and f.name != "row"
            and getattr(call, f.name) != f.default
        ):
            yield dataclasses.replace(call, **{f.name: f.default})
    for f in dataclasses.fields(call.spec):
        if f.init and f.name != "family" and getattr(call.spec, f.name) != f.default:
            changes: dict[str, Any] = {f.name: f.default}
            if f.name == "num_groups":
                changes["topk_groups"] = 1
            try:
                spec = call.spec.replace(**changes)
                spec.check_size(call.experts, call.topk)
            except ValueError:
                continue
            yield dataclasses.replace(call, spec=spec)
    for experts, topk in (
        (call.experts // 2, call.topk),
        (call.experts - 1, call.topk),
        (call.experts, call.topk // 2),
        (call.experts, call.topk - 1),
    ):
        try:
            call.spec.check_size(experts, topk)
        except ValueError:
            continue
        yield dataclasses.replace(call, experts=experts, topk=topk)
