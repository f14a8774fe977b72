"""Capture routing, its plan and the moves of rows in a CUDA graph, and replay it for other tokens.

python examples/cuda_graph.py  # needs an NVIDIA or AMD GPU
"""

from __future__ import annotations

import sys

import torch

import moe_routing

EXPERTS, TOPK, HIDDEN, MOST = 128, 8, 1024, 64


def main() -> None:
    """Capture once, replay twice, and compare with plain calls."""
    if not torch.cuda.is_available():
        sys.exit("cuda_graph.py: expected a GPU that torch can use, found none")
    route = moe_routing.get_router("qwen3_moe")
    # Tensors that the graph reads and writes stay where they are. Only what they hold changes.
    logits = torch.zeros(MOST, EXPERTS, dtype=torch.bfloat16, device="cuda")
    hidden = torch.zeros(MOST, HIDDEN, dtype=torch.bfloat16, device="cuda")
    tokens = torch.zeros((), dtype=torch.int32, device="cuda")  # how many of the rows are used

    def layer() -> torch.Tensor:
        weights, _, plan = route.with_plan(logits, TOPK, num_valid_tokens=tokens)
        rows = moe_routing.permute(hidden, plan)
        return moe_routing.combine(rows, plan, weights)  # experts would come before this line

    # 1. Nothing compiles during a capture, so every call is made once before, on a side stream.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer()
    torch.cuda.current_stream().wait_stream(stream)

    # 2. Capture. Nothing runs yet.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer()

    # 3. Replay: fill the inputs, replay, read the output.
    for count in (3, MOST):
        logits.normal_()
        hidden.normal_()
        tokens.fill_(count)
        graph.replay()
        same = torch.equal(output, layer())
        unused = int(output[count:].count_nonzero())
        print(f"{count} tokens: same bits as a plain call: {same}, nonzero padding: {unused}")


if __name__ == "__main__":
    main()
