"""Run every launch of the XPU's table in Triton's interpreter, against the oracle.

The script prints what is wrong as JSON.

A process of its own, as ``interpreted.py``, whose rows and comparison it uses.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "triton"))

import interpreted
import torch

from moe_routing_backends.triton.tuning.choose import SHIPPED
from moe_routing_backends.triton.tuning.table import parse

OF_KIND = {
    "logits": "gemma4",
    "row_sum": "softmax",
    "bias": "softmax_bias",
    "grouped": "deepseek_v3",
}
TOPK = {8: 8, 16: 10}


def main():
    """Interpret each launch once for its bits and list width.

    Rows are hostile in bfloat16, and have close scores in float32.
    """
    torch.set_num_threads(1)
    found = {}
    for (kind, bits, experts, width), steps in parse(
        (SHIPPED / "xpu.json").read_text(), "xpu.json"
    ).rules.items():
        for step in steps:
            if any(case.endswith(f" {bits} {experts} {step.launch}") for case in found):
                continue
            dtype, rows = (torch.float32, "close") if bits == 32 else (torch.bfloat16, "hostile")
            problems, _ = interpreted.run(
                OF_KIND[kind], step.launch, experts, TOPK[width], dtype, rows
            )
            found[f"{kind} {bits} {experts} {step.launch}"] = problems
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
