"""Write the tables of README and docs that say what was measured.

It is part of ``make figures``.

``python benchmarks/tables.py`` writes each between its marks; with ``--check`` it names the pages
that are not as the kept results say, and exits with 1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from check_proof import rows as of_hardware

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMPILED = ROOT / "tests" / "triton" / "ahead_of_time.json"
PEERS = ("vLLM CUDA", "SGLang CUDA", "SGLang Triton", "FlashInfer", "triton_kernels")
IN_README = (1, 64, 4096, 65536, 250_000)
OF_FAMILIES = (1, 64, 4096, 65536)
OF_GEMMA4 = 1.25
"""The ratio to ``gemma4`` that other families are to keep."""


def newest(has: str, card: str = "h200") -> dict[str, Any]:
    """Return the newest result on such a card that has this key.

    :raises FileNotFoundError: there is none.
    """
    every = [json.loads(path.read_text()) for path in RESULTS.glob(f"{card}-*.json")]
    found = [held for held in every if has in held and "date" in held]
    if not found:
        msg = f"benchmarks/results: expected a {card}-*.json with {has!r}"
        raise FileNotFoundError(msg)
    return max(found, key=lambda held: str(held["date"]))


def peers() -> dict[str, Any]:
    """Return what was measured of the peers."""
    held: dict[str, Any] = json.loads((RESULTS / "h200-peers.json").read_text())
    return held


def fastest_peer(row: dict[str, Any]) -> float:
    """Return the least time of a row of ``peers``.

    The full sort is not a peer, but what ours is timed against.
    """
    return min(time for name, time in row["us"].items() if name != "full sort")


Cases = dict[tuple[str, str, int, int, int], dict[str, Any]]
"""By spec, dtype, E, K and T."""


def ours() -> Cases:
    """Return the cases of the newest whole run of ``gpu.py`` on an H200.

    Cases that were measured since, variant by variant, replace older ones.
    """
    whole, since = newest("whole_calls_do_bench"), newest("start_early")
    return _right([*whole["cases"], *(since["cases"] if since["date"] > whole["date"] else [])])


def ours_on_h100() -> Cases:
    """Return the newest whole run of ``gpu.py`` on an H100."""
    return _right(newest("whole_calls_do_bench", "h100")["cases"])


def _right(cases: list[dict[str, Any]]) -> Cases:
    found: Cases = {}
    for case in cases:
        if not case["wrong"]:
            key = (case["spec"], case["dtype"], case["E"], case["K"], case["T"])
            found[key] = {**found.get(key, {}), **case}
    return found


def shown(case: dict[str, Any]) -> str:
    """Return the time of a case, marked where it is not of the whole run."""
    return f"{case['us']:.2f}" + ("\u2020" if "measured_in" in case else "")


def in_readme() -> Iterable[str]:
    """Yield each peer's time, the full sort's in the same run as ours, and ours.

    Likewise on an H100.
    """
    yield (
        "| logits | T | ours | full sort | "
        + " | ".join(PEERS)
        + " | ours, H100 | full sort, H100 |"
    )
    yield "|---|" + "---|" * (5 + len(PEERS))
    timed, on_h100 = ours(), ours_on_h100()
    for peer in peers()["rows"]:
        if (peer["E"], peer["K"]) == (128, 8) and peer["T"] in IN_README:
            case = timed["gemma4", peer["dtype"], 128, 8, peer["T"]]
            other = on_h100["gemma4", peer["dtype"], 128, 8, peer["T"]]
            times = [
                f"**{shown(case)}**",
                f"{case['full_sort_us']:.2f}",
                *(f"{peer['us'][name]:.2f}" for name in PEERS),
            ]
            times += [f"**{shown(other)}**", f"{other['full_sort_us']:.2f}"]
            yield f"| {peer['dtype']} | {peer['T']:,} | " + " | ".join(times) + " |"


def against_peers() -> Iterable[str]:
    """Yield a line for each row that has a target, and how many are met."""
    held, timed, on_h100 = peers(), ours(), ours_on_h100()
    met = met_before = ahead = 0
    yield (
        "| logits | E / K | T | floor | best peer | target | full sort | ours, before "
        "| full sort, H100 | ours, H100 | met |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for row in held["rows"]:
        dtype, experts, k, tokens = row["dtype"], row["E"], row["K"], row["T"]
        target = row["target"]
        before, case = (cases["gemma4", dtype, experts, k, tokens] for cases in (timed, on_h100))
        moved = tokens * (experts * (2 if dtype == "bfloat16" else 4) + k * 8)
        best = fastest_peer(row)
        is_met = case["us"] <= target
        met += is_met
        met_before += before["us"] <= target
        ahead += max(case["us"], before["us"]) < best
        cells = [
            f"{moved / held['copy_bytes_per_second'] * 1e6:.2f}",
            f"{best:.2f}",
            f"{target:.2f}",
        ]
        cells += [
            f"{before['full_sort_us']:.2f}",
            shown(before),
            f"{case['full_sort_us']:.2f}",
            f"**{shown(case)}**",
        ]
        cells.append("yes" if is_met else f"no, {case['us'] / target:.2f} times")
        yield f"| {dtype} | {experts} / {k} | {tokens:,} | " + " | ".join(cells) + " |"
    yield ""
    yield (
        f"Ahead of every peer in {ahead} of {len(held['rows'])} rows, on the H100 too; "
        f"{met} targets are met on the H100, and "
        f"{met_before} were on the H200 with the kernels before."
    )


def of_families() -> Iterable[str]:
    """Yield each family's time, and its ratio to gemma4's of the same sizes in the same run."""
    timed = ours_on_h100()
    ratios: list[float] = []
    yield (
        "| family | logits | E / K | "
        + " | ".join(f"T = {T:,}" if T == 1 else f"{T:,}" for T in OF_FAMILIES)
        + " |"
    )
    yield "|---|---|---|" + "---|" * len(OF_FAMILIES)
    for dtype in ("bfloat16", "float32"):
        for spec, experts, k in dict.fromkeys(
            (key[0], key[2], key[3]) for key in timed if key[0] != "gemma4"
        ):
            sizes = [(dtype, experts, k, T) for T in OF_FAMILIES]
            if any(("gemma4", *size) not in timed for size in sizes):
                continue
            cases = [timed[(spec, *size)] for size in sizes]
            beside = [
                case["us"] / timed[("gemma4", *size)]["us"]
                for case, size in zip(cases, sizes, strict=True)
            ]
            cells = " | ".join(
                f"{shown(case)} ({ratio:.2f})" for case, ratio in zip(cases, beside, strict=True)
            )
            ratios += beside
            yield f"| `{spec}` | {dtype} | {experts} / {k} | {cells} |"

    yield ""
    within = sum(ratio <= OF_GEMMA4 for ratio in ratios)
    yield f"At most {OF_GEMMA4} times in {within} of {len(ratios)}."


def compiled_ahead() -> Iterable[str]:
    """Yield registers, instructions and waves of the kernels for GPUs that are not here."""
    cases = json.loads(COMPILED.read_text())["cases"]
    targets = list(dict.fromkeys(case["target"] for case in cases))
    yield "| problem | logits | kernel | " + " | ".join(targets) + " |"
    yield "|---|---|---|" + "---|" * len(targets)
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for case in cases:
        waves = f" / {case['occupancy']}" if "occupancy" in case else ""
        key = (f"{case['spec']} {case['E']}/{case['K']}", case["dtype"], case["kernel"])
        rows.setdefault(key, {})[case["target"]] = (
            f"{case['registers']} / {case['instructions']:,}{waves}"
        )
    for key in sorted(rows):
        yield (
            f"| {' | '.join(key)} | "
            + " | ".join(rows[key].get(target, "") for target in targets)
            + " |"
        )


def _head_of_routers(sizes: Collection[int]) -> Iterable[str]:
    yield f"| router | | {' | '.join(f'T = {T:,}' if T == 1 else f'{T:,}' for T in sizes)} |"
    yield "|---|---|" + "---|" * len(sizes)


def of_gate() -> Iterable[str]:
    """Yield the time of ``gate`` with the launches that ship, and of PyTorch's chain."""
    held = json.loads((RESULTS / "h200-2026-11-29-gate.json").read_text())
    of_model: dict[str, dict[int, dict[str, float]]] = {}
    for row in held["results"]:
        of_model.setdefault(row["model"], {})[row["T"]] = row["us"]
    sizes = next(iter(of_model.values()))
    yield from _head_of_routers(sizes)
    for model, by_size in of_model.items():
        ways = {
            f"{model} | `gate`": "gate",
            "| PyTorch, and our routing": "chain",
            "| the same, float32 logits": "product",
        }
        for said, way in ways.items():
            times = [f"{us[way]:.2f}" for us in by_size.values() if way in us]
            shown = [f"**{us}**" for us in times] if way == "gate" else times
            if shown:
                yield f"| {said} | {' | '.join(shown)} |"


def of_gate_with_plan() -> Iterable[str]:
    """Yield the time of ``gate.with_plan``, now and when it was composed of two operations."""
    held = [
        json.loads((RESULTS / f"h200-2026-11-29-gate-with-plan{name}.json").read_text())["results"]
        for name in ("", "-before")
    ]
    of_model: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {}
    sizes = list(dict.fromkeys(row["T"] for row in held[0]))
    for now, before in zip(*held, strict=True):
        of_model.setdefault(now["model"], []).append((now["us"], before["us"]))
    yield from _head_of_routers(sizes)
    for model, pairs in of_model.items():
        for said, shown in (
            (f"{model} | `with_plan`", [f"**{now['plan']:.2f}**" for now, _ in pairs]),
            ("| composed of gate and plan", [f"{before['plan']:.2f}" for _, before in pairs]),
            ("| `gate` alone", [f"{now['gate']:.2f}" for now, _ in pairs]),
        ):
            yield f"| {said} | {' | '.join(shown)} |"


def of_batches() -> Iterable[str]:
    """Yield the rows that depend on their batch, on each device that was tried."""
    for kind in ("cpu", "h200"):
        try:
            held = newest("by_batch", kind)
        except FileNotFoundError:
            continue
        sizes = list(held["by_batch"][0]["rows"])
        yield f"{held['device']}, {held['with'].partition(' and')[0]}, {held['date']}:"
        yield ""
        yield f"| router | logits by | {' | '.join(f'in batches of {size}' for size in sizes)} |"
        yield "|---|---|" + "---:|" * len(sizes)
        for row in held["by_batch"]:
            counts = (f"{n['logits']:,} / {n['experts']:,}" for n in row["rows"].values())
            yield f"| {row['model']} | {row['way']} | {' | '.join(counts)} |"
        yield ""


E2E_MODELS = {"gemma4": "Gemma4-26B-A4B", "qwen3": "Qwen3-30B-A3B", "gpt-oss": "gpt-oss-20b"}
E2E_STAGES = {"graph decode": "decode", "prefill": "prefill"}
E2E_OURS = ("routing", "block", "gate")
"""What replaces more and more of a model: routers, experts' rows, routers' logits."""


def end_to_end() -> Iterable[str]:
    """Yield the time of steps of whole models, of the newest run of each.

    Prefill of one sequence waits for the host, and is left out.
    """
    yield (
        "| model | card | step | batch | transformers | `patch(model)` | `experts=True` "
        "| `experts=True, gate=True` | less time |"
    )
    yield "|---|---|---|---:|---:|---:|---:|---:|---:|"
    every = [json.loads(path.read_text()) for path in RESULTS.glob("h[12]00-e2e-*.json")]
    for model, name in E2E_MODELS.items():
        runs = [held for held in every if held.get("model") == model]
        newest = max(runs, key=lambda held: (str(held["date"]), str(held["device"])))
        rows, card = newest["rows"], newest["device"].split()[1]
        for stage, step in E2E_STAGES.items():
            for row in rows:
                if row["stage"] == stage and (stage != "prefill" or row["batch"] > 1):
                    ms = row["median_ms"]
                    ours = (f"{ms[way]:.2f}" if way in ms else "" for way in E2E_OURS)
                    best = max(100 - 100 * ms[way] / ms["stock"] for way in E2E_OURS if way in ms)
                    yield (
                        f"| {name} | {card} | {step} | {row['batch']} | {ms['stock']:.2f} "
                        f"| {' | '.join(ours)} | **{best:.1f} %** |"
                    )


OF_EXCHANGE = (
    ("transformers' `all_to_all`", "transformers all_to_all", "eager"),
    ('`all-to-all`, `reduce="none"`', "all-to-all reduce=none", "eager"),
    ('`all-to-all`, `reduce="rank"`', "all-to-all reduce=rank", "eager"),
    ('`all-to-all`, `"none"`, `max_tokens=T`', "all-to-all reduce=none padded", "graph"),
    ('`all-to-all`, `"rank"`, `max_tokens=T`', "all-to-all reduce=rank padded", "graph"),
    ('`symmetric`, `"none"`, `max_tokens=T`', "symmetric reduce=none padded", "graph"),
    ('`symmetric`, `"rank"`, `max_tokens=T`', "symmetric reduce=rank padded", "graph"),
    (
        '`symmetric`, `"none"`: the exchanges alone',
        "symmetric reduce=none padded, exchanges alone",
        "graph",
    ),
    (
        '`symmetric`, `"rank"`: the exchanges alone',
        "symmetric reduce=rank padded, exchanges alone",
        "graph",
    ),
    ("NCCL's all-to-all of as many rows, there and back", "NCCL all-to-all, even", "graph"),
    ("writing the rows for other ranks, once", "put", "graph"),
)
"""Rows of the table of exchanges: what it says, and the row and the way of the results."""


def on_gpus(what: str) -> list[dict[str, Any]]:
    """Return the newest result of each number of GPUs, the fewest first; of a day, the H200's."""
    found: dict[int, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob(f"h[12]00-x*{what}*.json")):
        held = json.loads(path.read_text()) | {"file": path.name}
        before = found.get(held["ranks"])
        if before is None or held["date"][:10] >= before["date"][:10]:
            found[held["ranks"]] = held
    return [found[ranks] for ranks in sorted(found)]


def of_exchange() -> Iterable[str]:
    """Yield what tokens take to other ranks and back."""
    for held in on_gpus("exchange"):
        us = {
            (row["hidden_size"], row["name"], row["how"], row["tokens"]): row["microseconds"]
            for row in held["results"]
        }
        tokens = sorted({row["tokens"] for row in held["results"]})
        where = f"{held['ranks']} of {held['device']}, {held['with']}, {held['date']}"
        yield f"{where} (`{held['file']}`):"
        yield ""
        yield f"| H | us there and back | | {' | '.join(f'T = {T:,}' for T in tokens)} |"
        yield "|---|---|---|" + "---:|" * len(tokens)
        for columns in sorted({row["hidden_size"] for row in held["results"]}):
            for said, name, how in OF_EXCHANGE:
                if (columns, name, how, tokens[0]) in us:
                    times = (us[columns, name, how, T] for T in tokens)
                    cells = (f"{t:,.0f}" if t >= 100 else f"{t:.1f}" for t in times)  # noqa: PLR2004 -- three digits
                    yield f"| {columns} | {said} | {how} | {' | '.join(cells)} |"
        yield ""


class OnRanks(NamedTuple):
    """A run of ``e2e_expert_parallel.py``.

    :ivar ms: by way and stage.
    :ivar stages: those in which every way was measured.
    """

    held: dict[str, Any]
    ms: dict[tuple[str, tuple[str, int]], float]
    ways: list[str]
    stages: list[tuple[str, int]]


def on_ranks() -> Iterable[OnRanks]:
    """Yield what models with experts on several ranks take, the fewest ranks first."""
    for held in on_gpus("e2e-expert-parallel"):
        ms = {(row["name"], (row["stage"], row["batch"])): row for row in held["results"]}
        ways = list(dict.fromkeys(name for name, _ in ms))
        stages = [
            stage
            for stage in dict.fromkeys(stage for _, stage in ms)
            if all((way, stage) in ms for way in ways)
        ]
        yield OnRanks(held, {key: row["median_ms"] for key, row in ms.items()}, ways, stages)


def of_models_on_ranks() -> Iterable[str]:
    """Yield milliseconds of decode steps and prefills."""
    for held, ms, ways, stages in on_ranks():
        date = held["date"].partition("T")[0]
        yield f"{held['ranks']} of {held['device']}, {held['with']}, {date} (`{held['file']}`):"
        yield ""
        said = (f"{stage}, {batch} a rank" for stage, batch in stages)
        yield f"| ms | {' | '.join(said)} |"
        yield "|---|" + "---:|" * len(stages)
        for way in ways:
            yield f"| {way} | {' | '.join(f'{ms[way, stage]:.1f}' for stage in stages)} |"
        yield ""


TABLES = {
    "models": (ROOT / "docs" / "expert_parallel.md", of_models_on_ranks),
    "exchange": (ROOT / "docs" / "expert_parallel.md", of_exchange),
    "hardware": (ROOT / "docs" / "hardware.md", of_hardware),
    "batches": (ROOT / "docs" / "mismatch.md", of_batches),
    "gate": (ROOT / "docs" / "performance.md", of_gate),
    "gate with plan": (ROOT / "docs" / "performance.md", of_gate_with_plan),
    "end to end": (ROOT / "README.md", end_to_end),
    "readme": (ROOT / "README.md", in_readme),
    "peers": (ROOT / "docs" / "performance.md", against_peers),
    "families": (ROOT / "docs" / "performance.md", of_families),
    "compiled": (ROOT / "docs" / "performance.md", compiled_ahead),
}


def with_table(text: str, name: str, lines: Iterable[str]) -> str:
    """Return the page's text with the table between its marks.

    :raises ValueError: the page has not both marks.
    """
    begin, end = f"<!-- table {name}: make figures -->", f"<!-- end of table {name} -->"
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        msg = f"expected the marks {begin} and {end}"
        raise ValueError(msg)
    return "\n".join([before + begin, *lines, end + after])


def main() -> None:
    """Write or check every table."""
    stale = []
    for name, (page, lines) in TABLES.items():
        text = page.read_text()
        fresh = with_table(text, name, lines())
        if fresh != text:
            stale.append(f"{page.relative_to(ROOT)}: table {name}")
            if "--check" not in sys.argv[1:]:
                page.write_text(fresh)
    if stale and "--check" in sys.argv[1:]:
        sys.exit("\n".join([*stale, "not as the kept results say: make figures"]))


if __name__ == "__main__":
    main()
