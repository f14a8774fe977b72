"""Draw random calls, route them by one backend, and print each that the reference contradicts.

A call is printed as the command that routes it alone. The exit code is 1 if there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from fuzz.calls import Call
from fuzz.check import check, shrunk
from fuzz.draw import calls, limits_of
from fuzz.interpreted import INTERPRETED, registered

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fuzz.judge import Verdict

INTERPRETER = Path(__file__).parents[2] / "triton" / "interpreter.py"
SHRUNK = 10
"""How many of the calls that go wrong are shrunk; each takes some hundred calls."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "backend",
        help="eager, triton (in Triton's interpreter), torch-compile, or any that is installed",
    )
    parser.add_argument(
        "--count", type=int, help="how many calls; 20,000, or fewer of a backend that takes long"
    )
    parser.add_argument(
        "--seed",
        default=str(random.SystemRandom().getrandbits(32)),
        help="the same seed draws the same calls",
    )
    parser.add_argument(
        "--call",
        type=Call.from_json,
        help="route this one call only; the others' options then mean nothing",
    )
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    asked = parser.parse_args()
    if asked.count is None:
        asked.count = limits_of(asked.backend).count
    torch.set_num_threads(1)
    if asked.backend == "triton":
        runpy.run_path(str(INTERPRETER))["interpret"]()  # before the kernels are imported
    with registered():
        wrong, near_ties = run(
            asked.backend,
            [asked.call] if asked.call else calls(asked.backend, asked.seed, asked.count),
            asked,
        )
    if asked.json:
        found = [
            {"call": json.loads(call.to_json()), "problems": verdict.problems}
            for call, verdict in wrong
        ]
        said = {
            "backend": asked.backend,
            "seed": asked.seed,
            "calls": asked.count,
            "near_ties": near_ties,
            "wrong": found,
        }
        json.dump(said, sys.stdout, indent=1)
        print()  # noqa: T201 -- the command's answer
    else:
        for call, verdict in wrong:
            print(verdict.problems[0], f"    {repeat(asked.backend, call)}", sep="\n")  # noqa: T201 -- likewise
    sys.exit(bool(wrong))


def run(
    backend: str, drawn: Iterable[Call], asked: argparse.Namespace
) -> tuple[list[tuple[Call, Verdict]], int]:
    """Route all; return those that went wrong, shrunk, and how many near ties were accepted."""
    name = INTERPRETED if backend == "triton" else backend
    wrong, near_ties, start, done = [], 0, time.monotonic(), 0
    for done, call in enumerate(drawn, 1):
        verdict = check(call, name)
        near_ties += verdict.near_ties
        if verdict.problems:
            wrong.append(
                shrunk(call, verdict, name)
                if len(wrong) < SHRUNK and not asked.call
                else (call, verdict)
            )
        if done % max(1, asked.count // 20) == 0:
            tell(
                f"{done} of {asked.count} calls by {backend}, seed {asked.seed}: {len(wrong)} wrong"
            )
    tell(
        f"{done} calls in {time.monotonic() - start:.0f} s, {len(wrong)} wrong; "
        f"{near_ties} near ties went either way"
    )
    return wrong, near_ties


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 -- progress


def repeat(backend: str, call: Call) -> str:
    """Return the command that routes this call alone."""
    return shlex.join(
        [
            os.path.relpath(sys.executable),
            os.path.relpath(__file__),
            backend,
            "--call",
            call.to_json(),
        ]
    )


if __name__ == "__main__":
    main()
