"""``recording`` and ``replaying`` of compiled models, with checkpoints inside and outside.

Not with transformers 5.17, whose experts cannot be compiled.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from moe_routing.integrations.transformers import recording, replaying

REPLAY = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("test_transformers_replay.py")))
)
mixtral, tokens, drawn, loss, gradients, checkpointed = (
    REPLAY.mixtral,
    REPLAY.tokens,
    REPLAY.drawn,
    REPLAY.loss,
    REPLAY.gradients,
    REPLAY.checkpointed,
)
pytestmark = REPLAY.pytestmark


@pytest.mark.slow
@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # of Dynamo, about this machine
def test_compiled_models_record_and_replay_with_checkpoints_inside_and_outside(where):
    torch.compiler.reset()
    batches, record = [tokens(2, 7), tokens(2, 7)], drawn(28, layers=1)
    model = mixtral(num_hidden_layers=1, attn_implementation="eager")
    with recording(model) as plain:
        for ids in batches:
            loss(model, ids)
    with replaying(model, record):
        sum(loss(model, ids) for ids in batches).backward()
    expected = gradients(model)
    checkpointed(model, reentrant=False)
    options = {"fullgraph": True, "backend": "aot_eager"}
    compiled = model
    if where == "inside":
        compiled = torch.compile(model, **options)
    else:
        model.get_submodule("model.layers.0.mlp").compile(**options)
    with replaying(model, record):
        losses = [loss(compiled, ids) for ids in batches]
    sum(losses).backward()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)
    for again in range(2):
        graphs = counters["stats"]["unique_graphs"]
        with recording(model) as records:
            for ids in batches:
                loss(compiled, ids).backward()
        assert torch.equal(records.ids, plain.ids)
        assert not again or counters["stats"]["unique_graphs"] == graphs
