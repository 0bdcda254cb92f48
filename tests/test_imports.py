"""Imports go one way, and light ones stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import toolkit

ROOT = Path(toolkit.__file__).parent
LAYERS = [
    ["errors"],
    ["schema", "metrics"],
    ["functional", "head", "distributed"],
    ["losses"],
    ["models", "tasks", "rollout"],
    ["plugins", "run_config", "overrides", "schemas"],
    ["settings"],
    ["diagnosis"],
    ["config"],
    ["training", "notebook", "testing"],
    ["runner", "catalogue", "conformance_suite", "help_text"],
    ["benchmark", "scale"],
    ["train", "bench", "check", "explain"],
]
"""From the bottom to the top; a room imports from rooms below it, and its own."""
# The config classes of the loop are below `config`, which composes them; the loop itself is above it.
BELOW_CONFIG = {"training.config", "benchmark.config"}


def rank(module: str) -> int:
    room = module.split(".")[0]
    if module in BELOW_CONFIG:
        return next(i for i, layer in enumerate(LAYERS) if "models" in layer)
    return next(i for i, layer in enumerate(LAYERS) if room in layer)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("toolkit."):
            found.add(node.module.removeprefix("toolkit."))
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("toolkit.") for alias in node.names if alias.name.startswith("toolkit.")}
    return found


def test_imports_go_one_way() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module in ("__init__", "_conf"):
            continue
        for used in imports(path):
            same_room = used.split(".")[0] == module.split(".")[0]
            if not same_room and rank(used) >= rank(module):
                wrong.append(f"{module} -> {used}")
    assert not wrong


def test_functional_and_head_know_nothing_of_config_hydra_accelerate_or_each_other() -> None:
    for room, other in (("functional", "head"), ("head", "functional")):
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text()
            for word in ("hydra", "omegaconf", "accelerate", "toolkit.config", "toolkit.losses", f"toolkit.{other}"):
                assert f"import {word}" not in text, path
                assert f"from {word}" not in text, path


def test_importing_is_light_and_touches_no_device() -> None:
    code = (
        "import sys, toolkit; light = 'torch' in sys.modules\n"
        "import toolkit.runner, torch\n"
        "print(light, 'transformers' in sys.modules, 'hydra' in sys.modules, torch.cuda.is_initialized(), "
        "'torch._dynamo' in sys.modules)"  # the compiler: more than a second
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"] * 5


def test_public_names_are_frozen() -> None:
    assert sorted(toolkit.__all__) == sorted(toolkit._HOMES)
    assert sorted(toolkit.__all__) == [
        "AggregationConfig", "BaseLossConfig", "BaseLossContext", "BaseLossKwargs", "BaseRLLossConfig", "CELossConfig",
        "CELossContext", "CELossContextInputItem", "CELossKwargs", "ConfigError", "CorrectionConfig", "DataError",
        "GRPOLossConfig", "GRPOLossContext", "GRPOLossKwargs", "LaunchError", "LogprobSpec", "LossContextInputItem",
        "LossResult", "LossRunner", "LossTerm", "OPDLossConfig", "OPDLossContext", "OrealLossConfig",
        "OrealLossContext", "PerToken", "PolicyTerms", "RLLossContextInputItem", "ScoredLossContext", "Shared",
        "ToolkitError", "register_advantage", "register_policy_loss", "step_weights",
    ]  # fmt: skip
    for name in toolkit.__all__:
        assert getattr(toolkit, name).__doc__


def test_public_names_of_the_testing_package_are_frozen() -> None:
    from toolkit import testing

    assert testing.__all__ == [
        "Batch", "Finding", "Layout", "LayoutError", "Part", "assert_layout_invariant", "differences", "random_batch",
        "toolkit_loop",
    ]  # fmt: skip
    for name in testing.__all__:
        assert getattr(testing, name).__doc__
