"""Most tests here are skipped where a trainer is not installed; .ci/peers installs them and wants none skipped."""

import importlib
import os

TOGETHER = "trl verl tinker torchtitan pytorch_lightning liger_kernel"
"""What can be installed in one folder; TOOLKIT_REQUIRE_PEERS is 1 for these, or the modules to be there instead."""

if required := os.environ.get("TOOLKIT_REQUIRE_PEERS"):
    for name in (TOGETHER if required == "1" else required).split():
        importlib.import_module(name)
