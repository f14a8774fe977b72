"""The contract, run by `pytest`."""

from moe_routing.conformance import PlanConformance, RouterConformance


class TestAcme(RouterConformance):
    """Every clause, each a test method of the class above."""

    backend = "acme"


class TestAcmePlans(PlanConformance):
    """The clauses of the operation `plan`."""

    backend = "acme"
