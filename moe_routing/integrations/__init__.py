"""Real clients: libraries and engines whose mixture-of-experts models route through ``moe_routing``. Imports none of them."""
