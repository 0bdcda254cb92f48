"""``python -m toolkit.explain``: what a loss computes, in formulas with numbers; ``--list`` shows every choice.

Takes the overrides of the training command, and does not import torch (unless one of your plugins does).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from toolkit.compose.build import build_loss
from toolkit.compose.grammar import check_repeated
from toolkit.compose.overrides import options_first, parse
from toolkit.compose.tree import compose_loss
from toolkit.errors import ConfigError, print_text, stopping_on_error
from toolkit.explain.facts import KL_EQUATIONS, shown_all, title_of
from toolkit.explain.formula import explain_loss
from toolkit.explain.lint import kl_of_trl
from toolkit.functional.advantages import advantage
from toolkit.functional.kl_facts import KL_NAMES
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.rollout.config import RolloutConfig
from toolkit.training.config import AdvantageConfig, KLControlConfig


def main() -> None:
    """Run the command line."""
    with stopping_on_error():
        arguments = _parser().parse_args(options_first(sys.argv[1:], _parser()))
        print_text(_answer(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="toolkit-explain",
        description="Say what a loss computes: formula, normaliser, policies, gradients, and warnings.",
        epilog="example: toolkit-explain loss=grpo policy_loss=gspo kl=k3 aggregation=seq_mean_token_mean",
    )
    parser.add_argument("overrides", nargs="*", help="as for toolkit-train; `list` is the same as --list")
    parser.add_argument("--config-dir", "-cd", metavar="FOLDER", help="a folder with your YAML files")
    parser.add_argument("--list", action="store_true", help="list everything that can be chosen")
    parser.add_argument(
        "--markdown",
        nargs="?",
        const="-",
        metavar="FILE",
        help="print the tables of all choices, or write them into this file between their markers",
    )
    parser.add_argument(
        "--from",
        dest="project",
        metavar="PROJECT",
        help="what the words of another project (trl, verl ...; all) are here, or those named after it; with "
        "--markdown [FILE] as a page",
    )
    return parser


def _answer(arguments: argparse.Namespace) -> str:
    if arguments.list or arguments.overrides == ["list"]:
        from toolkit.explain.catalogue import listing

        return listing()
    if arguments.project is not None:
        return _words(arguments.project, arguments.markdown, arguments.overrides)
    if arguments.markdown is not None:
        return _markdown(arguments.markdown)
    check_repeated(parse(arguments.overrides))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        preset = next((str(o.value()) for o in parse(arguments.overrides) if o.key_or_group == "loss"), None)

        def described(cfg: DictConfig) -> tuple[BaseLossConfig, list[tuple[str, list[str]]]]:
            loss = build_loss(cfg)
            return loss, list(_around(cfg, loss, preset))

        cfg = compose_loss(arguments.overrides, config_dir=arguments.config_dir, build=described)
        loss, about = described(cfg)
    text = explain_loss(loss, about, preset=preset, **_context(cfg))
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    unwrapped = " ".join(text.split())
    notes = [f"note: {message}" for message in messages if " ".join(message.split()) not in unwrapped]
    return "\n".join([text, *notes])


def _markdown(path: str) -> str:
    from toolkit.explain.catalogue import markdown, with_markdown

    if path == "-":
        return markdown()
    try:
        text = with_markdown(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"--markdown {path}: there is no such file in {Path.cwd()}; name a file with the tables' markers, such as "
            "tutorials/reference/losses.md of a checkout, or leave it out to print the tables"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--markdown {path}: {error}") from None
    Path(path).write_text(text, encoding="utf-8")
    return f"wrote the tables of {path}"


def _words(project: str, file: str | None, wanted: list[str]) -> str:
    from toolkit.explain.words import markdown, table

    if file in (None, "-"):
        return table(project, wanted) if file is None else markdown(project)
    page = markdown(project)
    try:
        Path(file).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--markdown {file}: {error}") from None
    return f"wrote {file}"


def _context(cfg: DictConfig) -> dict[str, object]:
    """Return what the settings of the run tell `warnings_for`."""
    options = _part(cfg, "advantage") or AdvantageConfig.defaults()
    return {
        "advantage": options.pop("estimator", None),
        "advantage_options": options.pop("options", {}) | options,
        "longest": _part(cfg, "rollout").get("max_new_tokens"),
    }


def _part(cfg: DictConfig, name: str) -> dict[str, Any]:
    """Return the settings of a part of the run; empty if only the loss was composed, so the defaults hold."""
    values = OmegaConf.to_container(cfg[name], resolve=True) if name in cfg else {}
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items() if name != "_target_"}


def _around(cfg: DictConfig, loss: BaseLossConfig, preset: str | None) -> Iterator[tuple[str, list[str]]]:
    """Describe what happens to rewards before the loss reads them, what controls the KL coefficient, and TRL's KL.

    Raises:
        ConfigError: the run lacks what the advantage estimator needs, as in training.
    """
    if not isinstance(loss, BaseRLLossConfig):
        return
    theirs = kl_of_trl(loss, preset)
    if theirs is not None:
        yield "kl of TRL", [f"with beta > 0 and without clamps: {shown_all(theirs)}"]
    control = KLControlConfig(**_part(cfg, "kl_control"))
    if control.reward_type is not None:
        estimator = KL_NAMES[control.reward_type]
        text = (
            f"R - {control.reward_coef:g} x the sum over the completion of {estimator}: {KL_EQUATIONS[estimator]}, "
            "d = log pi - log pi_ref, without gradient; before advantages are computed"
        )
        yield "reward", [text]
    if control.target is not None:
        text = (
            f"adaptive: the coefficient rises while the KL of a completion is above {control.target:g} nats and "
            f"falls while it is below; horizon {control.horizon} completions"
        )
        yield "kl control", [text]
    chosen = AdvantageConfig(**_part(cfg, "advantage"))
    chosen.check_training(RolloutConfig(**_part(cfg, "rollout")).group_size)
    if "advantages" not in loss.required_fields:
        return
    options = f" ({shown_all(chosen.options)})" if chosen.options else ""
    yield "advantage", [f"{chosen.estimator}: {title_of(advantage(chosen.estimator).function)}{options}"]


if __name__ == "__main__":
    main()
