"""The contract, run by `pytest`."""

from moe_routing.testing import RouterConformance


class TestAcme(RouterConformance):
    """All fifteen points, each a test method of the class above."""

    backend = "acme"
