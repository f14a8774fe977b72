"""Show an examination: tables of what is here, then every check.

The command that fixes a check is on the line after it. Commands and tracebacks are never wrapped,
so that they can be copied; in tables long words fold, none is cut off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from moe_routing.cli._show import STATE_STYLES, command, mark, table

if TYPE_CHECKING:
    from rich.console import Console

_GIB = 2**30


def render(
    report: dict[str, Any], console: Console, *, verbose: bool = False, tables: bool = True
) -> None:
    """Print the report.

    :param report: what ``examine`` returned.
    :param verbose: also checks that do not apply, tracebacks, and what was compared one by one.
    :param tables: also the tables of what is here, above the checks.
    """
    if tables:
        versions = report["versions"]
        named = Text(f"moe-routing {versions['moe-routing']}", style="bold")
        console.print(named + Text(f", Python {versions['python']}, {versions['system']}"))
        _devices(report, console)
        _toolchains(report, console)
        _backends(report, console)
        _operations(report, console)
        _environment(report, console)
    _ranks(report, console)
    if tables:
        console.print()
    _checks(report, console, verbose=verbose)


def _devices(report: dict[str, Any], console: Console) -> None:
    rows = [
        (
            device["type"] if device["index"] is None else f"{device['type']}:{device['index']}",
            device["name"] or "unknown",
            device["arch"] or "unknown",
            f"{device['total_memory'] / _GIB:.1f} GiB" if device["total_memory"] else "unknown",
            str(device["compute_units"] or "unknown"),
            ", ".join(map(str, device["warp_sizes"])) or "-",
        )
        for device in report["devices"]
    ]
    if rows:
        columns = ("Device", "Name", "Arch", "Memory", "Units", "Warp")
        console.print(
            table("Devices", *columns, rows=rows, whole=("Device", "Arch", "Memory", "Warp"))
        )


def _toolchains(report: dict[str, Any], console: Console) -> None:
    rows = [
        (
            toolchain["name"],
            toolchain["version"] or "no",
            Text("yes", style="green") if toolchain["usable"] else Text("no", style="dim"),
            toolchain["detail"],
        )
        for toolchain in report["toolchains"]
    ]
    console.print(
        table(
            "Toolchains",
            "Name",
            "Installed",
            "Usable",
            "What",
            rows=rows,
            whole=("Name", "Installed", "Usable"),
        )
    )


def _backends(report: dict[str, Any], console: Console) -> None:
    places = list(report["reports"])
    if not places:
        known = [
            (backend["name"], backend["distribution"], backend["summary"])
            for backend in report["backends"]
        ]
        console.print(table("Backends", "Name", "From", "What", rows=known, whole=("Name",)))
        return
    for place in places:
        problem = report["reports"][place]["problem"] or {}
        size = (
            f" with E={problem['num_experts']} K={problem['topk']} {problem['dtype']}"
            if problem
            else ""
        )
        states = [
            (backend["name"], backend["devices"][place])
            for backend in report["backends"]
            if "route" in backend["operations"]  # who computes the others, the next table says
        ]
        rows = [
            (
                name,
                Text(state["state"], style=STATE_STYLES[state["state"]]),
                state["code"] or "",
                state["reason"],
            )
            for name, state in states
        ]
        title = f"Backends for {report['router']}{size} on {place}"
        console.print(
            table(title, "Name", "State", "Code", "Why", rows=rows, whole=("Name", "State", "Code"))
        )
        for name, state in states:
            if state["fix"]:
                console.print(Text(f"to use {name}:"))
                command(console, state["fix"])


def _operations(report: dict[str, Any], console: Console) -> None:
    """Show who computes each operation; ``route`` alone is in the table of backends already."""
    rows = [
        (operation["name"], place, state["winner"] or "none", state["problem"], state["why"])
        for operation in report["operations"]
        for place, state in operation["devices"].items()
    ]
    if len(report["operations"]) > 1:
        columns = ("Operation", "Device", "Backend", "Problem", "Why")
        console.print(table("Operations", *columns, rows=rows, whole=columns[:3]))


def _environment(report: dict[str, Any], console: Console) -> None:
    rows = [
        (variable["name"], variable["value"], variable["meaning"])
        for variable in report["environment"]
    ]
    if rows:
        console.print(
            table("Environment variables", "Name", "Value", "Meaning", rows=rows, whole=("Name",))
        )


def _ranks(report: dict[str, Any], console: Console) -> None:
    """Show each rank that torchrun started."""
    rows = [
        (
            str(one["rank"]),
            one["host"],
            _device(one),
            one["backend"] or "none",
            one["transport"] or "none",
            one["shared_batch_transport"] or "none",
            one["versions"].get("moe-routing") or "unknown",
            one["versions"].get("torch") or "no",
            one["versions"].get("triton") or "no",
            _problems(one),
        )
        for one in report["ranks"]
    ]
    if rows:
        columns = (
            *("Rank", "Host", "Device", "Backend", "Transport", "Shared batch"),
            *("moe-routing", "torch", "Triton", "Problems"),
        )
        console.print(table("Ranks", *columns, rows=rows, whole=(columns[0], *columns[3:6])))


def _device(one: dict[str, Any]) -> str:
    known = ", ".join(filter(None, (one["name"], one["arch"])))
    return f"{one['device'] or 'unknown'} ({known})" if known else one["device"] or "unknown"


def _problems(one: dict[str, Any]) -> Text:
    """Name the checks that found one; what they say is below."""
    found = [check["name"] for check in one["findings"] if check["status"] == "problem"]
    if one["error"]:
        return Text("not examined", style="red")
    return Text(", ".join(dict.fromkeys(found)), style="red") if found else Text("none")


def _checks(report: dict[str, Any], console: Console, *, verbose: bool) -> None:
    console.print(Text("Checks", style="bold"))
    for check in report["checks"]:
        status = check["status"]
        if status == "skipped" and not verbose:
            continue
        console.print(
            mark(console, status) + Text.assemble((f"{check['name']}: ", "bold"), check["summary"])
        )
        if check["fix"]:
            command(console, check["fix"])
        if verbose and check["details"]:
            for detail in check["details"].rstrip().splitlines():
                console.print(Text(f"      {detail}", style="dim"), soft_wrap=True)
    console.print(Text(_summary(report, verbose=verbose), style="bold"), soft_wrap=True)


def _summary(report: dict[str, Any], *, verbose: bool) -> str:
    found = [check["status"] for check in report["checks"]]
    problems, warnings = found.count("problem"), found.count("warning")
    if not problems and not warnings:
        return "No problems."
    counts = ((problems, "problem"), (warnings, "warning"))
    said = (
        ", ".join(f"{count} {word}{'s' if count > 1 else ''}" for count, word in counts if count)
        + "."
    )
    hidden = not verbose and any(
        check["details"] for check in report["checks"] if check["status"] in ("problem", "warning")
    )
    return said + (" More with --verbose." if hidden else "")
