"""The operations ``permute`` and ``combine`` on Triton."""
