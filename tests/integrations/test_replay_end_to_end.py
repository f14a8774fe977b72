"""A model generates in one way and learns in another; near-ties in its routers show who replays.

Generation: a batch of 8, a cache, ``Router.gate``, and float32 or bfloat16. Learning: sequence by
sequence, whole, the routers' own logits, float32. Rows of a router's weight are equal in pairs but
for a little noise, and a token gets 3 experts: what rounding does decides who of a pair is third.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from moe_routing.integrations.transformers import patch, recording, replaying

BATCH, PROMPT, NEW = 8, 6, 16
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
    "num_local_experts": 16, "num_experts_per_tok": 3,
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


def built(weights, noise):
    """Build a model whose weights have passed through a dtype."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES)).eval()
    for layer in model.model.layers:
        rows = layer.mlp.gate.weight.data
        rows[1::2] = rows[::2] + noise * torch.randn_like(rows[::2])
    return model.to(weights)


def generated(model):
    """Return prompts with what a model makes of them, and the log-probabilities of the new."""
    prompts = torch.randint(3, 64, (BATCH, PROMPT), generator=torch.Generator().manual_seed(1))
    made = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        min_new_tokens=NEW,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return made.sequences, of_tokens(torch.stack(made.logits, 1), made.sequences[:, PROMPT:])


def of_tokens(logits, tokens):
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def learned(model, sequence):
    """Return the log-probabilities of a sequence's new tokens, whole and in one forward."""
    logits = model(input_ids=sequence[None, :-1], use_cache=False).logits[0, PROMPT - 1 :]
    return of_tokens(logits, sequence[PROMPT:])


@pytest.mark.parametrize(
    ("dtype", "noise", "bound", "at_least"),
    [(torch.float32, 1e-7, 1e-4, 0.5), (torch.bfloat16, 1e-3, 0.5, 1.0)],
    ids=["float32", "bfloat16"],
)
def test_log_probabilities_agree_with_replay_and_differ_without_it(dtype, noise, bound, at_least):
    engine, trainer = built(dtype, noise), built(dtype, noise).float()
    patch(engine, gate=True)
    patch(trainer)
    with recording(engine) as records:
        sequences, behavior = generated(engine)
    by_sequence = records.sequences(BATCH)
    apart = {"with replay": [], "without": []}
    for number, sequence in enumerate(sequences):
        apart["without"].append(learned(trainer, sequence) - behavior[number])
        with replaying(trainer, by_sequence[:, number]):
            found = learned(trainer, sequence)
            apart["with replay"].append(found - behavior[number])
            found.sum().backward()
    largest = {name: torch.stack(found).abs().max().item() for name, found in apart.items()}
    print(f"{dtype}: {largest}")  # noqa: T201 -- both numbers, with pytest -s
    assert largest["with replay"] < bound
    assert largest["without"] > at_least
    for layer in trainer.model.layers:
        assert layer.mlp.gate.weight.grad.isfinite().all()
        assert layer.mlp.gate.weight.grad.any()
