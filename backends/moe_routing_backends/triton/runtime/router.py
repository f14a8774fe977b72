"""The host side: choose the variant that serves this T, and launch it.

It takes as few microseconds of the host as Triton allows.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from triton import JITFunction

from moe_routing import RoutingOutput
from moe_routing.private_api import current_device, current_stream, empty, is_observed
from moe_routing_backends.triton import BATTLEMAGE, HOPPER
from moe_routing_backends.triton.kernels import OF_LAUNCHES, VARIANTS, constants
from moe_routing_backends.triton.kernels.counts import (
    LAUNCHES,
    SLOTS_APART,
    WARP_SIZE,
    launch_for,
    moe_routing_counts,
    programs,
)
from moe_routing_backends.triton.kernels.counts import constants as of_counts
from moe_routing_backends.triton.kernels.spec import ANY_ROWS, RUNTIME_ARGUMENTS, kernel_spec
from moe_routing_backends.triton.runtime.gradient import Gradient
from moe_routing_backends.triton.runtime.launcher import (
    ALIGNMENT,
    NEVER_CURRENT,
    Compiled,
    as_readable,
)
from moe_routing_backends.triton.tuning.choose import supports_pdl, table_for
from moe_routing_backends.triton.tuning.table import FALLBACK
from moe_routing_registry.device import INTERPRETER

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing import Operands
    from moe_routing.kernel import Prepared
    from moe_routing_backends.triton.kernels.spec import KernelSpec, Launch
    from moe_routing_backends.triton.tuning.table import Step
    from moe_routing_registry import DeviceInfo, RoutingProblem

NO_OPERANDS: tuple[Any, ...] = (None, None, None, None, None, None, None)
_tuple = tuple.__new__
"""Makes a named tuple in half the time of its own constructor, which is a Python function."""


def build(problem: RoutingProblem, device: DeviceInfo) -> TritonRouter:
    """Bind the problem to the device; nothing is compiled before the first call or ``warmup``."""
    return _built(problem, device, HOPPER)


def build_for_xpu(problem: RoutingProblem, device: DeviceInfo) -> TritonRouter:
    """Do the same; in the interpreter the kernels are launched as on Intel's GPUs."""
    return _built(problem, device, BATTLEMAGE)


def _built(problem: RoutingProblem, device: DeviceInfo, interpreted_as: DeviceInfo) -> TritonRouter:
    on_cpu = device.type == "cpu"
    if on_cpu == isinstance(VARIANTS["cooperative"].kernel, JITFunction):
        msg = (
            f"{INTERPRETER} was changed after Triton's kernels were imported: "
            "set or unset it before Python starts"
        )
        raise RuntimeError(msg)
    return TritonRouter(
        problem, device, table_for(interpreted_as, problem).steps(problem) if on_cpu else None
    )


class TritonRouter:
    """A ``Kernel``: one Triton kernel a call, two where the slots of many tokens are counted.

    :ivar notes: what is unusual, for ``Router.report``.
    """

    def __init__(
        self, problem: RoutingProblem, device: DeviceInfo, steps: tuple[Step, ...] | None = None
    ) -> None:
        """Look up the launches for the problem, or take the given.

        Warn of a table that cannot be used.
        """
        self._problem = problem
        self._index = NEVER_CURRENT if device.type == "cpu" else device.index or 0
        self._device = torch.device(
            "cpu" if device.type == "cpu" else f"{device.type}:{self._index}"
        )
        self._experts = problem.num_experts
        self._columns = problem.topk + problem.spec.shared_experts
        self._ids_dtype: torch.dtype = getattr(torch, problem.ids_dtype)
        self._element = 4 if problem.dtype == "float32" else 2
        steps = table_for(device, problem).steps(problem) if steps is None else steps
        self._limits = [s.tokens for s in steps[:-1]]
        self._launches = [s.launch for s in steps]
        self._pdl = supports_pdl(device)
        self._compiled = Compiled(problem, self._device, self._advice)
        self._ready = self._compiled.launchers
        self._gradient = Gradient(problem, self._index, self._compiled)

    @property
    def notes(self) -> tuple[str, ...]:
        """Say whether launches take the slow way, which only a launch can tell.

        The spec's notes say which table applies.
        """
        why = self._compiled.indirect
        return (f"launches through Triton's own launcher: {why}",) if why else ()

    def __call__(  # noqa: C901, PLR0912, PLR0913, PLR0915 -- Kernel's operands; one flat function, because calls cost a tenth of a microsecond
        self,
        logits: Tensor,
        *,
        per_expert_scale: Tensor | None = None,
        bias: Tensor | None = None,
        token_ids: Tensor | None = None,
        expert_table: Tensor | None = None,
        num_valid_tokens: int | Tensor | None = None,
        expert_map: Tensor | None = None,
        ids: Tensor | None = None,
        counts: Tensor | None = None,
        logical_to_physical: Tensor | None = None,
        replica_count: Tensor | None = None,
        out: RoutingOutput | None = None,
    ) -> RoutingOutput:
        """Route ``logits [T, E]``; see ``Kernel``."""
        T, _ = logits.shape
        if logical_to_physical is not None:
            expert_map = logical_to_physical  # which a kernel reads with the count
        if counts is not None and T * self._columns > SLOTS_APART:
            out = self(
                logits, per_expert_scale=per_expert_scale, bias=bias, token_ids=token_ids,
                expert_table=expert_table, num_valid_tokens=num_valid_tokens, ids=ids, out=out,
            )  # fmt: skip
            self._count(out.ids, expert_map, replica_count, counts)
            return out
        logits = logits.resolve_neg()  # a kernel reads memory, and knows of no lazy negation
        row_stride, expert_stride = logits.stride()
        here = current_device() == self._index
        if out is not None:
            weights, selected = out
        elif here:
            size, strides = (T, self._columns), (self._columns, 1)
            weights = empty(size, strides, torch.float32)
            selected = empty(size, strides, self._ids_dtype)
            out = _tuple(RoutingOutput, (weights, selected))
        else:
            size = (T, self._columns)
            weights = torch.empty(size, dtype=torch.float32, device=logits.device)
            selected = torch.empty(size, dtype=self._ids_dtype, device=logits.device)
            out = RoutingOutput(weights, selected)
        source, to_weights, to_ids = logits.data_ptr(), weights.data_ptr(), selected.data_ptr()
        aligned = not (source | to_weights | to_ids | (row_stride * self._element)) % ALIGNMENT
        step, launch = self._choose(T, aligned=aligned)
        scale_at = bias_at = scale_dtype = bias_dtype = None
        if per_expert_scale is not None:
            scale_at, scale_dtype = per_expert_scale.data_ptr(), per_expert_scale.dtype
        if bias is not None:
            bias_at, bias_dtype = bias.data_ptr(), bias.dtype
        key: tuple[Any, ...] = (
            step, aligned, row_stride == self._experts, expert_stride == 1, scale_dtype, bias_dtype,
        )  # fmt: skip
        if not aligned:  # a kernel is compiled for the alignment of each of the three
            key = (*key, source % ALIGNMENT, to_weights % ALIGNMENT, to_ids % ALIGNMENT)
        valid, vocabulary = T, 0
        rest = NO_OPERANDS
        # Kernels of specs without a table read a record there.
        table = expert_table if ids is None else ids
        if (
            table is not None
            or num_valid_tokens is not None
            or expert_map is not None
            or counts is not None
        ):
            valid_tensor = None
            if isinstance(num_valid_tokens, torch.Tensor):
                valid_tensor = num_valid_tokens
            elif num_valid_tokens is not None:
                valid = num_valid_tokens
            if table is not None:
                vocabulary = table.shape[0]
            tensors = (token_ids, table, valid_tensor, expert_map, counts, replica_count)
            rest = (*tensors, _most_replicas(expert_map, replica_count))
            key = (*key, *[None if o is None else o.dtype for o in tensors])
            if counts is not None:
                key = (*key, len(counts))
        ready = self._ready.get(key)
        if ready is None or not here or is_observed():  # only Triton's own launch calls its hooks
            self._launch_by_jit(
                key, launch, logits, out, (per_expert_scale, bias, *rest), valid, vocabulary
            )
            return out
        if rest is not NO_OPERANDS:
            rest = (*[None if o is None else o.data_ptr() for o in rest[:-1]], rest[-1])
        block = launch.block_t
        ready(
            (T + block - 1) // block,
            current_stream(self._index),
            (
                source, to_weights, to_ids, scale_at, bias_at, *rest,
                T, valid, row_stride, expert_stride, vocabulary,
            ),
        )  # fmt: skip
        return out

    def _advice(self, key: tuple[Any, ...]) -> str:
        problem = self._problem
        training = ", training=True" if key[0] == "backward" else ""
        named = ", ".join(map(repr, sorted(problem.operands)))
        operands = f", operands={{{named}}}" if named else ""
        return (
            f"call route.warmup({problem.num_experts}, {problem.topk}, "
            f"dtype=torch.{problem.dtype}, device='{self._device}'{training}{operands}), "
            "or route inputs of the same kind once"
        )

    def _choose(self, tokens: int, *, aligned: bool) -> tuple[int, Launch]:
        step = bisect_left(self._limits, tokens)
        launch = self._launches[step]
        return (step, launch) if aligned or launch.variant in ANY_ROWS else (-1, FALLBACK)

    def prepared(self, operands: Operands) -> Prepared | None:
        """Return a function that routes calls of this one's shapes, strides and dtypes.

        It takes less host time: all that depends on those is worked out here. This call has been
        routed before. ``None`` where such calls are not launched directly.
        """
        logits, scale, bias, token_ids, table, valid, expert_map, recorded, _ = operands
        T, _ = logits.shape
        row_stride, expert_stride = logits.stride()
        step, launch = self._choose(T, aligned=True)
        key: tuple[Any, ...] = (
            step, True, row_stride == self._experts, expert_stride == 1,
            None if scale is None else scale.dtype, None if bias is None else bias.dtype,
        )  # fmt: skip
        if recorded is not None:
            table = recorded
        extras = table is not None or valid is not None or expert_map is not None
        counted = isinstance(valid, int)
        if extras:
            tensors = (token_ids, table, None if counted else valid, expert_map, None, None)
            key = (*key, *[None if o is None else o.dtype for o in tensors])  # type: ignore[union-attr] # no int is left
        ready = self._ready.get(key)
        if ready is None or (row_stride * self._element) % ALIGNMENT:
            return None
        index, ids_dtype = self._index, self._ids_dtype
        size, strides = (T, self._columns), (self._columns, 1)
        blocks = (T + launch.block_t - 1) // launch.block_t
        vocabulary = 0 if table is None else table.shape[0]
        tail: tuple[Any, ...] = (*NO_OPERANDS, T, T, row_stride, expert_stride, vocabulary)

        def route(operands: Operands) -> RoutingOutput:
            logits, scale, bias, token_ids, table, valid, expert_map, recorded, out = operands
            if current_device() != index or is_observed():
                return self._route(operands)
            if out is None:
                out = _tuple(
                    RoutingOutput,
                    (empty(size, strides, torch.float32), empty(size, strides, ids_dtype))
                )  # fmt: skip
            weights, ids = out
            source, to_weights, to_ids = logits.data_ptr(), weights.data_ptr(), ids.data_ptr()
            if (source | to_weights | to_ids) % ALIGNMENT:
                return self._route(operands)
            scale_at = None if scale is None else scale.data_ptr()
            bias_at = None if bias is None else bias.data_ptr()
            rest = tail
            if extras:
                if recorded is not None:
                    table = recorded
                rest = (
                    None if token_ids is None else token_ids.data_ptr(),
                    None if table is None else table.data_ptr(),
                    None if valid is None or counted else valid.data_ptr(),  # type: ignore[union-attr] # a tensor
                    None if expert_map is None else expert_map.data_ptr(),
                    None, None, None, T, valid if counted else T,
                    row_stride, expert_stride, vocabulary,
                )  # fmt: skip
            ready(
                blocks,
                current_stream(index),
                (source, to_weights, to_ids, scale_at, bias_at, *rest),
            )
            return out

        return route

    def _route(self, operands: Operands) -> RoutingOutput:
        """Route a call that a prepared one does not fit."""
        logits, scale, bias, token_ids, table, valid, expert_map, recorded, out = operands
        return self(
            logits, per_expert_scale=scale, bias=bias, token_ids=token_ids, expert_table=table,
            num_valid_tokens=valid, expert_map=expert_map, ids=recorded, out=out,
        )  # fmt: skip

    def _launch_by_jit(  # noqa: PLR0913, PLR0917 -- what a call knows
        self,
        key: tuple[Any, ...],
        launch: Launch,
        logits: Tensor,
        out: RoutingOutput,
        operands: tuple[Any, ...],
        valid: int,
        vocabulary: int,
    ) -> None:
        """Gather what a launch through Triton's JIT takes."""
        scale, bias, *others = operands
        counts = operands[-3]
        readable = [as_readable(vector) for vector in (scale, bias)]
        if readable[0] is not scale or readable[1] is not bias:
            # No launcher is ever kept for such a key.
            names = (
                "per_expert_scale", "bias", "token_ids", "expert_table", "num_valid_tokens",
                "expert_map", "counts", "replica_count",
            )  # fmt: skip
            given: dict[str, Any] = dict(zip(names, (*readable, *others[:-1]), strict=True))
            if given["num_valid_tokens"] is None:
                given["num_valid_tokens"] = valid
            self(logits, **given, out=out)
            return
        row_stride, expert_stride = logits.stride()
        T = len(logits)
        is_packed = row_stride == self._experts and expert_stride == 1
        named = {
            **constants(self._problem, launch),
            "ROW_STRIDE": self._experts if is_packed else 0,
            "EXPERT_STRIDE": 1 if expert_stride == 1 else 0,
            "VALID_ON_DEVICE": operands[4] is not None,
            "PDL": self._pdl,
        }
        if counts is not None:
            named["SPEC"] = self._counting(counts)
        kernel = OF_LAUNCHES[launch.variant].kernel
        fixed = tuple(named[name] for name in kernel.arg_names[RUNTIME_ARGUMENTS:])
        arguments = (logits, *out, *operands, T, valid, row_stride, expert_stride, vocabulary)
        blocks = (T + launch.block_t - 1) // launch.block_t
        self._compiled.launch_and_keep(
            key, kernel, blocks, arguments, fixed, launch.num_warps, launch.warp_size, pdl=self._pdl
        )

    def _counting(self, counts: Tensor) -> KernelSpec:
        """Return the constant of a kernel that counts."""
        columns = self._columns if len(counts) > self._experts else self._problem.topk
        return replace(kernel_spec(self._problem), counted_columns=columns)

    def _count(
        self, ids: Tensor, expert_map: Tensor | None, replica_count: Tensor | None, counts: Tensor
    ) -> None:
        """Count the slots of logical ``ids``, and rename them where they lie."""
        tensors = (ids, expert_map, replica_count, counts)
        numbers = (_most_replicas(expert_map, replica_count), len(ids))
        launch = launch_for(ids.numel())
        key = (launch, *[None if t is None else t.dtype for t in tensors], len(counts))
        blocks = programs(ids.numel(), launch)
        ready = self._ready.get(key)
        if ready is None or current_device() != self._index or is_observed():
            named = {
                **of_counts(self._problem, launch),
                "SPEC": self._counting(counts),
                "PDL": self._pdl,
            }
            names = moe_routing_counts.arg_names[len(tensors) + len(numbers) :]
            self._compiled.launch_and_keep(
                key, moe_routing_counts, blocks, (*tensors, *numbers),
                tuple(named[name] for name in names), launch.num_warps, WARP_SIZE, pdl=self._pdl,
            )  # fmt: skip
            return
        at = [None if t is None else t.data_ptr() for t in tensors]
        ready(blocks, current_stream(self._index), (*at, *numbers))

    def backward(
        self, grad_weights: Tensor, logits: Tensor, ids: Tensor, per_expert_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of ``logits`` and of ``per_expert_scale``, in one kernel.

        The former is in the dtype of ``logits``, the latter empty if there is no scale.

        :param grad_weights: float32 ``[T, K]``, of the K selected experts.
        :param ids: ``[T, K]``, logical ids; -1 in rows of padding.
        """
        return self._gradient(grad_weights, logits, ids, per_expert_scale)

    def warmup(self) -> None:
        """Compile every variant that some number of tokens would pick.

        It routes zeros through each.
        """
        spec, dtype = self._problem.spec, getattr(torch, self._problem.dtype)
        sizes = [1, *(int(limit) + 1 for limit in self._limits)]
        if "counts" in self._problem.operands:  # a call of more slots counts in another kernel
            most = [SLOTS_APART, *(launch.slots for launch in LAUNCHES[:-1])]
            sizes += [int(slots) // self._columns + 1 for slots in most]
        # Vectors come in float32 or in the model's dtype, and a kernel is compiled for one of them.
        has_vectors = spec.per_expert_scale or spec.needs_bias
        for vectors in {torch.float32, dtype} if has_vectors else {dtype}:
            for T in sizes:
                logits = torch.zeros(T, self._experts, dtype=dtype, device=self._device)
                self(logits, **self._some_operands(T, vectors))

    def _some_operands(self, T: int, vectors: torch.dtype) -> dict[str, Any]:
        """Return operands of every kind that the problem has."""
        spec, device, topk = self._problem.spec, self._device, self._problem.topk
        optional = self._problem.operands
        operands: dict[str, Any] = {}
        if spec.per_expert_scale:
            operands["per_expert_scale"] = torch.ones(self._experts, dtype=vectors, device=device)
        if spec.needs_bias:
            operands["bias"] = torch.zeros(self._experts, dtype=vectors, device=device)
        if spec.selection == "token_table":
            operands["expert_table"] = torch.zeros(1, topk, dtype=torch.int64, device=device)
            operands["token_ids"] = torch.zeros(T, dtype=torch.int64, device=device)
        if "ids" in optional:
            operands["ids"] = torch.zeros((T, topk), dtype=torch.int32, device=device)
        if "valid" in optional:
            operands["num_valid_tokens"] = torch.ones(T, dtype=torch.bool, device=device)
        if "counts" in optional:
            operands["counts"] = torch.zeros(self._experts, dtype=torch.int64, device=device)
        if "replicas" in optional:
            ones = torch.ones(self._experts + spec.shared_experts, dtype=torch.int64, device=device)
            operands |= {"logical_to_physical": ones[:, None], "replica_count": ones}
        return operands


def _most_replicas(table: Tensor | None, replica_count: Tensor | None) -> int | None:
    """Return the columns of a table of replicas, ``None`` for a map."""
    return None if table is None or replica_count is None else table.shape[1]
