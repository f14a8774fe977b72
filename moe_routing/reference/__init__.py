"""What is right: the float64 oracle, the error bounds of float32, the comparison of an output with both, and shadow mode.

Production code may import this package; it may not import ``moe_routing.conformance``, which tests
backends against it. Importing this package imports no torch.
"""

from __future__ import annotations
