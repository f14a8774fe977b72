"""Compare two kept results of one kind of device, and name what got slower.

    python benchmarks/compare_results.py BEFORE.json AFTER.json

Takes what ``launch_tables.py cliffs`` and ``gpu.py`` write. A time is a loss where every run after
is more than 3 % slower than every run before; so the noise is what the runs of one result differ
by. A result of ``gpu.py`` holds one time a case: there the 3 % alone count. Prints the losses, the
worst first, and the largest gain; exit code 1 where there is a loss.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MARGIN = 1.03
"""How much slower is no loss yet."""

Times = dict[tuple[str, int], list[float]]
"""Microseconds of each run, by problem and number of tokens."""


def times(held: dict[str, Any], path: str) -> Times:
    """Return the times that a result holds."""
    cases = held.get("cases", [])
    if cases and all("rule" in case for case in cases):
        return {(case["rule"], int(T)): us for case in cases for T, us in case["us"].items()}
    if cases and all("spec" in case for case in cases):
        named = ((f"{c['spec']} {c['dtype']} {c['E']}/{c['K']}", c) for c in cases)
        return {(name, case["T"]): [case["us"]] for name, case in named}
    sys.exit(
        f"{path}: expected a result of launch_tables.py cliffs or of gpu.py, got one of "
        f"{', '.join(held)}"
    )


def beyond(
    slower: Times, faster: Times, places: list[tuple[str, int]]
) -> list[tuple[float, str, int]]:
    """Return where every run of one is slower than every run of the other.

    Only differences above the margin count, and the largest comes first.
    """
    ratios = ((min(slower[at]) / max(faster[at]), *at) for at in places)
    return sorted((ratio for ratio in ratios if ratio[0] > MARGIN), reverse=True)


def main(before_path: str, after_path: str) -> int:
    """Print the comparison; return the exit code."""
    before, after = (
        json.loads(Path(path).read_text(encoding="utf-8")) for path in (before_path, after_path)
    )
    if before["device"] != after["device"]:
        sys.exit(
            f"{after_path}: expected a result of {before['device']}, as {before_path} is, got one "
            f"of {after['device']}"
        )
    old, new = times(before, before_path), times(after, after_path)
    shared = sorted(old.keys() & new.keys())
    if not shared:
        sys.exit(f"{after_path}: expected problems that {before_path} holds too, got none")
    losses = beyond(new, old, shared)
    gains = beyond(old, new, shared)
    print(f"{len(shared)} times on {before['device']}: {len(losses)} slower, {len(gains)} faster")
    for gain, name, tokens in gains[:1]:
        print(f"at most {gain:.2f} times faster: {name}, T = {tokens}")
    for loss, name, tokens in losses:
        us = (" ".join(f"{us:.2f}" for us in runs[name, tokens]) for runs in (old, new))
        print(f"{loss - 1:6.1%}  {name}, T = {tokens}: {' -> '.join(us)} us")
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
