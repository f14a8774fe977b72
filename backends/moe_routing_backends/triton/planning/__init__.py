"""The operation ``plan`` on Triton."""
