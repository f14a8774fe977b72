"""Check a file that ``prove.py`` made, and keep it for the table of ``docs/hardware.md``.

    python benchmarks/check_proof.py FILE.json          # say what is wrong with it
    python benchmarks/check_proof.py FILE.json --keep NAME && python benchmarks/tables.py

Files come from strangers. So every field is checked, and nothing is shown that could be more than a
word in a table. Exit code 1: something is wrong; exit code 2: the file cannot be read.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KEPT = Path(__file__).parent / "hardware"
LARGEST = 1 << 20
"""Bytes of a file."""
MOST = 2000
"""Entries of a list."""
SCHEMA = 1
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,40}")
DATE = re.compile(r"20\d\d-[01]\d-[0-3]\d")
SHOWN = re.compile(r"[\w .,:;()+\-/#@=]{0,200}", re.ASCII)
"""What is shown in a page: no mark of Markdown or HTML among it."""
PRIVATE = re.compile(r"/home/|/Users/|/root/|[A-Za-z]:\\\\?Users|\\\\\w", re.IGNORECASE)
TEXT, COUNT, TIME, TRUTH = "text", "count", "time", "truth"
DEVICE = {
    "type": TEXT, "platform": TEXT, "arch": TEXT, "name": TEXT, "total_memory": COUNT,
    "compute_units": COUNT, "driver": TEXT,
}  # fmt: skip
OPERATION = {
    "backend": TEXT, "ok": TRUTH, "verdict": TEXT, "checked": COUNT, "declined": COUNT,
    "not_run": COUNT, "failed": COUNT, "failures": list, "seconds": TIME,
}  # fmt: skip
TIMED = {
    "operation": TEXT, "by": TEXT, "mode": TEXT, "dtype": TEXT, "num_experts": COUNT,
    "topk": COUNT, "tokens": COUNT, "microseconds": TIME, "spread": TIME, "wrong": TRUTH,
}  # fmt: skip
FOUND = {"check": TEXT, "status": TEXT, "says": str}
WHOLE = {
    "schema": COUNT, "date": TEXT, "profile": TEXT, "versions": dict, "device": DEVICE,
    "doctor": list, "operations": dict, "times": list, "model": dict, "wrong": dict,
}  # fmt: skip


_KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    list: (lambda v: isinstance(v, list) and len(v) <= MOST, f"a list of at most {MOST}"),
    str: (lambda v: isinstance(v, str), "text"),
    dict: (lambda v: isinstance(v, dict) and len(v) <= MOST, f"at most {MOST} fields"),
    TEXT: (
        lambda v: isinstance(v, str) and bool(SHOWN.fullmatch(v)),
        "a line of words, numbers and .,:;()+-/#@=",
    ),
    TRUTH: (lambda v: isinstance(v, bool), "true or false"),
    COUNT: (lambda v: v is None or (type(v) is int and 0 <= v < 1 << 60), "a count, or null"),
    TIME: (lambda v: type(v) in {int, float} and 0 <= v < math.inf, "a time"),
}
"""By kind, whether a value is one, and what was expected."""


def problems(held: object) -> list[str]:
    """Say what is wrong with a file: the field, what was expected, and what came."""
    found = [*_fields("file", held, WHOLE), *_private("file", held)]
    if found or not isinstance(held, dict):
        return found
    return [
        *_header(held),
        *(p for name, its in held["operations"].items() for p in _operation(name, its)),
        *(p for n, row in enumerate(held["times"]) for p in _fields(f"times[{n}]", row, TIMED)),
        *_texts("versions", held["versions"]),
        *_texts("wrong", held["wrong"]),
        *(p for n, its in enumerate(held["doctor"]) for p in _fields(f"doctor[{n}]", its, FOUND)),
        *_model(held["model"]),
    ]


def _header(held: dict[str, Any]) -> Iterator[str]:
    if held["schema"] != SCHEMA:
        yield f"schema: expected {SCHEMA}, got {held['schema']}"
    if not DATE.fullmatch(held["date"]):
        yield "date: expected one like 2026-11-28"
    if held["profile"] not in {"whole", "short"}:
        yield "profile: expected whole or short"
    for name in ("moe-routing", "python", "torch"):
        if name not in held["versions"]:
            yield f"versions: expected {name}"
    if not held["operations"]:
        yield "operations: expected some"


def _operation(name: str, its: object) -> Iterator[str]:
    where = f"operations.{name}"
    wrong = list(_fields(where, its, OPERATION))
    yield from wrong
    if wrong or not isinstance(its, dict):
        return
    if not NAME.fullmatch(name):
        yield f"{where}: expected the name of an operation"
    if its["ok"] != (its["failed"] == 0 and its["checked"] > 0):
        yield f"{where}: expected ok to be whether something was checked and nothing failed"
    if its["verdict"].startswith("conforms") != its["ok"]:
        yield f"{where}.verdict: expected what ok says"
    if not all(isinstance(each, str) for each in its["failures"]):
        yield f"{where}.failures: expected text"
    if len(its["failures"]) > its["failed"] or (its["failed"] and not its["failures"]):
        yield f"{where}.failures: expected those that are counted"


def _model(its: dict[str, Any]) -> Iterator[str]:
    """Expect why no model was timed, or milliseconds of each stage."""
    if its.keys() == {"not_run"}:
        yield from _texts("model", its)
        return
    yield from _fields("model", its, {"milliseconds": list})
    for number, row in enumerate(its.get("milliseconds", ())):
        where = f"model.milliseconds[{number}]"
        ways = {name: TIME for name in row if NAME.fullmatch(name)} if isinstance(row, dict) else {}
        yield from _fields(where, row, ways | {"stage": TEXT, "batch": COUNT})


def _fields(where: str, value: object, fields: dict[str, Any]) -> Iterator[str]:
    """Compare a value with the fields that it must have, and no others."""
    if not isinstance(value, dict):
        yield f"{where}: expected fields, got {type(value).__name__}"
        return
    for name in sorted(map(str, value.keys() ^ fields.keys())):
        yield f"{where}: expected {'' if name in fields else 'no '}{name}"
    for name in fields.keys() & value.keys():
        yield from _value(f"{where}.{name}", value[name], fields[name])


def _value(where: str, value: Any, kind: Any) -> Iterator[str]:  # noqa: ANN401 -- JSON
    if isinstance(kind, dict):
        yield from _fields(where, value, kind)
    elif not _KINDS[kind][0](value):
        yield f"{where}: expected {_KINDS[kind][1]}"


def _texts(where: str, held: dict[str, Any]) -> Iterator[str]:
    for name, value in held.items():
        if not SHOWN.fullmatch(name):
            yield f"{where}: expected names in words"
        if not isinstance(value, str):
            yield f"{where}.{name}: expected text"


def _private(where: str, value: object) -> Iterator[str]:
    """Name the fields that hold a path of somebody's."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _private(f"{where}.{name}", each)
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _private(f"{where}[{number}]", each)
    elif isinstance(value, str) and PRIVATE.search(value):
        yield f"{where}: expected no path of a user's"


def read(path: Path) -> object:
    """Return what a file holds.

    :raises ValueError: it is too large or no JSON.
    """
    if path.stat().st_size > LARGEST:
        msg = f"{path.name}: expected at most {LARGEST} bytes"
        raise ValueError(msg)
    return json.loads(path.read_text(encoding="utf-8"))


def rows() -> Iterator[str]:
    """Yield the table of the files that were kept."""
    yield "| device | driver | versions | kit | `route`, bfloat16, T = 1 and 4,096 | date |"
    yield "|---|---|---|---|---|---|"
    for path in sorted(KEPT.glob("*.json")):
        held = read(path)
        wrong = problems(held)
        if wrong or not isinstance(held, dict):
            msg = f"{path.name}: {wrong[0]}"
            raise ValueError(msg)
        device, versions = held["device"], held["versions"]
        tools = ("moe-routing", "torch", "triton", "python")
        said = ", ".join(f"{name} {versions[name]}" for name in tools if name in versions)
        kit = "; ".join(f"{name}: {_verdict(its)}" for name, its in held["operations"].items())
        where = f"{device['name']} ({device['platform']}, {device['arch']})"
        times = ", ".join(_times(held)) or "not timed"
        note = "" if held["profile"] == "whole" else ", a few clauses"
        driver = device["driver"] or "none"
        yield f"| {where} | {driver} | {said} | {kit}{note} | {times} | {held['date']} |"


def _verdict(its: dict[str, Any]) -> str:
    failed = f", **{its['failed']:,} failed**" if its["failed"] else ""
    return f"`{its['backend']}` {its['checked']:,} checked{failed}"


def _times(held: dict[str, Any]) -> Iterator[str]:
    winner = held["operations"].get("route", {}).get("backend")
    for tokens in (1, 4096):
        for row in held["times"]:
            its = (row["operation"], row["by"], row["dtype"], row["tokens"])
            if its == ("route", winner, "bfloat16", tokens) and not row["wrong"]:
                yield f"{row['microseconds']:,.1f} us"
                break


def main(words: list[str]) -> int:
    """Check a file, and keep it if it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr] # it has one
    parser.add_argument("file", type=Path)
    parser.add_argument("--keep", metavar="NAME", help="as benchmarks/hardware/NAME.json")
    given = parser.parse_args(words)
    try:
        held = read(given.file)
    except (OSError, ValueError) as error:
        print(f"{given.file}: {error}")
        return 2
    wrong = problems(held)
    if given.keep and not NAME.fullmatch(given.keep):
        wrong.append(f"--keep: expected small letters, digits and -, got {given.keep!r}")
    for each in wrong:
        print(each)
    if wrong:
        return 1
    print(f"{given.file}: right")
    if given.keep:
        KEPT.mkdir(exist_ok=True)
        to = KEPT / f"{given.keep}.json"
        to.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
        print(f"kept as {to.name}; write the table: python benchmarks/tables.py")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
