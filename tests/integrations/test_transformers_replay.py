"""``recording`` and ``replaying``: models of transformers that keep and repeat what they selected.

Records are drawn at random where they are replayed, so that no router would select them itself.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import re
import runpy
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from moe_routing.integrations.transformers import patch, patched, recording, replaying, unpatch
from moe_routing.integrations.transformers._tapes import TAPE

AGAINST = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("against.py"))))
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
QWEN = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}
HERE = [case for case in AGAINST.CASES if AGAINST.is_here(case)]
LAYERS, E, K = 2, 8, 2
GATES = ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:`gradient_checkpointing_:FutureWarning"  # which older releases call nothing else
    ),
]


def mixtral(**settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES | settings)).eval()
    patch(model)
    return model


@pytest.fixture
def model():
    return mixtral()


def tokens(*shape):
    return torch.randint(SIZES["vocab_size"], shape)


def drawn(rows, layers=LAYERS, num_experts=E, topk=K):
    return torch.rand(layers, rows, num_experts).argsort(-1)[..., :topk]


def logits(model, ids, **settings):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **settings).logits


def generated(model, prompts):
    """Generate 6 tokens for each prompt; none of them is padding."""
    return model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        min_new_tokens=6,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )


def loss(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def pass_two(model, record):
    """Replay a record in two forwards, of 6 and of 4 tokens."""
    with replaying(model, record):
        logits(model, tokens(2, 3))
        logits(model, tokens(1, 4))


def gradients(model):
    """Take the gradients off a model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert found
    return found


class TestRecording:
    def test_the_ids_are_those_that_the_routers_return(self, model):
        returned = []
        gates = [model.get_submodule(name) for name in GATES]
        hooks = [gate.register_forward_hook(lambda *a: returned.append(a[2][2])) for gate in gates]
        with recording(model) as records:
            logits(model, tokens(2, 7))
            logits(model, tokens(1, 4))
        for hook in hooks:
            hook.remove()
        first, second = torch.stack(returned[:2]), torch.stack(returned[2:])
        assert (records.layers, records.ids.dtype) == (GATES, torch.int8)
        assert torch.equal(records.ids.long(), torch.cat([first, second], 1))
        assert repr(records) == "Records(layers=2, forwards=2, tokens=18)"

    def test_a_block_changes_no_result_and_what_is_outside_is_not_recorded(self, model):
        ids = tokens(2, 7)
        before = logits(model, ids)
        with recording(model) as records:
            inside = logits(model, ids)
        assert torch.equal(logits(model, ids), before)
        assert torch.equal(inside, before)
        assert records.ids.shape == (LAYERS, 14, K)

    @pytest.mark.parametrize(("experts", "dtype"), [(128, torch.int8), (129, torch.int16)])
    def test_the_dtype_is_the_least_that_holds_the_ids_and_minus_1(self, experts, dtype):
        model = mixtral(num_local_experts=experts, num_hidden_layers=1, intermediate_size=4)
        with recording(model) as records:
            logits(model, tokens(2, 3))
        assert records.ids.dtype is dtype

    def test_generated_sequences_are_what_the_whole_sequences_would_select(self, model):
        with recording(model) as records:
            made = generated(model, tokens(3, 5))
        by_sequence = records.sequences(3)
        assert by_sequence.shape == (LAYERS, 3, 10, K)  # the last token was no input
        with recording(model) as whole:
            logits(model, made[:, :-1])
        assert torch.equal(by_sequence.flatten(1, 2), whole.ids)
        assert not torch.equal(records.ids, whole.ids)  # a step has a token of each sequence

    @pytest.mark.parametrize(
        ("size", "error"), [(2, ValueError), (0, ValueError), ("3", TypeError), (True, TypeError)]
    )
    def test_a_batch_size_that_does_not_fit_is_refused(self, model, size, error):
        with recording(model) as records:
            logits(model, tokens(3, 5))
        with pytest.raises(error, match=r"^batch_size: expected"):
            records.sequences(size)

    def test_reading_nothing_says_so(self, model):
        with recording(model) as records:
            pass
        with pytest.raises(RuntimeError, match=f"no forward of {GATES[0]} was recorded"):
            _ = records.ids

    def test_routers_that_saw_other_tokens_are_named(self, model):
        with recording(model) as records:
            logits(model, tokens(1, 4))
            model.get_submodule(GATES[1])(torch.randn(3, 32))
        with pytest.raises(
            RuntimeError, match=f"{GATES[1]} has 2 forwards with 7 rows, .* 1 with 4"
        ):
            _ = records.ids

    def test_records_are_saved_and_loaded_by_torchs_defaults(self, model, tmp_path):
        with recording(model) as records:
            generated(model, tokens(2, 3))
        torch.save(records, tmp_path / "records.pt")
        loaded = torch.load(tmp_path / "records.pt", weights_only=True)
        assert loaded.layers == records.layers
        assert torch.equal(loaded.sequences(2), records.sequences(2))

    def test_layers_are_named_in_the_model_that_records(self, model):
        for module, names in (
            (model.model.layers[1], ("mlp.gate",)),
            (model, GATES),
            (model.model, tuple(name.removeprefix("model.") for name in GATES)),
        ):
            with recording(module) as records:
                pass
            assert records.layers == names

    def test_forwards_of_threads_that_overtake_each_other_are_told(self, model):
        gates, hidden = [model.get_submodule(name) for name in GATES], torch.randn(3, 32)
        with recording(model) as records:
            gates[0](hidden)
            in_another_thread(lambda: [gate(hidden) for gate in gates])
            gates[1](hidden)
        with pytest.raises(RuntimeError, match=f"several threads .*: {GATES[1]} and {GATES[0]}"):
            _ = records.ids
        with recording(model) as records:  # one at a time
            for _ in range(2):
                in_another_thread(lambda: [gate(hidden) for gate in gates])
            for gate in gates:
                gate(hidden)
        assert records.ids.shape == (LAYERS, 9, K)

    @pytest.mark.parametrize("block", [recording, lambda model: replaying(model, drawn(3))])
    def test_no_value_is_read_on_the_host(self, model, block):
        gate, hidden = model.get_submodule(GATES[0]), torch.randn(3, 32)
        other = model.get_submodule(GATES[1])
        with torch.no_grad():
            with Operators() as plain:
                gate(hidden)
            with block(model):
                with Operators() as taped:
                    gate(hidden)
                other(hidden)
        assert taped.names
        read = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item"}
        assert not read & (set(taped.names) - set(plain.names))


def in_another_thread(function):
    """Call a function in a thread, and return what it returned or raise what it raised."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


class Operators(TorchDispatchMode):
    """Keeps the names of the operators that are called in a block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


class TestReplaying:
    def test_each_forward_takes_the_next_rows(self, model):
        record, returned = drawn(18), []
        gate = model.get_submodule(GATES[1])
        hook = gate.register_forward_hook(lambda *a: returned.append(a[2][1:]))
        with replaying(model, record):
            logits(model, tokens(2, 7))
            logits(model, tokens(1, 4))
        hook.remove()
        assert torch.equal(torch.cat([ids for _, ids in returned]), record[1])
        for weights, _ in returned:
            torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int64])
    def test_records_and_ids_of_any_integer_dtype_are_replayed(self, model, dtype):
        ids = tokens(2, 7)
        with recording(model) as records:
            expected = logits(model, ids)
        for record in (records, records.ids.to(dtype)):
            with replaying(model, record):
                assert torch.equal(logits(model, ids), expected)

    def test_rows_of_minus_1_are_routed_as_usual(self, model):
        ids, record = tokens(1, 6), drawn(6)
        record[:, 4:] = -1
        plain = logits(model, ids)
        with recording(model) as records:
            logits(model, ids)
        with replaying(model, torch.full_like(record, -1)):
            assert torch.equal(logits(model, ids), plain)
        with replaying(model, torch.where(record < 0, record, records.ids.long())):
            assert torch.equal(logits(model, ids), plain)

    def test_another_model_of_the_same_layers_takes_the_record(self, model):
        other = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES | QWEN)).eval()
        patch(other)
        with recording(model) as records:
            logits(model, tokens(2, 3))
        gate = other.get_submodule(GATES[0])
        returned = []
        hook = gate.register_forward_hook(lambda *a: returned.append(a[2][2]))
        with replaying(other, records):
            logits(other, tokens(2, 3))
        hook.remove()
        assert torch.equal(returned[0], records.ids[0].long())

    def test_what_the_weights_learn_is_what_replayed_routing_has_gradients_for(self, model):
        ids, record = tokens(2, 4), drawn(8)
        with replaying(model, record):
            loss(model, ids).backward()
        found = gradients(model)
        unpatch(model)

        def forward(router, hidden):
            scores = nn.functional.linear(hidden.reshape(-1, 32), router.weight)
            chosen = record[[model.get_submodule(name) for name in GATES].index(router)]
            weights = scores.float().softmax(-1).gather(1, chosen)
            return scores, weights / weights.sum(-1, keepdim=True), chosen

        stock = MixtralTopKRouter.forward
        MixtralTopKRouter.forward = forward
        try:
            loss(model, ids).backward()
        finally:
            MixtralTopKRouter.forward = stock
        torch.testing.assert_close(found, gradients(model), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        ("record", "error", "said"),
        [
            (None, TypeError, "records: expected Records, or an integer tensor [layers, T, K]"),
            (drawn(5).float(), TypeError, "records: expected Records, or an integer tensor"),
            (drawn(5)[0], ValueError, "records: expected a plain, dense tensor [layers, T, K]"),
            (drawn(5).to_sparse(), ValueError, "records: expected a plain, dense tensor"),
            (drawn(5).to("meta"), ValueError, "records: expected a plain, dense tensor [layers, T"),
            (
                drawn(5, layers=3),
                ValueError,
                "records: expected 2 layers, one for each router from",
            ),
            (
                drawn(5, topk=3),
                ValueError,
                f"records: expected 2 experts a token, as {GATES[0]} sel",
            ),
        ],
    )
    def test_a_record_that_does_not_fit_is_refused_before_the_block(
        self, model, record, error, said
    ):
        with pytest.raises(error, match="^" + re.escape(said)), replaying(model, record):
            raise AssertionError
        with recording(model):  # no block is open
            pass

    def test_a_forward_of_more_tokens_than_rows_are_left_is_refused(self, model):
        said = f"expected 4 rows for the tokens of this forward, got 1 left of 7; at {GATES[0]}"
        with pytest.raises(ValueError, match="^records: " + said):
            pass_two(model, drawn(7))

    def test_forwards_are_all_in_the_thread_of_the_first(self, model):
        with replaying(model, drawn(6)):
            logits(model, tokens(2, 3))
        said = r"^records: expected the thread of the first forward .*, got another"
        with pytest.raises(ValueError, match=said), replaying(model, drawn(6)):
            in_another_thread(lambda: logits(model, tokens(2, 3)))
        in_another_thread(lambda: logits(model, tokens(2, 3)))  # outside of a block
        unpatch(model)
        patch(model)

        def replayed():
            with replaying(model, drawn(6)):
                logits(model, tokens(2, 3))

        in_another_thread(replayed)

    @pytest.mark.parametrize("block", [recording, lambda gate: replaying(gate, drawn(4, 1))])
    def test_what_vmap_batches_is_refused(self, model, block):
        gate = model.get_submodule(GATES[0])
        with pytest.raises(RuntimeError, match=r"cannot be batched by torch\.vmap"), block(gate):
            torch.vmap(lambda hidden: gate(hidden)[1])(torch.randn(3, 4, 32))

    def test_rows_that_nobody_took_are_an_error_at_the_end(self, model):
        said = f"records: expected 6 rows, as many as tokens were routed, got 7; at {GATES[0]}"
        with pytest.raises(ValueError, match=re.escape(said)), replaying(model, drawn(7)):
            logits(model, tokens(2, 3))

    def test_an_error_inside_the_block_is_not_hidden_by_rows_that_are_left(self, model):
        with pytest.raises(AttributeError), replaying(model, drawn(7)):
            _ = model.nothing
        with replaying(model, drawn(6)):
            logits(model, tokens(2, 3))


class TestModels:
    @pytest.mark.parametrize("block", [recording, lambda model: replaying(model, drawn(1))])
    def test_what_cannot_record_or_replay_is_refused(self, block):
        stock = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES))
        dense = nn.Linear(1, 1)
        for model, error, said in (
            (None, TypeError, "model: expected a torch.nn.Module, got None"),
            (dense, ValueError, "model: expected mixture-of-experts layers, got a Linear without"),
            (stock, ValueError, f"model: expected routers that route .*, got {GATES[0]}, which"),
        ):
            with pytest.raises(error, match="^" + said), block(model):
                raise AssertionError
        patch(stock)
        stock.get_submodule(GATES[1]).__class__ = MixtralTopKRouter
        with pytest.raises(ValueError, match=f"got {GATES[1]}, which does not"), block(stock):
            raise AssertionError

    @pytest.mark.parametrize("outer", ["records", "replays"])
    def test_a_block_in_a_block_is_refused_and_the_outer_goes_on(self, model, outer):
        ids = tokens(2, 3)
        block = recording(model) if outer == "records" else replaying(model, drawn(6))
        with block:
            for inner in (recording(model), replaying(model, drawn(6))):
                with pytest.raises(ValueError, match=f"a block that {outer}; at {GATES[0]}"):
                    inner.__enter__()
            logits(model, ids)

    def test_phimoe_trains_by_its_own_code_which_a_block_does_not_allow(self):
        router, call = router_of(AGAINST.BY_MODEL["phimoe"])
        patch(router)
        router.train()
        with recording(router), pytest.raises(ValueError, match=r"by its own code; call eval"):
            call()

    def test_a_class_that_was_changed_after_patch_is_refused_in_a_block(self, model, monkeypatch):
        stock = MixtralTopKRouter.forward
        with recording(model):
            monkeypatch.setattr(MixtralTopKRouter, "forward", functools.partialmethod(stock))
            with pytest.raises(ValueError, match=f"got {GATES[0]}, which runs .*; patch it again"):
                logits(model, tokens(1, 2))

    def test_a_replica_of_data_parallel_which_would_share_the_tape_is_refused(self, model):
        gate = model.get_submodule(GATES[0])
        with recording(model):
            replica = gate._replicate_for_data_parallel()
            replica.weight = gate.weight.detach()
            with pytest.raises(ValueError, match=r"is a replica of nn\.DataParallel"):
                replica(torch.randn(3, 32))
        replica(torch.randn(3, 32))

    def test_copies_and_pickles_leave_the_tape_behind(self, model):
        with recording(model) as records:
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 -- its own
                logits(other, tokens(1, 2))
                assert getattr(other.get_submodule(GATES[0]), TAPE) is None
            logits(model, tokens(1, 3))
        assert records.ids.shape == (LAYERS, 3, K)

    @pytest.mark.parametrize("mode", ["records", "replays"])
    def test_unpatch_in_a_block_is_refused_and_the_block_goes_on(self, model, mode):
        block = recording(model) if mode == "records" else replaying(model, drawn(6))
        said = f"^model: .*, got one in a block that {mode}; at {GATES[0]}"
        with block:
            with pytest.raises(ValueError, match=said):
                unpatch(model)
            with patched(model, experts=True):  # takes back nothing of what was patched before
                logits(model, tokens(2, 3))
        unpatch(model)

    def test_patched_must_not_end_in_a_block(self):
        model = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES))
        outer = patched(model)
        outer.__enter__()
        with recording(model) as records:
            with pytest.raises(ValueError, match=f"got one in a block that records; at {GATES[0]}"):
                outer.__exit__(None, None, None)
            logits(model, tokens(1, 2))
        assert records.ids.shape == (LAYERS, 2, K)

    def test_unpatch_leaves_nothing(self, model):
        with replaying(model, drawn(2)):
            logits(model, tokens(1, 2))
        unpatch(model)
        assert not any(TAPE in vars(module) for module in model.modules())


def router_of(case):
    """Build a router; return it, and a function that calls it as its block does."""
    torch.manual_seed(sum(map(ord, case.model)))
    router = AGAINST.built(case, AGAINST.configured(case, case.settings[-1]))
    hidden, bias = torch.randn(AGAINST.T, AGAINST.H), torch.empty(AGAINST.E).uniform_(-0.3, 0.3)
    arguments = case.arguments(hidden, bias)

    def call():
        if case.model == "dbrx":
            return router.route_tokens_to_experts(router.router(arguments[0]))
        return router(*arguments)

    return router, call


def same(ours, theirs):
    return all(
        torch.equal(mine, its) if isinstance(its, torch.Tensor) else mine == its
        for mine, its in zip(ours, theirs, strict=True)
    )


@pytest.mark.filterwarnings("ignore::moe_routing.MoeRoutingWarning")  # of those that do not gate
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("case", HERE, ids=lambda case: case.model)
@torch.no_grad()
def test_every_kind_of_router_records_and_replays(case, gate):
    router, call = router_of(case)
    patch(router, gate=gate)
    with recording(router) as records:
        live = call()
    assert records.ids.dtype is torch.int8
    with replaying(router, records):
        assert same(call(), live)
    other = records.ids.roll(1, dims=1)  # of the token before
    with replaying(router, other), recorded_ids(router) as seen:
        replayed = call()
    assert torch.equal(seen[0], other[0].long())
    assert not same(replayed, live)
    assert same(call(), live)


@contextlib.contextmanager
def recorded_ids(router):
    """Record the ids ``[T, K]`` that routing returns inside a block that replays."""
    seen, tape = [], getattr(router, TAPE)
    tape.keep = lambda ids, _num_experts: seen.append(ids.reshape(-1, ids.shape[-1]))
    tape.mode = "record"
    yield seen
    tape.mode = "replay"
    del tape.keep


def checkpointed(model, *, reentrant):
    model.train()
    settings = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


class TestTraining:
    """Micro-batches whose forwards are computed again in backward."""

    @pytest.fixture
    def batches(self):
        return [tokens(2, 7), tokens(1, 5), tokens(2, 7)]

    @pytest.fixture
    def record(self, batches):
        return drawn(sum(ids.numel() for ids in batches))

    @pytest.fixture
    def expected(self, batches, record):
        model = mixtral()
        with replaying(model, record):
            sum(loss(model, ids) for ids in batches).backward()
        return gradients(model)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("order", ["each", "together", "last first", "after the block"])
    def test_a_forward_that_is_computed_again_has_the_rows_that_it_had(  # noqa: PLR0913, PLR0917 -- fixtures
        self, model, batches, record, expected, order, reentrant
    ):
        checkpointed(model, reentrant=reentrant)
        losses = []
        with replaying(model, record):
            for ids in batches:
                losses.append(loss(model, ids))
                if order == "each":
                    losses.pop().backward()
            if order == "last first":
                while losses:
                    losses.pop().backward()
            if order == "together":
                sum(losses).backward()
        if order == "after the block":
            loss(model, batches[0])  # not replayed, nor is its backward
            sum(losses).backward()
        torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_forward_of_before_the_block_is_computed_again_without_the_record(
        self, model, batches, reentrant
    ):
        loss(model, batches[0]).backward()
        expected = gradients(model)
        checkpointed(model, reentrant=reentrant)
        for number in range(2):  # the second time the tape has been used
            before = loss(model, batches[0])
            with replaying(model, drawn(5)):
                loss(model, batches[1])
                before.backward()
            torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)
            assert number < 2

    def test_a_backward_two_blocks_late_is_refused_and_one_block_late_is_right(
        self, model, batches, record, expected
    ):
        checkpointed(model, reentrant=False)
        late = []
        for _ in range(2):
            with replaying(model, record):
                late.append(sum(loss(model, ids) for ids in batches))
        late[0].backward()
        torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)
        with replaying(model, record):
            late.append(sum(loss(model, ids) for ids in batches))
        with replaying(model, record):
            sum(loss(model, ids) for ids in batches)
        with pytest.raises(ValueError, match="expected the backward of a checkpointed forward bef"):
            late[1].backward()
        model.zero_grad()
        late[2].backward()
        torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_forward_that_is_computed_again_is_recorded_once(self, model, batches, reentrant):
        with recording(model) as plain:
            for ids in batches:
                loss(model, ids)
        checkpointed(model, reentrant=reentrant)
        with recording(model) as records:
            for ids in batches:
                loss(model, ids).backward()
        assert torch.equal(records.ids, plain.ids)


FSDP = """
    import os, sys, torch, torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM, MixtralConfig
    from moe_routing.integrations.transformers import patch, recording, replaying

    rank = int(sys.argv[2])
    dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(64, (2, 2, 1, 7), generator=generator)  # of each rank, of each step
    record = torch.rand(2, 2, 14, 8, generator=generator).argsort(-1)[..., :2]  # of each rank

    def model():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(MixtralConfig(**{sizes})).train()

    def passed(model, of_rank):
        return sum(
            model(input_ids=ids, labels=ids, use_cache=False).loss for ids in batches[of_rank]
        )

    whole = model()
    patch(whole)
    selected = []
    for of_rank in range(2):
        with replaying(whole, record[of_rank]):
            (passed(whole, of_rank) / 2).backward()
        with recording(whole) as records, torch.no_grad():
            passed(whole, of_rank)
        selected.append(records.ids)
    expected = [p.grad for p in whole.parameters()]

    sharded = model()
    patch(sharded)
    sharded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={{"use_reentrant": False}})
    for layer in sharded.model.layers:
        fully_shard(layer.mlp.gate, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    with replaying(sharded, record[rank]):
        passed(sharded, rank).backward()
    found = [p.grad.full_tensor() for p in sharded.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    with recording(sharded) as records:
        passed(sharded, rank).backward()
    assert torch.equal(records.ids, selected[rank])
    dist.destroy_process_group()
    print("held", flush=True)
    os._exit(0)  # a group that something still holds may abort the process while Python ends
"""


@pytest.mark.slow
def test_sharded_models_replay_each_ranks_record(tmp_path):
    script = textwrap.dedent(FSDP.format(sizes=SIZES))
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", script, tmp_path / "store", str(rank)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        output, errors = process.communicate()
        assert output == "held\n", errors
