"""A newcomer who reads docs/writing_a_backend.md, types what it says, and nothing else."""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "writing_a_backend.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "examples" / "third_party_backend"
FILES = re.findall(
    r"from examples/third_party_backend/(\S+) -->\n\n```py\n(.*?)^```",
    PAGE,
    re.DOTALL | re.MULTILINE,
)
"""The names and texts of the files that the page shows."""
INSTALLED_ALREADY = "pip install '.[test]'"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def commands(block):
    return [line.removeprefix("$ ") for line in block.splitlines()]


class Shell:
    """A shell in a virtual environment of its own.

    moe-routing is installed in it as it is here, with its requirements.
    """

    def __init__(self, directory):
        self.directory = directory
        self.bin = directory / "environment" / "bin"
        venv.create(directory / "environment", with_pip=False, symlinks=True)
        packages = sysconfig.get_path("purelib", vars={"base": str(directory / "environment")})
        here = next(path for path in site.getsitepackages() if Path(path, "torch").exists())
        # Stands in for that, in a clone: this checkout, with the packages that the
        # tests run with.
        paths = [here, *(str(ROOT / source) for source in (".", "registry", "backends"))]
        lines = [f"import site; site.addsitedir({path!r})" for path in paths]
        Path(packages, "as_installed.pth").write_text("\n".join(lines) + "\n")
        for name, module in {"pip": "pip", "pytest": "pytest"}.items():
            self._script(name, f'exec "{self.bin}/python" -m {module} "$@"')
        self._script(
            "moe-routing",
            f'exec "{self.bin}/python" -c "from moe_routing.cli import main; main()" "$@"',
        )

    def _script(self, name, line):
        (self.bin / name).write_text(f"#!/bin/sh\n{line}\n")
        (self.bin / name).chmod(0o755)

    def __call__(self, command):
        environment = {
            **{
                k: v
                for k, v in os.environ.items()
                if not k.startswith("MOE_ROUTING_") and k != "PYTHONPATH"
            },
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        words = ["sh", "-c", command]
        return subprocess.run(
            words, cwd=self.directory, env=environment, capture_output=True, text=True, check=False
        )

    def done(self, command):
        ran = self(command)
        assert ran.returncode == 0, f"$ {command}\n{ran.stdout}\n{ran.stderr}"
        return ran.stdout


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    return Shell(tmp_path_factory.mktemp("newcomer"))


@pytest.fixture(scope="module")
def skeleton(shell):
    """Step 1: what each command printed."""
    first, *rest = commands(blocks("console")[0])
    assert first == INSTALLED_ALREADY
    return {command: shell.done(command) for command in rest}


@pytest.fixture(scope="module")
def acme(shell, skeleton):
    """Steps 2 to 4: the page's files in place of the skeleton's, and what each command printed."""
    assert skeleton
    assert len(FILES) == 3
    for name, code in FILES:
        (shell.directory / "moe-routing-acme" / name).write_text(code)
    project = shell.directory / "moe-routing-acme" / "pyproject.toml"
    text, (dependencies,) = project.read_text(), blocks("toml")
    assert 'dependencies = ["moe-routing"]\n' in text
    project.write_text(text.replace('dependencies = ["moe-routing"]\n', dependencies))
    return {command: shell.done(command) for command in commands(blocks("console")[1])}


@pytest.mark.slow
@pytest.mark.network
def test_the_skeleton_conforms_as_it_is_generated(skeleton):
    assert "acme conforms" in skeleton["moe-routing conformance acme"]


@pytest.mark.slow
@pytest.mark.network
def test_doctor_shows_the_installed_skeleton(skeleton):
    assert "acme" in skeleton["moe-routing doctor"]
    assert "explicit_only" in skeleton["moe-routing doctor"]
    assert "moe-routing-acme 0.1.0" in skeleton["moe-routing conformance acme"]


@pytest.mark.slow
@pytest.mark.network
def test_the_example_conforms(acme, shell):
    assert "acme conforms" in acme["moe-routing conformance acme --report acme.html"]
    assert "<td class='passed'" in (shell.directory / "acme.html").read_text()
    assert " passed" in next(
        output for command, output in acme.items() if command.startswith("pytest")
    )


@pytest.mark.slow
@pytest.mark.network
def test_the_page_s_python_routes_through_the_example(acme, shell):
    assert acme
    (script,) = blocks("python")
    (shell.directory / "use.py").write_text(script)
    assert "acme: asked for by the argument backend='acme'" in shell.done("python use.py")


@pytest.mark.slow
@pytest.mark.network
def test_the_example_plans(acme, shell):
    assert acme
    conformance, suite, plan = (shell.done(command) for command in commands(blocks("console")[2]))
    assert "acme conforms" in conformance
    assert " passed" in suite
    assert plan.strip() == "tensor([1, 0, 2, 3], dtype=torch.int32)"


@pytest.mark.slow
@pytest.mark.network
def test_the_example_s_benchmark_prints_a_line_for_every_size(acme, shell):
    assert acme
    shutil.copy(EXAMPLE / "benchmark.py", shell.directory)
    lines = shell.done("python benchmark.py 1 4096").strip().splitlines()
    assert len(lines) == 6
    assert all("times as fast as eager" in line for line in lines)


def test_the_example_is_the_distribution_that_the_page_builds():
    ours = (EXAMPLE / "pyproject.toml").read_text()
    assert blocks("toml")[0] in ours
    assert 'acme = "moe_routing_acme"' in ours


@pytest.mark.slow
@pytest.mark.network
def test_a_taken_directory_is_refused(shell, skeleton):
    assert skeleton
    ran = shell("moe-routing new-backend acme-two moe-routing-acme")
    assert ran.returncode == 2
    assert "expected a new or an empty one" in ran.stderr


@pytest.mark.slow
@pytest.mark.network
def test_it_runs_in_its_own_environment(shell):
    assert str(shell.directory) in shell.done("python -c 'import sys; print(sys.prefix)'")
    assert str(shell.directory) not in sys.prefix
