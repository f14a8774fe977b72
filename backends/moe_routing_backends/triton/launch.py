"""The host side: which variant serves this T, and its launch, in as few host microseconds as Triton allows."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

import torch

from moe_routing import RoutingOutput
from moe_routing_backends.triton.direct import launcher_of
from moe_routing_backends.triton.lanes import lanes_kernel
from moe_routing_backends.triton.plan import constants
from moe_routing_backends.triton.rows import rows_kernel
from moe_routing_backends.triton.table import LAST_LANES, table_for

if TYPE_CHECKING:
    from torch import Tensor

    from moe_routing_backends.triton.direct import Launcher
    from moe_routing_backends.triton.plan import Launch
    from moe_routing_registry import DeviceInfo, RoutingProblem

KERNELS = {"lanes": lanes_kernel, "rows": rows_kernel}
ALIGNMENT = 16
"""Bytes of the widest load."""
RUNTIME_ARGUMENTS = 13
"""How many arguments of a kernel, both variants alike, stand before its constants."""
NO_OPERANDS: tuple[Any, ...] = (None, None, None, None)

if torch.cuda.is_available():
    # What torch.cuda.current_device and Inductor's generated code call; the public ways take ten times as long.
    from torch._C import _cuda_getCurrentRawStream as _current_stream
    from torch._C import _cuda_getDevice as _current_device
    from torch._C._dynamo.guards import _empty_strided_cuda as _empty  # type: ignore[attr-defined]  # not in the stubs
else:  # the interpreter

    def _current_device() -> int:
        return -1

    def _current_stream(device: int) -> int:  # noqa: ARG001 -- the one on a GPU takes it
        return 0

    def _empty(size: tuple[int, int], strides: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, strides, dtype=dtype)


def build(problem: RoutingProblem, device: DeviceInfo) -> TritonRouter:
    """Bind the problem to the device; nothing is compiled before the first call or ``warmup``."""
    return TritonRouter(problem, device)


class TritonRouter:
    """A ``BoundRouter``: one Triton kernel a call.

    :ivar notes: which launch table speaks, and what is unusual, for ``explain`` and doctor.
    """

    def __init__(self, problem: RoutingProblem, device: DeviceInfo) -> None:
        """Look up the launches for the problem; a table that cannot be used is warned of here."""
        self._problem = problem
        self._index = device.index or 0
        self._device = torch.device("cpu" if device.type == "cpu" else f"{device.type}:{self._index}")
        self._experts = problem.num_experts
        self._columns = problem.topk + problem.spec.shared_experts
        self._ids_dtype: torch.dtype = getattr(torch, problem.ids_dtype)
        self._element = 4 if problem.dtype == "float32" else 2
        table = table_for(device)
        self._table = table
        steps = table.steps(problem)
        self._limits = [s.tokens for s in steps[:-1]]
        self._launches = [s.launch for s in steps]
        self._ready: dict[tuple[Any, ...], Launcher] = {}
        self._indirect = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """Say which table chose the launch parameters, and whether launches take the slow way."""
        indirect = (f"launches through Triton's own launcher: {self._indirect}",) if self._indirect else ()
        return (f"launch parameters from {self._table.source} ({self._table.provenance})", *indirect)

    def __call__(  # noqa: C901, PLR0913 -- BoundRouter's operands; one flat function, because calls cost a tenth of a microsecond
        self,
        logits: Tensor,
        *,
        per_expert_scale: Tensor | None = None,
        bias: Tensor | None = None,
        token_ids: Tensor | None = None,
        expert_table: Tensor | None = None,
        num_valid_tokens: int | Tensor | None = None,
        expert_map: Tensor | None = None,
        out: RoutingOutput | None = None,
    ) -> RoutingOutput:
        """Route ``logits [T, E]``; see ``BoundRouter``."""
        T = logits.size(0)
        row_stride, expert_stride = logits.stride()
        here = _current_device() == self._index
        if out is None:
            columns = self._columns
            if here:
                size, strides = (T, columns), (columns, 1)
                out = RoutingOutput(_empty(size, strides, torch.float32), _empty(size, strides, self._ids_dtype))
            else:
                out = RoutingOutput(
                    torch.empty((T, columns), dtype=torch.float32, device=logits.device),
                    torch.empty((T, columns), dtype=self._ids_dtype, device=logits.device),
                )
        weights, ids = out
        source, to_weights, to_ids = logits.data_ptr(), weights.data_ptr(), ids.data_ptr()
        aligned = not (source | to_weights | to_ids | (row_stride * self._element)) % ALIGNMENT
        launch = self._launches[bisect_left(self._limits, T)]
        if not aligned and launch.variant == "rows":
            launch = LAST_LANES
        scale_at = bias_at = None
        key: tuple[Any, ...] = (launch, row_stride == self._experts, aligned, expert_stride == 1)
        if per_expert_scale is not None:
            scale_at = per_expert_scale.data_ptr()
            key = (*key, per_expert_scale.dtype)
        if bias is not None:
            bias_at = bias.data_ptr()
            key = (*key, "bias", bias.dtype)
        valid = T
        rest = NO_OPERANDS
        if token_ids is not None or num_valid_tokens is not None or expert_map is not None:
            valid_tensor = None
            if isinstance(num_valid_tokens, torch.Tensor):
                valid_tensor = num_valid_tokens
            elif num_valid_tokens is not None:
                valid = min(num_valid_tokens, T)
            rest = (token_ids, expert_table, valid_tensor, expert_map)
            key = (*key, *[None if o is None else o.dtype for o in rest])
        ready = self._ready.get(key)
        if ready is None or not here:
            self._launch_slowly(key, launch, logits, out, (per_expert_scale, bias, *rest), valid)
            return out
        if rest is not NO_OPERANDS:
            rest = tuple(None if o is None else o.data_ptr() for o in rest)
        block = launch.block_t
        ready(
            (T + block - 1) // block,
            _current_stream(self._index),
            (source, to_weights, to_ids, scale_at, bias_at, *rest, T, valid, row_stride, expert_stride),
        )
        return out

    def _launch_slowly(  # noqa: PLR0913, PLR0917 -- what a call knows
        self,
        key: tuple[Any, ...],
        launch: Launch,
        logits: Tensor,
        out: RoutingOutput,
        operands: tuple[Tensor | None, ...],
        valid: int,
    ) -> None:
        """Launch through Triton's front door, compiling where needed, and keep the compiled kernel."""
        row_stride, expert_stride = logits.stride()
        T = len(logits)
        named = {
            **constants(self._problem, launch),
            "ROW_STRIDE": self._experts if row_stride == self._experts and expert_stride == 1 else 0,
            "EXPERT_STRIDE": 1 if expert_stride == 1 else 0,
            "VALID_ON_DEVICE": operands[4] is not None,
        }
        kernel = KERNELS[launch.variant]
        fixed = tuple(named[name] for name in kernel.arg_names[RUNTIME_ARGUMENTS:])
        arguments = (logits, *out, *operands, T, valid, row_stride, expert_stride, *fixed)
        blocks = (T + launch.block_t - 1) // launch.block_t
        if logits.device.type == "cpu":  # the interpreter
            kernel[blocks,](*arguments, num_warps=launch.num_warps)
            return
        with torch.cuda.device(self._index):
            if key not in self._ready and torch.cuda.is_current_stream_capturing():
                msg = (
                    f"moe-routing's Triton kernel for {self._problem} at T = {T} is not compiled yet, and nothing compiles "
                    "while a CUDA graph is captured: call route.warmup(...), or route once, before the capture"
                )
                raise RuntimeError(msg)
            compiled = kernel[blocks,](*arguments, num_warps=launch.num_warps, enable_fp_fusion=False)
            launcher, self._indirect = launcher_of(compiled, fixed)
            self._ready[key] = launcher

    def warmup(self) -> None:
        """Compile every variant that some number of tokens would pick, by routing zeros through it."""
        spec, device = self._problem.spec, self._device
        operands: dict[str, Any] = {}
        if spec.per_expert_scale:
            operands["per_expert_scale"] = torch.ones(self._experts, device=device)
        if spec.needs_bias:
            operands["bias"] = torch.zeros(self._experts, device=device)
        if spec.selection == "token_table":
            operands["expert_table"] = torch.zeros(1, self._problem.topk, dtype=torch.int64, device=device)
        limits = [1, *(int(limit) + 1 for limit in self._limits)]
        for T in limits:
            logits = torch.zeros(T, self._experts, dtype=getattr(torch, self._problem.dtype), device=device)
            if spec.selection == "token_table":
                operands["token_ids"] = torch.zeros(T, dtype=torch.int64, device=device)
            self(logits, **operands)
