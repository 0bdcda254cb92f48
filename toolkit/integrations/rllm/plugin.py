"""The entry point ``rllm.losses``: importing this module registers our policy losses with rLLM.

rLLM imports it when it meets a loss that it does not know, in every process, and calls nothing.
"""

from __future__ import annotations

from toolkit.integrations.rllm.losses import register

register()
