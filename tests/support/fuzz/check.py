"""Run one call on one backend, and say what is wrong with what came out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fuzz import calls
from fuzz.judge import Verdict, judge
from moe_routing import get_router

if TYPE_CHECKING:
    from fuzz.calls import Call


def check(call: Call, backend: str) -> Verdict:
    """Route; an exception is a problem too, for every call that is drawn is a right one."""
    operands = calls.build(call)
    route = get_router(call.spec, backend=backend)
    given, ids_dtype = operands.given, getattr(torch, call.ids_dtype)
    before = {name: value.detach().clone() for name, value in given.items()}
    more = {"topk": call.topk, "num_valid_tokens": operands.valid, "ids_dtype": ids_dtype}
    counts = operands.counts
    left = None if counts is None else counts.clone()
    table, numbers = operands.replicas or (None, None)
    after = {
        "expert_map": operands.expert_map, "counts": counts,
        "logical_to_physical": table, "replica_count": numbers,
    }  # fmt: skip
    alone = all(value is None for value in after.values())
    try:
        out = route(**given, **more, **after, out=operands.out)
        if call.training and call.tokens and not out.weights.requires_grad:
            return Verdict(["weights without a gradient"])
        plain = out if alone else route(**given, **more)
    except Exception as error:  # noqa: BLE001 -- whatever a backend raises is what is looked for
        return Verdict(
            [f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"]
        )
    if problem := _form(call, operands, out):
        return Verdict([problem])
    for name, value in given.items():
        if not torch.equal(_bits(value), _bits(before[name])):
            return Verdict([f"{name} was changed"])
    if problem := _beside_plain(operands, out, plain, left):
        return Verdict([problem])
    with torch.no_grad():
        return judge(call.spec, call.topk, given, operands.counted, plain)


def shrunk(call: Call, verdict: Verdict, backend: str) -> tuple[Call, Verdict]:
    """Return a call with less in it that goes wrong in the same way, and how it does."""
    kind, tried = _kind(verdict), set()
    while True:
        for less in calls.simpler(call, verdict.row):
            if less.to_json() in tried:
                continue
            tried.add(less.to_json())
            found = check(less, backend)
            if found.problems and _kind(found) == kind:
                call, verdict = less, found
                break
        else:
            return call, verdict


def _kind(verdict: Verdict) -> str:
    return " ".join(verdict.problems[0].split()[:2])


def _form(call: Call, operands: calls.Operands, out: tuple[torch.Tensor, torch.Tensor]) -> str:
    shape = (len(operands.given["logits"]), call.topk + call.spec.shared_experts)
    dtypes = (torch.float32, getattr(torch, call.ids_dtype))
    for tensor, dtype in zip(out, dtypes, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            got = f"{tuple(tensor.shape)}, strides {tensor.stride()}, {tensor.dtype}"
            return f"an output of shape {got}; expected {shape}, {dtype}"
    if operands.out is not None and any(
        given.data_ptr() != t.data_ptr() for given, t in zip(operands.out, out, strict=True)
    ):
        return "out is not what was returned"
    if any((part != 7).any() for part in operands.around_out):
        return "elements around out were written"
    return ""


def _beside_plain(
    operands: calls.Operands,
    out: tuple[torch.Tensor, torch.Tensor],
    plain: tuple[torch.Tensor, torch.Tensor],
    left: torch.Tensor | None,
) -> str:
    """Compare a call with the one without ``expert_map``, replicas and ``counts``.

    :param left: the counts before the call.
    """
    ids = renamed = plain[1]
    if operands.expert_map is not None:
        last = len(operands.expert_map) - 1
        inside = ids.long().clamp(0, last)  # what is outside is judged later
        renamed = torch.where(ids < 0, -1, operands.expert_map[inside]).to(ids.dtype)
    if operands.replicas is not None:
        renamed = _replicas_of(ids, *operands.replicas)
    if not torch.equal(out[1], renamed) or not torch.equal(_bits(out[0]), _bits(plain[0])):
        return "with a map, replicas or counts not the same weights, and ids renamed, as without"
    if operands.counts is not None and left is not None:
        grown = operands.counts - left
        slots = (ids.flatten()[:, None] == torch.arange(len(grown))).sum(0)
        if not torch.equal(grown.long(), slots):
            return f"counts grew by {grown.tolist()}, not {slots.tolist()}"
    return ""


def _replicas_of(ids: torch.Tensor, table: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    renamed = ids.clone()
    for row, slot in (ids >= 0).nonzero().tolist():
        expert = min(int(ids[row, slot]), len(table) - 1)  # what is outside is judged later
        used = min(max(int(numbers[expert]), 1), table.shape[1])
        renamed[row, slot] = table[expert, row % used]
    return renamed


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return (
        tensor.detach().resolve_neg().clone(memory_format=torch.contiguous_format).view(torch.uint8)
    )
