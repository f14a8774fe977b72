"""Sum scores in Triton's interpreter, and go back, against the formulas in float64.

A process of its own, with ``TRITON_INTERPRET=1``. Arguments: a seed, what of ``CHECKS``, and how
often.
"""

# ruff: noqa: S311 -- cases are no secrets

import random
import sys

from interpreter import interpret

interpret()

import torch  # noqa: E402 -- after Triton interprets

import moe_routing  # noqa: E402 -- likewise
from moe_routing.balancing.problem import SCORES, BalanceProblem  # noqa: E402 -- likewise
from moe_routing.conformance import run  # noqa: E402 -- likewise
from moe_routing.formula.balance import summed, summed_backward  # noqa: E402 -- likewise
from moe_routing_backends.triton.balancing import balancer  # noqa: E402 -- likewise
from moe_routing_backends.triton.balancing.balancer import TritonBalance  # noqa: E402 -- likewise
from moe_routing_backends.triton.runtime import bound  # noqa: E402 -- likewise

KINDS = (*((score, "ids") for score in SCORES), ("softmax", "best"), ("logsumexp", ""))
DTYPES = ("bfloat16", "float16", "float32")
UNTOUCHED = 77.0


class Drawn:
    """A problem, and a call of it."""

    def __init__(self, kind=None, **sizes):
        self.score, self.counts = kind or random.choice(KINDS)
        E = self.E = sizes.get("E", random.choice([1, 5, 8, 60, 128, 300]))
        B = self.B = sizes.get("B", random.choice([1, 1, 3]))
        S = self.S = sizes.get("S", random.choice([1, 7, 40, 300]))
        K = {"ids": random.choice([1, 2, 9]), "best": random.randint(1, min(E, 9)), "": 0}
        self.K = K[self.counts]
        self.dtype = getattr(torch, random.choice(DTYPES))
        scale = random.choice([0.1, 3.0, 40.0])
        logits = (torch.randn(B, S, E) * scale).to(self.dtype)
        if self.counts == "best":
            # Far enough apart that no rounding decides which are the best.
            steps = torch.stack([torch.randperm(E) for _ in range(B * S)]).view(B, S, E)
            logits = (steps.float() * -min(0.5, 8 / E)).to(self.dtype)
        self.logits = random.choice([whole, strided, odd])(logits)
        self.ids = None
        if self.counts == "ids":
            drawn = torch.randint(-2, E + 2, (B, S, self.K))
            drawn[torch.rand(drawn.shape) < 0.05] = 2**40
            self.ids = drawn if random.random() < 0.5 else drawn.clamp(max=E).int()
        self.weights = None
        if random.random() < 0.5:
            if self.counts == "best":
                self.weights = torch.randint(0, 3, (B, S)).float()
            else:
                self.weights = torch.rand(B, S) < 0.6
                self.logits[~self.weights] = torch.nan

    @property
    def problem(self):
        return BalanceProblem(
            score=self.score,
            num_experts=self.E,
            dtype=str(self.dtype).removeprefix("torch."),
            counts=self.counts,
            topk=self.K,
        )

    @property
    def best(self):
        return self.K if self.counts == "best" else 0

    def __str__(self):
        strides = list(self.logits.stride())
        return f"{self.problem}: [{self.B}, {self.S}], strides {strides}, {self.weights is None}"

    def empty(self):
        """Return memory for the sums and the counts."""
        columns = (1, 0) if self.score == "logsumexp" else (self.E, self.E)
        counts = torch.float32 if self.best else torch.int64
        return (
            torch.full((self.B, columns[0]), UNTOUCHED),
            torch.full((self.B, columns[1]), 77, dtype=counts),
        )


def whole(logits):
    return logits


def strided(logits):
    """Return the logits as a slice of a wider tensor, each row at a multiple of 16 bytes."""
    B, S, E = logits.shape
    wide = logits.new_full((B, 2 * S, -(-E // 8) * 8 + 8), torch.nan)
    return wide[:, ::2, :E].copy_(logits)


def odd(logits):
    """Return the logits one element past a multiple of 16 bytes."""
    memory = logits.new_full((logits.numel() + 1,), torch.nan)
    return memory[1:].view(logits.shape).copy_(logits)


def close(found, exact, said, rtol=3e-6, atol=0.0):
    torch.testing.assert_close(
        found.double(), exact, rtol=rtol, atol=atol, msg=lambda why: f"{said}: {why}"
    )


def sums_and_gradients(device):
    """Compare a call and its gradient with the formulas in float64."""
    drawn = Drawn()
    kernel, said = TritonBalance(drawn.problem, device), str(drawn)
    sums, counts = drawn.empty()
    kernel(drawn.logits, drawn.ids, drawn.weights, sums, counts)
    given = drawn.weights, drawn.score, drawn.best
    # Rounded scores are those of the dtype itself.
    exactly = drawn.logits if drawn.best else drawn.logits.double()
    exact = summed(exactly, drawn.ids, *given)
    step = max(3e-6, torch.finfo(drawn.dtype).eps if drawn.best else 0.0)
    close(sums, exact[0].double(), said, rtol=step, atol=1e-6)
    assert torch.equal(counts, exact[1]), said
    grad = torch.randn(sums.shape)
    made = torch.full(drawn.logits.shape, UNTOUCHED, dtype=drawn.dtype)
    kernel.backward(grad, drawn.logits, drawn.weights, made)
    right = summed_backward(grad if drawn.best else grad.double(), exactly, *given)
    eps = torch.finfo(drawn.dtype).eps * (4 if drawn.best else 1)
    # The terms of a gradient that is 0 have errors of float32 next to the largest of the row.
    large = right.double().abs().amax().nan_to_num(0.0).item()
    close(made, right.double(), said, rtol=eps + 1e-5, atol=eps * large + 1e-6)


def nan_reaches_every_sum_of_its_batch(device):
    """Put NaN into a token of one batch of two."""
    for kind in KINDS:
        drawn = Drawn(kind, B=2, E=8, S=40)
        drawn.weights = None
        drawn.logits = torch.randn(2, 40, 8).to(drawn.dtype)
        drawn.logits[1, 33, 5] = torch.nan
        sums, counts = drawn.empty()
        TritonBalance(drawn.problem, device)(drawn.logits, drawn.ids, None, sums, counts)
        assert sums[0].isfinite().all(), kind
        assert sums[1].isnan().all(), kind


def many_programs_and_few_leave_the_same(device):
    """Let one program sum all tiles of a batch, and then one each; and launch a batch at a time."""
    for kind in KINDS:
        drawn = Drawn(kind, B=3, E=300, S=20)
        found = []
        for summing, most in ((1, 2**31 - 1), (1024, 2**31 - 1), (1024, 2)):
            balancer.SUMMING, balancer.RETURNING, bound.MOST_PROGRAMS = summing, summing, most
            kernel = TritonBalance(drawn.problem, device)
            sums, counts = drawn.empty()
            kernel(drawn.logits, drawn.ids, drawn.weights, sums, counts)
            grad = torch.linspace(-1.0, 1.0, sums.numel()).view(sums.shape)
            made = torch.empty(drawn.logits.shape, dtype=drawn.dtype)
            kernel.backward(grad, drawn.logits, drawn.weights, made)
            found.append((sums, counts, made))
        for sums, counts, made in found[1:]:
            torch.testing.assert_close(sums, found[0][0])
            assert torch.equal(counts, found[0][1])
            assert torch.equal(made, found[0][2])


def conforms(_device):
    """Hold the backend to the kit's smallest cases."""
    report = run("triton", operation="balance", profile="smoke", seed=random.getrandbits(32))
    assert not report.failed, [(result.id, result.message) for result in report.failed][:3]
    assert report.count("passed") > 300


CHECKS = {
    check.__name__: check
    for check in (
        sums_and_gradients,
        nan_reaches_every_sum_of_its_batch,
        many_programs_and_few_leave_the_same,
        conforms,
    )
}


def main(seed, check, times):
    """Check in the interpreter."""
    random.seed(seed)
    torch.manual_seed(seed)
    device = moe_routing.probe("cpu")
    for _ in range(times):
        CHECKS[check](device)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
