"""Random calls of every backend against a reference that was written from docs/contract.md alone.

``run.py`` is the command; CONTRIBUTING.md says how to use it. The reference shares no code with the
product: a step that both had from one place could be wrong in both.
"""
