"""Where gpu.py finds the baseline; `moe-routing bench --compare baseline` measures it too."""

from moe_routing.bench.full_sort import full_sort

__all__ = ["full_sort"]
