"""Fixtures for every test.

They are real plug-in distributions on disk, a clean environment, and one seed for all random
numbers.
"""

from __future__ import annotations

import importlib
import os
import random
import shlex
import sys
import textwrap
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]
SEED = "--hypothesis-seed"
"""The option that repeats a run: hypothesis, torch and random start from it."""

# The same on every machine. In CI hypothesis would load a profile of its own, which tries the same
# examples each time. A deadline and the health check `too_slow` measure wall-clock time, so both
# are off.
settings.register_profile(
    "moe-routing",
    settings.get_profile("default"),
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("moe-routing")

VARIABLES = (
    "MOE_ROUTING_BACKEND",
    "MOE_ROUTING_BLOCK",
    "MOE_ROUTING_STRICT",
    "MOE_ROUTING_VERIFY",
    "MOE_ROUTING_VLLM",
)
WIDTH = "COLUMNS"
"""Of the terminal, which lines are wrapped to."""


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Draw a seed unless the command line names one, before hypothesis reads the option.

    A worker of pytest-xdist gets it.
    """
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        config.option.hypothesis_seed = worker["seed"]
        threads = max(1, (os.cpu_count() or 1) // worker["workercount"])
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start
    elif config.getoption(SEED) in (None, "random"):
        config.option.hypothesis_seed = str(random.SystemRandom().getrandbits(32))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Tell a worker of pytest-xdist the seed."""
    node.workerinput["seed"] = node.config.getoption(SEED)


def repeat(config):
    """Return the command that repeats this run."""
    python, seed = os.path.relpath(sys.executable), f"{SEED}={config.getoption(SEED)}"
    given = [argument for argument in map(str, config.invocation_params.args) if argument != seed]
    return shlex.join(
        [sys.executable if python.startswith("..") else python, "-m", "pytest", *given, seed]
    )


def pytest_report_header(config):
    return f"random seed: {config.getoption(SEED)}; to repeat this run: {repeat(config)}"


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if exitstatus == pytest.ExitCode.TESTS_FAILED:
        terminalreporter.write_line(f"to repeat this run: {repeat(config)}")


def pytest_ignore_collect(collection_path):
    """Only test files hold tests.

    Tests run the other files in processes of their own, and doctest must not import those.
    """
    return (
        collection_path.suffix == ".py" and not collection_path.name.startswith("test_")
    ) or None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip a test that needs a GPU where there is none, whatever ``-m`` selected.

    An ``-m`` of the command line replaces the one of pyproject.toml. ``make test-gpu`` fails then.
    """
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU; torch sees none")


@pytest.fixture(scope="module")
def one_thread():
    """Compute in one thread: with tiny tensors, threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    for variable in (*VARIABLES, WIDTH):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(autouse=True)
def _seeded(request):
    """Start torch's and Python's random numbers of each test from the run's seed.

    The library hypothesis does so by itself.
    """
    seed = zlib.crc32(str(request.config.getoption(SEED)).encode())
    torch.manual_seed(seed)
    random.seed(seed)


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    """Forget what a test compiled.

    From the ninth router on, Dynamo runs `Router.__call__` as it is, in later tests too.
    """
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def install_plugin(tmp_path, monkeypatch):
    """Return a function that writes a distribution with one module and one entry point.

    importlib.metadata finds the distribution, and ``import`` the module.
    """
    written = []

    def install(module, body, *, distribution=None, entry_point=None):
        distribution = distribution or f"{module.replace('_', '-')}-dist"
        site = tmp_path / distribution
        info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
        )
        (info / "entry_points.txt").write_text(
            f"[moe_routing.backends]\n{entry_point or module} = {module}\n"
        )
        (site / f"{module}.py").write_text(textwrap.dedent(body))
        monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        written.append(module)
        return site

    yield install
    for module in written:
        sys.modules.pop(module, None)


CARD = """
from moe_routing_registry import BackendSpec, RejectCode, Target, Verdict, hookimpl

def build(problem, device):
    return lambda logits, **operands: None

@hookimpl
def moe_routing_backends():
    factories = {{"route": "{module}:build"}}
    return [BackendSpec(name={name!r}, factories=factories, targets=(Target("cpu"),), {extra})]
"""


@pytest.fixture
def install_backend(install_plugin):
    """Install a plug-in whose spec is ordinary but for ``extra``."""

    def install(name, extra="priority=10", *, distribution=None, more=""):
        module = f"plugin_{name}_{(distribution or 'x').replace('-', '_')}"
        body = textwrap.dedent(CARD).format(
            name=name, module=module, extra=extra
        ) + textwrap.dedent(more)
        return install_plugin(module, body, distribution=distribution, entry_point=name)

    return install
