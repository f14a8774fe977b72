"""The contract on the first CUDA device, in the smallest profile; `make test-gpu` runs this."""

import pytest

from moe_routing.conformance import run


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_backend_conforms_on_the_gpu(backend):
    report = run(backend, "cuda:0", profile="smoke")
    assert [(result.id, result.message) for result in report.failed] == []
    assert report.ok
