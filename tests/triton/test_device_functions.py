"""The device functions that kernels share, each alone, in Triton's interpreter.

``tests/test_on_a_gpu.py`` compiles them.
"""

import inspect
import json
import re
from pathlib import Path

import pytest
from scripts import printed

from moe_routing_backends.triton.planning import kernels

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("device_functions.py")
OF_ROUTE = ("network", "exact16", "float32", "pair", "round", "product", "maths", "sum")
OF_PLAN = (
    "expert_of_pair", "counted", "rank_among", "laid_out", "write_counts", "fill", "fill_rows",
    "fill_last_blocks", "place_pairs", "count_pairs", "sums_of_groups", "place_all", "plan_row",
)  # fmt: skip


@pytest.fixture(scope="module")
def found():
    """What is wrong, by group, and how many units in the last place each function is off."""
    return json.loads(printed(SCRIPT))


@pytest.mark.parametrize("group", [*OF_ROUTE, *OF_PLAN])
def test_device_functions_do_what_they_say(found, group):
    assert found["wrong"][group] == []


def test_every_group_is_asked_for(found):
    assert set(found["wrong"]) == {*OF_ROUTE, *OF_PLAN}


def test_every_device_function_of_plan_has_a_group():
    functions = re.findall(
        r"^@triton\.jit\n^def (\w+)", inspect.getsource(kernels), flags=re.MULTILINE
    )
    assert sorted(functions) == sorted(OF_PLAN)
