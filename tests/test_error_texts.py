"""What an error shows of a value.

It shows type and shape in one line, and never the elements of a tensor, whatever the text of the
value.
"""

from __future__ import annotations

import pytest
import torch

import moe_routing
from moe_routing import Router, RoutingSpec, get_router
from moe_routing.bench import Settings
from moe_routing.models import from_config
from moe_routing_registry import Verdict
from moe_routing_registry.text import shown

np = pytest.importorskip("numpy")

ELEMENT = 7.25
TENSOR = torch.full((3,), ELEMENT)


class Panics:
    def __repr__(self):
        raise BaseException  # noqa: TRY002 -- as an extension in Rust does


class Talks:
    def __repr__(self):
        return "\x1b[31m" + "y\n" * 1_000_000


class Shapeless:
    @property
    def shape(self):
        raise RuntimeError


class Lengthless(list):
    def __len__(self):
        raise RuntimeError


VALUES = {
    "a tensor": (TENSOR, "a Tensor of shape [3], dtype torch.float32, device cpu"),
    "a tensor of no dimensions": (
        TENSOR[0],
        "a Tensor of shape [], dtype torch.float32, device cpu",
    ),
    "a parameter": (
        torch.nn.Parameter(TENSOR),
        "a Parameter of shape [3], dtype torch.float32, device cpu",
    ),
    "a list of tensors": ([TENSOR, TENSOR], "a list of 2 items"),
    "a tuple of tensors": ((TENSOR,), "a tuple of 1 items"),
    "a dict of tensors": ({"a": TENSOR}, "a dict of 1 items"),
    "an output": (moe_routing.RoutingOutput(TENSOR, TENSOR), "a RoutingOutput of 2 items"),
    "an array": (np.full(3, ELEMENT), "a ndarray of shape [3], dtype float64"),
    "a list of arrays": ([np.full(3, ELEMENT)], "a list of 1 items"),
    "a list of many": (list("abcdefghi"), "a list of 9 items"),
    "a text that raises": (Panics(), "a Panics"),
    "a text without end": (Talks(), "[31m" + "y " * 95),
    "a long string": ("z" * 1_000_000, "'zzzz"),
    "a number without end": (10**5000, "an int of 16610 bits"),
    "a shape that raises": (Shapeless(), "a Shapeless"),
    "a length that raises": (Lengthless(), "a Lengthless"),
    "a class": (Panics, "<class "),
}
"""A value, and how its text begins."""
ARGUMENTS = [
    value
    for name, (value, _) in VALUES.items()
    if name not in ("a number without end", "a length that raises")
]
"""Those that are no number and no list of one number.

Nobody has to measure a list that cannot be measured.
"""


@pytest.mark.parametrize(("value", "text"), VALUES.values(), ids=VALUES)
def test_a_value_is_shown_in_one_line_without_elements(value, text):
    said = shown(value)
    assert said.startswith(text)
    assert len(said) <= 200
    assert str(ELEMENT) not in said
    assert said.isprintable()


def test_what_is_short_and_plain_is_shown_as_it_is():
    for value in (None, True, 3, 2.5, "a", (), [1, 2], ("a", None), torch.float32, np.int64(3)):
        assert shown(value) == repr(value)


def test_an_interrupt_passes_through():
    class Interrupts:
        def __repr__(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shown(Interrupts())


LOGITS = torch.randn(2, 4)
ROUTE = Router(RoutingSpec(family="f"))
FOUR_EXPERTS = Router(RoutingSpec(family="f"), num_experts=4)
EVERY_OPERAND = Router(RoutingSpec(family="f", selection="scores_plus_bias", per_expert_scale=True))
CALLS = {
    "logits": lambda value: FOUR_EXPERTS(value, 2),
    "topk": lambda value: ROUTE(LOGITS, value),
    "per_expert_scale": lambda value: EVERY_OPERAND(LOGITS, 2, value, bias=torch.zeros(4)),
    "bias": lambda value: EVERY_OPERAND(LOGITS, 2, torch.ones(4), bias=value),
    "token_ids": lambda value: ROUTE(LOGITS, 2, token_ids=value),
    "num_valid_tokens": lambda value: ROUTE(LOGITS, 2, num_valid_tokens=value),
    "expert_map": lambda value: ROUTE(LOGITS, 2, expert_map=value),
    "ids_dtype": lambda value: ROUTE(LOGITS, 2, ids_dtype=value),
    "out": lambda value: ROUTE(LOGITS, 2, out=value),
    "spec": Router,
    "router": lambda value: get_router([value]),
    "backend": lambda value: get_router("mixtral", backend=value),
    "verify": lambda value: get_router("mixtral", verify=value),
    "device": moe_routing.probe,
    "scale": lambda value: RoutingSpec(family="f", scale=value),
    "family": lambda value: RoutingSpec(family=value),
    "reason": lambda value: Verdict(None, value),
    "tokens": lambda value: Settings(tokens=(value,)),
    "num_local_experts": lambda value: from_config(
        {"model_type": "mixtral", "num_local_experts": value, "num_experts_per_tok": 2}
    ),
}


@pytest.mark.parametrize("value", ARGUMENTS)
@pytest.mark.parametrize("argument", CALLS)
def test_every_refusal_names_the_argument_and_shows_no_elements(argument, value):
    with pytest.raises((TypeError, ValueError)) as raised:
        CALLS[argument](value)
    said = str(raised.value)
    assert str(ELEMENT) not in said
    assert "\x1b" not in said
    assert len(said) < 700
    assert argument in said


@pytest.mark.parametrize(
    "argument", ["router", "device", "num_experts", "topk", "dtype", "backend", "training"]
)
def test_explain_reports_whatever_comes(argument):
    for value in ARGUMENTS:
        report = moe_routing.explain(**{"router": "mixtral", argument: value})
        assert report.winner is None
        assert str(ELEMENT) not in report.error
        assert report.error


WRONG = {
    "device": [None, 3, 2.5, True, [], "", "no such", "cuda:99", "a\x1b[31m", b"cpu", TENSOR],
    "dtype": [None, 3, [], {}, "float32", torch.int8, TENSOR, 10**5000],
    "ids_dtype": [None, 3, [], {}, "int32", torch.int8, TENSOR],
    "training": [None, 3, "yes", [], TENSOR],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in WRONG.items() for value in values],
    ids=shown,
)
def test_what_is_asked_ahead_of_a_call_is_checked_too(name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: ") as raised:
        ROUTE.warmup(8, 2, **{name: value})
    assert str(raised.value).isprintable()
    with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
        ROUTE.resolve(
            **{"device": "cpu", "dtype": torch.float32, "num_experts": 8, "topk": 2} | {name: value}
        )


def test_rows_is_true_or_false():
    with pytest.raises(TypeError, match=r"^rows: expected True or False, got 'yes'"):
        ROUTE.resolve("cpu", torch.float32, 8, 2, rows="yes")


@pytest.mark.parametrize("value", [3, [], {}, TENSOR, b"eager"], ids=shown)
def test_a_backend_is_a_name(value):
    with pytest.raises(TypeError, match=r"^backend: expected a name, or None, got "):
        Router(RoutingSpec(family="f"), backend=value)


class Immeasurable(float):
    def __float__(self):
        raise OSError

    __str__ = __repr__ = __float__


@pytest.mark.parametrize(
    "value",
    [10**5000, -(10**5000), 10**400, 2, -0.5, float("nan"), float("inf"), Immeasurable(0.5)],
    ids=shown,
)
def test_a_share_of_calls_is_a_number_from_0_to_1(value):
    with pytest.raises(
        ValueError, match=r"^verify: expected True, False or a share from 0 to 1, got "
    ) as raised:
        get_router("mixtral", verify=value)
    assert len(str(raised.value)) < 300
