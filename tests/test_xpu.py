"""Intel's XPU: when triton-xpu is chosen, its launch table and its launch options.

One router also runs on several kinds of devices.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_routing import Router
from moe_routing._registry import registry
from moe_routing.families import FAMILIES
from moe_routing.probing._describe import describe
from moe_routing.probing._installed import Installed, Triton
from moe_routing.probing._observe import Observation, TorchBuild
from moe_routing_backends.triton.runtime.xpu import in_sub_groups
from moe_routing_backends.triton.tuning import choose, table
from moe_routing_registry import DeviceInfo, RejectCode, Request, RoutingProblem

HERE = Path(__file__).parent
GEMMA4 = FAMILIES["gemma4"].spec
INTELS = Triton(distribution="triton-xpu", version="3.7.2", backends=("intel",))
NVIDIAS = Triton(version="3.7.1", backends=("amd", "nvidia"))


def recorded(file, triton=INTELS, ipex=None, **properties):
    record = json.loads((HERE / "recorded_devices" / f"{file}.json").read_text())
    return describe(
        Observation(
            type=record["type"],
            index=record["index"],
            properties=SimpleNamespace(**record["properties"] | properties),
            build=TorchBuild(**record["torch"]),
            installed=Installed(triton=triton, ipex=ipex),
        )
    )


def resolved(device, dtype="bfloat16"):
    return registry().resolve(
        RoutingProblem(spec=GEMMA4, num_experts=128, topk=8, dtype=dtype), device, Request()
    )


def test_an_arc_pro_b60_is_what_intel_says_it_is():
    b60 = recorded("intel_arc_pro_b60")
    assert (b60.platform, b60.arch, b60.name) == (
        "xpu",
        "bmg-g21",
        "Intel(R) Arc(TM) Pro B60 Graphics",
    )
    assert b60.total_memory == 24480 * 2**20
    assert b60.compute_units * 8 == 160  # execution units, 8 of them an Xe core
    assert b60.warp_sizes == (16, 32)


@pytest.mark.parametrize(
    ("file", "properties"),
    [
        ("intel_arc_pro_b60", {}),
        ("intel_max_1100", {}),
        ("intel_arc_pro_b60", {"device_id": 0xE20B, "name": "Intel(R) Arc(TM) B580 Graphics"}),
        ("intel_arc_pro_b60", {"architecture": 0x500800000, "device_id": 0xE223}),
        ("intel_arc_a770_unnamed", {}),
    ],
)
def test_an_intel_gpu_with_intels_triton_gets_triton_xpu(file, properties):
    report = resolved(recorded(file, **properties))
    assert report.winner == "triton-xpu"
    assert report.rejection("triton").verdict.code is RejectCode.PLATFORM


@pytest.mark.parametrize("triton", [None, NVIDIAS])
def test_without_intels_triton_torch_compile_routes_and_the_way_to_mend_it_is_said(triton):
    report = resolved(recorded("intel_arc_pro_b60", triton))
    verdict = report.rejection("triton-xpu").verdict
    assert (report.winner, report.missed, verdict.code) == (
        "torch-compile",
        "triton-xpu",
        RejectCode.TOOLCHAIN,
    )
    assert verdict.fix == "uv pip install --reinstall torch --torch-backend=xpu"


def test_the_retired_pair_of_torch_and_ipex_2_8_is_recognised_and_gets_triton_xpu_too():
    device = recorded(
        "intel_max_1100",
        Triton(distribution="triton-xpu", version="3.4.0", backends=("intel",)),
        "2.8.10+xpu",
    )
    assert device.toolchain("ipex").usable
    assert resolved(device).winner == "triton-xpu"


def test_a_device_without_the_tables_sub_groups_is_declined_by_its_arch():
    verdict = (
        resolved(recorded("intel_arc_pro_b60", sub_group_sizes=[8, 16]))
        .rejection("triton-xpu")
        .verdict
    )
    assert (verdict.code, verdict.reason) == (
        RejectCode.ARCH,
        "needs sub-groups of 16 and 32 lanes, the device has 8, 16",
    )


def test_on_an_xpu_its_own_table_applies_and_says_that_it_was_not_measured():
    found = choose.table_for(
        recorded("intel_arc_pro_b60"),
        RoutingProblem(spec=GEMMA4, num_experts=128, topk=8, dtype="bfloat16"),
    )
    assert found.source.endswith("xpu.json")
    assert "not measured" in found.provenance


def launches():
    rules = table.parse((choose.SHIPPED / "xpu.json").read_text(), "xpu.json").rules
    found = [step.launch for steps in rules.values() for step in steps]
    assert found
    return found


def test_every_launch_of_the_xpus_table_fills_whole_sub_groups_that_its_gpus_have():
    for launch in launches():
        assert launch.warp_size in (16, 32)
        if launch.variant == "thread_per_row":
            assert launch.block_t * launch.threads_per_row == launch.num_warps * launch.warp_size


def test_the_xpus_table_uses_no_kernel_with_nvidias_instructions():
    assert {launch.variant for launch in launches()} <= {"cooperative", "thread_per_row"}


def test_a_sub_group_survives_writing_and_reading_a_table():
    step = table.Step(math.inf, table.Launch("cooperative", 1, 1, 1, 32))
    key = ("logits", 16, 128, 8)
    assert table.parse(table.to_json("bmg-g21", "x", {key: (step,)}), "x").rules == {key: (step,)}


@dataclass
class Until3Dot5:
    num_warps: int = 4
    threads_per_warp: int = 32


@dataclass
class From3Dot6:
    num_warps: int = 4
    warp_size: int = 32


@pytest.mark.parametrize(
    ("options", "name"), [(Until3Dot5(), "threads_per_warp"), (From3Dot6(), "warp_size")]
)
def test_the_sub_group_goes_by_the_name_that_the_installed_triton_takes(options, name):
    assert in_sub_groups(options, 1, 32) == {"num_warps": 1, name: 32}


def test_a_launch_made_for_warps_of_32_gets_twice_the_sub_groups():
    assert in_sub_groups(From3Dot6(), 2, 0) == {"num_warps": 4, "warp_size": 16}


def test_a_triton_that_takes_neither_name_is_a_sentence():
    with pytest.raises(RuntimeError, match=r"have none of warp_size, threads_per_warp: "):
        in_sub_groups(DeviceInfo(type="cpu", platform="cpu"), 1, 16)


@pytest.mark.slow
def test_every_launch_of_the_xpus_table_agrees_with_the_oracle_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, str(HERE / "xpu" / "interpret_table.py")],
        check=False, capture_output=True, text=True, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) >= 10
    assert not {case: problems for case, problems in found.items() if problems}


def test_one_router_gets_the_right_backend_on_every_kind_of_device(monkeypatch):
    def cuda(index):
        record = json.loads((HERE / "recorded_devices" / "nvidia_h200.json").read_text())
        properties, build = SimpleNamespace(**record["properties"]), TorchBuild(**record["torch"])
        installed = Installed(triton=NVIDIAS if index == 0 else None)
        return describe(
            Observation(
                type="cuda", index=index, properties=properties, build=build, installed=installed
            )
        )

    here = {
        "cuda:0": cuda(0),
        "cuda:1": cuda(1),
        "xpu:0": recorded("intel_arc_pro_b60"),
        "mps:0": DeviceInfo(type="mps", platform="mps"),
    }
    from moe_routing import _dispatch, probe

    monkeypatch.setattr(_dispatch, "probe", lambda device: here.get(str(device)) or probe(device))
    monkeypatch.setattr(_dispatch, "locate", lambda _device: None)  # these devices are not here
    built = []

    def build(name, *_):
        built.append(name)
        return lambda **_: name

    monkeypatch.setattr(registry(), "build", build)
    route = Router(GEMMA4.replace(scale=1.25))  # no other test's problem: these kernels stay
    expected = {
        "cpu": "eager",
        "cuda:0": "triton",
        "cuda:1": "torch-compile",
        "xpu:0": "triton-xpu",
        "mps:0": "torch-compile",
        "meta": "eager",
    }
    with pytest.warns(match="routes with 'torch-compile', not with 'triton'"):
        chosen = {
            device: route.resolve(device, torch.bfloat16, 128, 8).report.winner
            for device in expected
        }
    assert chosen == expected
    assert built == list(expected.values())  # each once
