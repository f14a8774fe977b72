"""A broken plug-in costs only itself.

Distributions on disk are broken in every way, and the values of backend specs are tested.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
import warnings
from dataclasses import fields, is_dataclass

import pytest
import torch

import moe_routing
from moe_routing._registry import BUILT_IN
from moe_routing.families import FAMILIES
from moe_routing.models import MODELS
from moe_routing.operations import OPERATIONS
from moe_routing_registry import (
    BackendSpec,
    DeviceInfo,
    FamilySpec,
    OperationSpec,
    Registry,
    RejectCode,
    Request,
    RoutingProblem,
    RoutingSpec,
    Target,
    Verdict,
)
from moe_routing_registry.errors import FactoryError, PluginWarning
from moe_routing_registry.request import preference

CPU = DeviceInfo(type="cpu", platform="cpu", arch="x86_64")
SPEC = RoutingSpec(family="topk_softmax", renormalize=True)
PROBLEM = RoutingProblem(spec=SPEC, num_experts=8, topk=2, dtype="float32")
HEAD = """
from moe_routing_registry import BackendSpec, FamilySpec, RoutingSpec, Target, Verdict, hookimpl
def build(problem, device):
    return lambda logits, **operands: None
T, ROUTE = (Target('cpu'),), {'route': 'a:b'}
"""


def registry():
    """Return a registry like the process's own."""
    return Registry(BUILT_IN, reserved={*FAMILIES, *MODELS}, operations=OPERATIONS)


def resolve(known, backend=None, problem=PROBLEM):
    return known.resolve(problem, CPU, Request.gather(backend))


# What a plug-in raises

RAISES = {
    "SystemExit": "raise SystemExit(3)",
    "pytest.skip": "import pytest; pytest.skip('no gpu', allow_module_level=True)",
    "CancelledError": "import asyncio; raise asyncio.CancelledError",
    "GeneratorExit": "raise GeneratorExit",
    "a panic": "class Panic(BaseException): pass\nraise Panic('rust')",
    "an error whose message ends the process": (
        "class Mute(BaseException):\n    def __str__(self): raise SystemExit\nraise Mute"
    ),
    "an error whose message is no plain string": """
class Own(str):
    def isprintable(self): raise SystemExit
class E(Exception):
    def __str__(self): return Own()
raise E
""",
    "an error whose cause cannot be had": (
        "class E(Exception):\n    __cause__ = property(lambda self: 1 / 0)\nraise E"
    ),
    "an error without words": (
        "class Mute(Exception):\n    def __str__(self): raise ValueError\nraise Mute"
    ),
    "a syntax error": "def (",
    "recursion": "def f(): f()\nf()",
    "a missing module": "import no_such_module",
}


@pytest.mark.parametrize("body", RAISES.values(), ids=RAISES)
def test_whatever_an_import_raises_costs_only_the_plug_in(install_plugin, install_backend, body):
    install_plugin("broken", body)
    install_backend("fine")
    known = registry()
    with pytest.warns(
        PluginWarning, match="'broken' of broken-dist 1.0 is not used: its import raised"
    ):
        report = resolve(known)
    assert report.winner == "fine"
    assert report.rejection("broken").verdict.code is RejectCode.IMPORT_FAILED
    assert "raceback" in report.rejection("broken").traceback


def test_a_keyboard_interrupt_is_the_users_and_the_next_call_loads_again(
    install_plugin, monkeypatch
):
    install_plugin(
        "slow_import", "import os\nif not os.environ.get('GO_ON'): raise KeyboardInterrupt"
    )
    known = registry()
    with pytest.raises(KeyboardInterrupt):
        resolve(known)
    monkeypatch.setenv("GO_ON", "1")
    with pytest.warns(PluginWarning, match="slow_import"):
        assert resolve(known).winner == "eager"


HOOKS = {
    "misspelt": ("def moe_routing_backend(): return []", "unknown hook 'moe_routing_backend'"),
    "returns nothing": (
        "def moe_routing_backends(): pass",
        "moe_routing_backends: expected a sequence of BackendSpec, got None",
    ),
    "returns a spec alone": (
        "def moe_routing_backends(): return SPEC",
        "expected a sequence of BackendSpec, got BackendSpec",
    ),
    "returns text": (
        "def moe_routing_backends(): return 'acme'",
        "expected a sequence of BackendSpec, got 'acme'",
    ),
    "returns a number": (
        "def moe_routing_families(): return 3",
        "moe_routing_families: expected a sequence of FamilySpec, got 3",
    ),
    "returns the other kind": (
        "def moe_routing_families(): return [SPEC]",
        "expected a sequence of FamilySpec",
    ),
    "returns a subclass": (
        (
            "def moe_routing_backends(own=type('Own', (BackendSpec,), {})): "
            "return [own(name='a', factories=ROUTE, targets=T)]"
        ),
        "expected a sequence of BackendSpec",
    ),
    "wants an argument": (
        "def moe_routing_backends(wrong): pass",
        "its registration raised PluginValidationError",
    ),
    "panics": (
        "def moe_routing_backends(): raise BaseException('rust')",
        "its registration raised BaseException: rust",
    ),
    "wrong field": (
        (
            "def moe_routing_backends(): "
            "return [BackendSpec(name='a', factories=ROUTE, targets=T, priority='9')]"
        ),
        "priority: expected an integer, got '9'",
    ),
    "name of a built-in backend": (
        (
            "def moe_routing_backends(): return [BackendSpec(name='eager', "
            "factories={'route': 'a:b'}, targets=(Target('cpu'),))]"
        ),
        "'eager' is the name of a built-in backend",
    ),
    "name of a built-in family": (
        (
            "def moe_routing_families(): "
            "return [FamilySpec(spec=RoutingSpec(family='gemma4'), source='x', oracle='a:b')]"
        ),
        "'gemma4' is the name of a built-in family or model",
    ),
    "name of a built-in model": (
        (
            "def moe_routing_families(s=RoutingSpec(family='a')): "
            "return [FamilySpec(spec=s, source='', models={'mixtral': s})]"
        ),
        "'mixtral' is the name of a built-in family or model",
    ),
    "one backend twice": (
        "def moe_routing_backends(): return [SPEC, SPEC]",
        "'acme' is the name of two of its backends",
    ),
    "one name twice": (
        (
            "def moe_routing_families(): "
            "return [FamilySpec(spec=RoutingSpec(family='acme_route'), source='x')] * 2"
        ),
        "'acme_route' is the name of a family or model of broken-dist 1.0 already",
    ),
}


@pytest.mark.parametrize(("hook", "said"), HOOKS.values(), ids=HOOKS)
def test_a_wrong_hook_or_spec_is_named_and_costs_only_the_plug_in(
    install_plugin, install_backend, hook, said
):
    own = "SPEC = BackendSpec(name='acme', factories=ROUTE, targets=T, priority=99)\n"
    install_plugin("broken", f"{HEAD}{own}@hookimpl\n{hook}\n")
    install_backend("fine")
    known = registry()
    with pytest.warns(PluginWarning, match="'broken' of broken-dist 1.0 is not used"):
        report = resolve(known)
    assert report.winner == "fine"
    assert report.rejection("broken").verdict.code is RejectCode.REGISTRATION_FAILED
    assert said in report.rejection("broken").verdict.reason
    assert not known.families


def test_a_hooks_answer_is_read_once(install_plugin):
    again = """
class Again(list):
    def __iter__(self):
        self.append(3)
        acme = BackendSpec(name="acme", factories=ROUTE, targets=T)
        return iter([acme] if len(self) == 1 else self)

@hookimpl
def moe_routing_backends(): return Again()
"""
    install_plugin("again", HEAD + again)
    assert "acme" in registry().backends


def test_a_plug_in_without_a_hook_is_named(install_plugin):
    install_plugin("hookless", "def moe_routing_backends(): return []  # not marked with hookimpl")
    with pytest.warns(
        PluginWarning,
        match="it implements none of the hooks moe_routing_backends, moe_routing_families",
    ):
        assert resolve(registry()).winner == "eager"


def test_a_plug_ins_wrapper_sees_only_its_own_hooks(install_plugin, install_backend):
    wrapper = (
        f"{HEAD}@hookimpl(wrapper=True)\ndef moe_routing_backends():\n    yield\n    return [[]]\n"
    )
    install_plugin("wrapping", wrapper)
    install_backend("fine")
    assert {"fine", "eager"} <= set(registry().backends)


@pytest.mark.slow
def test_a_plug_in_that_routes_at_its_import_is_refused_and_does_not_recurse(install_plugin):
    install_plugin("eager_beaver", "import moe_routing\nmoe_routing.list_backends()")
    said = run(
        "import warnings, moe_routing; warnings.simplefilter('ignore'); "
        "print(moe_routing.explain('mixtral'))"
    )
    assert said.startswith("eager: ")
    assert "not eager_beaver: its import raised RuntimeError: plug-ins are being loaded" in said


def test_where_warnings_are_errors_only_the_first_call_raises(install_plugin):
    install_plugin("broken", "1 / 0")
    known = registry()
    with pytest.raises(PluginWarning):
        resolve(known)
    assert resolve(known).winner == "eager"


@pytest.mark.slow
def test_a_plug_in_that_turns_warnings_into_errors_does_so_for_itself(install_plugin):
    install_plugin("aa_strict", "import warnings\nwarnings.simplefilter('error')\n1 / 0")
    done = run(
        "import moe_routing; print(moe_routing.explain('mixtral').winner); "
        "print(moe_routing.explain('mixtral').winner)"
    )
    assert done == "eager\neager\n"


def test_a_hook_that_turns_warnings_into_errors_does_so_for_itself(install_plugin):
    hook = (
        "@hookimpl\ndef moe_routing_backends():\n    import warnings\n"
        "    warnings.simplefilter('error')\n    return []\n"
    )
    install_plugin("strict_hook", HEAD + hook)
    before = list(warnings.filters)
    registry().load()
    assert warnings.filters == before


def test_the_command_that_uninstalls_is_safe_to_copy(install_plugin):
    site = install_plugin("named", "1 / 0")
    metadata = site / "named_dist-1.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: x;$(reboot)\nVersion: 1.0\n")
    known = registry()
    with pytest.warns(PluginWarning):
        assert resolve(known).rejection("named").verdict.fix == "pip uninstall 'x;$(reboot)'"


def test_two_plug_ins_with_one_family_leave_the_first(install_plugin):
    hook = (
        "@hookimpl\ndef moe_routing_families(): "
        "return [FamilySpec(spec=RoutingSpec(family='acme_route'), source=__name__)]"
    )
    install_plugin("one", HEAD + hook)
    install_plugin("two", HEAD + hook)
    known = registry()
    with pytest.warns(
        PluginWarning,
        match="'acme_route' is the name of a family or model of (one|two)-dist 1.0 already",
    ):
        assert known.families["acme_route"].source in {"one", "two"}
    assert len(known.failures) == 1


@pytest.mark.parametrize(
    ("oracle", "named"), [("", False), ("lowest:oracle", False), ("lowest:oracle", True)]
)
def test_a_family_with_an_oracle_of_its_own_is_for_backends_that_name_it(
    install_plugin, install_backend, oracle, named
):
    family = f"FamilySpec(spec=RoutingSpec(family='acme_lowest'), source='', oracle={oracle!r})"
    install_plugin("lowest", f"{HEAD}@hookimpl\ndef moe_routing_families(): return [{family}]")
    install_backend(
        "another", "families=frozenset({'acme_lowest'}), priority=10" if named else "priority=10"
    )
    problem = RoutingProblem(
        spec=RoutingSpec(family="acme_lowest"), num_experts=8, topk=2, dtype="float32"
    )
    report = resolve(registry(), problem=problem)
    assert report.winner == ("another" if named or not oracle else None)
    declined = {r.name for r in report.rejected if r.verdict.code is RejectCode.FAMILY}
    assert declined == (
        ({"eager"} if named else {"eager", "another"}) | {"torch-compile"} if oracle else set()
    )


@pytest.mark.parametrize("file", ["entry_points.txt", "METADATA"])
def test_metadata_that_cannot_be_decoded_costs_only_its_distribution(
    tmp_path, monkeypatch, install_backend, file
):
    info = tmp_path / "mangled" / "mangled-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mangled\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[console_scripts]\na = b:c\n")
    (info / file).write_bytes(b"\xff\xfe\x00[moe_routing.backends]\nx = y\n")
    monkeypatch.syspath_prepend(str(info.parent))
    importlib.invalidate_caches()
    install_backend("fine")
    known = registry()
    if file == "METADATA":
        assert resolve(known).winner == "fine"
        return
    with pytest.warns(
        PluginWarning,
        match=r"'mangled' of mangled 1\.0 is not used: reading its entry_points.txt raised Unicode",
    ):
        report = resolve(known)
    assert report.winner == "fine"
    assert report.rejection("mangled").verdict.fix == "pip uninstall mangled"


# What a backend raises when it is asked


def with_backend(install_plugin, body, **extra):
    """Install a backend ``acme`` whose spec is ordinary but for ``extra``.

    :param body: code in the module of the backend.
    """
    fields = "".join(f", {name}={value}" for name, value in extra.items())
    spec = (
        "BackendSpec(name='acme', factories={'route': 'acme_plugin:build'}, "
        f"targets=(Target('cpu'),), priority=99{fields})"
    )
    install_plugin(
        "acme_plugin", f"{HEAD}{body}\n@hookimpl\ndef moe_routing_backends(): return [{spec}]\n"
    )


PANIC = "class Panic(BaseException): pass\ndef rule(problem, device): raise Panic('rust')"


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_support_rule_that_panics_costs_only_its_backend(install_plugin, backend):
    with_backend(install_plugin, PANIC, supports="rule")
    report = resolve(registry(), backend)
    assert report.winner == "eager"
    assert report.rejection("acme").verdict.reason == "its support rule raised Panic: rust"


@pytest.mark.parametrize("answer", ["None", "True", "'yes'", "type('Own', (Verdict,), {})()"])
def test_a_support_rule_that_answers_with_something_else_costs_only_its_backend(
    install_plugin, answer
):
    with_backend(install_plugin, f"def rule(problem, device): return {answer}", supports="rule")
    report = resolve(registry())
    assert report.winner == "eager"
    assert "its support rule returned" in report.rejection("acme").verdict.reason


@pytest.mark.parametrize(
    ("body", "note"),
    [
        (PANIC, "its notes raised Panic: rust"),
        (
            "def rule(problem, device): return 'one'",
            "its notes returned 'one', not a tuple of strings",
        ),
        (
            "def rule(problem, device): return (1,)",
            "its notes returned (1,), not a tuple of strings",
        ),
        (
            "def rule(problem, device): return None",
            "its notes returned None, not a tuple of strings",
        ),
        (
            (
                "class Own:\n    __class__ = property(lambda self: 1 / 0)\n"
                "def rule(problem, device): return Own()"
            ),
            "its notes raised ZeroDivisionError: division by zero",
        ),
        (
            (
                "class Own(list):\n    def __iter__(self): raise SystemExit\n"
                "def rule(problem, device): return Own()"
            ),
            "its notes raised SystemExit",
        ),
        (
            (
                "class Own(str): __format__ = None\n"
                "def rule(problem, device): return [Own('a\\x1b\\nb')]"
            ),
            "a b",
        ),
        ("def rule(problem, device): return ['a' * 10**6]", "a" * 996 + " ..."),
    ],
)
def test_notes_that_raise_or_are_none_are_a_note(install_plugin, body, note):
    with_backend(install_plugin, body, notes="rule")
    report = resolve(registry())
    assert (report.winner, report.notes) == ("acme", (note,))
    assert f"note: {note}\n" in f"{report}\n"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "def build(problem, device): raise BaseException('rust')",
            "its factory raised BaseException: rust",
        ),
        ("def build(problem, device): return 3", "its factory returned 3, not a callable"),
        ("build = None", "its factory raised TypeError"),
        ("del build", "its factory raised AttributeError"),
    ],
)
def test_a_factory_that_fails_is_a_factory_error(install_plugin, body, said):
    with_backend(install_plugin, body)
    with pytest.raises(FactoryError, match=said):
        registry().build("acme", PROBLEM, CPU)


@pytest.mark.parametrize(
    "requirement",
    [
        "not valid !",
        "torch; no_such_marker == '1'",
        "torch @ file:///nowhere",
        "torch[",
        "",
        "torch<0",
    ],
)
def test_no_requirement_takes_routing_down(install_plugin, requirement):
    with_backend(install_plugin, "", requirements=(requirement,))
    assert resolve(registry()).winner in {"eager", "acme"}


# Fields of specs

HERE = (Target("cpu"),)
LONG = "x" * 10**6
BACKEND = {"name": "acme", "factories": {"route": "acme:build"}, "targets": HERE}
WRONG_BACKENDS = [
    *(
        ("name", value)
        for value in (
            None,
            3,
            "",
            "Upper",
            "with space",
            "a,b",
            "<b>",
            "a\x1b[31m",
            "é",
            "a" * 101,
            "a\n",
        )
    ),
    *(("factories", value) for value in (None, 3, "", "a:b", {}, {"Route": "a:b"}, {3: "a:b"})),
    *(
        ("factories", {"route": v})
        for v in (None, 3, "", "acme", ":build", "acme:", "a b:c", "acme:build:x", "a:b\x1b")
    ),
    *(
        ("targets", value)
        for value in (None, (), [], list(HERE), Target("cpu"), "cpu", ("cpu",), (*HERE, None))
    ),
    *(("targets", (value,)) for value in (type("Own", (Target,), {})("cpu"),)),
    *(("api_version", value) for value in (None, "1", 1.0, True, 2**31, 10**5000)),
    *(
        ("families", value)
        for value in (
            3,
            "mixtral",
            ["mixtral"],
            {"mixtral"},
            frozenset({3}),
            frozenset({"\x1b[31m"}),
            frozenset({""}),
        )
    ),
    *(("requirements", value) for value in (None, "torch", ["torch"], (5,), (None,), (LONG,))),
    *(("priority", value) for value in (None, "9", 9.0, True, float("nan"), -(2**31), 10**5000)),
    *(("supports", value) for value in (3, "rule", True)),
    *(("notes", value) for value in (3, "rule", ())),
    *(("summary", value) for value in (None, 3, ["x"], LONG)),
    *(
        ("tuners", value)
        for value in (None, 3, "acme", {"route": "a:b:c"}, {"route": ""}, {"sort": "a:b"})
    ),
    *(
        ("gaps", value)
        for value in (
            None,
            3,
            ["dtype"],
            {"dtype": ""},
            {"dtype": 3},
            {"dtype": LONG},
            {"speed": "slow"},
            {3: "x"},
        )
    ),
]
FAMILY = {"spec": RoutingSpec(family="acme_route"), "source": "ACME"}
WRONG_FAMILIES = [
    *(
        ("spec", value)
        for value in (
            None,
            "acme_route",
            {"family": "acme_route"},
            type("Own", (RoutingSpec,), {})(family="acme_route"),
        )
    ),
    *(("source", value) for value in (None, 3, LONG)),
    *(
        ("models", value)
        for value in (
            None,
            ["a"],
            {"<b>": FAMILY["spec"]},
            {3: FAMILY["spec"]},
            {"a": None},
            {"a": SPEC},
        )
    ),
    *(("oracle", value) for value in (None, 3, "oracle", "a b:c", f"a:{LONG}")),
]
OPERATION = {"name": "sort", "example": "a:b", "oracle": "a:c", "contract": "a:d"}
WRONG_OPERATIONS = [
    *(("name", value) for value in (None, 3, "", "<b>", LONG)),
    *((path, value) for path in ("example", "oracle", "contract") for value in (None, "", "a b:c")),
    *(("summary", value) for value in (None, 3, LONG)),
]
WRONG_TARGETS = [
    *(("platform", value) for value in (None, 3, "", "CUDA", "cuda:0", "a b")),
    *(("archs", value) for value in (None, "gfx942", ["gfx942"], {"gfx942"}, frozenset({9}))),
    *(
        ("min_capability", value)
        for value in (9, 9.0, "9.0", (9,), (9, 0, 0), (9.0, 0), [9, 0], (True, 0), (2**31, 0))
    ),
    *(("max_capability", value) for value in (9, "9.0", ("9", "0"))),
    *(("explicit", value) for value in (None, 1, "no")),
]
WRONG = [
    *((BackendSpec, {**BACKEND, field: value}, field) for field, value in WRONG_BACKENDS),
    *((FamilySpec, {**FAMILY, field: value}, field) for field, value in WRONG_FAMILIES),
    *((OperationSpec, {**OPERATION, field: value}, field) for field, value in WRONG_OPERATIONS),
    *((Target, {"platform": "cuda", field: value}, field) for field, value in WRONG_TARGETS),
    *(
        (Verdict, {"code": RejectCode.SHAPE, "reason": "no", field: value}, field)
        for field, value in (("reason", 3), ("fix", None))
    ),
]


@pytest.mark.parametrize(
    ("kind", "given", "field"),
    WRONG,
    ids=[f"{k.__name__}-{f}-{n}" for n, (k, _, f) in enumerate(WRONG)],
)
def test_a_spec_of_a_plug_in_refuses_a_wrong_field_by_name(kind, given, field):
    with pytest.raises((TypeError, ValueError), match=rf"^{field}: expected .*, got ") as raised:
        kind(**given)
    assert len(str(raised.value)) < 700


def own(value):
    """Return a value of a subclass, whose methods could do anything later."""
    return type("Own", (type(value),), {})(value)


OWN = [
    Target(own("cuda"), frozenset({own("sm_90")}), own((own(8), own(0))), None),
    BackendSpec(
        name=own("acme"),
        factories=own({own("route"): own("a:b")}),
        targets=own((Target("cpu"),)),
        api_version=own(1),
        families=own(frozenset({own("mixtral")})),
        requirements=own((own("torch"),)),
        priority=own(9),
        summary=own("fast"),
        tuners=own({own("route"): own("a:c")}),
        gaps=own({own("dtype"): own("half")}),
    ),
    FamilySpec(
        spec=RoutingSpec(family=own("acme_route")),
        source=own("ACME"),
        models=own({own("acme"): RoutingSpec(family="acme_route")}),
        oracle=own("a:b"),
    ),
    OperationSpec(**{name: own(value) for name, value in OPERATION.items()}, summary=own("sorts")),
    Verdict.no(RejectCode.SHAPE, own("too large"), own("pip install more")),
]


def values_in(value):
    """Return a value and all that it holds."""
    yield value
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple, frozenset)):
        for item in value:
            yield from values_in(item)


@pytest.mark.parametrize("spec", OWN, ids=lambda spec: type(spec).__name__)
def test_a_spec_keeps_plain_values_whatever_subclasses_came(spec):
    allowed = {str, int, bool, float, tuple, frozenset, dict, list, type(None), RejectCode}
    kinds = {type(value) for value in values_in(spec)}
    assert str in kinds
    assert kinds - {type(spec), RoutingSpec, Target} <= allowed


def test_a_spec_keeps_its_mappings_when_the_plug_in_changes_its_own():
    factories, models = {"route": "acme:build"}, {"acme_model": FAMILY["spec"]}
    backend, family = (
        BackendSpec(**{**BACKEND, "factories": factories}),
        FamilySpec(**FAMILY, models=models),
    )
    factories.clear()
    models["mixtral"] = None
    assert backend.factories == {"route": "acme:build"}
    assert family.names == {"acme_route", "acme_model"}


def test_a_registry_takes_nothing_but_backend_specs():
    with pytest.raises(TypeError, match="spec: expected a BackendSpec, got 3"):
        registry().register(3)


def test_a_verdict_keeps_a_line_of_limited_length():
    verdict = Verdict.no(RejectCode.SHAPE, f"a\n\x1b{LONG}", "b\x07")
    assert (verdict.reason, verdict.fix) == (f"a {'x' * 994} ...", "b")


# Specs

TORCH_SCALAR = torch.tensor(2.0)
WRONG_SPECS = [
    *(("family", value) for value in (None, 3, "", "Gemma", "a b", "<script>", "a\x07")),
    *(("score", value) for value in (None, "", "soft max", "<b>")),
    *(("selection", value) for value in (None, 3, "best", [])),
    *(("renormalize", value) for value in ("no", "True", 1, 0, None, 1.0)),
    *(("per_expert_scale", value) for value in ("yes", 1, None, [1.0])),
    *(("topk_per_group", value) for value in ("no", 2)),
    *(
        ("renorm_epsilon", value)
        for value in (-1.0, 1e-46, 1e-39, 1e39, float("nan"), float("inf"), "0", None, True)
    ),
    *(("renorm_floor", value) for value in (-1.0, 1e-46, 1e39, float("nan"), 1j)),
    *(
        ("scale", value)
        for value in (
            "2.5",
            1e39,
            -1e39,
            1e-46,
            float("nan"),
            float("-inf"),
            10**400,
            None,
            False,
            TORCH_SCALAR,
        )
    ),
    *(("num_groups", value) for value in (-1, 0, 2.0, "8", None, True, 2**31, 10**5000)),
    *(("topk_groups", value) for value in (0, 2, 1.0, None, True)),
    *(("group_by", value) for value in (None, "mean", 3)),
    *(
        ("logit_softcap", value)
        for value in (0, 0.0, -1.0, 1e-31, 1e31, 1e300, float("nan"), "30", True)
    ),
    *(("logit_multiplier", value) for value in (0, -1.0, 1e-31, 1e31, 1e300, None, "1")),
    *(("shared_experts", value) for value in (-1, 1.5, "1", None, True, 2**40)),
    *(("zero_experts", value) for value in (-1, 0.0, None, False)),
    *(("jitter", value) for value in (-0.1, 1e-46, 1e39, float("nan"), "0.01")),
]


@pytest.mark.parametrize(
    ("field", "value"), WRONG_SPECS, ids=[f"{f}-{type(v).__name__}" for f, v in WRONG_SPECS]
)
def test_a_spec_refuses_a_wrong_type_or_a_number_that_float32_cannot_hold_by_name(field, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{field}: expected .*, got "):
        RoutingSpec(**{"family": "f", field: value})


def test_an_error_shows_the_shape_of_a_tensor_and_never_its_elements():
    said = r"scale: expected a number, got a Tensor of shape \[3\], dtype torch.float32, device "
    with pytest.raises(TypeError, match=said):
        RoutingSpec(family="f", scale=torch.full((3,), 7.25))


def test_numpys_scalars_become_pythons():
    np = pytest.importorskip("numpy")
    given = {
        "renormalize": np.bool_(1),
        "scale": np.float32(2.5),
        "renorm_epsilon": np.float64(1e-20),
        "num_groups": np.int64(4),
        "topk_groups": np.uint8(2),
        "logit_softcap": np.float16(30.0),
        "score": np.str_("sigmoid"),
    }
    plain = RoutingSpec(family="f", **{name: value.item() for name, value in given.items()})
    spec = RoutingSpec(family="f", **given)
    assert (spec, hash(spec), spec.to_json()) == (plain, hash(plain), plain.to_json())
    assert [type(getattr(spec, name)) for name in given] == [
        type(getattr(plain, name)) for name in given
    ]
    assert RoutingSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(("one", "other"), [(2, 2.0), (-0.0, 0.0)])
def test_equal_specs_have_equal_texts(one, other):
    assert (
        RoutingSpec(family="f", scale=one).to_json()
        == RoutingSpec(family="f", scale=other).to_json()
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "spec: expected the JSON text of a RoutingSpec, got JSONDecodeError"),
        ("[" * 100_000, "spec: expected the JSON text of a RoutingSpec, got RecursionError"),
        ("[1]", r"spec: expected a JSON object, got \[1\]"),
        ("{}", "spec: expected the field family, got none"),
        (
            '{"family": "f", "colour": "red"}',
            "'colour': no field of a RoutingSpec, which has family, score",
        ),
        ('{"family": "f", "scale": NaN}', "scale: expected a number"),
        ('{"family": "f", "scale": 1e999}', "scale: expected a number"),
    ],
)
def test_a_text_that_is_no_spec_is_a_value_error_that_names_what_is_wrong(text, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        RoutingSpec.from_json(text)


def test_a_spec_can_be_made_inside_a_compiled_function():
    def scaled(x):
        return x * RoutingSpec(family="f", scale=2.5, renormalize=True, num_groups=4).scale

    assert torch.compile(scaled, fullgraph=True, backend="eager")(torch.ones(2)).tolist() == [
        2.5,
        2.5,
    ]


# Preferences


def test_a_preference_may_be_used_again_and_inside_itself():
    preferred = moe_routing.prefer("eager")
    for _ in range(2):
        with preferred:
            with preferred, moe_routing.prefer("triton"):
                assert preference.get() == "triton"
            assert preference.get() == "eager"
        assert preference.get() is None


def test_a_preference_serves_several_threads_at_once():
    preferred, seen = moe_routing.prefer("eager"), []
    inside = threading.Barrier(2)

    def work():
        with preferred:
            inside.wait()
            seen.append(preference.get())
            inside.wait()
        seen.append(preference.get())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, seen)) == ["None", "None", "eager", "eager"]


# Gradients of maths that only a third party knows

FAMILY_PLUGIN = """
import torch
from moe_routing import RoutingOutput
from moe_routing_registry import BackendSpec, FamilySpec, RoutingSpec, Target, hookimpl

SPEC = RoutingSpec(family="acme_route"{spec})

@hookimpl
def moe_routing_families():
    return [FamilySpec(spec=SPEC, source="ACME", oracle={oracle!r})]

@hookimpl
def moe_routing_backends():
    own, factories = frozenset({{"acme_route"}}), {{"route": "acme_family:build"}}
    return [BackendSpec(name="acme", factories=factories, targets=(Target("cpu"),), families=own)]

class Kernel:
    def __call__(self, logits, **operands):
        values, ids = logits.detach().sort(dim=-1, descending=True, stable=True)
        return RoutingOutput(values[:, :2] ** 2, ids[:, :2].to(torch.int32))
{backward}

def build(problem, device):
    return Kernel()
"""
BACKWARD = (
    "    def backward(self, grad_weights, logits, ids, scale): "
    "return torch.ones_like(logits), logits.new_empty(0)"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "oracle", "known"),
    [
        (', score="square"', "", "score function 'square'"),
        ("", "acme_family:oracle", "family 'acme_route', which has an oracle"),
    ],
    ids=["a score of its own", "an oracle of its own"],
)
def test_training_is_refused_by_name_where_only_the_kernel_could_have_gradients(
    install_plugin, spec, oracle, known
):
    site = install_plugin(
        "acme_family", FAMILY_PLUGIN.format(spec=spec, oracle=oracle, backward="")
    )
    said = run(TRAIN, site)
    assert "its kernel has no `backward`" in said
    assert known in said
    assert "[training]" in said


@pytest.mark.slow
def test_training_works_where_the_kernel_brings_its_gradients(install_plugin):
    body = FAMILY_PLUGIN.format(spec=', score="square"', oracle="", backward=BACKWARD)
    assert run(TRAIN, install_plugin("acme_family", body)) == "[[1.0, 1.0, 1.0, 1.0]]\n"


TRAIN = """
import torch, moe_routing
logits = torch.randn(1, 4, requires_grad=True)
route = moe_routing.get_router("acme_route", backend="acme")
route(logits.detach(), 2)
try:
    route(logits, 2).weights.sum().backward()
    print(logits.grad.tolist())
except moe_routing.BackendUnavailableError as error:
    print(error)
"""


def run(script, *sites):
    """Run a script in a process that finds the plug-ins that this one finds."""
    path = [*map(str, sites), *sys.path]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{script}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
