"""What keeps experts equally busy: losses, updates of the bias, and replicas of busy experts.

    loss = balancing.load_balancing_loss(logits, ids) * 0.01 + balancing.z_loss(logits) * 0.001
    balancing.update_bias(bias, counts, 0.001)
    placement = balancing.place_replicas(loads, num_slots=160, num_ranks=8)

``logits`` and ``ids`` are what a router was given and returned.
"""

from moe_routing.balancing._bias import update_bias
from moe_routing.balancing._replicas import Placement, place_replicas
from moe_routing.balancing.kernel import BalanceKernel, BalancesBackward
from moe_routing.balancing.losses import load_balancing_loss, sequence_balancing_loss, z_loss
from moe_routing.balancing.problem import BalanceProblem

__all__ = [
    "BalanceKernel",
    "BalanceProblem",
    "BalancesBackward",
    "Placement",
    "load_balancing_loss",
    "place_replicas",
    "sequence_balancing_loss",
    "update_bias",
    "z_loss",
]
