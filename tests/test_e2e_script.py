"""The end-to-end benchmark runs: tiny models on the CPU, whose times mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "e2e_gemma4.py"
WAYS = {"stock", "routing", "block", "gate"}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gemma4", "qwen3", "gpt-oss"])
def test_every_model_is_compared_with_stock_and_measured_in_every_way(tmp_path, model):
    out = tmp_path / "out.json"
    run = [sys.executable, str(SCRIPT), "run", str(out), "--tiny", "--model", model]
    subprocess.run(
        [*run, "--batches", "1,2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # the tensors are tiny
        check=True,
    )
    said = json.loads(out.read_text())
    assert said["routing_agreement"]["wrong"] == 0
    assert said["routing_agreement"]["rows"] > 0
    assert said["gate_agreement"]["rows"] == said["routing_agreement"]["rows"]
    assert said["gate_agreement"]["differ"] <= said["gate_agreement"]["rows"] // 4
    assert said["experts_agreement"].keys() == {"1", "16"}
    assert [(row["stage"], row["batch"]) for row in said["rows"]] == [
        (stage, batch) for batch in (1, 2) for stage in ("prefill", "graph decode")
    ]
    for row in said["rows"]:
        assert row["ms"].keys() == row["predicted_ms"].keys() == WAYS
        assert row["predicted_ms"]["stock"] == row["median_ms"]["stock"]
        assert row["pieces_us_a_layer"].keys() == WAYS
        assert row["kernels_us_a_layer"].keys() == {"plan", "permute", "combine"}
