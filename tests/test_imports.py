"""Imports go one way, and light ones stay light."""

import ast
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

import toolkit

ROOT = Path(toolkit.__file__).parent
LAYERS = [
    {"errors", "display"},
    {"peers"},
    {"schema", "metrics"},
    {
        "functional.names",
        "functional.options",
        "functional.registry",
        "functional.kl_facts",
        "functional.policy.registry",
    },
    {"head.options"},
    {"losses.config", "models.config", "rollout.config", "tasks.config"},
    {"functional", "head", "distributed"},
    {"losses"},
    {"models", "tasks"},
    {"rollout"},
    {"training"},
    {"compose"},
    {"explain"},
    {"testing"},
    {"check"},
    {"runner"},
    {"report"},
    {"notebook"},
    {"bench", "scale", "integrations"},
    {"train"},
]
"""From the bottom to the top: a module imports from layers below its own, and from its own. Where several entries name
a module, the longest does."""


def layer_of(module: str) -> int:
    names = [".".join(module.split(".")[:length]) for length in range(module.count(".") + 1, 0, -1)]
    return next(i for name in names for i, layer in enumerate(LAYERS) if name in layer)


def modules() -> dict[str, Path]:
    """Every module by its dotted name below ``toolkit``, without the package's own ``__init__``."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items() if name != "__init__"}


def imports(path: Path, known: Collection[str]) -> set[str]:
    """What a file imports of us anywhere: at the top, inside functions and for type checkers."""
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "toolkit":
            module = (node.module or "").removeprefix("toolkit").removeprefix(".")
            for alias in node.names:
                name = f"{module}.{alias.name}".removeprefix(".")
                used.add(name if name in known else module)
        elif isinstance(node, ast.Import):
            used |= {alias.name.removeprefix("toolkit.") for alias in node.names if alias.name.startswith("toolkit.")}
    return {name for name in used if name in known}


def test_imports_go_one_way() -> None:
    known = modules()
    wrong = [
        f"{module} -> {used}"
        for module, path in known.items()
        for used in imports(path, known)
        if module.split(".")[0] != used.split(".")[0] and layer_of(used) >= layer_of(module)
    ]
    assert not wrong


def test_no_module_imports_itself_on_a_detour() -> None:
    """Imports inside functions and for type checkers are counted; a package's ``__init__`` may export its modules."""
    known = modules()
    graph = {
        module: set() if path.name == "__init__.py" else imports(path, known) - {module}
        for module, path in known.items()
    }
    while free := {module for module, used in graph.items() if not used}:
        graph = {module: used - free for module, used in graph.items() if module not in free}
    assert not graph, f"in or above a circle: {sorted(graph)}"


def test_functional_and_head_know_nothing_of_config_hydra_accelerate_or_each_other() -> None:
    for room, other in (("functional", "head"), ("head", "functional")):
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text()
            for word in (
                "hydra",
                "omegaconf",
                "accelerate",
                "toolkit.compose.tree",
                "toolkit.losses",
                f"toolkit.{other}",
            ):
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


@pytest.mark.slow
def test_integrations_import_their_trainer_only_when_used() -> None:
    code = (
        "import sys, toolkit.integrations.trl, toolkit.integrations.trl.args\n"
        "print(*({'trl', 'verl', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_public_names_are_frozen() -> None:
    assert sorted(toolkit.__all__) == sorted(toolkit._MODULES)
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
