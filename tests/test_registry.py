from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import packaging
import pluggy
import pytest

from moe_routing._registry import BUILT_IN
from moe_routing.operations import OPERATIONS
from moe_routing_registry import (
    ACCELERATOR,
    ANY,
    BackendSpec,
    DeviceInfo,
    FamilySpec,
    Registry,
    RejectCode,
    Request,
    RoutingProblem,
    RoutingSpec,
    Target,
    UnknownNameError,
    Verdict,
)
from moe_routing_registry.errors import DuplicateNameError, FactoryError, PluginWarning
from moe_routing_registry.report import Rejection
from moe_routing_registry.request import flag, preferring

ROOT = Path(__file__).parents[1]
CPU = DeviceInfo(type="cpu", platform="cpu", arch="x86_64")
HOPPER = DeviceInfo(type="cuda", index=0, platform="cuda", arch="sm_90", name="NVIDIA H200")
PROBLEM = RoutingProblem(
    spec=RoutingSpec(family="topk_softmax", renormalize=True),
    num_experts=8,
    topk=2,
    dtype="float32",
)


ON_CPU = (Target("cpu"),)


def backend(name, *, priority=10, targets=ON_CPU, **fields):
    return BackendSpec(
        name=name, factories={"route": "json:dumps"}, targets=targets, priority=priority, **fields
    )


def registry_of(*backends):
    """Return a registry with these backends only."""
    registry = Registry(operations=OPERATIONS)
    for name in list(registry.backends):
        registry.unregister(name)
    for each in backends:
        registry.register(each)
    return registry


def resolve(registry, device=CPU, backend=None, problem=PROBLEM):
    return registry.resolve(problem, device, Request.gather(backend))


def code_of(report, name):
    return report.rejection(name).verdict.code


# Choosing


def test_the_higher_priority_wins():
    report = resolve(registry_of(backend("slow", priority=1), backend("fast", priority=2)))
    assert report.winner == "fast"
    assert [c.name for c in report.eligible] == ["fast", "slow"]
    assert report.asked_by == "probe"


def test_at_equal_priority_the_narrower_target_wins():
    wide = backend("a_wide", targets=(Target(ANY),))
    accelerator = backend("b_accelerator", targets=(Target(ACCELERATOR),))
    platform = backend("c_platform", targets=(Target("cuda"),))
    narrow = backend("d_narrow", targets=(Target("cuda", min_capability=(9, 0)),))
    report = resolve(registry_of(wide, accelerator, platform, narrow), HOPPER)
    assert [c.name for c in report.eligible] == [
        "d_narrow",
        "c_platform",
        "b_accelerator",
        "a_wide",
    ]


def test_at_equal_priority_and_target_the_name_decides():
    assert resolve(registry_of(backend("beta"), backend("alpha"))).winner == "alpha"


def test_argument_beats_context_beats_environment_beats_priority(monkeypatch):
    registry = registry_of(
        backend("best", priority=99), backend("arg"), backend("ctx"), backend("env")
    )
    assert resolve(registry).winner == "best"
    monkeypatch.setenv("MOE_ROUTING_BACKEND", "env")
    assert (resolve(registry).winner, resolve(registry).asked_by) == ("env", "environment")
    with preferring("ctx"):
        assert (resolve(registry).winner, resolve(registry).asked_by) == ("ctx", "context")
        report = resolve(registry, backend="arg")
        assert (report.winner, report.asked_by, report.requested) == ("arg", "argument", "arg")
    assert resolve(registry).winner == "env"


def test_naming_a_backend_that_does_not_fit_leaves_no_winner():
    report = resolve(
        registry_of(backend("gpu", targets=(Target("cuda"),)), backend("cpu")), backend="gpu"
    )
    assert report.winner is None
    assert "cannot be used" in report.why
    assert code_of(report, "gpu") is RejectCode.PLATFORM


def test_a_backend_without_a_priority_of_its_own_is_used_only_when_named():
    registry = registry_of(backend("acme", priority=-1), backend("eager", priority=0))
    report = resolve(registry)
    assert report.winner == "eager"
    assert code_of(report, "acme") is RejectCode.EXPLICIT_ONLY
    assert resolve(registry, backend="acme").winner == "acme"


def test_a_backend_may_be_explicit_only_on_one_kind_of_device():
    everywhere = backend("compiler", targets=(Target(ACCELERATOR), Target("cpu", explicit=True)))
    registry = registry_of(everywhere, backend("eager", priority=0, targets=(Target(ANY),)))
    assert resolve(registry, HOPPER).winner == "compiler"
    assert resolve(registry).winner == "eager"
    assert code_of(resolve(registry), "compiler") is RejectCode.EXPLICIT_ONLY
    assert resolve(registry, backend="compiler").winner == "compiler"


def test_a_blocked_backend_is_not_used(monkeypatch):
    monkeypatch.setenv("MOE_ROUTING_BLOCK", "fast, other")
    report = resolve(
        registry_of(backend("fast", priority=99), backend("other", priority=50), backend("slow"))
    )
    assert report.winner == "slow"
    assert code_of(report, "fast") is code_of(report, "other") is RejectCode.BLOCKED


@pytest.mark.parametrize("variable", ["MOE_ROUTING_BACKEND", "MOE_ROUTING_BLOCK"])
def test_a_misspelt_backend_in_the_environment_is_an_error_that_names_variable_and_near_matches(
    monkeypatch, variable
):
    monkeypatch.setenv(variable, "tritn")
    with pytest.raises(UnknownNameError, match=rf"{variable} 'tritn': did you mean 'triton'"):
        resolve(registry_of(backend("triton")))


def test_a_misspelt_backend_in_an_argument_lists_near_matches():
    with pytest.raises(
        UnknownNameError, match=r"'eagr': did you mean 'eager'\? Known: eager, other"
    ):
        resolve(registry_of(backend("eager"), backend("other")), backend="eagr")


@pytest.mark.parametrize(
    ("value", "meant"),
    [("1", True), ("true", True), ("on", True), ("0", False), ("no", False), ("", False)],
)
def test_a_flag_reads_zero_as_no(monkeypatch, value, meant):
    monkeypatch.setenv("MOE_ROUTING_STRICT", value)
    assert flag("MOE_ROUTING_STRICT") is meant


def test_an_unclear_flag_is_an_error(monkeypatch):
    monkeypatch.setenv("MOE_ROUTING_STRICT", "perhaps")
    with pytest.raises(ValueError, match=r"MOE_ROUTING_STRICT: expected 1 or 0, got 'perhaps'"):
        Request.gather()


# Rejecting


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"api_version": 99}, RejectCode.API_VERSION),
        ({"targets": (Target("cuda"),)}, RejectCode.PLATFORM),
        ({"families": frozenset({"other"})}, RejectCode.FAMILY),
        ({"requirements": ("no-such-distribution>=1",)}, RejectCode.REQUIREMENT_MISSING),
        ({"requirements": ("pluggy<0.1",)}, RejectCode.REQUIREMENT_VERSION),
        ({"requirements": ("not a requirement !",)}, RejectCode.REQUIREMENT_MISSING),
        (
            {"supports": lambda _p, _d: Verdict.no(RejectCode.SHAPE, "too few experts")},
            RejectCode.SHAPE,
        ),
        ({"supports": lambda _p, _d: 1 // 0}, RejectCode.SUPPORT_RULE_FAILED),
        ({"supports": lambda _p, _d: True}, RejectCode.SUPPORT_RULE_FAILED),
    ],
    ids=lambda value: value.value if isinstance(value, RejectCode) else "",
)
def test_each_reason_has_its_code(fields, code):
    report = resolve(registry_of(backend("bad", **fields), backend("good")))
    assert report.winner == "good"
    assert code_of(report, "bad") is code


def test_a_requirement_whose_marker_does_not_apply_is_met():
    fields = {"requirements": ("no-such-distribution; platform_system == 'Plan9'",)}
    assert resolve(registry_of(backend("fine", **fields))).winner == "fine"


def test_a_failing_support_rule_keeps_its_traceback():
    report = resolve(registry_of(backend("bad", supports=lambda _p, _d: 1 // 0)))
    assert "ZeroDivisionError" in report.rejection("bad").traceback


def test_a_better_backend_that_something_mendable_kept_away_is_named():
    missing = backend("fast", priority=99, requirements=("no-such-distribution",))
    assert resolve(registry_of(missing, backend("slow"))).missed == "fast"


@pytest.mark.parametrize(
    "fields",
    [
        {"priority": 99, "targets": (Target("cuda"),), "requirements": ("no-such-distribution",)},
        {"priority": 1, "requirements": ("no-such-distribution",)},
        {"priority": 99, "families": frozenset({"other"})},
        {"priority": -1, "requirements": ("no-such-distribution",)},
    ],
    ids=["other device", "worse anyway", "cannot do the problem", "only when named"],
)
def test_nothing_is_missed_where_the_choice_would_have_been_the_same(fields):
    assert resolve(registry_of(backend("other", **fields), backend("slow"))).missed is None


def test_a_factory_that_raises_is_a_rejection_with_its_own_code():
    registry = registry_of(backend("bad"))  # json.dumps(problem, device) raises TypeError
    with pytest.raises(FactoryError) as caught:
        registry.build("bad", PROBLEM, CPU)
    assert caught.value.rejection.verdict.code is RejectCode.FACTORY_FAILED
    assert "TypeError" in caught.value.rejection.traceback


def test_after_a_factory_failed_the_next_one_wins_and_the_failure_is_kept():
    report = resolve(registry_of(backend("bad", priority=99), backend("good")))
    after = report.without(
        Rejection(
            name="bad", verdict=Verdict.no(RejectCode.FACTORY_FAILED, "raised"), distribution="d"
        )
    )
    assert (after.winner, after.missed) == ("good", "bad")
    assert code_of(after, "bad") is RejectCode.FACTORY_FAILED


def test_a_rejection_without_a_code_or_a_sentence_cannot_be_constructed():
    with pytest.raises(TypeError, match="code: a rejection needs a RejectCode"):
        Verdict.no("because", "a sentence")
    with pytest.raises(ValueError, match="reason: a rejection needs a sentence"):
        Verdict.no(RejectCode.SHAPE, "")


# Targets


@pytest.mark.parametrize(
    ("target", "device", "code"),
    [
        (Target("cuda", min_capability=(8, 0)), HOPPER, None),
        (Target("cuda", min_capability=(8, 0), max_capability=(9, 0)), HOPPER, None),
        (Target("cuda", max_capability=(8, 9)), HOPPER, RejectCode.ARCH),
        (Target("cuda", min_capability=(10, 0)), HOPPER, RejectCode.ARCH),
        (Target("cuda"), CPU, RejectCode.PLATFORM),
        (Target(ACCELERATOR), CPU, RejectCode.PLATFORM),
        (Target(ACCELERATOR), HOPPER, None),
        (Target(ANY), CPU, None),
    ],
)
def test_cuda_generations_are_a_range(target, device, code):
    assert target.match(device).code is code


def test_rocm_generations_are_a_set_without_an_order():
    target = Target("rocm", archs=frozenset({"gfx942", "gfx950"}))
    mi300x = DeviceInfo(type="cuda", platform="rocm", arch="gfx942")
    radeon = DeviceInfo(type="cuda", platform="rocm", arch="gfx1100")
    assert target.match(mi300x)
    assert target.match(radeon).code is RejectCode.ARCH
    with pytest.raises(ValueError, match="only platform 'cuda' has an order"):
        Target("rocm", min_capability=(9, 0))


@pytest.mark.parametrize("name", ["", "Upper", "with space", "a,b", "a:b"])
def test_a_backend_name_that_could_not_be_typed_is_refused(name):
    with pytest.raises(ValueError, match="name: expected"):
        backend(name)


# Loading plug-ins


def test_an_installed_plugin_is_found_with_its_distribution(install_backend):
    install_backend("acme", distribution="acme-routing")
    registry = Registry(operations=OPERATIONS)
    assert resolve(registry).winner == "acme"
    assert registry.distribution("acme") == "acme-routing 1.0"


@pytest.mark.parametrize(
    "raises", ["raise ImportError('no libacme.so')", "import sys; sys.exit(1)", "1 / 0"]
)
def test_a_plugin_that_fails_at_import_costs_only_itself(install_plugin, install_backend, raises):
    install_plugin("broken", raises)
    install_backend("fine")
    registry = Registry(operations=OPERATIONS)
    with pytest.warns(
        PluginWarning, match="'broken' of broken-dist 1.0 is not used: its import raised"
    ):
        report = resolve(registry)
    assert report.winner == "fine"
    assert code_of(report, "broken") is RejectCode.IMPORT_FAILED
    assert "Traceback" in report.rejection("broken").traceback


@pytest.mark.parametrize(
    "hook",
    [
        "def moe_routing_backends(): 1 / 0",
        "def moe_routing_backends(): return ['acme']",
        "def moe_routing_backends(wrong): pass",
    ],
    ids=["raises", "returns no spec", "wrong signature"],
)
def test_a_plugin_that_fails_at_registration_costs_only_itself(
    install_plugin, install_backend, hook
):
    install_plugin("broken", f"from moe_routing_registry import hookimpl\n@hookimpl\n{hook}\n")
    install_backend("fine")
    registry = Registry(operations=OPERATIONS)
    with pytest.warns(PluginWarning, match="its registration raised"):
        report = resolve(registry)
    assert report.winner == "fine"
    assert code_of(report, "broken") is RejectCode.REGISTRATION_FAILED


def test_naming_a_plugin_that_failed_says_why(install_plugin):
    install_plugin("broken", "raise ImportError('no libacme.so')")
    registry = Registry(operations=OPERATIONS)
    with pytest.warns(PluginWarning):
        report = resolve(registry, backend="broken")
    assert report.winner is None
    assert "no libacme.so" in str(report)


def test_a_name_that_two_distributions_claim_is_an_error_naming_both(install_backend, monkeypatch):
    install_backend("acme", distribution="first-dist")
    install_backend("acme", distribution="second-dist")
    registry = Registry(operations=OPERATIONS)
    with pytest.raises(DuplicateNameError, match="backend 'acme'") as caught:
        resolve(registry)
    assert set(caught.value.distributions) == {"first-dist 1.0", "second-dist 1.0"}
    monkeypatch.setenv("MOE_ROUTING_BLOCK", "acme")
    registry.register(backend("other"))
    assert resolve(registry).winner == "other"


def test_a_family_may_come_from_a_plugin(install_plugin):
    body = """
    from moe_routing_registry import FamilySpec, RoutingSpec, hookimpl

    @hookimpl
    def moe_routing_families():
        return [FamilySpec(spec=RoutingSpec(family="acme_route"), source="ACME, 2026")]
    """
    install_plugin("acme_family", body)
    assert isinstance(Registry(operations=OPERATIONS).families["acme_route"], FamilySpec)


def test_the_report_is_json_all_the_way_down():
    report = resolve(
        registry_of(backend("good"), backend("bad", requirements=("no-such-distribution",)))
    )
    said = json.loads(json.dumps(report.to_dict()))
    assert said["winner"] == "good"
    assert said["rejected"][0]["code"] == "requirement_missing"
    assert said["rejected"][0]["fix"] == "pip install 'no-such-distribution'"


# Specs


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("family", ""),
        ("selection", "best"),
        ("renorm_epsilon", -1.0),
        ("scale", float("nan")),
        ("num_groups", -1),
        ("num_groups", 0),
        ("topk_groups", 2),
        ("group_sum", 0),
        ("group_by", "mean"),
        ("logit_softcap", 0.0),
        ("logit_multiplier", -1.0),
        ("shared_experts", -1),
        ("shared_weight", 0.4),
        ("shared_weight", float("inf")),
        ("zero_experts", -1),
        ("jitter", -0.1),
    ],
)
def test_a_spec_refuses_an_impossible_value_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: expected .*, got "):
        RoutingSpec(**{"family": "f", field: value})


# Real processes


def test_the_registry_works_where_torch_is_missing(tmp_path):
    for package in (pluggy, packaging):
        shutil.copytree(Path(package.__file__).parent, tmp_path / package.__name__)
    script = f"""
import sys
sys.path[:0] = [
    {str(tmp_path)!r}, {str(ROOT / "registry")!r}, {str(ROOT / "backends")!r}, {str(ROOT)!r}
]
from moe_routing._registry import registry
assert "eager" in registry().backends, registry().failures
assert registry().distribution("eager") == "moe-routing (no metadata)"
assert "torch" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-S", "-W", "error", "-c", script],
        check=True,
        env={"PATH": os.environ["PATH"]},
    )


def test_built_ins_are_the_entry_points_of_the_distribution():
    pyproject = (ROOT / "pyproject.toml").read_text()
    section = pyproject.split('[project.entry-points."moe_routing.backends"]')[1].split("[")[0]
    declared = dict(line.replace('"', "").split(" = ") for line in section.strip().splitlines())
    assert declared == dict(BUILT_IN)


def test_every_hook_is_documented():
    from moe_routing_registry import hooks as specifications

    written = "".join(page.read_text() for page in (ROOT / "docs").glob("**/*.md"))
    hooks = [name for name in vars(specifications) if name.startswith("moe_routing_")]
    assert hooks
    for hook in hooks:
        assert f"`{hook}`" in written, f"{hook} is not documented in docs/"
