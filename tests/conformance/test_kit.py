"""The eager backend conforms, by every entry point.

Reports, gaps and the quick verification are tested here too.
"""

import dataclasses
import itertools
import json
import math
import random
import subprocess
import sys
import warnings
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import mutants
import pytest
import torch
from mutants import MUTANTS, Mutant, registered

from moe_routing import UnknownNameError
from moe_routing._registry import registry
from moe_routing.conformance import quick, run, verify
from moe_routing.conformance import report as reports
from moe_routing.conformance.cases import Case
from moe_routing.conformance.checks import traced
from moe_routing.conformance.clauses import CLAUSES
from moe_routing.conformance.runner import NotUsableError, Report, Result
from moe_routing.conformance.under_test import BackendUnderTest
from moe_routing_registry import BackendSpec, RejectCode, Target, Verdict


@pytest.fixture
def _without_a_budget(monkeypatch):
    """Run every check of the quick verification, however slow the machine is."""
    monkeypatch.setattr(quick, "BUDGET_SECONDS", math.inf)


TAKES_SECONDS = {1, 2, 6, 13, 14, 16, 17, 18}
"""Clauses whose checks take seconds in the smallest profile too: their cases are tried with more.

The mutants try most of these checks as well.
"""


@pytest.mark.parametrize(
    ("clause", "profile"),
    [
        *((clause, "smoke") for clause in CLAUSES if clause not in TAKES_SECONDS),
        *(pytest.param(clause, "quick", marks=pytest.mark.slow) for clause in CLAUSES),
    ],
)
def test_eager_conforms(clause, profile):
    report = run("eager", profile=profile, clauses=[clause], seed=random.getrandbits(32))
    assert [(result.id, result.message) for result in report.failed] == []
    assert report.ok
    assert report.count("declined") == 0


def pytest_on(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_suite_without_a_backend_is_told_so(tmp_path):
    suite = (
        "from moe_routing.conformance import RouterConformance\n"
        "class TestAcme(RouterConformance):\n    pass\n"
    )
    (tmp_path / "test_acme.py").write_text(suite)
    ran = pytest_on("--rootdir", str(tmp_path), str(tmp_path))
    assert ran.returncode != 0
    assert "name a backend" in ran.stdout


@pytest.mark.slow
def test_pytest_runs_the_kit_on_a_named_backend():
    ran = pytest_on(
        "--pyargs",
        "moe_routing.conformance",
        "--moe-backend",
        "eager",
        "-k",
        "test_09_no_tokens and topk_softmax",
    )
    assert ran.returncode == 0, ran.stdout
    assert "2 passed" in ran.stdout


def test_a_misspelt_backend_is_an_error_that_names_the_near_one():
    with pytest.raises(UnknownNameError, match="did you mean 'eager'"):
        run("eagre")


@pytest.mark.slow
@pytest.mark.usefixtures("_without_a_budget")
def test_the_quick_verification_finds_nothing_wrong_with_eager():
    findings = verify("eager")
    assert [finding for finding in findings if not finding.ok] == []
    assert [finding.name for finding in findings] == list(quick.CHECKS)
    json.dumps([dataclasses.asdict(finding) for finding in findings])


def test_the_quick_verification_begins_no_case_after_its_budget(monkeypatch):
    monkeypatch.setattr(quick, "BUDGET_SECONDS", 1)
    monkeypatch.setattr(
        quick, "time", SimpleNamespace(monotonic=itertools.count().__next__)
    )  # a second for each case
    (finding,) = verify("eager")
    assert finding.name == quick.CHECKS[0]
    assert "(1 of 1 cases)" in finding.sentence


@pytest.mark.slow
@pytest.mark.usefixtures("_without_a_budget")
def test_the_quick_verification_says_what_is_wrong():
    with registered(next(m for m in MUTANTS if m.name == "mutant-tie-to-the-highest-id")) as name:
        wrong = [finding for finding in verify(name) if not finding.ok]
    assert "equal_scores_go_to_the_lower_id" in {finding.name for finding in wrong}
    assert "although their scores are equal" in " ".join(finding.sentence for finding in wrong)


def only_float32(problem, device):
    del device
    return (
        Verdict.yes()
        if problem.dtype == "float32"
        else Verdict.no(RejectCode.DTYPE, "float32 only")
    )


@pytest.fixture
def declining():
    """Return a function that registers the reference backend with a support rule and gaps."""
    names = []

    def register(supports=None, factory=mutants.Reference, **gaps):
        mutant = Mutant(factory, "", supports=supports)
        manager = registered(mutant)
        name = manager.__enter__()
        spec = registry().backends[name]
        registry().unregister(name)
        registry().register(dataclasses.replace(spec, gaps=gaps))
        names.append(manager)
        return name

    yield register
    for manager in names:
        manager.__exit__(None, None, None)


@pytest.mark.slow
def test_declining_what_could_be_had_fails(declining):
    report = run(declining(only_float32), clauses=[0])
    assert {result.check for result in report.failed} == {"what_it_declines_cannot_be_had"}
    assert "gaps['dtype']" in report.failed[0].message


@pytest.mark.slow
def test_declining_it_with_a_reason_on_the_card_is_a_gap_in_the_report(declining):
    report = run(declining(only_float32, dtype="half precision is not needed here"), clauses=[0, 4])
    assert report.ok
    assert report.gaps == {"dtype": "half precision is not needed here"}
    assert report.count("declined")
    assert "half precision is not needed here" in reports.to_html(report)


@pytest.mark.slow
def test_a_gap_that_is_none_fails(declining):
    report = run(
        declining(compile="cannot be traced", dtype="whatever"), profile="smoke", clauses=[0]
    )
    failed = {result.case: result.message for result in report.failed}
    assert failed == {
        "compile": "declares a gap in compile, but passes every check of it",
        "dtype": "declares a gap in dtype, but declines nothing for it",
    }


def test_a_check_that_a_gap_excuses_is_not_a_failure(declining):
    wrong = next(m for m in MUTANTS if m.name == "mutant-int32-offsets").factory
    report = run(
        declining(factory=wrong, large_sizes="32-bit offsets"), profile="smoke", clauses=[0, 8]
    )
    gaps = [result for result in report.results if result.status == "gap"]
    assert {result.check for result in gaps} == {"offsets_past_2_31_are_read"}
    assert gaps[0].message.startswith("32-bit offsets (")
    assert "offsets_past_2_31_are_read" not in {result.check for result in report.failed}


@pytest.fixture
def report():
    results = [
        Result(clause=1, check="a", case="c1", family="gemma4", status="passed", seconds=0.5),
        Result(
            clause=1,
            check="a",
            case="c2",
            family="gemma4",
            status="failed",
            message="row 0: <b>\x00 & more\nsecond line",
        ),
        Result(clause=2, check="b", case="c1", family="mixtral", status="declined", message="no"),
        Result(
            clause=8, check="d", case="c1", family="mixtral", status="gap", message="32-bit (wrong)"
        ),
        Result(
            clause=12, check="c", case="c1", family="", status="not_applicable", message="no GPU"
        ),
    ]
    return Report(
        backend="acme",
        operation="route",
        clauses=CLAUSES,
        distribution="moe-routing-acme 1.0",
        device="cpu",
        profile="quick",
        seed=7,
        versions={"torch": "2.13"},
        gaps={"large_sizes": "32-bit"},
        started="2026-01-01T00:00:00+00:00",
        results=results,
        seconds=1.5,
    )


def test_the_html_report_is_one_page_that_escapes_what_it_quotes(report, tmp_path):
    reports.write(report, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "does not conform" in page
    assert "row 0: &lt;b&gt;" in page
    assert "<b>" not in page
    assert not any(word in page for word in ("<script", "<img", "src=", "href="))
    for text in ("gemma4", "mixtral", "32-bit", "no GPU", CLAUSES[1].rule.replace("'", "&#x27;")):
        assert text in page


def test_the_json_report_holds_everything(report, tmp_path):
    reports.write(report, str(tmp_path / "r.json"))
    read = json.loads((tmp_path / "r.json").read_text())
    assert read["schema_version"] == 1
    assert (read["ok"], read["backend"], len(read["results"])) == (False, "acme", 5)
    assert read["results"][1]["message"].startswith("row 0")


def test_the_junit_report_counts_failures_and_skips(report, tmp_path):
    reports.write(report, tmp_path / "r.xml")
    suites = ET.fromstring((tmp_path / "r.xml").read_text()).findall("testsuite")  # noqa: S314 -- we wrote it
    assert [suite.get("name")[:2] for suite in suites] == ["01", "02", "08", "12"]
    assert [suite.get("failures") for suite in suites] == ["1", "0", "0", "0"]
    assert [suite.get("skipped") for suite in suites] == ["0", "1", "1", "1"]
    assert "second line" in suites[0].find("testcase/failure").text


def test_a_report_of_another_kind_is_refused(report):
    with pytest.raises(ValueError, match=r"\.html, \.json, \.xml"):
        reports.write(report, "r.pdf")


def test_nothing_passed_is_not_conforming(report):
    report.results = report.results[2:3]
    assert not report.ok
    assert report.verdict == "nothing was checked: 0 checked, 1 declined (no: 1)"


def test_a_verdict_says_what_was_checked_what_was_declined_and_what_was_not_run(report):
    assert (
        report.verdict
        == "does not conform: 2 checked, 1 failed, 2 declined (no: 1; 32-bit (wrong): 1)"
    )
    report.results[1:2] = [
        dataclasses.replace(report.results[4], status="not_run", message="needs a GPU")
    ] * 3
    assert report.verdict == (
        "conforms: 1 checked, 2 declined (no: 1; 32-bit (wrong): 1), "
        "3 not run here (needs a GPU: 3)"
    )
    assert report.to_dict()["verdict"] == report.verdict
    assert report.to_dict()["counts"] == {"checked": 1, "declined": 2, "not_run": 3}
    assert report.verdict in reports.to_html(report)
    others = [
        dataclasses.replace(report.results[1], status="declined", message=f"reason {n}")
        for n in range(9)
    ]
    report.results += others
    assert "and 8 more reasons)" in report.verdict


def test_a_backend_that_is_not_for_the_device_is_not_checked():
    with pytest.raises(
        NotUsableError, match="triton-xpu was not checked on cpu: is for xpu, the device is cpu"
    ):
        run("triton-xpu")


class Panic(BaseException):
    """As an extension in Rust raises it: no ``Exception``."""


def build_panicking(_problem, _device):
    def kernel(logits, **_operands):
        raise (KeyboardInterrupt if len(logits) == 67 else Panic)

    return kernel


def test_a_kernel_that_panics_fails_its_checks_and_only_an_interrupt_ends_the_run():
    target = Target("cpu")
    registry().register(
        BackendSpec(
            name="panicking", factories={"route": f"{__name__}:build_panicking"}, targets=(target,)
        )
    )
    try:
        report = run("panicking", profile="smoke", clauses=[0, 3])
        assert len(report.failed) > 20
        assert {result.status for result in report.results} <= {
            "failed",
            "not_applicable",
            "passed",
        }
        said = {result.message.partition("\n")[0] for result in report.failed if result.clause == 3}
        assert said == {"a call in it raised Panic"}
        with pytest.raises(KeyboardInterrupt):
            run("panicking", profile="smoke", clauses=[10])
    finally:
        registry().unregister("panicking")


def test_a_warning_that_torchs_opcheck_gives_fails_no_check(monkeypatch):
    opcheck = torch.library.opcheck

    def warning(*arguments):  # torch 2.15 warns inside it, older ones do not
        warnings.warn("a look at .grad", stacklevel=1)
        return opcheck(*arguments)

    monkeypatch.setattr(torch.library, "opcheck", warning)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("error")
        under_test = BackendUnderTest("eager", torch.device("cpu"))
        traced.the_operator_of_training_passes_opcheck(under_test, Case(variant="softmax_topk"))
    assert "a look at .grad" in {str(caught.message) for caught in shown}
