"""Every run of the tests starts from one new seed, in CI as on any machine.

The header of pytest shows the seed.
"""

import random
import zlib

import torch
from hypothesis import core, settings


def test_property_tests_try_new_examples_in_every_run_and_measure_no_time():
    assert settings.default.derandomize is False
    assert settings.default.deadline is None


def test_hypothesis_torch_and_random_start_from_the_seed_of_the_run(pytestconfig):
    seed = pytestconfig.getoption("--hypothesis-seed")
    assert str(core.global_force_seed) == seed
    number = zlib.crc32(seed.encode())
    drawn = random.getrandbits(32)
    random.seed(number)
    assert (random.getrandbits(32), torch.initial_seed()) == (drawn, number)
