"""Launch tables of ``route``: which launch serves how many tokens of which problems, as data.

How the files are read and written as JSON. The table of ``plan`` is a part of the same file
(``planning/table.py``).
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moe_routing_backends.triton.kernels import VARIANTS, supports, weigh
from moe_routing_backends.triton.kernels.spec import APPROXIMATED, CHUNK, Launch, kind, list_width
from moe_routing_backends.triton.planning.table import parse_plans, plans_to_json
from moe_routing_backends.triton.tuning.reading import powers_of_two, text, typed
from moe_routing_registry.text import line, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from moe_routing_backends.triton.planning.table import PlanTable
    from moe_routing_registry import DeviceInfo, RoutingProblem

SCHEMA = 1
FALLBACK = Launch("cooperative", 2, 1, 1)
"""The launch that serves rows of any alignment.

It also serves every number of tokens for which the table has no launch that can.
"""
FEWEST_THREADS = 2
"""Threads a row that the filter is launched with at least.

With one it takes long to compile, and is no faster.
"""
ONE_ROW_UP_TO = 1024
"""Tokens up to which one row a program fills no device twice over.

Above it, two rows share a program.
"""

MOST_BYTES = 1 << 20
"""Of a table's file; what is larger is not read. The largest table that is shipped has 14 KiB."""
MOST_THREADS = 1024
"""Threads a program, on every device that Triton compiles for."""
MOST_ROWS = 256
"""Rows a program of the cooperative variant.

With the 2,048 experts that are taken at most, half of Triton's largest block.
"""
WARPS = (8, 16, 32, 64)
"""Threads a warp, on the devices that Triton compiles for."""

Key = tuple[str, int, int, int]
"""What a rule is for: the kind of a spec, the bits of a logit, E, and the width of a list.

The list is that of the selected, and its width is 8 or 16.
"""


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a table: up to ``tokens`` tokens, this launch."""

    tokens: float
    launch: Launch


@dataclass(frozen=True, slots=True)
class Table:
    """The rules of one arch, and where they come from.

    :ivar source: path of the file, or the name of the rule.
    :ivar provenance: measured where, or derived from what.
    :ivar rules: the steps of each key, by rising number of tokens.
    :ivar device: what device it was measured on, as ``store.identity`` says; of a user's own table
        only.
    :ivar plans: the table of ``plan`` in the same file.
    """

    source: str
    provenance: str
    rules: Mapping[Key, tuple[Step, ...]]
    device: Mapping[str, str] | None = None
    plans: PlanTable | None = None

    def nearest(self, problem: RoutingProblem) -> tuple[tuple[bool, bool, bool, int], Key] | None:
        """Return how far off the nearest rule is, and its key.

        Of the problem's kind and list width, the least E not below.

        Biased scores that the filter can serve are routed as others are where no rule is for them.
        """
        kind_, bits, experts, width = key_of(problem)
        kinds = (kind_, "bias") if kind_ == APPROXIMATED else (kind_,)
        fits = [key for key in self.rules if key[0] in kinds and key[1] == bits]
        off = {
            key: (key[0] != kind_, key[3] != width, key[2] < experts, abs(key[2] - experts))
            for key in fits
        }
        return min(((off[key], key) for key in fits), default=None)

    def steps(self, problem: RoutingProblem) -> tuple[Step, ...]:
        """Return the steps of the nearest rule.

        The last step has no end, and every step can serve the problem. Recorded ids have a rule of
        their own, which is the same in all tables.
        """
        if "ids" in problem.operands:
            return tuple(Step(tokens, launch) for tokens, launch in weigh.launches(problem))
        nearest = self.nearest(problem)
        served = (
            (s.tokens, _serving(problem, s.launch))
            for s in (self.rules[nearest[1]] if nearest else ())
        )
        usable = [Step(tokens, launch) for tokens, launch in served if launch is not None]
        if not usable:
            return (Step(ONE_ROW_UP_TO, Launch("cooperative", 1, 1, 1)), Step(math.inf, FALLBACK))
        if usable[-1].tokens != math.inf:
            usable.append(Step(math.inf, FALLBACK))
        return tuple(usable)


def _serving(problem: RoutingProblem, launch: Launch) -> Launch | None:
    """Return the launch that serves the problem in place of this one, or None.

    Where the filter's threads cannot share a row evenly, the filter gets fewer threads, or
    thread_per_row serves.
    """
    if launch.variant == "filter":
        narrow = launch
        while not supports(problem, narrow) and narrow.threads_per_row > FEWEST_THREADS:
            narrow = replace(
                narrow, block_t=2 * narrow.block_t, threads_per_row=narrow.threads_per_row // 2
            )
        launch = narrow if supports(problem, narrow) else replace(launch, variant="thread_per_row")
    return launch if supports(problem, launch) else None


def key_of(problem: RoutingProblem) -> Key:
    """Return what a rule for the problem is kept under."""
    kind_ = kind(problem.spec)
    if kind_ == APPROXIMATED and problem.num_experts % (FEWEST_THREADS * CHUNK):
        kind_ = "bias"  # no threads of the filter can share such a row
    return kind_, 32 if problem.dtype == "float32" else 16, problem.num_experts, list_width(problem)


def parse(written: str, source: str) -> Table:
    """Read a table; ``ValueError`` names what is wrong with it.

    >>> text = '{"schema": 1, "arch": "sm_90", "provenance": "by hand", "rules": []}'
    >>> parse(text, "x.json").provenance
    'by hand'
    """
    try:
        data = json.loads(written)
    except (RecursionError, MemoryError) as error:
        msg = f"expected JSON of a launch table, got {type(error).__name__}: {error}"
        raise ValueError(msg) from error
    schema = data.get("schema") if isinstance(data, dict) else type(data).__name__
    if type(schema) is not int or schema != SCHEMA:  # True is no 1 here
        msg = f"schema: expected {SCHEMA}, got {schema}"
        raise ValueError(msg)
    rules = {}
    for rule in typed(data, "rules", list):
        key = (
            typed(rule, "kind", str),
            *(typed(rule, name, int) for name in ("bits", "experts", "width")),
        )
        rules[key] = tuple(_steps(typed(rule, "steps", list)))
    known = typed(data, "device", dict) if "device" in data else None
    device = None if known is None else {name: text(known, name) for name in known}
    plans = parse_plans(typed(data, "plans", dict), source) if "plans" in data else None
    return Table(source, text(data, "provenance"), rules, device, plans)


def _steps(lines: list[Any]) -> Iterable[Step]:
    before = 0.0
    for row in lines:
        if not isinstance(row, list) or len(row) not in (5, 6) or row[1] not in tuple(VARIANTS):
            variants = " or ".join(map(repr, VARIANTS))
            fields = (
                f"[tokens or null, {variants}, block_t, threads_per_row, num_warps(, warp_size)]"
            )
            msg = f"steps: expected {fields}, got {row!r:.100}"
            raise ValueError(msg)
        tokens = math.inf if row[0] is None else row[0]
        numbers = row[2:]
        rising = (
            type(tokens) in (int, float)
            and before < tokens
            and (row[0] is None or tokens < math.inf)
        )
        if not rising or not powers_of_two(numbers):
            msg = f"steps: expected rising tokens and powers of two, got {row!r:.100}"
            raise ValueError(msg)
        launch = Launch(row[1], *numbers)
        if too_much := _beyond(launch):
            msg = f"steps: expected {too_much}, got {row!r:.100}"
            raise ValueError(msg)
        before = tokens
        yield Step(tokens, launch)


def _beyond(launch: Launch) -> str:
    """Say which limit of every device a launch is beyond, ``""`` where it is beyond none."""
    if launch.block_t * launch.threads_per_row > MOST_THREADS:
        return f"block_t * threads_per_row of at most {MOST_THREADS}"
    if launch.variant == "cooperative" and launch.block_t > MOST_ROWS:
        return f"block_t of at most {MOST_ROWS} for 'cooperative'"
    if launch.num_warps * (launch.warp_size or WARPS[0]) > MOST_THREADS:
        return f"num_warps of at most {MOST_THREADS} threads"
    if launch.threads_per_row > WARPS[-1]:
        return f"threads_per_row of at most {WARPS[-1]}"
    return (
        "" if launch.warp_size in (0, *WARPS) else f"a warp_size among {', '.join(map(str, WARPS))}"
    )


def beyond(launch: Launch, device: DeviceInfo) -> str:
    """Say what of a launch this device cannot do, ``""`` where it can do it."""
    if not VARIANTS[launch.variant].runs_on(device):
        return f"no launch of '{launch.variant}' on {device.arch or 'this device'}"
    widest = launch.warp_size or max(device.warp_sizes, default=WARPS[0])
    if launch.warp_size and launch.warp_size not in device.warp_sizes:
        return f"a warp_size among {', '.join(map(str, device.warp_sizes)) or 'none'}"
    return (
        f"num_warps of at most {MOST_THREADS // widest}"
        if launch.num_warps * widest > MOST_THREADS
        else ""
    )


def to_json(
    arch: str,
    provenance: str,
    rules: Mapping[Key, tuple[Step, ...]],
    device: Mapping[str, str] | None = None,
    plans: PlanTable | None = None,
) -> str:
    """Write a table as text that ``parse`` reads."""
    lines = [
        {
            "kind": key[0],
            "bits": key[1],
            "experts": key[2],
            "width": key[3],
            "steps": [
                [
                    None if s.tokens == math.inf else s.tokens,
                    s.launch.variant,
                    s.launch.block_t,
                    s.launch.threads_per_row,
                    s.launch.num_warps,
                    *([s.launch.warp_size] if s.launch.warp_size else []),
                ]
                for s in steps
            ],
        }
        for key, steps in sorted(rules.items())
    ]
    rules_text = ",\n  ".join(json.dumps(line) for line in lines)
    head = f'"schema": {SCHEMA}, "arch": {json.dumps(arch)}, "provenance": {json.dumps(provenance)}'
    head += "" if device is None else f', "device": {json.dumps(device)}'
    tail = "" if plans is None else f', "plans": {plans_to_json(plans)}'
    return f'{{{head}, "rules": [\n  {rules_text}\n]{tail}}}\n'


def usable(path: Path) -> Table | None:
    """Read a table; return ``None`` where there is no file.

    Return ``None``, with a warning, also for a table that cannot be used.
    """
    try:
        if not path.is_file():  # also a device or a pipe, which may have no end
            return None
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            msg = f"expected at most {MOST_BYTES} bytes, got more"
            raise ValueError(msg)  # noqa: TRY301 -- what is wrong with a table is a ValueError, here as in `parse`
        return parse(data.decode("utf-8"), str(path))
    except (OSError, ValueError) as error:
        warn_ignored(path, str(error))
        return None


def warn_ignored(path: Path, why: str) -> None:
    """Warn in a line that a table is not used; the reason may quote all that it holds."""
    warnings.warn(
        f"moe-routing ignores the launch table {printable(str(path))}: {line(why)}",
        RuntimeWarning,
        stacklevel=3,
    )
