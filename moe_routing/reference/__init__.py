"""The definition of right outputs: the float64 oracle and the error bounds of float32.

The package also compares outputs with both, and has shadow mode. Production code may import this
package; it may not import ``moe_routing.conformance``, which tests backends against it. Importing
this package imports no torch.
"""

from __future__ import annotations
