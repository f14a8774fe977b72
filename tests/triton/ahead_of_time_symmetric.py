"""Compile the kernels of the backend ``symmetric`` for GPUs that are not here.

The script prints what they need and what their PTX says as JSON.

A process of its own: nothing must have set ``TRITON_INTERPRET``, and no driver is needed.
Arguments: names of targets, and ``--few`` for a single call.

The transport itself launches them, with tensors of the CPU and memory that nobody writes. In the
place of the launch stands Triton's ``warmup``: it specialises arguments as a launch does, and
compiles. So a kernel has the constants, the types and the divisibilities of a real launch.
"""

import datetime as dt
import json
import re
import sys
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
from ahead_of_time import TARGETS, read_back, usage
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

import moe_routing
from moe_routing.distributed import ExchangeProblem
from moe_routing.distributed.kernel import Tokens
from moe_routing_backends.symmetric import exchange
from moe_routing_backends.symmetric.memory import Memory

KERNELS = ("moe_routing_send", "moe_routing_send_back", "moe_routing_sum_back")
EXPERTS_PER_RANK = 4
TIMEOUT = dt.timedelta(minutes=10)
"""NCCL's own."""
WIDE = re.compile(r"\b(ld|st)\.global\S*\.v(?:4\.b32|2\.b64)")
ATOMIC = re.compile(r"\b(?:atom|red)\.global\.(\S+)")
SIGNALLED = re.compile(r"\b(?:atom|red)\.global\.sys\.release\.add")


class Call(NamedTuple):
    """An exchange.

    :ivar me: this rank: 0, 1 and others are three specialisations.
    :ivar tokens: likewise 1, multiples of 16, and others.
    :ivar width: bytes of a row.
    :ivar most: the most tokens of a rank.
    :ivar offset: columns in front of the rows, so that those are not aligned.
    :ivar recorded: whether gradients flow.
    :ivar capacity: the most rows of a rank for another, where that was stated.
    """

    ranks: int
    me: int
    tokens: int
    topk: int
    dtype: torch.dtype
    width: int
    weights: torch.dtype
    ids: torch.dtype
    most: int = 16
    offset: int = 0
    recorded: bool = False
    capacity: int = 0


BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
INT32, INT64 = torch.int32, torch.int64
FEW = [Call(2, 0, 16, 8, BF16, 14336, FP32, INT64)]
CALLS = [
    # Rows of whole vectors: the widest piece of a row, a number of vectors that 16 does not divide,
    # and a single vector.
    *FEW,
    Call(2, 0, 7, 8, BF16, 14336, FP32, INT64, recorded=True),
    Call(2, 1, 7, 6, BF16, 4112, BF16, INT32),
    Call(2, 0, 1, 1, BF16, 16, FP32, INT64),
    # So many places that programs look at several at once on the way back.
    Call(2, 0, 16, 8, BF16, 2048, FP32, INT64, most=512),
    # Rows of units of 4, 2 and 1 bytes.
    Call(2, 1, 16, 8, BF16, 4092, BF16, INT64, recorded=True),
    Call(2, 0, 7, 8, FP16, 4094, FP32, INT32, recorded=True),
    Call(2, 1, 16, 8, BF16, 14336, BF16, INT64, offset=1),
    Call(2, 1, 7, 8, FP8, 4095, FP32, INT64),
    # More is told than a launch of rows copies besides.
    Call(2, 0, 7, 10, FP16, 4096, FP32, INT64, most=256),
    # Places by a plan.
    Call(2, 1, 16, 8, BF16, 14336, FP32, INT32, capacity=9),
    Call(4, 0, 7, 6, BF16, 4094, BF16, INT64, recorded=True, capacity=3),
    # Other numbers of ranks.
    Call(3, 2, 7, 8, FP16, 14336, BF16, INT64),
    Call(3, 0, 16, 6, FP32, 4092, FP32, INT64),
    Call(4, 1, 16, 8, FP32, 14336, BF16, INT32),
    Call(4, 3, 1, 8, FP16, 4094, FP32, INT64),
    Call(8, 0, 1, 8, FP32, 14336, FP32, INT64),
    Call(8, 3, 7, 6, BF16, 4094, BF16, INT64),
    Call(8, 7, 16, 10, FP16, 14336, FP32, INT32, recorded=True),
]
VARIANT = (
    "kernel", "SUMS", "BY_RANK", "PLACED", "TELLS", "BY_PLACE", "WEIGHS", "KEEPS", "PLANNED",
)  # fmt: skip
"""What tells kernels apart whose code begins alike."""


class Launched:
    """Stands where a kernel does: compiles what is launched.

    :ivar found: the compiled kernels, each once, with the constants it was launched with first.
    """

    def __init__(self, kernel, found):
        """Take the place of a kernel."""
        self.kernel, self.found, self.call = kernel, found, None

    def __getitem__(self, grid):
        """Return what is called in the place of a launch."""

        def launch(*arguments, **options):
            binary = self.kernel.warmup(*arguments, grid=grid, **options)
            self.found.setdefault(binary.hash, (self.call, binary, options, arguments))
            given = dict(zip(self.kernel.arg_names, arguments, strict=False))
            # As after an exchange without any expert: else these were whatever memory held.
            if options.get("TELLS"):
                for name in ("inverse", "ranks"):
                    given[name].fill_(-1)
            if options.get("KEEPS"):
                given["kept"].fill_(-1)

        return launch


def transport(call, target, reduce):
    """Return a transport as it is on a device of the target."""

    def allocate(size, device, _):
        addresses = torch.zeros(call.ranks, dtype=torch.int64)
        return Memory(torch.zeros(size, dtype=torch.uint8, device=device), addresses, None)

    problem = ExchangeProblem(
        ranks=call.ranks,
        experts_per_rank=EXPERTS_PER_RANK,
        reduce=reduce,
        max_tokens=max(call.most, call.tokens),
        capacity=call.capacity,
    )
    distributed.init_process_group("fake", store=FakeStore(), rank=call.me, world_size=call.ranks)
    made = exchange.Symmetric(problem, torch.device("cpu"), distributed.group.WORLD, allocate)
    # What it would have found out on such a device.
    made._interpreted = False
    made._pdl = divmod(target.arch, 10) >= exchange.PDL_FROM
    return made


def exchanged(made, call):
    """Exchange tokens there and back, in each way that there is."""
    recorded = call.recorded
    columns = call.width // call.dtype.itemsize
    ids = torch.zeros(call.tokens, call.topk, dtype=call.ids)
    weights = torch.zeros(call.tokens, call.topk, dtype=call.weights)
    hidden, scales = torch.zeros(call.tokens, call.offset + columns, dtype=call.dtype), None
    hidden = hidden[:, call.offset :]
    if call.dtype.itemsize == 1:
        scales = torch.zeros(call.tokens, -(-columns // 128))
    for part in (hidden, weights):
        part.requires_grad_(recorded)
    tokens = Tokens(hidden, ids, weights, scales)
    # Results of experts have a dtype that sums can be made in.
    columns, dtype = (columns, call.dtype) if scales is None else (columns // 2, BF16)
    results = []
    received = made.dispatch(tokens)
    rows = torch.zeros(len(received.rows), columns, dtype=dtype, requires_grad=recorded)
    results.append(made.combine(rows, received))
    received = made.dispatch(tokens)
    plan = moe_routing.plan(received.ids, EXPERTS_PER_RANK, backend="eager")
    rows = torch.zeros(received.ids.numel(), columns, dtype=dtype, requires_grad=recorded)
    results.append(made.combine_planned(rows, plan, received))
    if recorded:
        sum(result.float().sum() for result in results).backward()


def compiled(target, calls, reduces):
    """Return every kernel that the calls launch, with its call, its constants and arguments."""
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: target,
    )
    triton.runtime.driver.set_active(driver)
    found = {}
    stand_ins = [Launched(getattr(exchange, name), found) for name in KERNELS]
    for stand_in, name in zip(stand_ins, KERNELS, strict=True):
        stand_in.kernel.device_caches.clear()  # of the target before
        setattr(exchange, name, stand_in)
    # A group that moves nothing has no timeout.
    timeout_of, exchange.timeout_of = exchange.timeout_of, lambda *_: TIMEOUT
    try:
        for call in calls:
            for stand_in in stand_ins:
                stand_in.call = call
            for reduce in reduces:
                made = transport(call, target, reduce)
                exchanged(made, call)
                distributed.destroy_process_group()
    finally:
        exchange.timeout_of = timeout_of
        for stand_in, name in zip(stand_ins, KERNELS, strict=True):
            setattr(exchange, name, stand_in.kernel)
    return list(found.values())


def said(text):
    """Return what PTX says of copies, signals and waits."""
    wide = [match[1] for match in WIDE.finditer(text)]
    signal = SIGNALLED.search(text)
    before = text[: signal.start()]
    return {
        "wide loads": wide.count("ld"),
        "wide stores": wide.count("st"),
        "atomics": sorted(match[1] for match in ATOMIC.finditer(text)),
        "traps": len(re.findall(r"\btrap;", text)),
        "clocks": text.count("%globaltimer"),
        # Whether all threads have written their rows before a thread signals.
        "barrier": before.rfind("bar.sync") > before.rfind("st.global"),
        "dependencies": [
            text.count(f"griddepcontrol.{what}") for what in ("wait", "launch_dependents")
        ],
        "fused": len(re.findall(r"\bfma\.", text)),
    }


def main(names, calls, reduces, *, disassembled=True):
    """Compile the calls for the targets named.

    :param disassembled: whether to look where the code of each variant waits, which takes longer
        than to compile it.
    """
    found, seen = [], set()
    for name in names:
        target = TARGETS[name]
        for call, binary, options, arguments in compiled(target, calls, reduces):
            case = {"target": name, "kernel": binary.metadata.name, "call": str(call)} | options
            case["unit"] = str(arguments[0].dtype).removeprefix("torch.")
            case["weights"] = str(call.weights).removeprefix("torch.")
            summed = case["kernel"] == "moe_routing_sum_back"
            case["programs"] = (exchange.SUMMED if summed else exchange.MOVED)[0]
            variant = name, *(case.get(constant) for constant in VARIANT)
            read = read_back if disassembled and variant not in seen else usage
            seen.add(variant)
            found.append(case | said(binary.asm["ptx"]) | read(binary, target))
    json.dump({"triton": triton.__version__, "cases": found}, sys.stdout)


if __name__ == "__main__":
    named = [name for name in sys.argv[1:] if name != "--few"] or ["sm_80", "sm_90"]
    if "--few" in sys.argv:
        main(named, FEW, ("rank",), disassembled=False)
    else:
        main(named, CALLS, ("none", "rank"))
