"""``python -m toolkit.bench``: measure the head with a loss on top; ``--help`` lists every choice.

Checks the command line before torch is imported, then runs the benchmark.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from toolkit.bench.config import BENCH, build_bench
from toolkit.compose.grammar import quoted
from toolkit.compose.overrides import options_first
from toolkit.compose.schemas import BEHAVIOUR, conf_dir, register_schemas
from toolkit.compose.tree import compose_run
from toolkit.errors import print_text, say_warnings_plainly, stopping_on_error
from toolkit.training.output_dir import new_dir

PURPOSE = (
    "Measure the head with a loss on top: time, memory and accuracy, against eager PyTorch, installed peers and the "
    "bare matrix products."
)
EXAMPLES = {
    "python -m toolkit.bench bench=qwen3_0_6b bench.dtype=bfloat16": "",
    "python -m toolkit.bench bench.shape=[1024,896,151936] policy_loss=gspo bench.frozen_head=true": "",
    "python -m toolkit.bench bench=bars": "the table of tutorials/reference/head.md",
}

# Spinning idle threads would count as CPU time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@hydra.main(config_path=conf_dir(), config_name="bench", **BEHAVIOUR)
def _job(cfg: DictConfig) -> None:
    with stopping_on_error():
        config, loss_cfg = build_bench(cfg)
        from toolkit.bench import measure, report  # loads torch

        results = measure.measure_all(config, loss_cfg, list(cfg.plugins))
        report.print_table(config, results)
        paths = report.write(Path(HydraConfig.get().runtime.output_dir), config, loss_cfg.model_dump(), results)
    print(f"{', '.join(path.name for path in paths)} in {paths[0].parent}")


def main() -> None:
    """Run the command line."""
    say_warnings_plainly()
    with stopping_on_error():
        sys.argv[1:] = options_first(sys.argv[1:], get_args_parser())
        arguments = get_args_parser().parse_args()
        if not (arguments.shell_completion or arguments.hydra_help):
            cfg, _, folder, _ = compose_run(
                arguments.overrides, root=BENCH, config_dir=arguments.config_dir, build=build_bench
            )
            if arguments.help:
                from toolkit.compose.help_text import help_text

                return print_text(help_text(cfg, root=BENCH, purpose=PURPOSE, examples=EXAMPLES))
            build_bench(cfg)
            if folder.path is not None and folder.is_dated and not (arguments.cfg or arguments.info):
                sys.argv.append(f"hydra.run.dir={quoted(new_dir(folder.path))}")
        register_schemas(BENCH.schemas)
    _job()


if __name__ == "__main__":
    main()
