"""The check of the plug-in for vLLM.

What it would do where vLLM starts, and what it did in this process.
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from moe_routing.doctor._check import Check
from moe_routing.integrations.vllm import report
from moe_routing.integrations.vllm.patch_points import PATCH_POINTS, PLUGIN, VARIABLE, look
from moe_routing_registry.request import flag

if TYPE_CHECKING:
    from moe_routing.doctor._case import Case
    from moe_routing.doctor._check import Status


def vllm(_case: Case) -> list[Check]:
    """Judge whether the plug-in fits the vLLM that is installed and would be called.

    Say what it did in this process.
    """
    found = look()
    if found is None:
        return [_finding("skipped", "vLLM is not installed")]
    here = f"vLLM {found.version}"
    if found.problems:
        asked = _asked()
        summary = f"{here} is not known, so nothing of it is replaced: {found.problems[0]}"
        return [
            _finding(
                "warning" if asked else "ok",
                summary,
                f"unset {VARIABLE}" if asked else "",
                found.problems,
            )
        ]
    signatures = tuple(
        f"{point.name}{point.parameters} in vllm/{point.file}" for point in PATCH_POINTS
    )
    if not _asked():
        return [
            _finding(
                "ok",
                f"{here} is known and left alone; {VARIABLE}=1 has us route for it",
                details=signatures,
            )
        ]
    if PLUGIN not in entry_points(group="vllm.general_plugins").names:
        return [
            _finding(
                "warning",
                f"{here} finds no plug-in {PLUGIN}: there is no metadata",
                "pip install moe-routing",
            )
        ]
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        fix = f"export VLLM_PLUGINS={','.join(filter(None, [allowed, PLUGIN]))}"
        return [
            _finding(
                "warning", f"{here} is told to leave {PLUGIN} out by VLLM_PLUGINS={allowed}", fix
            )
        ]
    sites = report().sites
    did = tuple(
        f"{s.layers} x {s.router}, {s.calls} calls: {s.formula or f'left alone: {s.reason}'}"
        for s in sites
    )
    replaced = sum(site.layers for site in sites if site.formula)
    kept = sum(site.layers for site in sites) - replaced
    so_far = (
        f"; in this process {replaced} routers were replaced, {kept} left alone" if sites else ""
    )
    unread = (
        f"; the code of {len(found.unknown)} classes was not read, and they are left alone"
        if found.unknown
        else ""
    )
    summary = f"{here} routes through us where its routers are known{unread}{so_far}"
    fix = "pip install --upgrade moe-routing" if found.unknown else ""
    return [
        _finding("warning" if unread else "ok", summary, fix, (*found.unknown, *did) or signatures)
    ]


def _asked() -> bool:
    try:
        return flag(VARIABLE)
    except ValueError:  # the check "environment" says so
        return False


def _finding(status: Status, summary: str, fix: str = "", details: tuple[str, ...] = ()) -> Check:
    return Check(name="vllm", status=status, summary=summary, fix=fix, details="\n".join(details))
