"""The host side of a call.

Choosing a launch, launching it, and what Triton and torch offer no public interface for.
"""
