"""vLLM 0.32 and 0.33: a general plug-in that routes the MoE layers through ``moe_routing``.

The plug-in is off unless ``MOE_ROUTING_VLLM=1``. vLLM calls ``register`` in every process that it
starts (entry-point group ``vllm.general_plugins``, name ``moe-routing``, which ``VLLM_PLUGINS`` may
name); it may be called any number of times.

>>> from moe_routing.integrations import vllm as integration
>>> integration.report().sites  # nothing is routed in this process
()
"""

from __future__ import annotations

from moe_routing.integrations.vllm._install import register
from moe_routing.integrations.vllm._report import Report, Site, report

__all__ = ["Report", "Site", "register", "report"]
