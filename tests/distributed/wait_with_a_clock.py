"""Wait for signals in Triton's interpreter, by a clock that this script turns.

It prints which rank was late.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from moe_routing_backends.symmetric import kernels

LIMIT = int(600e9)
STEP = int(1e10)
"""Nanoseconds between two looks at the clock."""
STATE = torch.zeros(3, dtype=torch.int64)


class Clock:
    """Stands where the GPU's clock does; a signal comes after some looks."""

    now = int(1e12)
    looks = 0

    def __call__(self, _semantic=None):
        """Return the time."""
        Clock.now += STEP
        Clock.looks += 1
        if Clock.looks == Clock.arrives:
            OWN[1] = 2
        return tl.tensor(TensorHandle(np.array([Clock.now], dtype=np.int64), tl.int64), tl.int64)


class StoppedError(Exception):
    """Stands for the trap."""


def _stopped(*_, **__):
    raise StoppedError


kernels.globaltimer = Clock()
kernels.LOOKS = tl.constexpr(4)
OWN = torch.zeros(2, dtype=torch.int64)


@triton.jit
def wait(own, number, limit, late, state):
    kernels._wait(own, number, limit, late, state, 2, 2, INTERPRETED=False)


def late_after(looks):
    """Return the rank that is late, from 1 on, if the other's signal comes after so many looks."""
    OWN.copy_(torch.tensor([2, 1]))
    late = torch.zeros(1, dtype=torch.int64)
    Clock.looks, Clock.arrives = 0, looks
    tl.inline_asm_elementwise = _stopped
    try:
        wait[(1,)](OWN, 2, LIMIT, late, STATE)
    except Exception as error:
        if "StoppedError" not in str(error):
            raise
    return int(late)


said = {}
late_after(3)
Clock.now += int(900e9)
said["after 15 idle minutes"] = late_after(3)
said["never"] = late_after(10**9)
sys.stdout.write(json.dumps(said))
