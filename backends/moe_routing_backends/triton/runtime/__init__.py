"""The host side of a call: choosing a launch, launching it, and what Triton and torch offer no public interface for."""
