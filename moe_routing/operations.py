"""The built-in operations.

A new one is an entry here, a problem, an oracle and a contract; the registry does not change.
"""

from __future__ import annotations

from moe_routing.families import FAMILIES
from moe_routing_registry import OperationSpec, RoutingProblem

ROUTE_EXAMPLE = RoutingProblem(
    spec=FAMILIES["gemma4"].spec, num_experts=128, topk=8, dtype="bfloat16"
)

OPERATIONS = (
    OperationSpec(
        name="route",
        example="moe_routing.operations:ROUTE_EXAMPLE",
        oracle="moe_routing.reference.oracle:route",
        contract="moe_routing.conformance.checks:ROUTE",
        summary="router logits to the weights and ids of each token's experts",
    ),
    OperationSpec(
        name="gate",
        example="moe_routing.gating.example:GATE_EXAMPLE",
        oracle="moe_routing.reference.gate_oracle:gate",
        contract="moe_routing.conformance.gating:GATE",
        summary="hidden states to router logits, and those to weights and ids",
    ),
    OperationSpec(
        name="plan",
        example="moe_routing.planning.problem:PLAN_EXAMPLE",
        oracle="moe_routing.reference.plan_oracle:plan",
        contract="moe_routing.conformance.planning:PLAN",
        summary="ids to the places of tokens grouped by expert",
    ),
    OperationSpec(
        name="permute",
        example="moe_routing.permutation.problem:PERMUTE_EXAMPLE",
        oracle="moe_routing.reference.permutation_oracle:permute",
        contract="moe_routing.conformance.permutation:PERMUTE",
        summary="rows of tokens to the order of a plan",
    ),
    OperationSpec(
        name="combine",
        example="moe_routing.permutation.problem:COMBINE_EXAMPLE",
        oracle="moe_routing.reference.permutation_oracle:combine",
        contract="moe_routing.conformance.permutation:COMBINE",
        summary="rows in the order of a plan to weighted sums of each token",
    ),
    OperationSpec(
        name="exchange",
        example="moe_routing.distributed.problem:EXCHANGE_EXAMPLE",
        oracle="moe_routing.reference.exchange_oracle:exchange",
        contract="moe_routing.conformance.exchange:EXCHANGE",
        summary="tokens to the ranks of their experts, and the results back",
    ),
    OperationSpec(
        name="balance",
        example="moe_routing.balancing.problem:BALANCE_EXAMPLE",
        oracle="moe_routing.reference.balance_oracle:balance",
        contract="moe_routing.conformance.balancing:BALANCE",
        summary="router logits and ids to the sums that balancing losses are made of",
    ),
)
