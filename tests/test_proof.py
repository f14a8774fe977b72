"""Proof from hardware: the command that makes the file, and the checks of a file."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import check_proof  # noqa: E402 -- from the folder above
import prove  # noqa: E402 -- likewise

KEPT = sorted((ROOT / "benchmarks" / "hardware").glob("*.json"))


@pytest.fixture
def right():
    return json.loads(KEPT[0].read_text())


def test_every_file_that_was_kept_is_right():
    assert KEPT
    for path in KEPT:
        assert check_proof.problems(check_proof.read(path)) == []


def changed(held, path, value):
    """Return the file with another value at a path of names and numbers; ``...`` takes it away."""
    made = copy.deepcopy(held)
    *way, last = path
    at = made
    for step in way:
        at = at[step]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return made


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("schema",), 2, "schema: expected 1, got 2"),
        (("date",), "yesterday", "date: expected one like"),
        (("profile",), "all", "profile: expected"),
        (("device",), None, "file.device: expected fields, got NoneType"),
        (("device", "name"), ..., "file.device: expected name"),
        (("device", "more"), 1, "file.device: expected no more"),
        (("device", "name"), "a | b", "file.device.name: expected a line of words"),
        (("device", "name"), "<b>x</b>", "file.device.name: expected a line of words"),
        (("device", "name"), "x\n| y", "file.device.name: expected a line of words"),
        (("device", "name"), "`x`", "file.device.name: expected a line of words"),
        (("device", "name"), "x" * 201, "file.device.name: expected a line of words"),
        (("device", "total_memory"), -1, "file.device.total_memory: expected a count"),
        (("device", "compute_units"), True, "file.device.compute_units: expected a count"),
        (("versions", "torch"), ..., "versions: expected torch"),
        (("versions", "torch"), 2.13, "versions.torch: expected a line of words"),
        (("versions", "torch"), "2 | <i>", "versions.torch: expected a line of words"),
        (("device", "name"), "https://x.example", "file.device.name: expected a line of words"),
        (("device", "name"), "WWW.x.example", "file.device.name: expected a line of words"),
        (("operations", "route", "checked"), None, "operations.route.checked: expected a count"),
        (("times", 0, "microseconds"), 10**400, "times[0].microseconds: expected a time"),
        (("times", 0, "microseconds"), 0, "times[0].microseconds: expected more than 0"),
        (("times", 0, "microseconds"), None, "times[0].microseconds: expected a time"),
        (("versions", "<i>"), "1", "versions: expected names in words"),
        (("operations",), {}, "operations: expected some"),
        (("operations", "route", "ok"), False, "operations.route: expected ok to be whether"),
        (("operations", "route", "checked"), 0, "operations.route: expected ok to be whether"),
        (("operations", "route", "failed"), 1, "operations.route: expected ok to be whether"),
        (("operations", "route", "verdict"), "breaks it", "operations.route.verdict: expected"),
        (("operations", "route", "failures"), ["x"], "operations.route.failures: expected those"),
        (("operations", "route", "seconds"), math.inf, "operations.route.seconds: expected a time"),
        (("times", 0, "microseconds"), math.nan, "times[0].microseconds: expected a time"),
        (("times", 0, "microseconds"), "1", "times[0].microseconds: expected a time"),
        (("times", 0), [], "times[0]: expected fields, got list"),
        (("times",), [None] * 3000, "file.times: expected a list of at most 2000"),
        (("model",), {"not_run": 1}, "model.not_run: expected text"),
        (("model",), {"milliseconds": [{"stage": "x"}]}, "model.milliseconds[0]: expected batch"),
        (("wrong",), {"model": "in /home/me/x"}, "file.wrong.model: expected no path of a user's"),
        (("wrong",), {"model": "C:\\Users\\me"}, "file.wrong.model: expected no path of a user's"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_field(right, path, value, said):
    found = check_proof.problems(changed(right, path, value))
    assert any(each.startswith(said) for each in found), found


def test_a_verdict_gives_reasons_in_any_words(right):
    """It is not in the table; on accelerators its reasons are long."""
    verdict = "conforms: 9 checked, 3 declined (`bias` isn't <= 1: 3)" + "; and so on" * 30
    assert check_proof.problems(changed(right, ("operations", "route", "verdict"), verdict)) == []


def test_what_computes_wrong_values_has_no_time(right):
    row = right["times"][0] | {"microseconds": None, "spread": None, "wrong": True}
    assert check_proof.problems(changed(right, ("times", 0), row)) == []


@pytest.mark.parametrize("held", [None, [], "text", 1, {}])
def test_what_is_no_such_file_is_told(held):
    assert check_proof.problems(held)


def test_the_command_checks_and_keeps_a_file(right, tmp_path, monkeypatch, capsys):
    file = tmp_path / "proof.json"
    file.write_text(json.dumps(right))
    monkeypatch.setattr(check_proof, "KEPT", tmp_path / "hardware")
    assert check_proof.main([str(file)]) == 0
    assert check_proof.main([str(file), "--keep", "../mine"]) == 1
    assert "--keep: expected small letters, digits and -, got '../mine'" in capsys.readouterr().out
    assert check_proof.main([str(file), "--keep", "mi300x"]) == 0
    header, line, row = check_proof.rows()
    assert header.count("|") == line.count("|") == row.count("|")
    file.write_text(json.dumps(changed(right, ("schema",), 2)))
    assert check_proof.main([str(file)]) == 1
    file.write_text("no JSON")
    assert check_proof.main([str(file)]) == 2
    file.write_text(" " * (check_proof.LARGEST + 1))
    assert check_proof.main([str(file)]) == 2
    file.write_text("[" * 200_000)
    assert check_proof.main([str(file)]) == 2
    assert check_proof.main([str(tmp_path / "absent")]) == 2


def test_paths_and_the_host_are_replaced(monkeypatch):
    monkeypatch.setattr(prove.Path, "home", lambda: Path("/home/somebody"))
    monkeypatch.setattr(prove.platform, "node", lambda: "their-host")
    monkeypatch.setattr(prove.getpass, "getuser", lambda: "somebody")
    said = {
        "home": "in /home/somebody/x.py",
        "elsewhere": ["/data/somebody/y"],
        "mounted": "/mnt/team/project/model.bin is absent, a/b/c is not",
        "clone": f"{prove.ROOT}/moe_routing",
        "host": "at their-host",
    }
    assert prove.scrubbed(said) == {
        "home": "in ~/x.py",
        "elsewhere": ["/data/<user>/y"],
        "mounted": "<...>/model.bin is absent, a/b/c is not",
        "clone": "<clone>/moe_routing",
        "host": "at <host>",
    }


def test_a_part_that_dies_is_kept_with_what_it_said_last(capsys):
    parts = prove.Parts()
    script = "import os, sys; print('began', file=sys.stderr); print('it broke', file=sys.stderr); "
    assert parts.run("one", "-c", script + "sys.stderr.flush(); os._exit(3)") is None
    assert parts.run("two", "-c", "import os; os._exit(4)") is None
    assert parts.run("three", "-c", "print('[1]')") is None
    assert parts.run("four", "-c", "print('{\"a\": 1}')") == {"a": 1}
    assert parts.wrong == {"one": "it broke", "two": "code 4", "three": "[1]"}
    assert "exit code 3" in capsys.readouterr().out


def test_a_part_that_fails_after_it_wrote_is_wrong_and_keeps_what_it_wrote(tmp_path):
    parts, out = prove.Parts(), tmp_path / "out.json"
    script = f"import pathlib, sys; pathlib.Path({str(out)!r}).write_text('{{\"rows\": []}}'); "
    assert parts.run("one", "-c", script, out=out) == {"rows": []}
    assert not parts.wrong
    assert parts.run("two", "-c", script + "sys.exit('wrong rows')", out=out) == {"rows": []}
    assert parts.wrong == {"two": "wrong rows"}
    out.unlink()
    assert parts.run("three", "-c", "pass", out=out) is None
    assert parts.wrong["three"] == "code 0"


@pytest.mark.slow
def test_the_command_makes_a_right_file_whatever_a_plug_in_does(tmp_path):
    """A plug-in that raises, with its home in the message, is a warning of doctor's and no more."""
    plugins = tmp_path / "plugins"
    info = plugins / "moe_routing_broken-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moe-routing-broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[moe_routing.backends]\nbroken = moe_routing_broken\n")
    (plugins / "moe_routing_broken.py").write_text(
        "from pathlib import Path\nraise RuntimeError(f'nothing in {Path.home()}/models')\n"
    )
    script = tmp_path / "small.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "import prove\n"
        "prove.SHORT, prove.TIMED = ('--clause', '8'), {'plan': ('plan', '--tokens', '1')}\n"
        "sys.exit(prove.main(sys.argv[1:]))\n"
    )
    out = tmp_path / "proof.json"
    path = os.pathsep.join(filter(None, [str(plugins), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(script), "--short", "--device", "cpu", "--out", str(out)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    held = check_proof.read(out)
    assert check_proof.problems(held) == []
    assert held["device"]["type"] == "cpu"
    assert {"route", "gate", "plan", "permute", "combine", "balance"} <= held["operations"].keys()
    assert all(operation["ok"] for operation in held["operations"].values())
    assert {row["operation"] for row in held["times"]} == {"plan"}
    assert held["model"] == {"not_run": "the script needs CUDA or ROCm"}
    assert any("broken" in each["says"] for each in held["doctor"]), held["doctor"]
    assert str(Path.home()) not in out.read_text()
