"""Clause 18: replicas chosen wrong, by the router and by backends that choose themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_routing import _after, _calls, _replicas, _router
from moe_routing.reference.replicas_oracle import physical
from mutants._change import Change
from mutants._mutant import EVERY_OPERAND, Reference, caught_by

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_routing.kernel import RoutingOutput

CHANGES: list[Change] = []
CHOSEN = "each_row_gets_a_replica_of_its_experts"
BY_TABLE = r"row \d+: ids \[.*\], by the table \["


def _change(home: Any, function: str, check: str, saying: str) -> Any:
    def enter(made: Callable[[Any], Any]) -> Callable[[Any], Any]:
        CHANGES.append(Change("route", check, saying, home, function, made))
        return made

    return enter


def _by(ids: Any, replicas: Any, index: Any) -> Any:
    """Return the physical ids for an index of replicas that broadcasts with the logical ids."""
    table, count = replicas
    experts = ids.clamp(min=0).long()
    used = count.clamp(1, table.shape[1])[experts]
    return torch.where(ids < 0, ids, table[experts, index % used].to(ids.dtype))


def _rows(ids: Any) -> Any:
    return torch.arange(len(ids))[:, None]


@_change(_replicas, "chosen", CHOSEN, BY_TABLE)
def the_slot_chooses(_right: Any) -> Any:
    return lambda ids, replicas: _by(ids, replicas, torch.arange(ids.shape[1]))


@_change(_replicas, "chosen", CHOSEN, BY_TABLE)
def the_pair_chooses(_right: Any) -> Any:
    return lambda ids, replicas: _by(ids, replicas, torch.arange(ids.numel()).view(ids.shape))


@_change(_replicas, "chosen", CHOSEN, BY_TABLE)
def rows_count_from_one(_right: Any) -> Any:
    return lambda ids, replicas: _by(ids, replicas, _rows(ids) + 1)


@_change(_replicas, "chosen", CHOSEN, BY_TABLE)
def the_first_replica_gets_all(_right: Any) -> Any:
    return lambda ids, replicas: _by(ids, replicas, torch.zeros_like(ids))


@_change(_replicas, "chosen", CHOSEN, BY_TABLE)
def only_valid_rows_are_numbered(_right: Any) -> Any:
    def wrong(ids: Any, replicas: Any) -> Any:
        valid = (ids >= 0).any(1)
        return _by(ids, replicas, (valid.cumsum(0) - 1).clamp(min=0)[:, None])

    return wrong


@_change(_replicas, "chosen", CHOSEN, BY_TABLE)
def the_count_is_the_width_of_the_table(right: Any) -> Any:
    return lambda ids, replicas: right(
        ids,
        replicas._replace(
            replica_count=torch.full_like(
                replicas.replica_count, replicas.logical_to_physical.shape[1]
            )
        ),
    )


@_change(_replicas, "chosen", CHOSEN, BY_TABLE)
def padding_is_renamed(right: Any) -> Any:
    return lambda ids, replicas: right(ids.clamp(min=0), replicas)


@_change(_replicas, "chosen", CHOSEN, BY_TABLE)
def shared_experts_keep_their_ids(right: Any) -> Any:
    def wrong(ids: Any, replicas: Any) -> Any:
        experts = len(replicas.replica_count) // 8 * 8  # kits have E of multiples of 8
        return torch.where(ids >= experts, ids, right(ids, replicas))

    return wrong


@_change(_after, "renamed", CHOSEN, r"call 3: row \d+: ids")
def what_is_given_keeps_logical_ids(right: Any) -> Any:
    return lambda ids, renaming, out: ids if out is not None else right(ids, renaming, None)


@_change(_replicas, "chosen", CHOSEN, r"ids of dtype torch.int64")
def ids_have_the_dtype_of_the_table(_right: Any) -> Any:
    return lambda ids, replicas: physical(ids, *replicas)


@_change(_replicas, "chosen", "a_table_of_one_column_is_a_map", "^not the outputs of the call with")
def a_column_is_read_by_row(right: Any) -> Any:
    def wrong(ids: Any, replicas: Any) -> Any:
        table = replicas.logical_to_physical
        if table.shape[1] == 1:
            return table[:, 0][_rows(ids) % len(table)].to(ids.dtype).expand_as(ids)
        return right(ids, replicas)

    return wrong


@_change(_replicas, "chosen", "numbers_of_replicas_are_clamped", r"^counts of \d+: " + BY_TABLE)
def too_many_replicas_are_one(right: Any) -> Any:
    def wrong(ids: Any, replicas: Any) -> Any:
        table, count = replicas
        few = count.where(count <= table.shape[1], 1)
        return right(ids, replicas._replace(replica_count=few))

    return wrong


@_change(_replicas, "chosen", "tables_may_lie_anywhere", r"^(transposed|a slice): " + BY_TABLE)
def strides_of_the_table_are_ignored(right: Any) -> Any:
    def wrong(ids: Any, replicas: Any) -> Any:
        table = replicas.logical_to_physical
        packed = table.as_strided(table.shape, (table.shape[1], 1), table.storage_offset())
        return right(ids, replicas._replace(logical_to_physical=packed))

    return wrong


@_change(_replicas, "chosen", "tables_may_lie_anywhere", r"^every second count: " + BY_TABLE)
def strides_of_the_counts_are_ignored(right: Any) -> Any:
    return lambda ids, replicas: right(
        ids,
        replicas._replace(
            replica_count=replicas.replica_count.as_strided(replicas.replica_count.shape, (1,))
        ),
    )


@_change(
    _calls.Calls, "_first_with_plan", "a_call_with_a_plan_plans_replicas", r"^call 1 with a plan"
)
def a_first_call_with_a_plan_has_logical_ids(right: Any) -> Any:
    return lambda router, operands, topk, dtype, _after, *others: right(
        router, operands, topk, dtype, None, *others
    )


@_change(_router.Router, "with_plan", "a_call_with_a_plan_plans_replicas", r"^call 2 with a plan")
def a_later_call_with_a_plan_has_logical_ids(right: Any) -> Any:
    seen: set[int] = set()

    def wrong(*arguments: Any, logical_to_physical: Any = None, **options: Any) -> Any:
        if logical_to_physical is not None and logical_to_physical.data_ptr() in seen:
            return right(*arguments, **(options | {"replica_count": None}))
        seen.update([] if logical_to_physical is None else [logical_to_physical.data_ptr()])
        return right(*arguments, logical_to_physical=logical_to_physical, **options)

    return wrong


@_change(_after, "done", "logical_experts_are_counted", r"^physical experts are counted")
def replicas_are_counted(right: Any) -> Any:
    def wrong(after: Any, ids: Any, experts: int, shared: int, *others: Any) -> Any:
        if after.counts is None or after.replicas is None:
            return right(after, ids, experts, shared, *others)
        renamed = right(after._replace(counts=None), ids, experts, shared, *others)
        right(after._replace(replicas=None), renamed % experts, experts, shared, None, None)
        return renamed

    return wrong


@_change(_calls.Calls, "routed", "gradients_flow_past_replicas", r"^with gradients: " + BY_TABLE)
def training_has_the_first_replica(right: Any) -> Any:
    def wrong(router: Any, operands: Any, topk: Any, dtype: Any, after: Any) -> Any:
        if after is not None and operands.logits.requires_grad:
            first = torch.ones_like(after.replicas.replica_count)
            after = after._replace(replicas=after.replicas._replace(replica_count=first))
        return right(router, operands, topk, dtype, after)

    return wrong


@_change(
    _replicas,
    "chosen",
    "traced_calls_choose_the_same_replicas",
    r"^a compiled program: " + BY_TABLE,
)
def compiled_calls_have_the_first_replica(right: Any) -> Any:
    def wrong(ids: Any, replicas: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            replicas = _replicas.Replicas(replicas[0], torch.ones_like(replicas[1]))
        return right(ids, replicas)

    return wrong


@_change(
    _replicas, "check", "wrong_arguments_raise_and_are_named", r"out ids in the table: no error"
)
def outputs_may_lie_in_the_table(right: Any) -> Any:
    return lambda *given: right(*given[:-1], {})


@caught_by(CHOSEN, saying=BY_TABLE, operands=EVERY_OPERAND)
class RowsOfAProgramChoose(Reference):
    """Takes the number of a row in its program of 4 rows."""

    def choose(self, ids: Tensor, table: Tensor, count: Tensor) -> Tensor:
        return _by(ids, (table, count), _rows(ids) % 4)


@caught_by(CHOSEN, saying=BY_TABLE, operands=EVERY_OPERAND)
class PaddingHasNoNumber(Reference):
    """Numbers the rows that are no padding."""

    def choose(self, ids: Tensor, table: Tensor, count: Tensor) -> Tensor:
        tokens = (ids >= 0).any(-1, keepdim=True)
        return _by(ids, (table, count), (tokens.cumsum(0) - 1).clamp(min=0))


@caught_by(CHOSEN, saying=BY_TABLE, operands=EVERY_OPERAND)
class PaddingIsRenamed(Reference):
    """Gives padding a replica of the first expert."""

    def choose(self, ids: Tensor, table: Tensor, count: Tensor) -> Tensor:
        return super().choose(ids.clamp(min=0), table, count)


@caught_by(CHOSEN, saying=BY_TABLE, operands=EVERY_OPERAND)
class TheWidthOfTheTableChooses(Reference):
    """Takes the number of columns for the number of replicas."""

    def choose(self, ids: Tensor, table: Tensor, count: Tensor) -> Tensor:
        return _by(ids, (table, torch.full_like(count, table.shape[1])), _rows(ids))


@caught_by(
    "numbers_of_replicas_are_clamped", saying=r"^counts of 6: " + BY_TABLE, operands=EVERY_OPERAND
)
class MoreReplicasThanColumnsAreOne(Reference):
    """Clamps a number of replicas that is too large to the wrong end."""

    def choose(self, ids: Tensor, table: Tensor, count: Tensor) -> Tensor:
        return super().choose(ids, table, count.where(count <= table.shape[1], 1))


@caught_by("logical_experts_are_counted", saying="^physical experts", operands=EVERY_OPERAND)
class ReplicasAreCounted(Reference):
    """Counts the physical ids."""

    def __call__(
        self, logits: Tensor, *, out: RoutingOutput | None = None, **operands: Any
    ) -> RoutingOutput:
        counts = operands.pop("counts", None)
        output = super().__call__(logits, out=out, **operands)
        if counts is not None:
            self.count(counts, output.ids, logits.shape[1])
        return output
