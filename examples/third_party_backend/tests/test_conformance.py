"""The contract, run by `pytest`."""

from moe_routing.conformance import RouterConformance


class TestAcme(RouterConformance):
    """All sixteen clauses, each a test method of the class above."""

    backend = "acme"
