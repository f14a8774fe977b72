"""What each rank of ``test_symmetric.py`` does: kernels in Triton's interpreter, on shared memory.

A rank may sleep where others would be ahead of it.
"""

from __future__ import annotations

import time
from copy import deepcopy

import torch
from mutants import registered
from mutants._mutant import Mutant
from shared_memory import of_processes
from torch import distributed

import moe_routing
from moe_routing.conformance.exchange import ranks
from moe_routing.distributed import ExchangeProblem, ExpertParallel
from moe_routing.distributed.kernel import Tokens
from moe_routing_backends import symmetric
from moe_routing_backends.symmetric import exchange, kernels
from moe_routing_registry import DeviceInfo

CPU = DeviceInfo(type="cpu", platform="cpu")
E, K, H, T = 6, 2, 24, 5
"""Experts of all ranks, slots, columns, and the most tokens."""
PAUSE = 0.5
"""Seconds in which another rank may do what it must not do yet."""


def build(problem, device):
    """Build the transport with memory that these processes share."""
    return exchange.build(problem, device, of_processes)


ON_SHARED_MEMORY = Mutant(
    build,
    "",
    operation="exchange",
    supports=lambda problem, _device: symmetric.fits(problem),
    gaps={"group": "writes into memory of one host, for ranks that have a most of tokens"},
)
"""Under a name of its own: on a CPU no user is offered it."""


def kit(rank, _number, seed, clauses):
    """Return what the kit says of the transport."""
    here = ranks.Here(rank, torch.device("cpu"), seed)
    with registered(ON_SHARED_MEMORY) as name:
        report = ranks.run(here, name, "smoke", clauses or None)
    return {
        "verdict": report.verdict,
        "failed": [f"{one.id}: {one.message}" for one in report.failed],
    }


def parallel(reduce="none"):
    """Return what a user gets of the transport."""
    with registered(ON_SHARED_MEMORY) as name:
        return ExpertParallel(None, E, reduce=reduce, max_tokens=T, device="cpu", transport=name)


def transport(number, reduce):
    """Return the transport of all ranks."""
    problem = ExchangeProblem(
        ranks=number, experts_per_rank=E // number, reduce=reduce, max_tokens=T
    )
    return build(problem, CPU)(distributed.group.WORLD)


def tokens(rank, turn, columns=H, topk=K, tokens=T - 1):
    """Return tokens of a rank that differ in each turn."""
    generator = torch.Generator().manual_seed(97 * turn + rank)
    hidden = torch.randn(tokens, columns, generator=generator).bfloat16()
    ids = torch.rand(tokens, E, generator=generator).argsort(1)[:, :topk].int()
    return Tokens(hidden, ids, torch.rand(tokens, topk, generator=generator))


def sums(made, given):
    """Return how far results are from those of experts that change nothing."""
    right = given.hidden.float() * given.weights.sum(1, keepdim=True)
    return float((made.float() - right).abs().max())


def there_and_back(ep, given):
    """Dispatch and combine."""
    rows, _ = ep.dispatch(*given[:3])
    return sums(ep.combine(rows), given)


def what_arrived(rank, number, reduce, follows, broken=""):
    """Look late at what arrived, while the other ranks go on to the next exchange of this kind.

    :param follows: the kind: ``"dispatch"`` or ``"combine"``.
    :param broken: a part of the kernels that is left out. Then others are waited for until they
        have done harm, and not so long as a test may wait.
    :returns: whether it was right.
    """
    made = transport(number, reduce)
    first, second = tokens(rank, 0), tokens(rank, 1)
    # Memory is made together: that must not make the ranks wait for each other later.
    nobody = made.dispatch(first._replace(ids=torch.full_like(first.ids, -1)))
    made.combine(nobody.rows.clone(), nobody)
    if broken == "handshake":  # no exchange seems to follow one of its kind
        kernels.begin = _begin_without_handshake
    if broken == "wait":
        kernels._wait = lambda *_, **__: None
        if rank:  # rank 0 has looked
            distributed.recv(torch.zeros(1), src=0)
    received = made.dispatch(first)
    ids, rows = received.ids.clone(), _sent_to(number, reduce)
    if broken == "wait" and rank == 0:
        found = torch.equal(ids, _told(rank, number, reduce))
        distributed.send(torch.zeros(1), dst=1)
        return found
    if follows == "dispatch":
        place = (_told(rank, number, reduce) >= 0).any(1)

        def right():
            return torch.equal(received.rows[place], rows[place])

        stayed = _looks(right, rank, broken)
        made.dispatch(second)
        return stayed and torch.equal(ids, _told(rank, number, reduce))
    back = made.back(rows, received.state, ids, None)
    reached = received.state.plan.inverse
    token = torch.arange(len(reached))[:, None].expand_as(reached)[reached >= 0]

    def right():
        return torch.equal(back[reached[reached >= 0].long()], first.hidden[token])

    stayed = _looks(right, rank, broken)
    made.back(2 * rows, received.state, ids, None)
    return stayed


def _looks(right, rank, broken):
    """Look late on rank 0, at once on others."""
    until = time.monotonic() + (60 if broken else PAUSE)
    while rank == 0 and time.monotonic() < until and (right() or not broken):
        time.sleep(0.01)
    return right()


def _sent_to(number, reduce):
    """Return the row of each place of a rank, with an expert there or not, of the first turn."""
    of_slots = K if reduce == "none" else 1
    parts = []
    for source in range(number):
        hidden = tokens(source, 0).hidden
        whole = torch.cat((hidden, hidden.new_zeros(T - len(hidden), H)))
        parts.append(whole.repeat_interleave(of_slots, dim=0))
    return torch.cat(parts)


def _told(rank, number, reduce):
    """Return the experts of each place of a rank, of the first turn."""
    own = E // number
    parts = []
    for source in range(number):
        ids = tokens(source, 0).ids
        whole = torch.cat((ids, ids.new_full((T - len(ids), K), -1)))
        parts.append(whole if reduce == "rank" else whole.view(-1, 1))
    local = torch.cat(parts) - rank * own
    return torch.where((local >= 0) & (local < own), local, -1)


def _begin_without_handshake(state, *_, **__):
    return kernels.tl.load(state + kernels.EPOCH) + 1


def callers_keep_what_they_got(rank, number, reduce):
    """Dispatch twice before anything is combined; return whether all of the first call stayed."""
    ep = parallel(reduce)
    calls = [tokens(rank, turn) for turn in (0, 1)]
    scales = torch.arange(8.0).view(4, 2)
    received = [
        ep.dispatch_rows(*given[:3], scales=scales + turn) for turn, given in enumerate(calls)
    ]
    plain = [part.clone() for part in received[0][:4] if part is not None]
    ep.dispatch(*tokens(rank, 2)[:3])
    same = all(
        torch.equal(part, before)
        for part, before in zip((p for p in received[0][:4] if p is not None), plain, strict=True)
    )
    off = []
    for given, got in zip(calls, received, strict=True):
        rows = got.rows
        if got.weights is not None:
            plan = moe_routing.plan(got.ids, E // number)
            rows = moe_routing.combine(moe_routing.permute(rows, plan), plan, got.weights)
        off.append(sums(ep.combine_rows(rows, got), given))
    return {"same": same, "off": max(off)}


def sizes_change(rank, _number, reduce):
    """Exchange wider rows, more slots, and the first ones again; return how far results are off."""
    ep = parallel(reduce)
    off = []
    for turn, (columns, topk) in enumerate([(H, 2), (5 * H, 2), (H, 2), (1, 3), (7, 3), (H, 2)]):
        off.append(there_and_back(ep, tokens(rank, turn, columns, topk)))
    return off


def too_many_tokens(rank, _number):
    """Return what a rank with more tokens than the most is told; the others made no call."""
    ep = parallel()
    try:
        ep.dispatch(*tokens(rank, 0, tokens=T + 1)[:3])
    except ValueError as error:
        return str(error)
    return ""


def a_rank_is_late(rank, number):
    """Leave rank 0 alone; return what its next call says."""
    made = transport(number, "none")
    received = made.dispatch(tokens(rank, 0))
    made.combine(received.rows.clone(), received)
    distributed.barrier()
    kernels.POLLS = kernels.tl.constexpr(200)  # there is no clock in the interpreter
    if rank:
        return ""
    made.dispatch(tokens(rank, 1))
    try:
        made.dispatch(tokens(rank, 1))
    except TimeoutError as error:
        return str(error)
    return ""


def second_gradients(rank, _number):
    """Differentiate twice, after a later call has written where the experts' ids had arrived."""
    ep = parallel()
    given = tokens(rank, 0)
    factor = torch.full((), 1.5, requires_grad=True)
    rows, _ = ep.dispatch(given.hidden.float(), *given[1:3])  # only the experts learn
    made = ep.combine(rows * factor**2)
    with torch.no_grad():
        later = tokens(rank, 1)
        there_and_back(ep, later._replace(ids=torch.full_like(later.ids, -1)))
    (first,) = torch.autograd.grad(made.square().sum(), factor, create_graph=True)
    (second,) = torch.autograd.grad(first, factor)
    total = torch.tensor([float(made.detach().square().sum()), float(second)])
    distributed.all_reduce(total)
    return total.tolist()


def results_of_another(rank, _number):
    """Return what is said of rows that another object dispatched."""
    one, other = parallel(), parallel("rank")
    received = one.dispatch_rows(*tokens(rank, 0)[:3])
    try:
        other.combine_rows(received.rows, received)
    except ValueError as error:
        return str(error)
    return ""


def copies(rank, _number):
    """Exchange through a copy of an object, and through the object after it."""
    ep = parallel()
    there_and_back(ep, tokens(rank, 0))
    copy = deepcopy(ep)
    return [there_and_back(each, tokens(rank, turn)) for turn, each in enumerate((copy, ep, copy))]
