"""Fixtures for every test: real plug-in distributions on disk, and a clean environment."""

from __future__ import annotations

import importlib
import os
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]
# CI must answer the same to the same commit; everybody else's runs keep looking for new examples.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

VARIABLES = ("MOE_ROUTING_BACKEND", "MOE_ROUTING_BLOCK", "MOE_ROUTING_STRICT", "MOE_ROUTING_VERIFY", "MOE_ROUTING_VLLM")
WIDTH = "COLUMNS"
"""Of the terminal, which lines are wrapped to."""


def pytest_ignore_collect(collection_path):
    """Only test files hold tests; the others are what they run in processes of their own, and not for a doctest's import."""
    return (collection_path.suffix == ".py" and not collection_path.name.startswith("test_")) or None


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    for variable in (*VARIABLES, WIDTH):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def install_plugin(tmp_path, monkeypatch):
    """Write a distribution with one module and one entry point, where importlib.metadata and import find it."""
    written = []

    def install(module, body, *, distribution=None, entry_point=None):
        distribution = distribution or f"{module.replace('_', '-')}-dist"
        site = tmp_path / distribution
        info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[moe_routing.backends]\n{entry_point or module} = {module}\n")
        (site / f"{module}.py").write_text(textwrap.dedent(body))
        monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        written.append(module)
        return site

    yield install
    for module in written:
        sys.modules.pop(module, None)


CARD = """
from moe_routing_registry import BackendSpec, Target, Verdict, RejectCode, hookimpl

def build(problem, device):
    return lambda logits, **operands: None

@hookimpl
def moe_routing_backends():
    return [BackendSpec(name={name!r}, factory="{module}:build", targets=(Target("cpu"),), {extra})]
"""


@pytest.fixture
def install_backend(install_plugin):
    """Install a plug-in whose card is ordinary but for ``extra``."""

    def install(name, extra="priority=10", *, distribution=None, more=""):
        module = f"plugin_{name}_{(distribution or 'x').replace('-', '_')}"
        body = textwrap.dedent(CARD).format(name=name, module=module, extra=extra) + textwrap.dedent(more)
        return install_plugin(module, body, distribution=distribution, entry_point=name)

    return install
