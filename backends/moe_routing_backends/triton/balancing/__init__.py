"""The operation ``balance`` on Triton."""
