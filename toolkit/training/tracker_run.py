"""A run in wandb, tensorboard or trackio: started or continued, filled and finished, by the main process alone.

The id of the run is kept in the output directory. A resumed run goes on in the same run of wandb or trackio and takes
the id with it: a checkpoint that is resumed twice, in two folders, gives two runs. Files of tensorboard are in the
output directory; resumed in another one, a run begins there with the earlier lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from toolkit.errors import ConfigError, first_line
from toolkit.training.config import TrackerConfig

RUN_FILE = "tracker.json"
"""Where an output directory keeps the id of its run in the tracker."""


class Shown(NamedTuple):
    """A completion to show."""

    messages: Sequence[Mapping[str, Any]]
    """The prompt: messages of a chat, or one of the user."""
    completion: str
    reward: float | None
    answer: str


class TrackerRun:
    """The run in the tracker."""

    def __init__(
        self, config: TrackerConfig, accelerator: Accelerator, output_dir: Path, settings: Mapping[str, Any]
    ) -> None:
        assert config.log_with is not None
        self._name, self._project, self._settings = config.log_with, config.project, settings
        self._accelerator, self._dir = accelerator, output_dir
        self._tracker: Any = None
        self._num_known = 0
        """Rows that the tracker has from before: a repeated one has the same numbers, and wandb would warn."""

    def start(self, rows: Sequence[Mapping[str, Any]], earlier_dir: Path | None) -> None:
        """Continue the run of `earlier_dir` if it had one, otherwise begin a run with the restored rows.

        Raises:
            ConfigError: the tracker does not start.
        """
        run_id, is_continued = self._take_id(earlier_dir)
        settings = None if self._name == "tensorboard" and is_continued else _flat(self._settings)
        options = {self._name: self._options(run_id, is_continued, len(rows))}
        try:
            self._accelerator.init_trackers(self._project, config=settings, init_kwargs=options)
        except Exception as error:
            remedy = "; run wandb login, or set WANDB_MODE=offline" if self._name == "wandb" else ""
            raise ConfigError(f"tracker={self._name} does not start: {first_line(error)}{remedy}") from None
        self._tracker = self._accelerator.trackers[0]
        # Of trackio's run this is private; without it, repeated rows are there twice.
        known = {"wandb": "starting_step", "trackio": "_next_step"}.get(self._name)
        self._num_known = getattr(self._tracker.tracker, known, 0) if known is not None else 0
        if not is_continued:
            for index, row in enumerate(rows):
                self.log(index, row)

    def _take_id(self, earlier_dir: Path | None) -> tuple[str, bool]:
        """Return the id of the run, and whether it has been one before; it is then no longer that of `earlier_dir`."""
        taken = None
        earlier = None if earlier_dir is None else earlier_dir.resolve()
        is_here = earlier == self._dir.resolve()
        if earlier is not None and (is_here or self._name != "tensorboard"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                kept = json.loads((earlier / RUN_FILE).read_text())
                if (kept["tracker"], kept["project"]) == (self._name, self._project):
                    if not is_here:
                        (earlier / RUN_FILE).unlink()  # in a folder that cannot be changed it stays, and is not taken
                    taken = str(kept["id"])
        label = "-".join(self._dir.resolve().parts[-2:])
        run_id = taken or f"{label}-{uuid.uuid4().hex[:8]}"
        if self._name == "wandb":
            run_id = os.environ.get("WANDB_RUN_ID") or taken or uuid.uuid4().hex[:8]
        kept = {"tracker": self._name, "project": self._project, "id": run_id}
        (self._dir / RUN_FILE).write_text(json.dumps(kept) + "\n")
        return run_id, taken is not None

    def _options(self, run_id: str, is_continued: bool, num_rows: int) -> dict[str, Any]:
        if self._name == "tensorboard":
            # Hides rows after the checkpoint, and those of a run that was replaced.
            return {"purge_step": num_rows if is_continued else 0}
        if self._name == "trackio":
            return {"name": run_id, "resume": "allow" if is_continued else "never"}
        name = os.environ.get("WANDB_NAME") or "/".join(self._dir.resolve().parts[-2:])
        return {"id": run_id, "name": name, "resume": "allow", "dir": os.environ.get("WANDB_DIR") or str(self._dir)}

    def log(self, index: int, row: Mapping[str, Any], shown: Sequence[Shown] = ()) -> None:
        """Send what was measured of a row, by phase and name, at its place on the axis."""
        if index < self._num_known:
            return
        phase = row["phase"]
        values = {f"{phase}/{key}": value for key, value in row.items() if key != "phase" and value is not None}
        if shown and self._name == "trackio":
            values |= _traces(f"{phase}/completions", shown)
        self._tracker.log(values, step=index)

    def finish(self, *, has_failed: bool) -> None:
        """Let the tracker write everything; after an error, which is more important, its own errors are left out."""
        if self._tracker is None:
            return
        tracker, self._tracker = self._tracker, None
        with contextlib.suppress(*([Exception] if has_failed else [])):
            if has_failed and self._name == "wandb":
                tracker.tracker.finish(exit_code=1)
            else:
                tracker.finish()  # accelerate's `end_training` would also end the process group


def _traces(key: str, shown: Sequence[Shown]) -> dict[str, Any]:
    """Return the completions as traces; nothing with versions of trackio that have none."""
    import trackio

    trace = getattr(trackio, "Trace", None)
    if trace is None:
        return {}
    return {
        key: [
            trace(
                messages=[*map(dict, each.messages), {"role": "assistant", "content": each.completion}],
                metadata={"reward": each.reward, "answer": each.answer},
            )
            for each in shown
        ]
    }


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (int, float, bool)) else str(value)
    return flat
