"""``RouterConformance`` and its like: a contract as a test class, a method a clause.

Importing this imports neither torch nor pytest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moe_routing.conformance import (
    balance_clauses,
    clauses,
    combine_clauses,
    exchange_clauses,
    gate_clauses,
    permute_clauses,
    plan_clauses,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pytest

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.clauses import Clause
    from moe_routing.conformance.contract import Item

_FAILED = "{id}\n{sentence}\n{message}"


class _Conformance:
    """The contract of one operation as tests; ``RouterConformance`` says how it is used."""

    operation: ClassVar[str]
    backend: ClassVar[str] = ""
    device: ClassVar[str] = ""
    profile: ClassVar[Profile] = "quick"

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        """Give each method the checks of its clause on all their cases."""
        option = metafunc.config.getoption
        backend = cls.backend or option("--moe-backend", default=None)
        if not backend:
            message = (
                f"{cls.__name__}: name a backend, "
                "as the class attribute `backend` or with --moe-backend"
            )
            raise ValueError(message)
        from moe_routing.conformance import drawn
        from moe_routing.conformance.contract import contract_of
        from moe_routing.conformance.runner import NotUsableError, backend_under_test

        device = cls.device or option("--moe-device", default=None) or "cpu"
        under_test = backend_under_test(backend, device)
        contract = contract_of(cls.operation)
        rejection = under_test.why_not(contract.problems())
        if rejection is not None:
            raise NotUsableError(under_test, rejection)
        profile: Profile = "full" if option("--moe-full", default=False) else cls.profile
        clause = int(metafunc.function.__name__.split("_")[1])
        with drawn.seeded(option("--moe-seed", default=None)):
            items = [item for item in contract.items(profile) if item.check.clause == clause]
        names = [f"{item.id}-{backend}-{device}" for item in items]
        metafunc.parametrize(
            ("item", "under_test"), [(item, (backend, device)) for item in items], ids=names
        )

    @staticmethod
    def _hold(item: Item, under_test: tuple[str, str]) -> None:
        import pytest

        from moe_routing.conformance.runner import backend_under_test, evaluate

        __tracebackhide__ = True
        result = evaluate(item, backend_under_test(*under_test))
        if result.status == "failed":
            pytest.fail(
                _FAILED.format(id=result.id, sentence=item.check.sentence, message=result.message),
                pytrace=False,
            )
        if result.status != "passed":
            pytest.skip(f"{result.status}: {result.message}")


def _method(clause: Clause) -> Callable[[_Conformance, Item, tuple[str, str]], None]:
    """Return the test method of a clause.

    Pytest names a test by the function, so each clause has its own.
    """

    def test(self: _Conformance, item: Item, under_test: tuple[str, str]) -> None:
        self._hold(item, under_test)

    test.__name__ = f"test_{clause.number:02d}_{clause.name}"
    test.__doc__ = clause.rule
    return test


class RouterConformance(_Conformance):
    """Subclass this in a test file, name a backend, and pytest runs the contract against it.

    :cvar backend: the backend's name; without one, the option ``--moe-backend`` says.
    :cvar device: the device, ``"cpu"`` unless this or ``--moe-device`` says otherwise.
    :cvar profile: ``"quick"``, ``"smoke"`` or ``"full"``; the option ``--moe-full`` overrides it.

    A check that the backend declines, that its ``gaps`` excuse, or that makes no sense on the
    device, is a skip with the reason; ``moe-routing conformance`` writes the same into a report.
    """

    operation = "route"


class PlanConformance(_Conformance):
    """The same for the operation ``plan``: subclass it, and name a backend."""

    operation = "plan"


class PermuteConformance(_Conformance):
    """The same for the operation ``permute``."""

    operation = "permute"


class CombineConformance(_Conformance):
    """The same for the operation ``combine``."""

    operation = "combine"


class BalanceConformance(_Conformance):
    """The same for the operation ``balance``."""

    operation = "balance"


class GateConformance(_Conformance):
    """The same for the operation ``gate``."""

    operation = "gate"


class ExchangeConformance(_Conformance):
    """The same for the operation ``exchange``, in the ranks that pytest runs in.

    Those are the ranks of torchrun, or one.
    """

    operation = "exchange"


def _add_methods(suite: type[_Conformance], contents: Mapping[int, Clause]) -> None:
    for clause in contents.values():
        method = _method(clause)
        method.__qualname__ = f"{suite.__name__}.{method.__name__}"
        setattr(suite, method.__name__, method)


_add_methods(RouterConformance, clauses.CLAUSES)
_add_methods(PlanConformance, plan_clauses.CLAUSES)
_add_methods(PermuteConformance, permute_clauses.CLAUSES)
_add_methods(CombineConformance, combine_clauses.CLAUSES)
_add_methods(BalanceConformance, balance_clauses.CLAUSES)
_add_methods(GateConformance, gate_clauses.CLAUSES)
_add_methods(ExchangeConformance, exchange_clauses.CLAUSES)
