"""Clauses 0, 11 and 15: what a kernel keeps between calls, and its optional methods."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from moe_routing._router import Router
from moe_routing.conformance.checks import _sets
from moe_routing.conformance.checks._check import check
from moe_routing.conformance.checks.traced import compare_gradients
from moe_routing.conformance.requirements import require
from moe_routing.conformance.threads import THREADS, made_at_once
from moe_routing.conformance.under_test import (
    DeclinedError,
    NotApplicableError,
    must_match,
    outputs,
    same_bits,
)
from moe_routing.conformance.variants import VARIANTS, fits
from moe_routing.kernel import Operands, Prepares, RoutingOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from moe_routing.conformance.cases import Call, Case, Profile
    from moe_routing.conformance.under_test import BackendUnderTest

TURNS = 3
"""Calls of a kind.

The first is checked and prepared, the second is recognised, and the third is like the second.
"""
CALLS = 12


def _router(under_test: BackendUnderTest, call: Call) -> Router:
    """Return a router that has seen no call.

    Build what the call needs, or raise ``DeclinedError``, before.
    """
    under_test.route(call)
    return Router(call.spec, backend=under_test.backend)


def _routed(route: Router, call: Call, out: RoutingOutput | None = None) -> RoutingOutput:
    return route(call.logits, call.topk, ids_dtype=call.ids_dtype, out=out, **call.operands)


def _out(call: Call, under_test: BackendUnderTest) -> RoutingOutput:
    return outputs(
        len(call.logits), call.topk + call.spec.shared_experts, call.ids_dtype, under_test.device
    )


def _other(call: Call, turn: int) -> Call:
    """Return a call of the same shapes with other values.

    All that it brings is moved by some places.
    """
    moved: dict[str, Any] = {}
    for name, value in call.operands.items():
        if isinstance(value, torch.Tensor):
            moved[name] = (
                (value - turn).clamp(min=0)
                if name == "num_valid_tokens"
                else value.roll(turn, 0).contiguous()
            )
        elif value is not None:
            moved[name] = max(0, cast("int", value) - turn)
    changed = call.but(**moved)
    changed.logits = call.logits.roll((turn, turn), (0, 1)).contiguous()
    return changed


def _kinds(profile: Profile) -> Iterator[Case]:
    """Yield every family without and with the operands that any call may bring."""
    for case in _sets.of_every_family(profile):
        yield case
        yield case.but(mapped=True, valid="int")
        yield case.but(mapped=True, valid="tensor", ids_dtype="int64")


def _must_match(call: Call, output: RoutingOutput, what: str) -> None:
    try:
        must_match(call, output)
    except AssertionError as error:
        msg = f"{what}: {error}"
        raise AssertionError(msg) from error


@check(11, _kinds)
def later_calls_of_a_kind_are_right(under_test: BackendUnderTest, case: Case) -> None:
    """Later calls of the same shapes with other values are right, and their outputs stay.

    This holds with outputs to write into and without.
    """
    call = case.make(under_test.device)
    route = _router(under_test, call)
    for given in (False, True):
        routed = []
        for turn in range(TURNS):
            other = _other(call, turn)
            out = _out(other, under_test) if given else None
            output = _routed(route, other, out)
            written = out is None or (output.weights is out.weights and output.ids is out.ids)
            require(written, f"call {turn + 1} with out: what it returns is not out")
            routed.append((other, output))
        for turn, (other, output) in enumerate(routed):
            _must_match(other, output, f"call {turn + 1} {'with' if given else 'without'} out")


@check(11, _kinds)
def what_is_prepared_serves_calls_with_and_without_out(
    under_test: BackendUnderTest, case: Case
) -> None:
    """What a kernel prepares from a call without outputs serves calls with them.

    The converse holds too.
    """
    call = case.make(under_test.device)
    kernel = _kernel(under_test, call)
    if not isinstance(kernel, Prepares):
        msg = "the kernel prepares nothing"
        raise NotApplicableError(msg)
    for given in (False, True):
        prepared = kernel.prepared(_operands(call, _out(call, under_test) if given else None))
        if prepared is None:
            continue
        for turn, again in enumerate((given, not given, not given, given)):
            other = _other(call, turn)
            out = _out(other, under_test) if again else None
            output = prepared(_operands(other, out))
            what = (
                f"prepared {'with' if given else 'without'} out, "
                f"called {'with' if again else 'without'}"
            )
            require(
                out is None or (output.weights is out.weights and output.ids is out.ids),
                f"{what}: not out is returned",
            )
            _must_match(other, output, what)


def _kernel(under_test: BackendUnderTest, call: Call) -> Any:  # noqa: ANN401 -- a Kernel and more
    """Return the kernel that serves the call."""
    route, logits = _router(under_test, call), call.logits
    return route.resolve(
        logits.device, logits.dtype, logits.shape[1], call.topk, ids_dtype=call.ids_dtype
    ).kernel


def _operands(call: Call, out: RoutingOutput | None) -> Operands:
    return Operands(call.logits, out=out, **call.launched)


@check(11, _sets.of_every_family)
def operands_changed_in_place_are_read_again(under_test: BackendUnderTest, case: Case) -> None:
    """Every tensor of a call may change in place between two calls, as biases do in training.

    The second reads it again.
    """
    call = case.but(mapped=True, valid="tensor").make(under_test.device)
    route = _router(under_test, call)
    for _ in range(TURNS):
        _must_match(call, _routed(route, call), "before anything is changed")
    other = _other(call, 5)
    changed = {"logits": other.logits, **other.operands}
    for name, tensor in {"logits": call.logits, **call.operands}.items():
        if isinstance(tensor, torch.Tensor):
            tensor.copy_(cast("Tensor", changed[name]))
            _must_match(call, _routed(route, call), f"{name} changed in place")


@check(11, _sets.where(_sets.of_every_family, tokens=129))
def eight_threads_may_share_a_router(under_test: BackendUnderTest, case: Case) -> None:
    """Eight threads that route at once through one router get what each would get alone.

    Each thread has its own inputs.
    """
    call = case.make(under_test.device)
    calls = [_other(call, thread) for thread in range(THREADS)]
    route = _router(under_test, call)
    work = [partial(_routed, route, one) for one in calls]
    for one, (what, routed) in zip(calls, made_at_once(work, CALLS), strict=True):
        for output in routed:
            if not (
                same_bits(output.ids, routed[0].ids)
                and same_bits(output.weights, routed[0].weights)
            ):
                msg = f"{what}: the same call gives other bits"
                raise AssertionError(msg)
        _must_match(one, routed[0], what)


def _of(num_experts: int, profile: Profile) -> Iterator[Case]:
    """Yield every family in a size that no other check has, so that nothing is built for it yet."""
    for case in _sets.of_every_family(profile):
        yield case.but(
            num_experts=num_experts, topk=4 if fits(VARIANTS[case.variant], num_experts, 4) else 8
        )


@check(11, _sets.where(_of, 48))
def a_warmed_up_router_routes_right(under_test: BackendUnderTest, case: Case) -> None:
    """Router.warmup and the kernel's own raise nothing, and do not change later calls."""
    for tokens in (1, 33):
        call = case.but(num_tokens=tokens).make(under_test.device)
        route = _router(under_test, call)
        _warm_up(route, call, under_test, training=False)
        for _ in range(TURNS):
            _must_match(call, _routed(route, call), f"T = {tokens} after warmup()")


@check(15, _sets.where(_of, 48), capability="gradients")
def a_router_warmed_up_for_training_has_right_gradients(
    under_test: BackendUnderTest, case: Case
) -> None:
    """The same with ``training=True``, for the gradients too."""
    call = _gentle(case, under_test)
    route = _router(under_test, call)
    _warm_up(route, call, under_test, training=True)
    compare_gradients(under_test, case, call)


def _gentle(case: Case, under_test: BackendUnderTest) -> Call:
    """Return a call for gradients whose weights are far from 1.

    Near it, float32 loses the digits of 1 - w.
    """
    call = case.make(under_test.device)
    call.logits = (call.logits / 4).requires_grad_()
    return call


def _warm_up(route: Router, call: Call, under_test: BackendUnderTest, *, training: bool) -> None:
    said = f"warmup(training={training})"
    try:
        report = route.warmup(
            call.logits.shape[1], call.topk, dtype=call.logits.dtype, device=under_test.device,
            ids_dtype=call.ids_dtype, training=training,
        )  # fmt: skip
    except Exception as error:
        msg = f"{said} raises {type(error).__name__}: {error}"
        raise AssertionError(msg) from error
    require(
        report.winner == under_test.backend,
        f"{said}: expected the backend {under_test.backend}, got {report.winner}",
    )


@check(15, _sets.of_every_family, capability="gradients")
def later_training_steps_have_right_gradients(under_test: BackendUnderTest, case: Case) -> None:
    """Logits and scale that change in place between training steps are read again.

    They change as an optimiser changes them.
    """
    call = _gentle(case.but(valid="tensor"), under_test)
    for turn in range(TURNS):
        other = _other(call, turn + 1)
        compare_gradients(under_test, case, call)
        with torch.no_grad():
            call.logits.copy_(other.logits)
            scale, changed = (
                call.operands.get("per_expert_scale"),
                other.operands.get("per_expert_scale"),
            )
            if scale is not None and changed is not None:
                scale.copy_(changed)


MODES: dict[str, Callable[[], Any]] = {
    "torch.inference_mode": torch.inference_mode,
    "torch.no_grad": torch.no_grad,
    "torch.enable_grad": torch.enable_grad,
}


@check(15, _sets.where(_of, 40), capability="gradients")
def calls_may_change_between_grad_modes(under_test: BackendUnderTest, case: Case) -> None:
    """Calls in inference mode, without and with gradients follow each other in any order.

    The same bits, and gradients.
    """
    declined = under_test.rejection(case.problem(training=True))
    if declined is not None:
        raise DeclinedError(declined)
    call = _gentle(case.but(num_tokens=17), under_test)
    route, before = Router(call.spec, backend=under_test.backend), "nothing"
    first: RoutingOutput | None = None
    for mode in [*MODES, *reversed(MODES), *MODES]:
        what = f"in {mode} after {before}"
        try:
            with MODES[mode]():
                output = under_test.route(call) if first is None else _routed(route, call)
        except (RuntimeError, ValueError) as error:
            msg = f"{what}: raises {type(error).__name__}: {error}"
            raise AssertionError(msg) from error
        wanted = mode == "torch.enable_grad"
        require(
            output.weights.requires_grad == wanted,
            f"{what}: weights.requires_grad is {output.weights.requires_grad}",
        )
        if first is not None:
            same = same_bits(output.ids, first.ids) and same_bits(
                output.weights.detach(), first.weights
            )
            require(same, f"{what}: not the outputs of the first call")
        else:
            first = output
        if wanted:
            compare_gradients(under_test, case, call)
        before = mode
    must_match(call, cast("RoutingOutput", first))


@check(0, _sets.of_every_family)
def its_notes_are_lines_of_text(under_test: BackendUnderTest, case: Case) -> None:
    """A kernel's notes are a tuple of texts, and asking for the report of a call raises nothing."""
    call = case.make(under_test.device)
    kernel = _kernel(under_test, call)
    try:
        notes = getattr(kernel, "notes", ())
        good = isinstance(notes, tuple) and all(isinstance(note, str) for note in notes)
        require(good, f"notes: expected a tuple of texts, got {notes!r}")
        route = _router(under_test, call)
        _routed(route, call)
        said = route.report.notes if route.report else None
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        msg = f"notes: asking for them raises {type(error).__name__}: {error}"
        raise AssertionError(msg) from error
    require(
        said is not None and set(notes) <= set(said),
        f"notes: {notes} are not in the report, which has {said}",
    )
