"""The conformance kit: proves that a backend computes what every other backend computes.

Importing this package imports no torch; its modules do, when a test runs.
"""

from __future__ import annotations

__all__: list[str] = []
