"""``RoutingSpec``: the maths of a routing family, as data."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_routing_registry.text import refusal, require_name, shown

Selection = Literal["logits", "scores_plus_bias", "logits_plus_bias", "token_table", "sparsemixer"]
GroupBy = Literal["selection", "scores"]

SELECTIONS: tuple[Selection, ...] = (
    "logits",
    "scores_plus_bias",
    "logits_plus_bias",
    "token_table",
    "sparsemixer",
)
SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
"""The score functions that every built-in backend knows.

A third party's family may name another.
"""

TINY, HUGE = 2.0**-126, (2 - 2**-23) * 2.0**127
"""Least positive and largest number of float32 that no device flushes to 0 or rounds to inf.

Kernels compute in float32.
"""
_MOST = 2**31 - 1
"""Largest count: ids are int32."""
_NAMES = ("family", "score", "selection", "group_by")
_FLAGS = ("renormalize", "per_expert_scale", "topk_per_group")
_COUNTS = {
    "num_groups": 1,
    "topk_groups": 1,
    "group_sum": 1,
    "shared_experts": 0,
    "zero_experts": 0,
}
"""Each count and the least that it may be."""
_NUMBERS = {
    "renorm_epsilon": (0.0, HUGE),
    "renorm_floor": (0.0, HUGE),
    "scale": (-HUGE, HUGE),
    "shared_weight": (-HUGE, HUGE),
    # Beyond these a quotient by the cap, or a product with the factor, leaves float32 for ordinary
    # logits.
    "logit_softcap": (1e-30, 1e30),
    "logit_multiplier": (1e-30, 1e30),
    "jitter": (0.0, HUGE),
}
"""Each number and the range that it may be in."""
_NO_GROUPS: dict[str, object] = {"num_groups": 1, "topk_per_group": False, "group_by": "selection"}
_UNUSED: dict[str, dict[str, object]] = {
    "sparsemixer": {
        "score": "softmax",
        "renormalize": False,
        "logit_softcap": None,
        "logit_multiplier": 1.0,
        **_NO_GROUPS,
    },
    "token_table": _NO_GROUPS,
}
"""Fields that a selection has no use for, with their defaults.

Any other value asks for maths that nobody would compute.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSpec:
    """How ``logits [T, E]`` become ``weights [T, K]`` and ``ids [T, K]``.

    A spec is one frozen row of data for each family.

    The steps, in order::

        l = logits in float32; NaN -> -inf; clamped to the finite range of float32
        x = l * logit_multiplier;  x = logit_softcap * tanh(x / logit_softcap)   if there is a cap
        s = score(x)                                  softmax over E, sigmoid, or sqrt(softplus)
        selected by  l | s + bias | x + bias | a table | sparsemixer             (``selection``)
        limited to the best ``topk_groups`` of ``num_groups``, or the best K / num_groups of each;
            a group's score is the sum of its best ``group_sum`` experts        (``group_by``)
        w = s[ids];  w = w / max(sum(w) + renorm_epsilon, renorm_floor)          if ``renormalize``
        w = w * scale * per_expert_scale[ids];  w = 0 for ids >= E - zero_experts
        ``shared_experts`` slots with ids E, E + 1, ... and weight ``shared_weight`` are appended

    Where selection is monotonic in the logit it is made on the logit itself, never on a rounded
    score.

    :ivar family: name of the family, ``"grouped_sigmoid_bias"`` for example.
    :ivar score: ``"softmax"``, ``"sigmoid"`` or ``"sqrtsoftplus"``; another name only for a third
        party's family.
    :ivar selection: what top-k looks at; the two ``..._plus_bias`` kinds need the operand ``bias
        [E]``, and ``"token_table"`` needs ``token_ids [T]`` and ``expert_table [vocabulary, K]``.
    :ivar renormalize: whether the selected weights are divided by their sum.
    :ivar renorm_epsilon: added to that sum (DeepSeek-V3: 1e-20).
    :ivar renorm_floor: lower bound of that sum (Ernie 4.5: 1e-12).
    :ivar scale: factor ``c`` on the weights after renormalisation (``routed_scaling_factor``).
    :ivar per_expert_scale: whether the operand ``per_expert_scale [E]`` multiplies the weights
        (Gemma4).
    :ivar num_groups: number of equal groups that the experts fall into; 1 means no groups.
    :ivar topk_groups: how many groups stay eligible.
    :ivar group_sum: score of a group: the sum of its best ``group_sum`` experts, of all if it has
        fewer; 1 is the maximum (DeepSeek-V2), 2 is DeepSeek-V3's, K / topk_groups Megatron-Core's.
    :ivar group_by: what is summed: ``"selection"``, what top-k looks at (logits, or scores or
        logits with the bias), or ``"scores"``, without the bias.
    :ivar topk_per_group: select K / num_groups in each group instead of limiting groups
        (InternS1-Pro).
    :ivar logit_softcap: cap of ``cap * tanh(x / cap)``, or ``None``.
    :ivar logit_multiplier: positive factor on the logits.
    :ivar shared_experts: number of always-on slots appended to the K selected.
    :ivar shared_weight: the weight of each of them: 1 / c where the engine multiplies the sum over
        all slots by c, 1 where ``scale`` has the c already.
    :ivar zero_experts: how many of the last expert ids are experts that compute nothing (LongCat):
        weight 0.
    :ivar jitter: threshold of sparsemixer's mask.

    A selection has no use for some fields, and a spec that sets one of those is refused:
    sparsemixer for other scores, renormalisation, groups, soft-cap and multiplier; a token table
    for groups. Without shared experts nothing has use for a ``shared_weight``. The best score of a
    group is that of its highest logit, so selection on logits has no use for ``group_by="scores"``
    with ``group_sum=1``.

    Names are made of the characters of plug-in names: a-z, 0-9, ``.``, ``_`` and ``-``. Counts are
    at most 2**31 - 1. Numbers are 0 or of float32's normal range, 2**-126 to 3.4e38, in which
    kernels compute; caps and multipliers are from 1e-30 to 1e30. NumPy's scalars are taken, and
    kept as Python's.

    Raises ``TypeError`` for a value of the wrong type and ``ValueError`` for one out of range; both
    name the field.

    >>> RoutingSpec(family="mixtral_like", renormalize=True).formula
    'ids = topk(l); w = softmax(l[ids])'
    """

    family: str
    score: str = "softmax"
    selection: Selection = "logits"
    renormalize: bool = False
    renorm_epsilon: float = 0.0
    renorm_floor: float = 0.0
    scale: float = 1.0
    per_expert_scale: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_sum: int = 1
    group_by: GroupBy = "selection"
    topk_per_group: bool = False
    logit_softcap: float | None = None
    logit_multiplier: float = 1.0
    shared_experts: int = 0
    shared_weight: float = 1.0
    zero_experts: int = 0
    jitter: float = 0.01
    _key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check every field, and turn NumPy's scalars into Python's.

        So equal specs have equal hashes and texts.
        """
        for name in _NAMES:
            self._set(name, require_name(name, getattr(self, name)))
        for name in _FLAGS:
            self._set(name, _flag(name, getattr(self, name)))
        for name, fewest in _COUNTS.items():
            self._set(name, _count(name, getattr(self, name), fewest))
        for name, (least, most) in _NUMBERS.items():
            if name != "logit_softcap" or self.logit_softcap is not None:
                self._set(name, number(name, getattr(self, name), least, most))
        if self.selection not in SELECTIONS:
            raise ValueError(
                refusal("selection", f"one of {', '.join(SELECTIONS)}", self.selection)
            )
        if self.group_by not in ("selection", "scores"):
            raise ValueError(refusal("group_by", "'selection' or 'scores'", self.group_by))
        if self.topk_groups > self.num_groups:
            raise ValueError(
                refusal(
                    "topk_groups",
                    f"1 <= topk_groups <= num_groups ({self.num_groups})",
                    self.topk_groups,
                )
            )
        self._refuse_unused()
        self._set("_key", "")

    def _refuse_unused(self) -> None:
        for name, usual in _UNUSED.get(self.selection, {}).items():
            value = getattr(self, name)
            if value != usual:
                raise ValueError(
                    refusal(
                        name,
                        f"{usual!r}, because selection {self.selection!r} has no use for it",
                        value,
                    )
                )
        if self.group_by == "scores" and self.group_sum == 1 and not self.needs_bias:
            why = "because with group_sum 1 the highest logit says which group is best"
            raise ValueError(refusal("group_by", f"'selection', {why}", self.group_by))
        if self.shared_weight != 1.0 and not self.shared_experts:
            expected = "1.0, because there are no shared_experts"
            raise ValueError(refusal("shared_weight", expected, self.shared_weight))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def needs_bias(self) -> bool:
        """Whether selection adds the operand ``bias [E]``."""
        return self.selection in ("scores_plus_bias", "logits_plus_bias")

    @property
    def grouped(self) -> bool:
        """Whether only the experts of the best groups are eligible."""
        return self.num_groups > 1 and not self.topk_per_group

    def check_size(self, num_experts: int, topk: int) -> None:
        """Raise ``ValueError`` unless K of E experts can be selected under the group rule.

        >>> RoutingSpec(family="f", num_groups=4, topk_groups=1).check_size(8, 3)
        Traceback (most recent call last):
        ...
        ValueError: topk: expected at most topk_groups * (num_experts / num_groups) = 2, got 3
        """
        # No divmod: torch.compile(dynamic=True) traces this with a symbolic E, and cannot trace
        # that.
        group, left_over = num_experts // self.num_groups, num_experts % self.num_groups
        if not 1 <= topk <= num_experts:
            name, value, expected = "topk", topk, f"1 <= topk <= num_experts ({num_experts})"
        elif left_over:
            name, value, expected = (
                "num_groups",
                self.num_groups,
                f"a divisor of num_experts ({num_experts})",
            )
        elif self.topk_per_group and topk % self.num_groups:
            name, value, expected = "topk", topk, f"a multiple of num_groups ({self.num_groups})"
        elif self.grouped and topk > self.topk_groups * group:
            most = f"topk_groups * (num_experts / num_groups) = {self.topk_groups * group}"
            name, value, expected = "topk", topk, f"at most {most}"
        elif self.zero_experts > num_experts:
            name, value, expected = (
                "zero_experts",
                self.zero_experts,
                f"at most num_experts ({num_experts})",
            )
        else:
            return
        raise ValueError(refusal(name, expected, value))

    def replace(self, **changes: Any) -> RoutingSpec:  # noqa: ANN401 -- the fields' own types, checked on construction
        """Return a copy with some fields changed, checked like a new one."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """Return the canonical text.

        Equal specs give equal texts, and only fields unlike the defaults are in it.
        """
        if not self._key:
            # Not on construction, which torch.compile traces: it stops at json.
            values = {
                f.name: getattr(self, f.name)
                for f in dataclasses.fields(self)
                if f.init and (f.name == "family" or getattr(self, f.name) != f.default)
            }
            self._set("_key", json.dumps(values, sort_keys=True))
        return self._key

    @classmethod
    def from_json(cls, text: str) -> RoutingSpec:
        """Rebuild a spec from ``to_json``'s text.

        >>> spec = RoutingSpec(family="f", scale=2.5)
        >>> RoutingSpec.from_json(spec.to_json()) == spec
        True

        :raises ValueError: the text is not JSON, not an object, or has a field that is unknown,
            missing or out of range.
        :raises TypeError: a field has the wrong type.
        """
        try:
            values = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            got = f"{type(error).__name__}: {error}"
            msg = f"spec: expected the JSON text of a RoutingSpec, got {got}"
            raise ValueError(msg) from error
        if not isinstance(values, dict):
            raise ValueError(refusal("spec", "a JSON object", values))  # noqa: TRY004 -- a text's content, not an argument
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        for name in values:
            if name not in known:
                msg = f"{shown(name)}: no field of a RoutingSpec, which has {', '.join(known)}"
                raise ValueError(msg)
        if "family" not in values:
            msg = "spec: expected the field family, got none"
            raise ValueError(msg)
        return cls(**values)

    @property
    def formula(self) -> str:
        """The maths in one line: ``l`` are the logits, ``b`` the selection bias."""
        x = "l"
        if self.logit_multiplier != 1.0:
            x = f"{self.logit_multiplier:g}*{x}"
        if self.logit_softcap is not None:
            x = f"{self.logit_softcap:g}*tanh({x}/{self.logit_softcap:g})"
        score = f"{self.score}({x})"
        steps = [
            f"ids = {self._selection_formula(x, score)}",
            f"w = {self._weight_formula(x, score)}",
        ]
        if self.zero_experts:
            steps.append(f"w = 0 where ids >= E-{self.zero_experts}")
        if self.shared_experts:
            last = self.shared_experts - 1
            steps.append(f"append ids E..E+{last} with w = {self.shared_weight:g}")
        return "; ".join(steps)

    def _selection_formula(self, x: str, score: str) -> str:
        if self.selection == "token_table":
            return "table[token_id]"
        if self.selection == "sparsemixer":
            left_out = f"(m-l)/max(|l|,m) > {2 * self.jitter:g}"
            return f"K rounds of argmax(l), each without entries {left_out}"
        what = {"scores_plus_bias": f"{score}+b", "logits_plus_bias": f"{x}+b"}.get(
            self.selection, "l"
        )
        if self.topk_per_group:
            return f"top K/{self.num_groups} of {what} in each of {self.num_groups} groups"
        if self.grouped:
            groups = f"the best {self.topk_groups} of {self.num_groups} groups"
            best = "max" if self.group_sum == 1 else f"sum of best {self.group_sum}"
            judged = f" {score}" if self.group_by == "scores" else ""
            return f"topk({what}) in {groups} by {best}{judged}"
        return f"topk({what})"

    def _weight_formula(self, x: str, score: str) -> str:
        if self.selection == "sparsemixer":
            weight = "softmax(masked l)[id] of each round"
        elif (
            self.renormalize
            and self.score == "softmax"
            and not (self.renorm_epsilon or self.renorm_floor)
        ):
            weight = f"softmax({x}[ids])"
        else:
            weight = f"{score}[ids]"
            if self.renormalize:
                total = f"sum + {self.renorm_epsilon:g}" if self.renorm_epsilon else "sum"
                floor = f"max({total}, {self.renorm_floor:g})" if self.renorm_floor else ""
                weight += " / " + (floor or (f"({total})" if self.renorm_epsilon else total))
        if self.scale != 1.0:
            weight += f" * {self.scale:g}"
        if self.per_expert_scale:
            weight += " * per_expert_scale[ids]"
        return weight


def _flag(name: str, value: object) -> bool:
    if type(value) is bool:
        return value
    # NumPy is not imported for this; its `bool` was called `bool_` before version 2.
    if (type(value).__module__, type(value).__name__.rstrip("_")) != ("numpy", "bool"):
        raise TypeError(refusal(name, "True or False", value))
    return bool(value)


def _count(name: str, value: object, least: int) -> int:
    if type(value) is not int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(refusal(name, "an integer", value))
        value = int(value)
    if not least <= value <= _MOST:
        raise ValueError(refusal(name, f"an integer from {least} to {_MOST}", value))
    return value


def number(name: str, value: object, least: float, most: float) -> float:
    """Return a number that float32 holds with all its digits: none between 0 and ``TINY``.

    >>> number("scale", 1e-40, 0.0, HUGE)
    Traceback (most recent call last):
    ...
    ValueError: scale: expected a number from 1.17549e-38 to 3.40282e+38, or 0, got 1e-40
    """
    if type(value) is not float and (
        isinstance(value, bool) or not isinstance(value, numbers.Real)
    ):
        raise TypeError(refusal(name, "a number", value))
    try:
        found = float(value) + 0.0  # -0.0 equals 0.0, and must print like it
    except OverflowError:  # an integer beyond float64
        found = math.inf
    if not (least <= found <= most and (found == 0 or abs(found) >= TINY)):
        size = f"magnitude {TINY:g}" if least < 0 else f"{max(least, TINY):g}"
        expected = f"a number from {size} to {most:g}" + ("" if least > 0 else ", or 0")
        raise ValueError(refusal(name, expected, value))
    return found
