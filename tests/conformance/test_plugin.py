"""What the pytest plug-in costs people who only have us installed: next to nothing."""

import json
import subprocess
import sys
import textwrap

import pytest

from moe_routing.conformance import pytest_plugin as plugin


def python(code):
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_loading_the_plugin_loads_four_modules_of_ours_and_nothing_else():
    loaded = python("""
        import json, sys
        import pytest
        before = set(sys.modules)
        import moe_routing.conformance.pytest_plugin
        print(json.dumps(sorted(set(sys.modules) - before)))
    """)
    ours = [
        "moe_routing",
        "moe_routing._with_torch",
        "moe_routing.conformance",
        "moe_routing.conformance.pytest_plugin",
    ]
    assert [
        name for name in json.loads(loaded) if name.partition(".")[0] not in sys.stdlib_module_names
    ] == ours


def test_the_plugin_and_the_class_import_no_torch():
    loaded = python("""
        import sys
        import moe_routing.conformance.pytest_plugin
        from moe_routing.conformance import CombineConformance, PermuteConformance
        from moe_routing.conformance import PlanConformance, RouterConformance
        heavy = ("torch", "numpy", "pytest", "moe_routing_registry")
        print([name for name in heavy if name in sys.modules])
    """)
    assert loaded == "[]"


@pytest.mark.slow
def test_a_pytest_run_of_somebody_else_imports_no_torch(tmp_path):
    (tmp_path / "test_theirs.py").write_text(
        "import sys\ndef test_it():\n    assert 'torch' not in sys.modules\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stdout


def test_the_kits_own_files_are_left_alone_without_a_backend_and_for_other_operations(tmp_path):
    class Config:
        backend, operation = None, "route"

        def getoption(self, name):
            return {"--moe-backend": self.backend, "--moe-operation": self.operation}[name]

    config = Config()
    folder = tmp_path / "moe_routing" / "conformance"
    files = {
        "route": folder / "test_named_backend.py",
        "plan": folder / "test_named_backend_plan.py",
        "permute": folder / "test_named_backend_permute.py",
        "combine": folder / "test_named_backend_combine.py",
        "balance": folder / "test_named_backend_balance.py",
    }
    for file in files.values():
        assert plugin.pytest_ignore_collect(file, config) is True
    assert plugin.pytest_ignore_collect(tmp_path / "test_named_backend.py", config) is None
    assert plugin.pytest_ignore_collect(folder / "test_other.py", config) is None
    config.backend = "eager"
    for config.operation in files:
        for operation, file in files.items():
            ignored = plugin.pytest_ignore_collect(file, config)
            assert ignored is (None if operation == config.operation else True)
