"""``LoadMonitor`` and what it reads: a model's own layers, numbers, table, JSON and drawing."""

import copy
import json
import math
import pickle
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import moe_routing
from moe_routing import Load, LoadMonitor, Loads

E, K, T = 8, 2, 12
LAYERS = ("layers.0", "layers.1")


def routed(monitor, tokens=T):
    route = moe_routing.get_router("mixtral")
    return {layer: route(torch.randn(tokens, E), K, counts=monitor[layer]).ids for layer in LAYERS}


def test_each_layer_has_counts_of_its_own():
    monitor = LoadMonitor(E)
    ids = routed(monitor)
    assert list(monitor.counts) == list(LAYERS)
    loads = monitor.read()
    for layer in LAYERS:
        expected = torch.bincount(ids[layer].flatten(), minlength=E)
        assert loads.layers[layer].counts == tuple(expected.tolist())
    assert loads.overall.total == 2 * T * K
    overall = torch.bincount(torch.cat(list(ids.values())).flatten(), minlength=E)
    assert loads.overall.counts == tuple(overall.tolist())


def test_what_was_read_stays_and_a_reset_counts_on_in_the_same_memory():
    monitor = LoadMonitor(E)
    routed(monitor)
    before, kept = monitor.read(), monitor["layers.0"]
    monitor.reset()
    assert monitor.read().overall.total == 0
    assert before.overall.total == 2 * T * K
    routed(monitor)
    assert monitor["layers.0"] is kept
    assert kept.sum() == T * K


def test_counts_made_in_inference_mode_count_outside_too():
    monitor = LoadMonitor(E)
    with torch.inference_mode():
        routed(monitor)
    routed(monitor)
    assert monitor.read().overall.total == 4 * T * K


def test_a_monitor_is_copied_and_pickled_with_its_counts():
    monitor = LoadMonitor(E)
    routed(monitor)
    for made in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):  # noqa: S301 -- its own
        assert made.read() == monitor.read()
        made.reset()
        assert monitor.read().overall.total


def test_a_compiled_function_fills_it():
    monitor = LoadMonitor(E)
    route = moe_routing.get_router("mixtral")
    compiled = torch.compile(
        lambda logits: route(logits, K, counts=monitor["layers.0"]).ids,
        fullgraph=True,
        backend="aot_eager",
    )
    for times in (1, 2, 3):
        compiled(torch.randn(T, E))
        assert monitor["layers.0"].sum() == times * T * K
    monitor.reset()
    compiled(torch.randn(T, E))
    assert monitor["layers.0"].sum() == T * K


def test_counts_follow_a_layer_to_another_device():
    monitor = LoadMonitor()
    on_meta = monitor.on("a", E, torch.device("meta"))
    assert on_meta.is_meta
    counts = monitor.on("a", E, torch.device("cpu"))
    assert counts.tolist() == [0] * E
    assert monitor["a"] is counts
    assert monitor.on("a", E, "cpu") is counts


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"^num_experts: expected an int from 1"):
        LoadMonitor(0)
    with pytest.raises(TypeError, match=r"^num_experts: expected an int, got '8'"):
        LoadMonitor("8")
    with pytest.raises(TypeError, match=r"^device: expected a torch.device or its name, got 0"):
        LoadMonitor(E, device=0)
    with pytest.raises(ValueError, match=r"^device: expected the name of a torch.device, got 'wa"):
        LoadMonitor(E, device="warp")
    with pytest.raises(TypeError, match=r"^layer: expected a str, got 3"):
        LoadMonitor(E)[3]
    with pytest.raises(TypeError, match=r"^layer: expected a str, got 3"):
        LoadMonitor(E).on(3, E, "cpu")
    with pytest.raises(TypeError, match=r"^num_experts: expected an int, got '8'"):
        LoadMonitor().on("a", "8", "cpu")
    with pytest.raises(TypeError, match=r"^device: expected a torch.device or its name, got 0"):
        LoadMonitor().on("a", E, 0)
    with pytest.raises(ValueError, match=r"^num_experts: expected an int for the layer 'a'"):
        LoadMonitor()["a"]
    monitor = LoadMonitor(E)
    monitor["a"].add_(1)
    with pytest.raises(ValueError, match=r"^num_experts: expected 8, as the counts of 'a' have"):
        monitor.on("a", E + 1, torch.device("cpu"))


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=40))
def test_statistics_are_those_of_the_shares(counts):
    load = Load(tuple(counts))
    assert load.total == sum(counts)
    if not load.total:
        assert (load.entropy, load.max_over_mean) == (None, None)
        assert set(load.shares) == {0.0}
        return
    assert math.isclose(sum(load.shares), 1.0)
    exact = [count / load.total for count in counts]
    entropy = -sum(share * math.log2(share) for share in exact if share)
    assert math.isclose(load.entropy, entropy, abs_tol=1e-12)
    assert 0.0 <= load.entropy <= math.log2(len(counts)) + 1e-9
    assert math.isclose(load.max_over_mean, max(exact) * len(counts))
    assert 1.0 - 1e-9 <= load.max_over_mean <= len(counts) * (1 + 1e-9)


def test_the_extremes_of_the_statistics():
    even, one = Load((5,) * 8), Load((0, 7, 0, 0))
    assert (even.entropy, even.max_over_mean) == (3.0, 1.0)
    assert (one.entropy, one.max_over_mean) == (0.0, 4.0)
    assert math.copysign(1.0, one.entropy) == 1.0


def test_layers_of_other_sizes_add_up_by_expert_id():
    loads = Loads({"a": Load((1, 2)), "b": Load((0, 0, 3))})
    assert loads.overall.counts == (1, 2, 3)
    assert loads.worst == "b"


def test_nothing_counted_is_said_so():
    for loads in (Loads({}), LoadMonitor(E).read(), Loads({"a": Load((0, 0))})):
        assert loads.worst is None
        assert loads.overall.total == 0
        assert json.loads(loads.to_json())["overall"]["entropy"] is None
        assert str(loads).endswith(" 0 slots")
        shown(loads)


def shown(loads, width=80):
    console = Console(width=width)
    with console.capture() as captured:
        console.print(loads)
    return captured.get()


def test_json_has_every_number():
    loads = Loads({"a": Load((3, 1)), "b": Load((0, 0))})
    assert json.loads(loads.to_json()) == loads.to_dict()
    written = loads.to_dict()
    assert written["schema_version"] == 1
    assert written["worst"] == "a"
    assert written["layers"]["a"] == {
        "counts": [3, 1],
        "total": 4,
        "shares": [0.75, 0.25],
        "entropy": loads.layers["a"].entropy,
        "max_over_mean": 1.5,
    }


def test_the_table_has_a_row_for_each_layer_and_one_for_all():
    text = shown(Loads({"layers.0": Load((6, 2, 0, 0)), "layers.1": Load((0,) * 4)}), width=100)
    rows = [line.split() for line in text.splitlines() if line.strip()]
    assert ["layers.0", "8", "3.00", "0:", "75.0%", "2/4", "0.81/2.00"] in rows
    assert ["layers.1", "0", "-", "-", "-", "-"] in rows
    assert ["all", "layers", "8", "3.00", "0:", "75.0%", "2/4", "0.81/2.00"] in rows


def test_names_of_layers_are_text():
    text = shown(Loads({"[red]a\x1b[0m": Load((1,))}), width=100)
    assert "[red]a" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_drawing_is_written(tmp_path, ending):
    loads = Loads({"$a$": Load((3, 1)), "b": Load((0, 0)), "c": Load((1, 0, 2))})
    first, again = (tmp_path / f"{n}.{ending}" for n in range(2))
    loads.save_plot(first)
    loads.save_plot(str(again))
    assert first.read_bytes() == again.read_bytes()
    assert first.stat().st_size > 1000
    if ending == "svg":
        assert "$a$" in first.read_text()


def test_what_cannot_be_drawn_is_refused(tmp_path, monkeypatch):
    loads = Loads({"a": Load((3, 1))})
    with pytest.raises(ValueError, match=r"^path: expected a name that ends in .png or .svg"):
        loads.save_plot(tmp_path / "loads.pdf")
    with pytest.raises(ValueError, match=r"^loads: expected a layer with counts"):
        Loads({"a": Load((0, 0))}).save_plot(tmp_path / "loads.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'moe-routing\[bench\]'"):
        loads.save_plot(tmp_path / "loads.png")
