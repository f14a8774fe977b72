"""What each rank of ``test_exchange_kit.py`` tries: right transports, wrong ones, and changes.

Rank 0 prints JSON: for each of them, what the checks said. On GPUs, where no test starts it, it
tries the wrong transports that are wrong there alone:

    torchrun --nproc-per-node 2 tests/conformance/exchange_rank.py 1 cuda
"""

from __future__ import annotations

import json
import os
import sys

import torch
from mutants import registered
from mutants._mutant import Mutant
from mutants.exchange import CHANGES, MUTANTS, Transport
from torch import distributed

from moe_routing.conformance import drawn
from moe_routing.conformance.contract import contract_of
from moe_routing.conformance.exchange import ranks
from moe_routing.conformance.runner import backend_under_test, evaluate


def said(name, check, seed, device="cpu"):
    """Return whether the check's cases passed, and what those that failed said.

    The least cases that have a wrong transport for sure: where a seed draws them, enough for every
    number of tokens.
    """
    under_test = backend_under_test(name, device)
    profile = "quick" if check.startswith("drawn") else "smoke"
    with drawn.seeded(seed):
        items = [one for one in contract_of("exchange").items(profile) if one.check.name == check]
    found = [evaluate(item, under_test) for item in items]
    return {
        "passed": sum(one.status == "passed" for one in found),
        "failed": [one.message for one in found if one.status == "failed"],
    }


def main(seed):
    torch.set_num_threads(1)
    ranks.initialise(torch.device("cpu"))
    told = {"ranks": distributed.get_world_size(), "kits": {}, "mutants": {}, "changes": {}}
    for name in ("all-to-all", "all-reduce"):  # of symmetric see tests/distributed
        report = ranks.run(ranks.Here(0, torch.device("cpu"), seed), name, "quick", None)
        failed = [f"{one.id}: {one.message}" for one in report.failed]
        told["kits"][name] = {"verdict": report.verdict, "failed": failed}
    if distributed.get_world_size() == 2:
        for mutant in MUTANTS:
            if not mutant.only_on:
                with registered(mutant) as name:
                    told["mutants"][mutant.name] = said(name, mutant.caught_by, seed)
        for change in CHANGES:
            right = vars(change.home)[change.function]
            setattr(change.home, change.function, change.made(right))
            told["changes"][change.name] = said("all-to-all", change.caught_by, seed)
            setattr(change.home, change.function, right)
        with registered(Mutant(Transport, "", operation="exchange")) as name:
            checks = {mutant.caught_by for mutant in MUTANTS if not mutant.only_on}
            told["right"] = {check: said(name, check, seed) for check in sorted(checks)}
    if distributed.get_rank() == 0:
        sys.stdout.write(json.dumps(told))
    distributed.destroy_process_group()


def on_gpus(seed, device):
    """Try what is wrong there alone, and a right transport."""
    torch.accelerator.set_device_index(device.index)
    ranks.initialise(device)
    told = {}
    for mutant in (one for one in MUTANTS if one.only_on == device.type):
        with registered(mutant) as name:
            told[mutant.name] = said(name, mutant.caught_by, seed, device)
        right = said("all-to-all", mutant.caught_by, seed, device)
        told[mutant.name] |= {"right": right, "must_say": mutant.saying}
    if distributed.get_rank() == 0:
        sys.stdout.write(json.dumps(told))
        sys.stdout.flush()
    distributed.barrier()
    # NCCL ends a group when no graph with its calls is left, and what failed keeps some.
    os._exit(0)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        on_gpus(int(sys.argv[1]), torch.device(sys.argv[2], int(os.environ["LOCAL_RANK"])))
    else:
        main(int(sys.argv[1]))
