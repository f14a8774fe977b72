"""Run the core tests, the integration with transformers, and the kit with several versions.

``python tests/versions/run.py [oldest|...]``, or ``make matrix``. Each environment is a virtual
environment of its own, in ``.venv-matrix/``; they are made, tested and removed one after another,
since each takes 5 to 7 GB. What was found is written to ``results.json`` beside this file after
each of them, and ``docs/tables.py`` makes the table of ``docs/versions.md`` of it. Environments
that were not run keep their last result.

Exit code 1: a test failed that is not in ``KNOWN``, one that is there passed, or something could
not be installed. Exit code 2: no such environment, or no such Python.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv-matrix"
RESULTS = Path(__file__).with_name("results.json")


class Environment(NamedTuple):
    """Versions that are tested together."""

    python: str
    torch: str
    triton: str
    transformers: str


ENVIRONMENTS = {
    "oldest": Environment("3.10", "2.8.0", "3.6.0", "5.17.0"),
    "gpus": Environment("3.11", "2.11.0", "3.6.0", "5.21.1"),
    "later": Environment("3.12", "2.13.0", "3.8.0", "5.23.0"),
    "newest": Environment("3.13", "2.15.0", "3.9.0", "5.24.0"),
}
"""``gpus`` has the torch and Triton that ran on GPUs. ``newest`` follows the releases."""
QUICK = "not (slow or network or gpu)"
NOT_CORE = (
    "tests/integrations",  # the next part
    "tests/test_models.py",  # compares presets with the newest transformers, model by model
    "tests/test_models_against_transformers.py",
    "tests/test_demo.py",
    "tests/test_docs.py",
    "tests/test_release.py",
)
CORE = ["-m", QUICK, *(f"--ignore={path}" for path in NOT_CORE)]
# As `make transformers-check`: what releases before 5.21 or models before 5.24 do not have.
TRANSFORMERS = [
    "-m", f"{QUICK} and not patch_mapping", "-k", "not bfloat16 and not gradients and not preset",
    *sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests" / "integrations").glob("test_transformers_*.py")
        if not path.stem.endswith("_compile")
    ),
]  # fmt: skip
OPERATIONS = ("route", "gate", "plan", "permute", "combine", "balance")
_NO_QUALNAME = "code of Python 3.10 does not know the class or function that it stands in"
KNOWN: dict[str, dict[str, str]] = {
    "oldest": {
        "*.test_it_exports_with_dynamic_leading_sizes*": (
            "torch 2.8 exports no function that reads a tensor from outside, as the test's does"
        ),
        "*.test_the_tensors_of_a_caller_bear_no_mark_of_dynamo": (
            "Inductor of torch 2.8 imports `triton_key` from where Triton 3.6 does not have it"
        ),
        "*.test_a_compiled_checkpoint_counts_once": (
            "with torch 2.8 a compiled layer in an activation checkpoint counts twice"
        ),
        "*.test_a_router_that_somebody_wrapped_before_is_left_with_who_and_the_way_out*": (
            _NO_QUALNAME
        ),
        "*.test_a_class_whose_forward_was_*_is_left": _NO_QUALNAME,
        "*._enable.enable": "transformers 5.17 needs torchvision for it, which is not installed",
    },
    "newest": {
        "*.test_rows_of_whole_vectors_are_copied_16_bytes_at_a_time_and_signalled_to_other_gpus": (
            "Triton 3.9 keeps one register of the kernel that sends in local memory: one store and "
            "one load for each program"
        )
    },
}
"""By environment, tests that fail there (patterns of ids), and why."""


def main(names: list[str]) -> int:
    """Run the environments with these names, or all."""
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        print(f"environments: expected some of {', '.join(ENVIRONMENTS)}, got {unknown[0]}")
        return 2
    chosen = {name: ENVIRONMENTS[name] for name in names or ENVIRONMENTS}
    absent = [e.python for e in chosen.values() if shutil.which(f"python{e.python}") is None]
    if absent:
        print(f"PATH: expected python{absent[0]}, found none")
        return 2
    return max(_environment(name, environment) for name, environment in chosen.items())


def _environment(name: str, environment: Environment) -> int:
    print(f"==> {name}: {environment}", flush=True)
    folder = FOLDER / name
    try:
        python = _installed(folder, environment)
        parts = {
            "core": tested(python, folder, CORE),
            "transformers tests": tested(python, folder, TRANSFORMERS),
        }
        kits = {operation: _kit(python, operation) for operation in OPERATIONS}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    failed = [test for part in parts.values() for test in part["failed"]]
    found = judged(failed, KNOWN.get(name, {}))
    wrong = found.wrong + [f"kit of {op}" for op, kit in kits.items() if not kit["ok"]]
    for test in wrong:
        print(f"{name}: {test} failed")
    for pattern in found.passed:
        print(f"{name}: {pattern} is in KNOWN, and did not fail")
    held = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    held[name] = {
        **environment._asdict(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        **{part: {**counts, "failed": len(counts["failed"])} for part, counts in parts.items()},
        "kits": {operation: kit["checked"] for operation, kit in kits.items()},
        "known": found.known,
        "wrong": wrong,
    }
    ordered = {key: held[key] for key in ENVIRONMENTS if key in held}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
    return int(bool(wrong or found.passed))


class Judged(NamedTuple):
    """Failed tests that are known to, with the reason; others; and patterns that none matches."""

    known: dict[str, str]
    wrong: list[str]
    passed: list[str]


def judged(failed: list[str], patterns: dict[str, str]) -> Judged:
    """Compare the tests that failed with those that are known to fail, patterns of ids."""
    known = {
        test: reason
        for test in failed
        for pattern, reason in patterns.items()
        if fnmatchcase(test, pattern)
    }
    wrong = [test for test in failed if test not in known]
    passed = [
        pattern for pattern in patterns if not any(fnmatchcase(test, pattern) for test in failed)
    ]
    return Judged(known, wrong, passed)


def _installed(folder: Path, environment: Environment) -> Path:
    """Make the virtual environment, and return its Python."""
    shutil.rmtree(folder, ignore_errors=True)
    _run(f"python{environment.python}", "-m", "venv", str(folder))
    python = folder / "bin" / "python"
    pip = (str(python), "-m", "pip", "-q", "--disable-pip-version-check", "install")
    pip = (*pip, "--no-compile", "--no-cache-dir")
    transformers = f"transformers=={environment.transformers}"
    _run(*pip, f"torch=={environment.torch}", "-e", f"{ROOT}[test,bench]", transformers)
    # Last, since torch requires the Triton that it was built with, and here others are tried.
    _run(*pip, "--no-deps", f"triton=={environment.triton}")
    for package in ("torch", "triton", "transformers"):
        _require(python, package, getattr(environment, package))
    return python


def _require(python: Path, package: str, version: str) -> None:
    """Require the version: what is installed next may have replaced it."""
    asked = f"from importlib.metadata import version; print(version({package!r}))"
    command = [str(python), "-c", asked]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if found.partition("+")[0] != version:
        msg = f"{package}: expected {version}, found {found}"
        raise RuntimeError(msg)


def tested(python: Path, folder: Path, selection: list[str]) -> dict[str, object]:
    """Run tests, and return how many passed, which failed, and how many were skipped."""
    report = folder / "report.xml"
    said = folder / "said.txt"
    with said.open("w") as output:
        subprocess.run(
            [
                str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--numprocesses=auto",
                "--maxprocesses=8", "--dist=loadfile", f"--junitxml={report}",
                # torch's own while it compiles, on Python 3.13.0 only.
                "-W", "ignore:Guards may run slower on Python:RuntimeWarning", *selection,
            ],
            cwd=ROOT, check=False, stdout=output, stderr=output, env=_ENVIRONMENT,
        )  # fmt: skip
    if not report.exists():
        raise RuntimeError(said.read_text()[-3000:])
    cases = [case for suite in ET.parse(report).getroot() for case in suite]  # noqa: S314 -- pytest's
    failed = sorted(_name(case) for case in cases if _has(case, "failure", "error"))
    skipped = sum(_has(case, "skipped") for case in cases)
    print(said.read_text().splitlines()[-1], flush=True)
    return {"passed": len(cases) - len(failed) - skipped, "failed": failed, "skipped": skipped}


def _name(case: ET.Element) -> str:
    return f"{case.get('classname')}.{case.get('name')}"


def _has(case: ET.Element, *kinds: str) -> bool:
    return any(part.tag in kinds for part in case)


def _kit(python: Path, operation: str) -> dict[str, object]:
    """Check ``eager`` against the contract of an operation."""
    command = [str(python), "-m", "moe_routing", "conformance", "eager", "--operation", operation]
    done = subprocess.run(
        [*command, "--json"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        env=_ENVIRONMENT,
    )
    report = json.loads(done.stdout)
    print(f"eager, {operation}: {report['verdict']}", flush=True)
    return {"ok": done.returncode == 0, "checked": report["counts"]["checked"]}


_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
"""Of the tests: the code under test is the installed one."""


def _run(*command: str) -> None:
    print(f"  $ {' '.join(command)}", flush=True)
    subprocess.run(command, check=True, env=_ENVIRONMENT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
