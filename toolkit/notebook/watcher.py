"""`watch`: the dashboard of a run, which reads its files again every few seconds."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from toolkit.errors import ConfigError, DataError, a_type
from toolkit.notebook.charts import picture
from toolkit.notebook.extra import check_extra
from toolkit.notebook.token_records import is_number
from toolkit.notebook.token_source import records_from
from toolkit.notebook.watch_model import WatchModel
from toolkit.report.runs import SAMPLES

check_extra()

import ipywidgets as widgets  # noqa: E402

from toolkit.notebook.chart_widget import ChartWidget  # noqa: E402
from toolkit.notebook.static_view import WithPicture  # noqa: E402
from toolkit.notebook.token_model import TokenModel  # noqa: E402
from toolkit.notebook.token_widget import TokenView  # noqa: E402

MOST_SAMPLES = 60
"""Completions that are shown, evenly chosen."""


def watch(run_dir: str | os.PathLike[str], *, every: float = 2.0) -> RunWatch:
    """Show a run as it goes: reward, KL, entropy, clipped tokens by the sign of A, throughput and samples.

    It may be called before the run begins, while it runs and after it has ended; the run does not notice.

    Args:
        run_dir: the output folder of the training command (``hydra.run.dir``).
        every: seconds between two looks at its files.

    Raises:
        ConfigError: `every` is not above 0, or `run_dir` is a file or not a path.
    """
    if not isinstance(run_dir, (str, os.PathLike)):
        raise ConfigError(
            f"watch got {a_type(run_dir)}; give the output folder of a run, such as 'outputs/2026-11-30/10-00-00'"
        )
    if not is_number(every) or every <= 0:
        raise ConfigError(f"every={every} must be a number of seconds above 0")
    if Path(run_dir).is_file():
        raise ConfigError(f"{run_dir} is a file; give the output folder of the run")
    return RunWatch(WatchModel(Path(run_dir)), every)


class RunWatch(WithPicture):
    """The widget; `model` is its state. `stop` ends the reading; `refresh` reads at once."""

    def __init__(self, model: WatchModel, every: float) -> None:
        self.model = model
        self.charts = ChartWidget()
        self._samples = widgets.VBox([])
        self._stop = widgets.Button(description="stop watching", tooltip="Stop reading the files of the run.")
        self._show = widgets.Button(description="show samples", tooltip="Read the completions that the run has kept.")
        self._stop.on_click(lambda _: self.stop())
        self._show.on_click(lambda _: self.show_samples())
        super().__init__([self.charts, widgets.HBox([self._show, self._stop]), self._samples])
        self.refresh()
        self._task = _started(self._follow(every))
        self._stop.disabled = self._task is None

    def picture(self) -> bytes:
        """Return the charts as a PNG."""
        return picture(self.model.view())

    def summary(self) -> str:
        """Return how far the run is."""
        return self.model.status()

    def refresh(self) -> None:
        """Read the files of the run and draw what is new."""
        if self.model.refresh():
            self.charts.show(self.model.view())

    def show_samples(self) -> None:
        """Read the completions that the run has kept so far, and show their tokens."""
        try:
            records = records_from(self.model.folder / SAMPLES, most=MOST_SAMPLES)
        except (ConfigError, DataError) as error:
            self._samples.children = [widgets.Label(value=str(error))]
            return
        self._samples.children = [TokenView(TokenModel(records))]
        self._show.description = "read samples again"

    def stop(self) -> None:
        """Stop reading the files."""
        if self._task is not None:
            self._task.cancel()
        self._stop.disabled = True

    async def _follow(self, every: float) -> None:
        while not self.model.is_done:
            await asyncio.sleep(every)
            self.refresh()
            self.charts.show(self.model.view())  # how long ago the last step was
        self._stop.disabled = True


def _started(work: Any) -> asyncio.Task[None] | None:
    """Start `work` where a notebook's loop runs; None elsewhere, for example in a script."""
    try:
        return asyncio.get_running_loop().create_task(work)
    except RuntimeError:
        work.close()
        return None
