"""Real clients: libraries and engines whose models route through ``moe_routing``.

This file imports none of them.
"""
