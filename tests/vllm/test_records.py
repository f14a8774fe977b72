"""What vLLM's own capturer of routed experts gives is what ``moe_routing.replay`` reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from checkpoints import NEW_TOKENS, PROMPT


def test_vllms_routed_experts_are_read_and_replayed(tmp_path):
    """A Qwen3-MoE with a dense layer between two with experts, in float32.

    vLLM's router on a CPU leaves a token's experts unsorted, so the record has them in another
    order than a recording of the same tokens by transformers.
    """
    result_file = tmp_path / "result.json"
    script = Path(__file__).with_name("record.py")
    command = [sys.executable, str(script), str(tmp_path / "checkpoint"), str(result_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(result_file.read_text())
    tokens = len(PROMPT) + NEW_TOKENS - 1  # the last was no input
    assert (result["shape"], result["dtype"]) == ([tokens, 3, 4], "uint8")
    assert result["dense"] == [[0] * 4] * tokens
    assert result["record"] == result["recorded"]
    assert result["replayed tokens"] == result["tokens"]
    assert len(set(result["tokens"])) > NEW_TOKENS // 4
    assert result["written again"]
    assert result["over HTTP"]
