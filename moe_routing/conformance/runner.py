"""Running the checks: one backend, one device, one profile; what comes out is a ``Report``."""

from __future__ import annotations

import contextlib
import platform
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal

import torch

from moe_routing._registry import registry
from moe_routing.conformance import drawn
from moe_routing.conformance.contract import contract_of
from moe_routing.conformance.under_test import (
    BackendUnderTest,
    DeclinedError,
    NotApplicableError,
    NotRunError,
)
from moe_routing.probing import probe
from moe_routing_registry import Request
from moe_routing_registry.containment import PluginFailure, contained
from moe_routing_registry.errors import MoeRoutingWarning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from moe_routing.conformance.cases import Profile
    from moe_routing.conformance.clauses import Clause
    from moe_routing.conformance.contract import Item
    from moe_routing_registry.report import Rejection

Status = Literal["passed", "failed", "gap", "declined", "not_run", "not_applicable"]
SCHEMA_VERSION = 1
MANY_ROWS = 2048
REASONS = 3
"""How many reasons a verdict gives; the report has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one check on one case came to.

    :ivar clause: the number of a clause of the contract.
    :ivar check: the check's name.
    :ivar case: the case's name.
    :ivar family: the family, or ``""`` where it is about none.
    :ivar status: ``"passed"``; ``"failed"``; ``"gap"``: it fails, and the spec gives a reason;
        ``"declined"``: the backend declines the problem; ``"not_run"``: it needs what is not here;
        ``"not_applicable"``: there is nothing to check.
    :ivar message: why, unless it passed.
    :ivar seconds: how long it took.
    """

    clause: int
    check: str
    case: str
    family: str
    status: Status
    message: str = ""
    seconds: float = 0.0

    @property
    def id(self) -> str:
        """The clause's number, the check and the case, as in pytest."""
        return f"{self.clause:02d}-{self.check}-{self.case}"


@dataclass(slots=True, kw_only=True)
class Report:
    """The outcome of a run; ``moe_routing.conformance.report`` writes it as HTML, JSON or JUnit.

    :ivar operation: the operation that was checked.
    :ivar clauses: the clauses of its contract, by number.
    :ivar seed: what drew the cases that are in no list; ``run(..., seed=)`` draws them again.
    """

    backend: str
    operation: str
    clauses: Mapping[int, Clause]
    distribution: str
    device: str
    profile: Profile
    seed: int
    versions: dict[str, str]
    gaps: dict[str, str]
    started: str
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing failed and something passed."""
        return not self.failed and any(r.status == "passed" for r in self.results)

    @property
    def verdict(self) -> str:
        """The verdict in a sentence, with its counts.

        How much was checked, declined and not run, and why.

        >>> run("eager", profile="smoke", clauses=[9]).verdict
        'conforms: 34 checked'
        """
        counts = self.counts
        word = (
            "does not conform"
            if self.failed
            else "conforms"
            if counts["checked"]
            else "nothing was checked"
        )
        parts = [f"{counts['checked']} checked"]
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        parts += (
            [f"{counts['declined']} declined ({self._reasons('declined', 'gap')})"]
            if counts["declined"]
            else []
        )
        parts += (
            [f"{counts['not_run']} not run here ({self._reasons('not_run')})"]
            if counts["not_run"]
            else []
        )
        return f"{word}: {', '.join(parts)}"

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of cases that were checked, declined, and not run.

        The backend declines a case, or a gap of its spec excuses it; a case that is not run cannot
        be run here.
        """
        return {
            "checked": self.count("passed") + len(self.failed),
            "declined": self.count("declined") + self.count("gap"),
            "not_run": self.count("not_run"),
        }

    def _reasons(self, *statuses: Status) -> str:
        """Return the most frequent reasons, each with how often it was given."""
        given = Counter(
            r.message.partition("\n")[0] for r in self.results if r.status in statuses
        ).most_common()
        more = [f"and {len(given) - REASONS} more reasons"] if len(given) > REASONS else []
        return "; ".join([*(f"{reason}: {count}" for reason, count in given[:REASONS]), *more])

    @property
    def failed(self) -> list[Result]:
        """What failed."""
        return [r for r in self.results if r.status == "failed"]

    def count(self, status: Status, *, clause: int | None = None, family: str | None = None) -> int:
        """Count results, of one clause and one family where given."""
        return sum(
            r.status == status and clause in (None, r.clause) and family in (None, r.family)
            for r in self.results
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        slots = ("clause", "check", "case", "family", "status", "message", "seconds")
        return {
            "schema_version": SCHEMA_VERSION,
            "ok": self.ok,
            "verdict": self.verdict,
            "counts": self.counts,
            "backend": self.backend,
            "operation": self.operation,
            "distribution": self.distribution,
            "device": self.device,
            "profile": self.profile,
            "seed": self.seed,
            "versions": self.versions,
            "gaps": self.gaps,
            "started": self.started,
            "seconds": round(self.seconds, 3),
            "clauses": {str(n): {"name": p.name, "rule": p.rule} for n, p in self.clauses.items()},
            "results": [{name: getattr(result, name) for name in slots} for result in self.results],
        }


class NotUsableError(Exception):
    """The backend cannot be used on the device at all, so that there is nothing to check.

    ``rejection`` says why.
    """

    def __init__(self, under_test: BackendUnderTest, rejection: Rejection) -> None:
        """Say why, and what would change it."""
        self.rejection = rejection
        verdict = rejection.verdict
        fix = f"; {verdict.fix}" if verdict.fix else ""
        super().__init__(
            f"{under_test.backend} was not checked on {under_test.device}: {verdict.reason}{fix}"
        )


def run(  # noqa: PLR0913 -- the options of the command
    backend: str,
    device: str | torch.device = "cpu",
    *,
    operation: str = "route",
    profile: Profile = "quick",
    clauses: Iterable[int] | None = None,
    seed: int | None = None,
    on_result: Callable[[Result, int, int], None] | None = None,
) -> Report:
    """Check a backend.

    :param operation: the operation whose contract is checked.
    :param clauses: only these clauses; all of them where ``None``.
    :param seed: draws the cases that are in no list; a new one where ``None``. The report has it.
    :param on_result: called after each check with its result, how many are done, and how many there
        are.
    :raises UnknownNameError: there is no such backend, or no such operation.
    :raises NotUsableError: the backend is not for the device, or cannot be used on it.
    """
    under_test = backend_under_test(backend, device)
    contract = contract_of(operation)
    rejection = under_test.why_not(contract.problems())
    if rejection is not None:
        raise NotUsableError(under_test, rejection)
    wanted = set(contract.clauses if clauses is None else clauses)
    seed = drawn.new_seed() if seed is None else seed
    with drawn.seeded(seed):
        items = [item for item in contract.items(profile) if item.check.clause in wanted]
    report = Report(
        backend=backend,
        operation=operation,
        clauses=contract.clauses,
        distribution=registry().distribution(backend),
        device=str(probe(under_test.device)),
        profile=profile,
        seed=seed,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "moe-routing": _version(),
        },
        gaps=dict(under_test.spec.gaps),
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    begun = time.perf_counter()
    for done, item in enumerate(items, start=1):
        result = evaluate(item, under_test)
        report.results.append(result)
        if on_result is not None:
            on_result(result, done, len(items))
    report.seconds = time.perf_counter() - begun
    return report


def _version() -> str:
    import moe_routing

    return moe_routing.__version__


def backend_under_test(backend: str, device: str | torch.device) -> BackendUnderTest:
    """Return the backend on the device; an accelerator without an index is the current one.

    :raises UnknownNameError: there is no such backend.
    """
    registry().check_names(Request(backend=backend, asked_by="argument"))
    return BackendUnderTest(backend, torch.empty(0, device=device).device)


def evaluate(item: Item, under_test: BackendUnderTest) -> Result:
    """Run one check on one case."""
    begun = time.perf_counter()
    with _threads_for(item, under_test):
        status, message = _outcome(item, under_test)
    return Result(
        clause=item.check.clause,
        check=item.check.name,
        case=item.case.id,
        family=item.case.family,
        status=status,
        message=message,
        seconds=round(time.perf_counter() - begun, 6),
    )


@contextlib.contextmanager
def _threads_for(item: Item, under_test: BackendUnderTest) -> Iterator[None]:
    """Use one thread of torch's for a few rows on a CPU.

    On a busy machine, threads wait for each other there, long.

    Cases with many rows keep all threads, so that what goes wrong between threads can go wrong.
    """
    threads = torch.get_num_threads()
    if (
        under_test.device.type != "cpu"
        or threads == 1
        or getattr(item.case, "num_tokens", 0) >= MANY_ROWS
    ):
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _outcome(item: Item, under_test: BackendUnderTest) -> tuple[Status, str]:
    verdicts = (NotApplicableError, NotRunError, DeclinedError, AssertionError)
    try:
        with warnings.catch_warnings(), contained("a call in it", *verdicts):
            warnings.simplefilter("error", MoeRoutingWarning)
            item.check.run(under_test, item.case)
    except NotApplicableError as error:
        return "not_applicable", str(error)
    except NotRunError as error:
        return "not_run", str(error)
    except DeclinedError as error:
        return "declined", str(error)
    except AssertionError as error:
        return _failure(item, under_test, str(error))
    except PluginFailure as failure:
        return _failure(item, under_test, f"{failure.sentence}\n{failure.trace}")
    return "passed", ""


def _failure(item: Item, under_test: BackendUnderTest, message: str) -> tuple[Status, str]:
    reason = under_test.spec.gaps.get(item.check.capability)
    return ("gap", f"{reason} ({message.partition(chr(10))[0]})") if reason else ("failed", message)
