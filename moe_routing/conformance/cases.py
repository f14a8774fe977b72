"""Cases: what is routed, made from a few words, the same on every machine."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from moe_routing._dispatch import dtype_name
from moe_routing.conformance import rows
from moe_routing.conformance.variants import VARIANTS
from moe_routing.kernel import MASK, NO_OPERANDS, REPLAY
from moe_routing.reference import oracle
from moe_routing.reference.compare import exact_device
from moe_routing_registry import RoutingProblem

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing import RoutingOutput
    from moe_routing.reference.compare import Operands
    from moe_routing_registry import RoutingSpec

Layout = Literal[
    "contiguous", "sliced", "offset", "transposed", "every_second", "repeated_row", "constant_row"
]
LAYOUTS: tuple[Layout, ...] = (
    "contiguous", "sliced", "offset", "transposed", "every_second", "repeated_row", "constant_row",
)  # fmt: skip
Profile = Literal["smoke", "quick", "full"]
"""Which cases run.

``smoke`` is for doctor and for the mutants (seconds), ``quick`` for every change, ``full`` for a
release.
"""

_VOCABULARY = 97
_OPERAND_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One routing call in words.

    :ivar variant: key of ``VARIANTS``.
    :ivar kind: ``"ordinary"``, or a key of ``rows.KINDS``, which brings its own number of rows.
    :ivar valid: how ``num_valid_tokens`` is given: not at all, as an int, as a tensor, or
        as the mask ``valid``.
    :ivar mapped: whether there is an ``expert_map``.
    :ivar recorded: whether ids were recorded.
    :ivar out: whether outputs are given.
    :ivar seed: the seed that drew the case, where a seed did (``drawn``).
    """

    variant: str
    num_experts: int = 64
    topk: int = 8
    num_tokens: int = 33
    dtype: str = "float32"
    kind: str = "ordinary"
    layout: Layout = "contiguous"
    ids_dtype: str = "int32"
    valid: Literal["all", "int", "tensor", "mask"] = "all"
    mapped: bool = False
    recorded: bool = False
    out: bool = False
    seed: int | None = None

    @property
    def spec(self) -> RoutingSpec:
        """The maths."""
        return VARIANTS[self.variant]

    @property
    def family(self) -> str:
        """Name of the family, for the report's matrix."""
        return self.variant.partition("/")[0]

    @property
    def id(self) -> str:
        """A name for test ids: only what differs from the usual is in it."""
        tokens = f"T{self.num_tokens}" if self.kind == "ordinary" else self.kind
        words = [
            self.variant.replace("/", "."),
            f"E{self.num_experts}",
            f"K{self.topk}",
            tokens,
            self.dtype,
        ]
        words += [
            word for word in (self.layout, self.ids_dtype) if word not in ("contiguous", "int32")
        ]
        words += (
            [f"valid_{self.valid}"] * (self.valid != "all")
            + ["mapped"] * self.mapped
            + ["recorded"] * self.recorded
            + ["out"] * self.out
        )
        words += [] if self.seed is None else [f"seed{self.seed}"]
        return "-".join(words)

    def but(self, **changes: object) -> Case:
        """Return the case with some words changed."""
        return replace(self, **changes)  # type: ignore[arg-type]  # the fields' own types

    def problem(self, *, training: bool = False) -> RoutingProblem:
        """Return the problem that the call is an instance of."""
        return RoutingProblem(
            spec=self.spec,
            num_experts=self.num_experts,
            topk=self.topk,
            dtype=dtype_name(self.dtype),
            ids_dtype=self.ids_dtype,
            training=training,
            layout="strided" if self.layout == "transposed" else "rows",
            operands=(REPLAY if self.recorded else NO_OPERANDS)
            | (MASK if self.valid == "mask" else NO_OPERANDS),
        )

    def generator(self) -> torch.Generator:
        """Return a generator that is seeded by the case's id.

        So it is the same on every machine and in every order.
        """
        return torch.Generator().manual_seed(zlib.crc32(self.id.encode()))

    def logits(self, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Return contiguous logits on the CPU, and the kind of each row."""
        dtype = getattr(torch, self.dtype)
        if self.kind == "ordinary":
            return rows.ordinary(self.num_tokens, self.num_experts, dtype, generator), []
        kinds = rows.KINDS[self.kind](self.num_experts, self.topk, dtype, generator)
        return torch.stack(list(kinds.values())), list(kinds)

    def make(self, device: torch.device | str = "cpu") -> Call:
        """Make the tensors on a device."""
        generator = self.generator()
        logits, labels = self.logits(generator)
        operands = make_operands(self, len(logits), generator)
        if self.recorded:
            operands["ids"] = make_record(self, logits, operands, generator)
        return Call(
            spec=self.spec,
            logits=laid_out(logits.to(device), self.layout),
            topk=self.topk,
            operands=on_device(operands, device),
            ids_dtype=getattr(torch, self.ids_dtype),
            labels=labels,
        )


@dataclass(slots=True)
class Call:
    """The arguments of one routing call.

    ``labels`` names the kind of each row, where rows are of a kind.
    """

    spec: RoutingSpec
    logits: Tensor
    topk: int
    operands: Operands
    ids_dtype: torch.dtype = torch.int32
    labels: list[str] = field(default_factory=list)

    def but(self, **operands: object) -> Call:
        """Return the call with some operands changed."""
        return replace(self, operands={**self.operands, **operands})  # type: ignore[typeddict-item]  # callers name operands

    def rows(self, index: Tensor | slice) -> Call:
        """Return the call on some of its rows; per-token operands follow."""
        per_token = {name: self.operands.get(name) for name in ("token_ids", "ids", "valid")}
        changed: dict[str, object] = {
            name: value[index]
            for name, value in per_token.items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self.but(**changed), logits=self.logits[index], labels=[])

    @property
    def launched(self) -> dict[str, Any]:
        """The operands as a kernel takes them: a mask stands in ``num_valid_tokens``."""
        given: dict[str, Any] = dict(self.operands)
        mask = given.pop("valid", None)
        return given if mask is None else given | {"num_valid_tokens": mask}

    def exact(self) -> RoutingOutput:
        """Route in float64."""
        home = exact_device(self.logits)
        return oracle.route(
            self.spec, self.logits.detach().to(home), self.topk, **on_device(self.operands, home)
        )


def on_device(operands: Operands, device: torch.device | str) -> Operands:
    """Return the operands with their tensors on that device."""
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in operands.items()}
    return cast("Operands", moved)  # the same keys, which a comprehension cannot say


def make_operands(case: Case, num_tokens: int, generator: torch.Generator) -> Operands:
    """Return what the case's spec takes.

    Float operands come in several dtypes, from case to case.
    """
    spec, num_experts = case.spec, case.num_experts
    dtype = _OPERAND_DTYPES[int(torch.randint(3, (1,), generator=generator))]
    integer = (torch.int32, torch.int64)[int(torch.randint(2, (1,), generator=generator))]
    operands: Operands = {}
    if spec.needs_bias:
        # Of the order of the differences between scores, so that it changes some selections and not
        # all.
        spread = (
            1 / num_experts
            if spec.score == "softmax" and spec.selection == "scores_plus_bias"
            else 0.3
        )
        operands["bias"] = (torch.randn(num_experts, generator=generator) * spread).to(dtype)
    if spec.per_expert_scale:
        operands["per_expert_scale"] = (
            0.25 + 1.5 * torch.rand(num_experts, generator=generator)
        ).to(dtype)
    if spec.selection == "token_table":
        order = torch.rand(_VOCABULARY, num_experts, generator=generator).argsort(-1)
        operands["expert_table"] = order[:, : case.topk].to(integer).contiguous()
        operands["token_ids"] = torch.randint(_VOCABULARY, (num_tokens,), generator=generator).to(
            integer
        )
    if case.mapped:
        slots = num_experts + spec.shared_experts
        operands["expert_map"] = torch.randperm(2 * slots, generator=generator)[:slots].to(integer)
    if case.valid == "mask":
        operands["valid"] = torch.rand(num_tokens, generator=generator) < 0.7  # noqa: PLR2004 -- some are not
    elif case.valid != "all":
        valid = int(torch.randint(num_tokens + 1, (1,), generator=generator))
        operands["num_valid_tokens"] = (
            valid if case.valid == "int" else torch.tensor([valid], dtype=integer)
        )
    return operands


def make_record(
    case: Case, logits: Tensor, operands: Operands, generator: torch.Generator
) -> Tensor:
    """Return recorded ids ``[T, K]``; each kind of row comes again after 7 rows.

    The kinds: no record; the usual selection backwards; any experts; the usual ones backwards with
    a slot that has no expert; any with all but one such slot; one expert in every slot; and an id
    that no expert has.
    """
    num_tokens, topk, E = len(logits), case.topk, case.num_experts
    if not num_tokens:
        return torch.empty(0, topk, dtype=torch.int32)
    names = ("bias", "token_ids", "expert_table")
    usual = oracle.select(
        case.spec,
        logits,
        topk,
        **{name: operands.get(name) for name in names},  # type: ignore[arg-type] # tensors
    )
    ids = torch.rand(num_tokens, E, generator=generator).argsort(-1)[:, :topk]
    slot = torch.arange(num_tokens) // 7 % topk
    here = torch.arange(topk) == slot[:, None]
    outside = torch.where(slot % 2 == 0, E, -2)[:, None]
    kinds = (
        torch.full_like(ids, -1),
        usual.flip(1),
        ids,
        usual.flip(1).masked_fill(here, -1),
        ids.masked_fill(~here, -1),
        ids[:, :1].expand_as(ids),
        ids.where(~here, outside),
    )
    record = torch.empty_like(ids)
    for first, kind in enumerate(kinds):
        record[first :: len(kinds)] = kind[first :: len(kinds)]
    dtypes = (torch.int16, torch.int32, torch.int64)
    drawn = dtypes[int(torch.randint(len(dtypes), (1,), generator=generator))]
    return record.to(drawn if torch.iinfo(drawn).max >= E else torch.int64)


def laid_out(logits: Tensor, layout: Layout) -> Tensor:
    """Return the same values in memory laid out in that way, among values that must not be read.

    ``"repeated_row"`` and ``"constant_row"`` keep only the first row, or the first column, and
    expand it.
    """
    num_tokens, num_experts = logits.shape
    if layout == "contiguous":
        return logits
    if layout == "repeated_row":
        return logits[:1].expand(num_tokens, num_experts)
    if layout == "constant_row":
        return logits[:, :1].expand(num_tokens, num_experts)
    if layout == "transposed":
        return logits.t().contiguous().t()
    # Not NaN around the rows: it counts as -inf and would hide what reads it.
    shape, view = {
        "sliced": ((num_tokens, num_experts + 11), (slice(None), slice(3, 3 + num_experts))),
        "offset": ((num_tokens + 5, num_experts), (slice(5, None), slice(None))),
        "every_second": ((num_tokens, 2 * num_experts), (slice(None), slice(None, None, 2))),
    }[layout]
    around = torch.full(
        shape, torch.finfo(logits.dtype).max, dtype=logits.dtype, device=logits.device
    )
    inside = around[view]
    inside.copy_(logits)
    return inside
