"""Text from outside (names, reasons, fixes, messages, devices) through every page and every table.

It stays text.
"""

from __future__ import annotations

import dataclasses
import html.parser
import io
import json
import re
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import pytest

from moe_routing._html import page
from moe_routing.bench import Case, Result, Row, Settings
from moe_routing.bench.page import to_html as bench_page
from moe_routing.cli import _bench, _conformance, _explain, _list, _show, _transformers, _tune
from moe_routing.cli._app import run
from moe_routing.cli._render_doctor import render
from moe_routing.conformance import report as reports
from moe_routing.conformance import runner
from moe_routing.conformance.clauses import CLAUSES
from moe_routing.doctor import examine
from moe_routing.doctor._machine import Failure
from moe_routing.report import Gathered, Tried, to_html
from moe_routing_registry import DeviceInfo, RejectCode, ResolutionReport, Verdict
from moe_routing_registry.report import Candidate, Rejection
from moe_routing_registry.text import printable

STEERING = (
    "\x1b[31m\x1b]0;title\x07\x1b]8;;http://evil\x07\x9b2J"
    "\u202egnihtyna\u2066\u200f\x00\x7f\r\x08\ud800"
)
MARKUP = "[red]r[/red] [/nope] [link=http://evil]x[/link] :boom: $x^{$ "
TAGS = "<script>alert(1)</script><img/src=x/onerror='alert(2)'>\"'&amp; </pre></td> "
HOSTILE = f"{TAGS}{MARKUP}{STEERING}"
KEPT = {"status", "state", "code", "winner", "type", "index"}
"""Keys of words from closed lists."""
DRIVEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def poisoned(value, key=""):
    """Put hostile text into every string of a report, also into keys that are names."""
    if isinstance(value, dict):
        return {k: poisoned(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v, key) for v in value]
    return f"{HOSTILE}{value}" if isinstance(value, str) and key not in KEPT else value


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.found, self.attributes, self.text = set(), set(), ""

    def handle_starttag(self, tag, attributes):
        self.found.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


def check_page(text):
    tags = Tags()
    tags.feed(text)
    assert "script" not in tags.found
    assert not {name for name in tags.attributes if name.startswith("on")}
    assert not DRIVEN.search(text)
    assert "<script>alert(1)</script>" in tags.text  # it is shown, as text


@pytest.fixture(scope="module")
def doctor():
    report = examine(device="cpu")
    for backend in report["backends"]:
        backend["devices"]["cpu"] |= {"fix": "fix", "reason": "reason"}
    report["environment"].append(
        {"name": "V", "value": "value", "meaning": "meaning", "problem": ""}
    )
    report["plugin_failures"].append({"name": "n", "distribution": "d", "reason": "r"})
    return poisoned(json.loads(json.dumps(report)))


@pytest.fixture
def conformance():
    result = runner.Result(
        clause=1,
        check=HOSTILE,
        case=HOSTILE,
        family=HOSTILE,
        status="failed",
        message=f"{HOSTILE}\nsecond {HOSTILE}",
    )
    others = [
        dataclasses.replace(result, status=status)
        for status in ("passed", "gap", "declined", "not_applicable")
    ]
    return runner.Report(
        backend=HOSTILE, operation=HOSTILE, clauses=CLAUSES,
        distribution=HOSTILE, device=HOSTILE, profile=HOSTILE, seed=7, versions={HOSTILE: HOSTILE},
        gaps={"dtype": HOSTILE, HOSTILE: HOSTILE}, started=HOSTILE, results=[result, *others],
    )  # fmt: skip


@pytest.fixture
def bench():
    case = Case(HOSTILE, "bfloat16", 8, 2, 1)
    row = Row(
        case=case, mode="call", implementation=HOSTILE, is_backend=True, rounds=(1.0, 2.0), bytes=8
    )
    rows = [
        row,
        dataclasses.replace(row, rounds=(), wrong=(HOSTILE,)),
        dataclasses.replace(row, rounds=(), skipped=HOSTILE),
    ]
    device = {"name": HOSTILE, "platform": HOSTILE, "arch": HOSTILE, "threads": 1, "cache": 1}
    versions = {HOSTILE: HOSTILE}
    return Result(
        settings=Settings(),
        device=device,
        versions=versions,
        date=HOSTILE,
        copy_rate=1.0,
        launch_floor={"call": 1.0},
        rows=rows,
    )


RESOLUTION = ResolutionReport(
    device=DeviceInfo(type="cpu", platform="cpu", name=HOSTILE, arch=HOSTILE),
    winner=HOSTILE,
    eligible=(Candidate(name=HOSTILE, priority=1, distribution=HOSTILE),),
    rejected=(
        Rejection(
            name=HOSTILE,
            verdict=Verdict.no(RejectCode.SHAPE, HOSTILE, HOSTILE),
            distribution=HOSTILE,
        ),
    ),
    notes=(HOSTILE,),
)

# Pages


def test_the_report_page(doctor, conformance, bench):
    failure = Failure(HOSTILE, HOSTILE)
    for checked, timed in ((conformance, bench), (failure, failure)):
        operations = {HOSTILE: Tried(backend=HOSTILE, conformance=checked, bench=timed)}
        check_page(to_html(Gathered(doctor=doctor, device=HOSTILE, operations=operations)))


def test_the_conformance_page(conformance):
    check_page(reports.to_html(conformance))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:constrained_layout not applied"
)  # the title is longer than the picture
def test_the_bench_page_and_its_picture(bench, tmp_path):
    check_page(bench_page(bench))
    _bench._draw(bench, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0


def test_every_page_has_one_shell():
    check_page(page(HOSTILE, [f"<p>{'&lt;script&gt;alert(1)&lt;/script&gt;'}</p>"]))


def test_junit_and_json_can_be_written_and_read(conformance, tmp_path):
    for name in ("x.xml", "x.json", "x.html"):
        reports.write(conformance, tmp_path / name)
    assert ET.parse(tmp_path / "x.xml").getroot().tag == "testsuites"  # noqa: S314 -- written by this test
    assert json.loads((tmp_path / "x.json").read_text())["backend"] == HOSTILE


# Tables, at two widths


@pytest.fixture(params=[40, 80, 100_000])
def screen(request, monkeypatch):
    """Return a function that shows something on a coloured console of that width.

    The function returns the text that reached the terminal.
    """
    monkeypatch.setenv("COLUMNS", str(request.param))
    monkeypatch.setenv("FORCE_COLOR", "1")

    def shown(show):
        stream = io.StringIO()
        token = _show._answer.set(stream)
        try:
            show(_show.console())
        finally:
            _show._answer.reset(token)
        text = re.sub("\x1b\\[[0-9;]*m", "", stream.getvalue())  # rich's own colours
        assert "\x1b" in stream.getvalue()
        assert not DRIVEN.search(text)
        assert "[red]r[/red]" in "".join(text.split())  # markup is text
        return text

    return shown


def test_doctors_tables(doctor, screen):
    screen(lambda console: render(doctor, console, verbose=True))


def test_the_conformance_table(conformance, screen):
    screen(lambda console: _conformance._show(conformance, console))


def test_the_bench_table(bench, screen):
    screen(lambda console: _bench._show(bench, console))


def test_the_explain_table(screen):
    screen(lambda console: _explain._show(console, HOSTILE, HOSTILE, HOSTILE, RESOLUTION))


def test_the_tune_table(screen):
    launch = {"variant": HOSTILE, HOSTILE: 1}
    timed = {"tokens": 1, "launch": launch, "us": 1.0, "launch_before": launch, "us_before": 1.0}
    one = {"title": HOSTILE, "timed": [timed], "wrong": [HOSTILE]}
    screen(
        lambda console: _tune._show(
            {**one, "unusable": [HOSTILE], "before": HOSTILE, "table": HOSTILE}, console
        )
    )


class Patched:
    """A report of ``patch`` as the command reads it."""

    layers = left = (SimpleNamespace(router=HOSTILE, routing="", reason=HOSTILE),)

    def __str__(self):
        return HOSTILE

    def runs(self):
        return [(HOSTILE, self.layers[0])]


def test_the_transformers_table(screen):
    screen(lambda console: _transformers._show(console, HOSTILE, Patched()))


def test_the_list(screen):
    screen(lambda console: _list._block(console, HOSTILE, HOSTILE, HOSTILE))


def test_a_progress_bar(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with _show.progress() as bar:
        bar.add_task(HOSTILE, total=1)
        assert "[red]" in bar.console.render_str(HOSTILE).plain


def test_errors_and_warnings_on_stderr(capsys):
    assert run(["explain", f"a{HOSTILE}"]) == 2
    assert run(["list", HOSTILE]) == 2
    err = capsys.readouterr().err
    assert not DRIVEN.search(err)
    assert err.count("\n") == 2


def test_a_report_as_text_is_stripped_for_those_who_print_it():
    assert not DRIVEN.search(str(RESOLUTION))


@pytest.mark.parametrize(
    "text", ["plain", "tab\tand\nnewline", "façade 日本 ✓ 👍", "no\u00a0break"]
)
def test_ordinary_text_is_left_alone(text):
    assert printable(text).replace("\u00a0", " ") == text.replace("\u00a0", " ")


# No word is lost


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_a_table_loses_no_word_at_any_width(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [
        ("torch-compile", "rejected", "explicit_only", "fits, but is only used when it is named"),
        (
            "triton",
            "rejected",
            "toolchain",
            "needs a Triton that compiles for cuda: /usr/lib/python3/dist-packages/triton",
        ),
        ("x" * 30, "", "", "y" * 130),
    ]
    stream = io.StringIO()
    token = _show._answer.set(stream)
    _show.console().print(
        _show.table(
            "A title of some words",
            "Name",
            "State",
            "Code",
            "Why",
            rows=rows,
            whole=("Name", "State", "Code"),
        )
    )
    _show._answer.reset(token)
    text = stream.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    letters = re.sub(r"[\s─]", "", text)
    for row in [("A title of some words", "Name", "Why"), *rows]:
        for word in " ".join(row).split():
            assert (
                word in text
                or word in letters
                or all(letters.count(c) >= word.count(c) for c in set(word))
            )
            assert word in text or len(word) > 20 or width < 40
