"""``python -m toolkit.train``: train a policy; ``--help`` lists every choice. `train` is the same for notebooks.

Checks the whole command line before torch is imported, then hands over to `toolkit.training.run`.
"""

from __future__ import annotations

import time

STARTED = time.time()
"""When the program began, before slow imports. The *process* may be much older: a shell that ends with this command."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from toolkit.compose.build import build_config
from toolkit.compose.grammar import quoted
from toolkit.compose.overrides import config_folders_in, options_first, parse, with_folder
from toolkit.compose.schemas import BEHAVIOUR, conf_dir, register_schemas
from toolkit.compose.tree import TRAIN, CommandLine, Folder, check_command_line, compose_config, compose_run
from toolkit.errors import ConfigError, ToolkitError, has_warned, print_text, say_warnings_plainly
from toolkit.explain.lint import warnings_for
from toolkit.training.config import AUTO
from toolkit.training.output_dir import check_free, claim, new_dir, release
from toolkit.training.resume import check_named, continued
from toolkit.training.run_config import RunConfig
from toolkit.training.startup import INTERRUPTED, check_environment, launched_rank

if TYPE_CHECKING:
    from toolkit.training.report import Summary

PURPOSE = "Train a policy with the losses of this toolkit."
EXAMPLES = {
    "toolkit-train loss=grpo policy_loss=vanilla kl=k3 mode=chunk loss.chunk_size=256": "",
    "toolkit-train experiment=grpo_kl seed=1 training.steps=100": "",
    "toolkit-train -m seed=0,1,2": "one run after the other",
    "toolkit-train --config-dir my_conf loss=mine": "your YAML files: my_conf/loss/mine.yaml",
    "toolkit-train policy_loss=gspo --help": "the settings of a choice",
    "toolkit-explain --list": "all choices with one line each, including presets",
    "toolkit-train --cfg job --resolve": "print the configuration and stop",
    "toolkit-train kl=k3 training.resume=outputs/...": "continue a run, given its overrides",
}
PATIENCE = 8.0
"""Seconds that another process waits for the main one to print the same error, so it is printed once."""


@hydra.main(config_path=conf_dir(), config_name="config", **BEHAVIOUR)
def _job(cfg: DictConfig) -> float | None:
    try:
        config = build_config(cfg)
        hydra_cfg = HydraConfig.get()
        if config.training.resume == AUTO:  # a job of a multirun
            training = continued(config.training, hydra_cfg.runtime.output_dir)
            config = config.model_copy(update={"training": training})
        if launched_rank() == 0:  # a job of a multirun, or a folder that only Hydra could name
            claim(hydra_cfg.runtime.output_dir, config.training)
        from toolkit.training.run import run  # loads torch

        # In a multirun the imports are part of the first job only.
        is_later = hydra_cfg.mode == RunMode.MULTIRUN and hydra_cfg.job.num > 0
        started = time.time() if is_later else STARTED
        summary = run(config, cfg, started=started, output_dir=hydra_cfg.runtime.output_dir)
    except ToolkitError as error:
        _stop(error)
    # After a signal no further job of a multirun may start.
    if summary.interrupted or (summary.stopped_by and hydra_cfg.mode == RunMode.MULTIRUN):
        sys.exit(128 + signal.Signals[summary.stopped_by or "SIGINT"])
    return summary.objective


def main() -> None:
    """Run the command line."""
    say_warnings_plainly()
    try:
        sys.argv[1:] = options_first(sys.argv[1:], get_args_parser())
        arguments = get_args_parser().parse_args()
        if arguments.multirun and arguments.cfg:
            raise ConfigError("--cfg prints the configuration of one run; leave out -m")
        if arguments.resolve and not arguments.cfg:
            raise ConfigError("--resolve goes with --cfg job: toolkit-train --cfg job --resolve")
        if arguments.help:
            return _print_help(arguments)
        if not (arguments.shell_completion or arguments.hydra_help):
            sys.argv[1:] = _checked(arguments)
        register_schemas()
    except ToolkitError as error:
        _stop(error)
    if launched_rank() > 0:
        # One output directory per run: only the main process creates it.
        sys.argv += ["hydra.run.dir=.", "hydra.output_subdir=null"]
    try:
        _job()
    except KeyboardInterrupt as error:
        print("interrupted before the loop could write a checkpoint", file=sys.stderr)
        raise SystemExit(getattr(error, "code", INTERRUPTED)) from None
    finally:
        if arguments.multirun and launched_rank() == 0:
            _compare(sys.argv[1:])


def train(overrides: Sequence[str] = ()) -> Summary:
    """Train as ``toolkit-train`` does with the same overrides, and return the summary; needs the extra [train].

    In a notebook ``train(["kl=k3", "seed=1"])`` runs in its process. ``accelerate.notebook_launcher(train, (["kl=k3",
    "seed=1"],), num_processes=2)`` runs it in two and returns nothing: read summary.json in the output directory.

    Args:
        overrides: as on the command line; ``hydra.run.dir=...`` names the output directory.

    Raises:
        ConfigError: an override is wrong; nothing has started yet.
        LaunchError: the processes do not work together, or would change the scale of the loss.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"train() takes a list of overrides, not a string: train([{overrides!r}])")
    started = time.time()
    cfg, _, folder, _ = compose_run(overrides)
    config = build_config(cfg)
    check_environment(config)
    if folder.path is None:
        raise ConfigError("hydra.run.dir names what only the command line knows; give train() a plain folder")
    output_dir = folder.path
    config, _ = _continued(config, folder)
    if launched_rank() == 0:  # the others receive its path
        output_dir = new_dir(output_dir) if folder.is_dated else output_dir
        claim(output_dir, config.training)
    from accelerate.state import AcceleratorState, GradientState  # loads torch

    from toolkit.training.run import run

    try:
        return run(config, cfg, started=started, output_dir=output_dir)
    finally:  # the next run may have other settings, and notebook_launcher requires a clean state
        release(output_dir)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def _print_help(arguments: argparse.Namespace) -> None:
    from toolkit.compose.help_text import help_text

    overrides = with_folder(arguments.overrides, arguments.config_dir)
    folders = config_folders_in(parse(overrides))
    print_text(help_text(compose_config(overrides), root=TRAIN, purpose=PURPOSE, examples=EXAMPLES, folders=folders))


def _checked(arguments: argparse.Namespace) -> list[str]:
    """Check what needs no torch; return the command line with its overrides in the form that Hydra accepts."""
    overrides = with_folder(arguments.overrides, arguments.config_dir)
    check = None if arguments.cfg or arguments.info else check_environment
    checked = check_command_line(overrides, multirun=arguments.multirun, check=check)
    instead = dict(zip(overrides, checked.overrides, strict=True))
    taken = [instead.get(word, word) for word in sys.argv[1:]]
    if check is not None:
        if arguments.multirun:
            if checked.folder.is_dated:
                for config in checked.configs:
                    check_named(config.training, "hydra.sweep.dir")
        else:
            config, texts = _continued(checked.configs[0], checked.folder)
            checked, taken = checked._replace(configs=[config]), taken + texts
        for config in checked.configs:
            check_environment(config)
        if launched_rank() == 0:
            _say_notes(checked.configs)
            taken += _claimed(checked, multirun=arguments.multirun)
    return taken


def _continued(config: RunConfig, folder: Folder) -> tuple[RunConfig, list[str]]:
    """Return a run that continues what its output directory holds, if asked to, and overrides that say so to Hydra."""
    if folder.path is None or folder.is_dated:
        note = check_named(config.training)
        if note is not None and launched_rank() == 0:
            print(f"note: {note}", file=sys.stderr)
        return config, []
    training = continued(config.training, folder.path)
    if config.training.resume == AUTO and training.resume is None and launched_rank() == 0:
        print(f"note: training.resume=auto: no checkpoint in {folder.path}, so the run starts anew", file=sys.stderr)
    changed = {name: value for name, value in training if value != getattr(config.training, name)}
    texts = [f"training.{name}={_written(value)}" for name, value in changed.items()]
    return config.model_copy(update={"training": training}), texts


def _written(value: object) -> str:
    """Return a value of a setting as Hydra reads it."""
    if value is None:
        return "null"
    return quoted(value) if isinstance(value, str) else str(value).lower()


def _claimed(checked: CommandLine, *, multirun: bool) -> list[str]:
    """Claim the output directory of a run, or create that of a multirun; return the override that names it to Hydra."""
    path, is_dated = checked.folder
    if path is None:
        return []
    path = new_dir(path) if is_dated else path
    if multirun:  # each job claims its own folder
        for number, config in enumerate(checked.configs):
            job = os.path.join(path, str(number))
            check_free(job, continued(config.training, job))
        return [f"hydra.sweep.dir={quoted(path)}"]
    claim(path, checked.configs[0].training)
    return [f"hydra.run.dir={quoted(path)}"]


def _compare(arguments: Sequence[str]) -> None:
    """Compare the runs of a multirun as far as they have come: a table, and a page in its folder."""
    folders = [each.partition("=")[2].strip("'") for each in arguments if each.startswith("hydra.sweep.dir=")]
    if folders:
        from toolkit.report.command import compare_sweep

        compare_sweep(folders[-1])


def _say_notes(configs: list[RunConfig]) -> None:
    """Print the known problems of a valid configuration, each once."""
    notes = [
        note
        for config in configs
        for note in warnings_for(
            config.loss,
            advantage=config.advantage.estimator,
            advantage_options=config.advantage.options,
            longest=config.rollout.max_new_tokens,
        )
        if not has_warned(note)
    ]
    for note in dict.fromkeys(notes):
        print(f"note: {note}", file=sys.stderr)


def _stop(error: ToolkitError) -> None:
    """Print the error and exit; other processes leave the printing to the main one if it fails, too.

    The main process exits at once, and then the launcher ends the others silently. Those that still run after a while
    have an error of their machine alone; the first process of that machine ends its neighbours.
    """
    if launched_rank() > 0 and not error.is_reported:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(PATIENCE + int(os.environ.get("LOCAL_RANK", "0")))
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(1) from None


if __name__ == "__main__":
    main()
