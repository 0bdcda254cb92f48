"""``python -m toolkit.bench``: measure the head with a loss on top; ``--help`` lists every choice.

Checks the whole command line before torch is imported, then hands over to `toolkit.benchmark`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from toolkit.config import build_bench, compose_config, conf_dir, register_schemas
from toolkit.errors import ToolkitError, say_warnings_plainly

# Idle threads that spin would be counted as CPU time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="bench")
def _job(cfg: DictConfig) -> None:
    try:
        config, loss_cfg = build_bench(cfg)
        from toolkit.benchmark import measure, report  # loads torch

        results = measure.measure_all(config, loss_cfg, list(cfg.plugins), say=_say)
        report.print_table(config, results)
        paths = report.write(Path(HydraConfig.get().runtime.output_dir), config, loss_cfg.model_dump(), results)
    except ToolkitError as error:
        _stop(error)
    print(f"{', '.join(path.name for path in paths)} in {paths[0].parent}")


def main() -> None:
    """Run the command line."""
    say_warnings_plainly()
    arguments = get_args_parser().parse_args()
    try:
        if not (arguments.shell_completion or arguments.hydra_help):
            build_bench(compose_config(list(arguments.overrides), root="bench"))
        register_schemas()
    except ToolkitError as error:
        _stop(error)
    _job()


def _say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


def _stop(error: ToolkitError) -> None:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(1) from None


if __name__ == "__main__":
    main()
