"""Most tests here are skipped where a trainer is not installed; .ci/peers installs them and wants none skipped."""

import importlib
import os

if os.environ.get("TOOLKIT_REQUIRE_PEERS"):
    for name in ("trl", "verl", "tinker", "torchtitan", "pytorch_lightning"):
        importlib.import_module(name)
