"""One thread for the kit's own tests, in this process and in those that it starts.

They route a few rows at a time, and on a busy machine torch's threads would wait for each other.
"""

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(threads)
    if variable is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = variable
