"""Compile the plain formula whole, once a problem, and be told at once where that cannot be done.

K rounds of a maximum over keys are K reductions over the same rows, which Inductor fuses into one
kernel, and the weights into another; ``torch.topk`` and ``torch.sort`` would be calls between
kernels, and the former's ties are arbitrary.

Before every call Dynamo checks its guards, which takes longer than the kernels do, and AOTAutograd
looks for aliases and gradients. All guards but those on the sizes, strides and dtypes of the
arguments are about constants of this file, and there are neither aliases nor gradients here; so
what Inductor made for a set of sizes, strides and dtypes is kept, and called directly the next
time.
"""

from __future__ import annotations

import itertools
import logging
import time
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table

from moe_routing import Operands, RoutingOutput
from moe_routing.formula import (
    NARROW_UP_TO,
    by_narrow_rounds,
    by_rounds,
    by_sort,
    finish,
    route,
    whole,
)
from moe_routing.private_api import compile_by_inductor
from moe_routing.python_warnings import not_raised
from moe_routing_registry.locks import ForkSafeLock

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.fx import GraphModule

    from moe_routing.formula import Select
    from moe_routing.kernel import Prepared
    from moe_routing_registry import DeviceInfo, RoutingProblem

LOGGER = logging.getLogger("moe_routing.torch_compile")
ROUNDS_UP_TO = 32
"""K up to which the rounds are unrolled.

A longer graph compiles for minutes, so a stable sort takes over.
"""
SAMPLE_TOKENS = 64
SAMPLE_SCORES = 1 << 22
"""Scores that an accelerator is warmed up with.

Inductor times its choices of a block on the first call, and with few rows all
choices take the same time, so that the choice for many rows would be a matter of chance."""
MOST_KINDS = 1 << 14
"""Kinds of calls that are remembered, one a number of tokens.

When there are more, remembering begins anew.
"""
OTHERS = Operands._fields[1:-1]
"""Names of the operands but for the logits and ``out``."""
PER_TOKEN = ("token_ids", "ids", "num_valid_tokens")
"""Operands that may have a row for each token."""
_POINT = 2.0**44
"""Scale of sums in fixed point: int64 holds the sum of 2**18 numbers up to 1, each to 2**-44.

That is finer than float32.
"""
_counter = itertools.count()


def build(problem: RoutingProblem, device: DeviceInfo) -> CompiledRouter:
    """Bind the problem to the device, and compile now.

    So a missing compiler rejects this backend, and raises no error in a user's call.
    """
    where = (device.type,) if device.index is None else (device.type, device.index)
    router = CompiledRouter(problem, torch.device(*where))
    router.warmup()
    return router


class CompiledRouter:
    """The compiled formula of one problem.

    Each set of operands has one graph for T = 1, and one for every larger T.

    Rows may lie apart in memory; what is not contiguous in any row is copied first.
    """

    def __init__(self, problem: RoutingProblem, device: torch.device) -> None:
        """Bind; ``warmup`` compiles."""
        self._problem = problem
        self._device = device
        self._compiled: dict[tuple[object, ...], Callable[..., RoutingOutput]] = {}
        self._direct: dict[tuple[object, ...], _Direct] = {}
        self._seen: list[_Run] = []
        self._lock = ForkSafeLock()

    def __call__(
        self,
        logits: Tensor,
        *,
        out: RoutingOutput | None = None,
        **operands: Any,  # noqa: ANN401 -- Kernel's operands, handed on
    ) -> RoutingOutput:
        """Route; see ``Kernel``."""
        # A kernel whose lanes read far apart would read the row again for each of the K rounds.
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        valid = operands.get("num_valid_tokens")
        if isinstance(valid, int):
            operands["num_valid_tokens"] = self._counted(valid, logits)
        given = {name: value for name, value in operands.items() if value is not None}
        kind = _kind(logits, given)
        direct = self._direct.get(kind)
        if direct is not None:
            result = direct(logits, given)
        else:
            try:
                result = self._through_dynamo(kind, logits.detach(), given)
            except TorchDynamoException as error:  # a set of operands that `warmup` could not know
                cause = getattr(error, "inner_exception", error)
                said = f"{type(cause).__name__}: {cause}".strip().partition("\n")[0]
                msg = (
                    f"torch-compile cannot compile {self._problem} with {', '.join(given)}: "
                    f"{said}; use backend='eager'"
                )
                raise RuntimeError(msg) from error
        return _into(out, result)

    def prepared(self, operands: Operands) -> Prepared | None:
        """Return a function that routes calls of this one's shapes, strides and dtypes.

        It takes less host time. ``None`` if no such call was seen.
        """
        logits, *others, _ = operands
        counted = isinstance(operands.num_valid_tokens, int)
        if counted:
            others[OTHERS.index("num_valid_tokens")] = self._counted(
                operands.num_valid_tokens, logits
            )
        given = {
            name: value
            for name, value in zip(OTHERS, others, strict=True)
            if isinstance(value, torch.Tensor)
        }
        direct = self._direct.get(_kind(logits, given))
        if direct is None:
            return None
        function, places = direct
        # Where each operand stands among the arguments of what Inductor made; the rest are sizes.
        filled = [
            (n, Operands._fields.index(place))
            for n, place in enumerate(places)
            if isinstance(place, str)
        ]

        def route(operands: Operands) -> RoutingOutput:
            if counted:
                valid = self._counted(operands.num_valid_tokens, operands.logits)
                operands = operands._replace(num_valid_tokens=valid)
            arguments = list(places)
            for n, index in filled:
                arguments[n] = operands[index]
            return _into(operands.out, RoutingOutput(*function(arguments)))

        return route

    @staticmethod
    def _counted(valid: Any, logits: Tensor) -> Tensor:  # noqa: ANN401 -- an int, whose value must not be compiled in
        return torch.full((1,), valid, dtype=torch.int64, device=logits.device)

    def warmup(self) -> None:
        """Compile the graphs of an ordinary call: many tokens, and one."""
        start = time.perf_counter()
        dtype: torch.dtype = getattr(torch, self._problem.dtype)
        num_experts = self._problem.num_experts
        many = (
            SAMPLE_TOKENS
            if self._device.type == "cpu"
            else max(SAMPLE_TOKENS, SAMPLE_SCORES // num_experts)
        )
        for num_tokens in (many, 1):
            logits = torch.zeros(num_tokens, num_experts, dtype=dtype, device=self._device)
            operands = self._sample_operands(num_tokens)
            self._through_dynamo(_kind(logits, operands), logits, operands)
        LOGGER.info(
            "compiled %s for %s in %.1f s", self._problem, self._device, time.perf_counter() - start
        )

    def _sample_operands(self, num_tokens: int) -> dict[str, Tensor]:
        spec, num_experts = self._problem.spec, self._problem.num_experts
        operands: dict[str, Tensor] = {}
        if spec.per_expert_scale:
            operands["per_expert_scale"] = torch.ones(num_experts, device=self._device)
        if spec.needs_bias:
            operands["bias"] = torch.zeros(num_experts, device=self._device)
        if spec.selection == "token_table":
            operands["token_ids"] = torch.zeros(num_tokens, dtype=torch.int64, device=self._device)
            operands["expert_table"] = torch.arange(self._problem.topk, device=self._device)[None]
        if "ids" in self._problem.operands:
            shape = (num_tokens, self._problem.topk)
            operands["ids"] = torch.zeros(shape, dtype=torch.int32, device=self._device)
        if "valid" in self._problem.operands:
            mask = torch.ones(num_tokens, dtype=torch.bool, device=self._device)
            operands["num_valid_tokens"] = mask
        return operands

    def _through_dynamo(
        self, kind: tuple[object, ...], logits: Tensor, operands: dict[str, Tensor]
    ) -> RoutingOutput:
        """Let Dynamo check its guards, and compile where needed.

        The router remembers what Dynamo called for this kind of arguments.
        """
        num_tokens, num_experts = logits.shape
        apart = logits.stride(0)
        # Dynamo compiles anew for some of these, and gives up after some times; so each has a
        # function of its own.
        rows = (
            num_tokens > 1,
            "repeated" if apart == 0 else "together" if apart == num_experts else "apart",
        )
        graph = (*rows, *((name, value.dtype) for name, value in operands.items()))
        with self._lock, torch.no_grad(), not_raised():
            if graph not in self._compiled:
                self._compiled[graph] = self._compile()
            if num_tokens > 1:
                # A record or a mask is compared with the logits and the token ids, row by row.
                # The mark stays with a tensor: an alias keeps it off the caller's own.
                related = PER_TOKEN if self._problem.operands else ()
                aliases = {n: operands[n].detach() for n in related if n in operands}
                operands = {**operands, **aliases}
                for tensor in (logits, *aliases.values()):
                    if tensor.numel() >= num_tokens:  # a number of valid tokens is one element
                        torch._dynamo.mark_dynamic(tensor, 0)  # noqa: SLF001 -- torch documents it under this name
            result = self._compiled[graph](logits, **operands)
            direct = self._seen.pop().as_direct(logits, operands, result) if self._seen else None
            if len(self._direct) >= MOST_KINDS:
                self._direct.clear()
            if direct is not None:
                self._direct[kind] = direct
        return result

    def _compile(self) -> Callable[..., RoutingOutput]:
        spec, topk, num_experts = self._problem.spec, self._problem.topk, self._problem.num_experts
        ids_dtype: torch.dtype = getattr(torch, self._problem.ids_dtype)
        select = _selection(self._problem)

        def formula(logits: Tensor, **operands: Tensor) -> RoutingOutput:
            behind = {name: operands.pop(name, None) for name in ("num_valid_tokens", "expert_map")}
            recorded = operands.pop("ids", None)
            weights, ids = route(spec, topk, logits, select=select, recorded=recorded, **operands)
            return finish(
                spec, weights, ids, num_experts=num_experts, ids_dtype=ids_dtype,
                replayed=recorded is not None, **behind,
            )  # fmt: skip

        # Dynamo keeps its graphs, and counts its recompilations, by code object: each problem needs
        # its own.
        code: CodeType = formula.__code__.replace(co_name=f"route_{next(_counter)}")
        own = FunctionType(code, formula.__globals__, code.co_name, None, formula.__closure__)
        return torch.compile(own, fullgraph=True, backend=self._inductor)

    def _inductor(self, graph: GraphModule, samples: list[Any]) -> Callable[..., Any]:
        """Compile as Dynamo's backend "inductor" does.

        Record how AOTAutograd calls the function that Inductor made. AOTAutograd's cache would
        keep what this returns, which cannot be kept; Inductor's own caches stay. Shapes and strides
        are those of a kind of call that is known, and ids come out of keys that hold no others, or
        are compared with the table's size: neither is looked at again.

        One kernel takes a row whole: split, a reduction is two kernels, each of the K rounds needs
        its own, and their keys depend on T, which makes them int64. A softmax in one pass over the
        row saves nothing where K rounds pass over it, and Inductor warns where it cannot have it.
        """

        def inner(module: GraphModule, inputs: Any, **options: Any) -> Any:  # noqa: ANN401 -- Inductor's own
            function = compile_by_inductor(module, inputs, **options)

            def seen(*arguments: Any) -> Any:  # noqa: ANN401 -- what AOTAutograd passes
                outputs = function(list(arguments))
                self._seen[:] = [_Run(function, arguments, outputs)]
                return outputs

            return seen

        options = inductor.patch(
            size_asserts=False,
            assert_indirect_indexing=False,
            split_reductions=False,
            online_softmax=False,
        )
        with functorch.patch(enable_autograd_cache=False), options:
            compiled: Any = compile_fx(
                graph, samples, inner_compile=inner, decompositions=_decompositions()
            )
        return compiled  # type: ignore[no-any-return] # what Dynamo calls; Inductor's declaration also allows other things


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Return how operations are decomposed.

    They are as in Inductor, but for sums, which have the same bits in every order.

    The order of a reduction is that of the lanes, which Inductor chooses for each kernel, some by
    timing them: for one token and for many, and for plain and for padded calls, weights would
    differ in their last bits, and so would ids.
    """
    return {
        **select_decomp_table(),
        torch.ops.aten.sum.dim_IntList: _sum,
        torch.ops.aten._softmax.default: _softmax,  # noqa: SLF001 -- softmax, under its name there
    }


def _sum(
    x: Tensor,
    dim: list[int],
    keepdim: bool = False,  # noqa: FBT001, FBT002 -- torch.sum's signature
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Add up numbers between 0 and 1, the powers of a softmax, in fixed point.

    Sums of integers are left as they are.
    """
    if not x.is_floating_point() or dtype is not None:
        return NotImplemented  # type: ignore[no-any-return] # what leaves an operation as it is
    return (x * _POINT).to(torch.int64).sum(dim, keepdim).to(x.dtype) / _POINT


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:  # noqa: ARG001, FBT001 -- the operation's signature; ours are float32 or float64
    powers = (x - x.amax(dim, keepdim=True)).exp()
    return powers / _sum(powers, [dim], keepdim=True)


def _into(out: RoutingOutput | None, result: RoutingOutput) -> RoutingOutput:
    """Copy a result to where the caller wants it."""
    if out is None:
        return result
    out.weights.copy_(result.weights)
    out.ids.copy_(result.ids)
    return out


def _selection(problem: RoutingProblem) -> Select:
    """Return the way to select that compiles to the least."""
    if problem.topk > ROUNDS_UP_TO:
        return whole(by_sort)
    spec = problem.spec
    exact = (
        problem.dtype in ("bfloat16", "float16")
        and spec.selection == "logits"
        and spec.num_groups == 1
    )
    return by_narrow_rounds if exact and problem.num_experts <= NARROW_UP_TO else whole(by_rounds)


def _kind(logits: Tensor, operands: dict[str, Tensor]) -> tuple[object, ...]:
    """Return all that Dynamo's guards look at and that may differ between calls of a problem."""
    return (
        *logits.shape,
        *logits.stride(),
        *[(name, value.dtype, value.shape) for name, value in operands.items()],
    )


class _Run(NamedTuple):
    """One call of what Inductor made, by AOTAutograd."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    outputs: Any

    def as_direct(
        self, logits: Tensor, operands: dict[str, Tensor], result: RoutingOutput
    ) -> _Direct | None:
        """Say how to make the same call for other tensors of the kind.

        ``None`` where that cannot be seen.
        """
        tensors = {id(logits): "logits", **{id(value): name for name, value in operands.items()}}
        places = [a if isinstance(a, int) else tensors.get(id(a)) for a in self.arguments]
        # One tensor came as two operands, and the next time two may come.
        several = len(tensors) <= len(operands)
        if several or None in places or [id(o) for o in self.outputs] != [id(o) for o in result]:
            return None
        return _Direct(self.function, tuple(places))


class _Direct(NamedTuple):
    """What Inductor made, and its arguments for one kind of call: names of tensors, and sizes."""

    function: Callable[..., Any]
    places: tuple[Any, ...]

    def __call__(self, logits: Tensor, operands: dict[str, Tensor]) -> RoutingOutput:
        """Route."""
        operands["logits"] = logits
        return RoutingOutput(*self.function([operands.get(place, place) for place in self.places]))
