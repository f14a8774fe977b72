"""Which launch serves how many tokens: JSON tables, one an arch, and the rule for an arch without one.

A table is data: ``tables/<arch>.json`` is shipped; ``moe-routing tune`` stores the user's own, which is asked first.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_routing_backends.triton.plan import Launch, kind, rows_can

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moe_routing_registry import DeviceInfo, RoutingProblem

SCHEMA = 1
SHIPPED = Path(__file__).parent / "tables"
LAST_LANES = Launch("lanes", 2, 1, 1)
"""What serves the tokens that the rows variant would, where it cannot."""
WARP = 32
"""Threads a warp on the device that the shipped table was measured on."""
LANES_UP_TO = 1024
"""Tokens up to which one row a program fills no device twice over; above it, two rows share a program."""


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
    :ivar rules: from (kind, bits of a logit, E, list width) to its steps, by rising number of tokens.
    """

    source: str
    provenance: str
    rules: dict[tuple[str, int, int, int], tuple[Step, ...]]

    def steps(self, problem: RoutingProblem) -> tuple[Step, ...]:
        """Return the steps for the problem: of its kind and list width, the least E that is not below its own.

        The last step has no end, and every step can serve the problem.
        """
        bits = 32 if problem.dtype == "float32" else 16
        width = 8 if problem.topk + problem.spec.shared_experts <= 8 else 16  # noqa: PLR2004 -- the two lists there are
        fits = [key for key in self.rules if key[:2] == (kind(problem.spec), bits)]
        if not fits:
            return (Step(LANES_UP_TO, Launch("lanes", 1, 1, 1)), Step(math.inf, LAST_LANES))
        best = min(fits, key=lambda key: (key[3] != width, key[2] < problem.num_experts, abs(key[2] - problem.num_experts)))
        usable = [s for s in self.rules[best] if s.launch.variant == "lanes" or rows_can(problem, s.launch.lanes)]
        if not usable or usable[-1].tokens != math.inf:
            usable.append(Step(math.inf, LAST_LANES))
        return tuple(usable)


def parse(text: str, source: str) -> Table:
    """Read a table; ``ValueError`` names what is wrong with it.

    >>> parse('{"schema": 1, "arch": "sm_90", "provenance": "by hand", "rules": []}', "x.json").provenance
    'by hand'
    """
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        msg = f"schema: expected {SCHEMA}, got {data.get('schema') if isinstance(data, dict) else type(data).__name__}"
        raise ValueError(msg)
    rules = {}
    for rule in _typed(data, "rules", list):
        key = (_typed(rule, "kind", str), *(_typed(rule, name, int) for name in ("bits", "experts", "width")))
        rules[key] = tuple(_steps(_typed(rule, "steps", list)))
    return Table(source, _typed(data, "provenance", str), rules)


def _typed(data: Any, name: str, kind_: type) -> Any:  # noqa: ANN401 -- JSON
    value = data.get(name) if isinstance(data, dict) else None
    if not isinstance(value, kind_) or isinstance(value, bool):
        msg = f"{name}: expected {kind_.__name__}, got {value!r}"
        raise ValueError(msg)  # noqa: TRY004 -- a file's content, not an argument
    return value


def _steps(lines: list[Any]) -> Iterable[Step]:
    before = 0.0
    for line in lines:
        if not isinstance(line, list) or len(line) != 5 or line[1] not in ("lanes", "rows"):  # noqa: PLR2004 -- as written
            msg = f"steps: expected [tokens or null, 'lanes' or 'rows', block_t, lanes, num_warps], got {line!r}"
            raise ValueError(msg)
        tokens = math.inf if line[0] is None else line[0]
        numbers = line[2:]
        powers = all(isinstance(n, int) and n > 0 and n & (n - 1) == 0 for n in numbers)
        if not isinstance(tokens, (int, float)) or tokens <= before or not powers:
            msg = f"steps: expected rising tokens and powers of two, got {line!r}"
            raise ValueError(msg)
        before = tokens
        yield Step(tokens, Launch(line[1], *numbers))


def to_json(arch: str, provenance: str, rules: dict[tuple[str, int, int, int], tuple[Step, ...]]) -> str:
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
                    s.launch.lanes,
                    s.launch.num_warps,
                ]
                for s in steps
            ],
        }
        for key, steps in sorted(rules.items())
    ]
    rules_text = ",\n  ".join(json.dumps(line) for line in lines)
    head = f'"schema": {SCHEMA}, "arch": {json.dumps(arch)}, "provenance": {json.dumps(provenance)}'
    return f'{{{head}, "rules": [\n  {rules_text}\n]}}\n'


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all: readers and other writers never see a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    Path(temporary).replace(path)


def user_path(device: DeviceInfo) -> Path:
    """Return where ``moe-routing tune`` keeps the table of this device: by name, driver and Triton version."""
    import platformdirs

    versions = "-".join(f"{t.name}{t.version}" for t in device.toolchains if t.name in ("triton", "torch") and t.version)
    safe = "".join(c if c.isalnum() or c in "-._" else "_" for c in f"{device.name}-{device.arch}-{versions}")
    return Path(platformdirs.user_cache_dir("moe-routing")) / "triton" / f"{safe}.json"


@cache
def table_for(device: DeviceInfo) -> Table:
    """Return the table that speaks for the device: the user's own, the shipped one, or the rule of thumb.

    A file that cannot be used is named in a warning and ignored.
    """
    for path in (user_path(device), SHIPPED / f"{device.arch}.json"):
        if not path.is_file():
            continue
        try:
            return parse(path.read_text(encoding="utf-8"), str(path))
        except (OSError, ValueError) as error:
            warnings.warn(f"launch table {path} is ignored: {error}", RuntimeWarning, stacklevel=2)
    shipped = parse((SHIPPED / "sm_90.json").read_text(encoding="utf-8"), "rule of thumb")
    wide = max(device.warp_sizes, default=WARP) // WARP
    rules = {key: tuple(Step(s.tokens, _widened(s.launch, wide)) for s in steps) for key, steps in shipped.rules.items()}
    return Table("rule of thumb", f"the table of sm_90, unmeasured on {device.arch or 'this device'}", rules)


def _widened(launch: Launch, factor: int) -> Launch:
    """Give the rows variant rows enough for wider warps: ``block_t * lanes`` threads are ``num_warps`` warps."""
    if launch.variant == "lanes":
        return launch
    return Launch("rows", launch.block_t * factor, launch.lanes, launch.num_warps)
