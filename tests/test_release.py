"""What is released: the wheel and the sdist that `make dist` builds."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import moe_routing

ROOT = Path(__file__).parents[1]
PACKAGES = {"moe_routing", "moe_routing_registry", "moe_routing_backends"}
SOURCES = ("moe_routing", "registry/moe_routing_registry", "backends/moe_routing_backends")
SUFFIXES = {".py", ".typed", ".json", ".txt", ".md", ".toml"}
"""Of files that packages may hold."""
COMMAND = re.compile(r"moe-routing ([a-z]+)")
FOR_USERS = (ROOT / "RELEASING.md", ROOT / "SECURITY.md", *(ROOT / ".github").rglob("*.yml"))


def tracked(*folders):
    """Return the files that git tracks, whatever else lies in the tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", *folders],  # noqa: S607 -- the git that made the clone
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [name for name in listed.stdout.split("\0") if name]


def built(folder):
    """Build from a copy of the tracked files, as from a commit."""
    for name in tracked():
        copy = folder / "tree" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "tree"],
        check=True,
        capture_output=True,
        env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"},
    )
    return {path.name: path for path in (folder / "dist").iterdir()}


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """Return two builds of the same files, in folders of other names."""
    return [built(tmp_path_factory.mktemp(name)) for name in ("one", "another_place")]


def test_the_files_for_those_who_release_and_report_name_commands_that_exist():
    named = {name for path in FOR_USERS for name in COMMAND.findall(path.read_text())}
    assert {"doctor", "report", "bench", "explain", "conformance"} <= named
    shown = subprocess.run(
        [sys.executable, "-m", "moe_routing", "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert all(re.search(rf"\b{name}\b", shown) for name in named)


def test_the_version_has_one_place():
    (line,) = re.findall(
        r'^__version__ = "(.+)"$', tracked_text("moe_routing/__init__.py"), re.MULTILINE
    )
    assert line == moe_routing.__version__
    assert not re.search(r"^version\s*=", tracked_text("pyproject.toml"), re.MULTILINE)


def tracked_text(name):
    return (ROOT / name).read_text()


def test_the_templates_and_the_workflow_are_yaml():
    files = [path for path in FOR_USERS if path.suffix == ".yml"]
    forms = [yaml.safe_load(path.read_text()) for path in files]
    assert len(forms) == 6
    assert all(isinstance(form, dict) for form in forms)
    asked = [form for form in forms if "body" in form]
    assert len(asked) == 4
    assert all("moe-routing" in str(form["body"]) for form in asked)


@pytest.mark.network
def test_two_builds_of_the_same_files_have_the_same_bytes(builds):
    one, another = (
        {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in build.items()}
        for build in builds
    )
    release = f"moe_routing-{moe_routing.__version__}"
    assert set(one) == {f"{release}-py3-none-any.whl", f"{release}.tar.gz"}
    assert one == another


@pytest.mark.network
def test_the_wheel_holds_the_packages_and_nothing_else(builds):
    (wheel,) = (path for name, path in builds[0].items() if name.endswith(".whl"))
    held = zipfile.ZipFile(wheel).namelist()
    modules = {name for name in held if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in modules} == PACKAGES
    assert {Path(name).suffix for name in modules} <= SUFFIXES
    assert not any("__pycache__" in name for name in held)
    expected = {
        str(Path(name).relative_to(Path(folder).parent))
        for folder in SOURCES
        for name in tracked(folder)
    }
    assert modules == expected
    assert f"moe_routing-{moe_routing.__version__}.dist-info/licenses/LICENSE" in held


@pytest.mark.network
def test_the_sdist_holds_what_building_and_testing_need(builds):
    (sdist,) = (path for name, path in builds[0].items() if name.endswith(".tar.gz"))
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    missing = {"Makefile", "constraints.txt", "pyproject.toml", "README.md", "LICENSE"} - held
    assert not missing
    assert {name for name in tracked("tests", "examples") if name not in held} == set()
