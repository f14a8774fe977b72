"""Run doctor, the kit, benchmarks and a model on a device that nobody here has: one file to send.

    python benchmarks/prove.py [--device cuda:0] [--out moe-routing-proof.json] [--short]

Run it from a clone, in an environment in which ``moe-routing doctor`` finds the device. Each part
is a process of its own, so that one that dies leaves the others; what it said is kept. The kit of
every operation is compiled and run, which may take an hour on a GPU; ``--short`` runs a few clauses
of each and times few sizes. The model (``e2e_gemma4.py``) needs transformers, CUDA or ROCm, and
56 GB of the device's memory; elsewhere the file says that it did not run.

The file has versions, the device, verdicts and times. It has no paths, and no names of users or
hosts: those are replaced. Exit code 1: something failed, or could not run; the file is written
nevertheless. ``check_proof.py`` is the other side.
"""

from __future__ import annotations

import argparse
import datetime as dt
import getpass
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[1]
SCHEMA = 1
TIMED = {"route": ("--backend", "all", "--dtype", "bfloat16,float32"), "plan": ("plan",)}
"""What is timed, and the arguments of ``moe-routing bench``."""
SHORT = ("--clause", "1", "--clause", "2", "--clause", "3")
PATH = re.compile(r"(?<![\w>~.-])/(?:[\w.@+-]+/){2,}([\w.@+-]+)")
"""An absolute path of three parts or more, of which the last is kept."""
MODEL_BYTES = 56 * 10**9
NOT_RUN = 2
"""The exit code of commands that could not do what was asked."""
SECONDS = 7200
"""After which a part that does not end is ended."""
KEPT = 20
"""Failures of an operation that are kept."""
LONGEST = 300
"""Characters of a message that are kept."""


class Parts:
    """Runs parts, each in a process, and keeps what went wrong.

    :ivar wrong: by part, the last that a process said which gave no result.
    """

    def __init__(self) -> None:
        """Begin with nothing wrong."""
        self.wrong: dict[str, str] = {}

    def run(self, part: str, *command: str, out: Path | None = None) -> dict[str, Any] | None:
        """Run a part, and return the JSON that it printed, or wrote to ``out``, if it did.

        A part that writes to a file and fails is kept as wrong, with what it had written.
        """
        print(f"==> {part}: {' '.join(command)}", flush=True)
        began = time.monotonic()
        try:
            done = subprocess.run(  # noqa: S603 -- its own parts
                [sys.executable, *command], check=False, capture_output=True, text=True, cwd=ROOT,
                timeout=SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            self.wrong[part] = f"did not end in {SECONDS} s"
            return None
        print(f"    exit code {done.returncode}, {time.monotonic() - began:.0f} s", flush=True)
        found = None
        with suppress(json.JSONDecodeError):
            found = json.loads((out.read_text() if out and out.exists() else done.stdout) or "null")
        right = done.returncode == 0 if out else done.returncode != NOT_RUN
        if not isinstance(found, dict) or not right:
            said = (done.stderr or done.stdout).strip().splitlines()
            self.wrong[part] = (said or [f"code {done.returncode}"])[-1][:LONGEST]
        return found if isinstance(found, dict) and (right or out) else None


def proof(device: str | None, *, short: bool, save: Callable[[dict[str, Any]], object]) -> None:
    """Find out all there is of a device: the first accelerator if it is not named.

    :param save: is called with all that was found, after each part: a run may be stopped.
    """
    parts = Parts()
    where = ("--device", device) if device else ()
    doctor = parts.run("doctor", "-m", "moe_routing", "doctor", "--json", "--verify", *where)
    made: dict[str, Any] = {
        "schema": SCHEMA,
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "profile": "short" if short else "whole",
        "wrong": parts.wrong,
    }
    if doctor is None:
        save(made)
        return
    places = [name for name, report in doctor["reports"].items() if report["winner"]]
    place = next((name for name in places if name != "cpu"), "cpu")
    its = doctor["reports"][place]["device"]
    kept = ("type", "platform", "arch", "name", "total_memory", "compute_units", "driver")
    made |= {
        "versions": doctor["versions"]
        | {tool["name"]: tool["version"] for tool in its["toolchains"] if tool["version"]},
        "device": {name: its[name] for name in kept},
        "doctor": [
            {"check": check["name"], "status": check["status"], "says": check["summary"]}
            for check in doctor["checks"]
            if check["status"] in {"problem", "warning"}
        ],
        "operations": {},
        "times": [],
        "model": {"not_run": "the run was stopped before"},
    }
    for name, operation in _operations(doctor, place, parts, short=short):
        made["operations"][name] = operation
        save(made)
    for row in _times(place, parts, short=short):
        made["times"].append(row)
    save(made)
    made["model"] = _model(its, parts, short=short)
    save(made)


def _operations(
    doctor: dict[str, Any], place: str, parts: Parts, *, short: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Check the backend that the device gets of each operation, but of those of several ranks."""
    for operation in doctor["operations"]:
        name, winner = operation["name"], operation["devices"].get(place, {}).get("winner")
        if not winner or name == "exchange":
            continue
        report = parts.run(
            f"kit of {name}", "-m", "moe_routing", "conformance", winner, "--operation", name,
            "--device", place, "--json", *(SHORT if short else ()),
        )  # fmt: skip
        if report is not None:
            failed = [each for each in report["results"] if each["status"] == "failed"]
            said = [f"{each['check']}: {each['message']}"[:LONGEST] for each in failed]
            yield (
                name,
                {
                    "backend": winner,
                    "ok": report["ok"],
                    "verdict": report["verdict"],
                    **report["counts"],
                    "failed": len(failed),
                    "failures": said[:KEPT],
                    "seconds": round(report["seconds"], 1),
                },
            )


def _times(place: str, parts: Parts, *, short: bool) -> Iterator[dict[str, Any]]:
    """Time what ``bench`` knows; what is wrong gets no time."""
    for name, arguments in TIMED.items():
        given = (*arguments, "--device", place, *(("--tokens", "1,4096") if short else ()))
        result = parts.run(f"bench of {name}", "-m", "moe_routing", "bench", *given, "--json")
        for row in (result or {"rows": []})["rows"]:
            if not row["skipped"]:
                yield {
                    "operation": name,
                    "by": row["implementation"],
                    "mode": row["mode"],
                    "dtype": row.get("dtype", ""),
                    "num_experts": row["num_experts"],
                    "topk": row["topk"],
                    "tokens": row["tokens"],
                    "microseconds": row["microseconds"],
                    "spread": row["spread"],
                    "wrong": bool(row["wrong"]),
                }


def _model(device: dict[str, Any], parts: Parts, *, short: bool) -> dict[str, Any]:
    """Time decode steps of Gemma4's shape, or say why not."""
    if device["type"] != "cuda":
        return {"not_run": "the script needs CUDA or ROCm"}
    if (device["total_memory"] or 0) < MODEL_BYTES:
        return {"not_run": "the model needs 56 GB of the device's memory"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.json"
        batches = ("--batches", "1") if short else ("--batches", "1,16,64")
        found = parts.run("model", "benchmarks/e2e_gemma4.py", "run", str(out), *batches, out=out)
    if found is None:
        return {"not_run": parts.wrong["model"]}
    return {
        "milliseconds": [
            {"stage": row["stage"], "batch": row["batch"], **row["median_ms"]}
            for row in found["rows"]
        ]
    }


def scrubbed(value: Any) -> Any:  # noqa: ANN401 -- JSON
    """Return JSON values without this machine's paths, user and host."""
    if isinstance(value, dict):
        return {scrubbed(key): scrubbed(each) for key, each in value.items()}
    if isinstance(value, list):
        return [scrubbed(each) for each in value]
    if isinstance(value, str):
        for private, said in _private():
            value = value.replace(private, said)
        # Other folders of somebody's, mounted anywhere: their last part says enough.
        value = PATH.sub(r"<...>/\1", value)
    return value


def _private() -> list[tuple[str, str]]:
    """Return what is personal and what stands for it, the longest first."""
    found = {str(Path.home()): "~", tempfile.gettempdir(): "<tmp>", str(Path.cwd()): "<here>"}
    found |= {sys.base_prefix: "<python>", sys.prefix: "<environment>", str(ROOT): "<clone>"}
    user, host = getpass.getuser(), platform.node()
    found |= {f"/{user}/": "/<user>/", host: "<host>"}
    return sorted(
        ((private, said) for private, said in found.items() if private.strip("/")),
        key=lambda pair: -len(pair[0]),
    )


def main(words: list[str]) -> int:
    """Make the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", help="cuda:0, xpu:0, ...; the first accelerator, else the CPU")
    parser.add_argument("--out", type=Path, default=Path("moe-routing-proof.json"))
    parser.add_argument("--short", action="store_true", help="few clauses and sizes: minutes")
    given = parser.parse_args(words)
    given.out.touch()  # that it can be written is known before an hour has passed

    def save(made: dict[str, Any]) -> None:
        given.out.write_text(json.dumps(scrubbed(made), indent=1) + "\n")

    proof(given.device, short=given.short, save=save)
    made = json.loads(given.out.read_text())
    for name, operation in made.get("operations", {}).items():
        print(f"{name}: {operation['backend']} {operation['verdict']}")
    for part, said in made["wrong"].items():
        print(f"{part} did not run: {said}")
    problems = [each for each in made.get("doctor", []) if each["status"] == "problem"]
    right = not made["wrong"] and not problems
    right = right and all(each["ok"] for each in made["operations"].values())
    right = right and not any(row["wrong"] for row in made["times"])
    print(f"{given.out}: send it as docs/hardware.md says")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
