"""TensorBoard event files. Runs in the process of :mod:`fisher_lab.tracking.worker`."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fisher_lab.config.schema import TrackerConfig
from fisher_lab.tracking.base import Numbers, Say, Start
from fisher_lab.tracking.wandb import CURVE, SPECTRUM

MISSING = "tracker=tensorboard needs the package tensorboard: pip install 'fisher-lab[tensorboard]'"


def installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("tensorboard") is not None


def make(config: TrackerConfig, say: Say) -> TensorBoardSink:
    """The sink."""
    return TensorBoardSink()


class TensorBoardSink:
    """Event files in ``tensorboard/`` of the tracker's directory.

    An attempt that goes on where an earlier one was killed makes some steps again: the file that
    it opens says from which step on the earlier ones are void, and TensorBoard leaves those out.
    """

    def __init__(self) -> None:
        self._start: Start | None = None
        self._opened: Any = None
        self._step = 0

    def start(self, start: Start) -> None:
        """Open the event file; a later attempt's only with its first number, which has a step."""
        if not installed():
            raise ModuleNotFoundError(MISSING)
        self._start = start
        if start.attempt == 1:
            self._open()

    def _open(self, void_from: int | None = None) -> None:
        """Configuration and name go in as text."""
        from torch.utils.tensorboard import SummaryWriter

        assert self._start is not None
        start = self._start
        self._opened = SummaryWriter(str(start.directory / "tensorboard"), purge_step=void_from)
        about = {"id": start.tracker_id, "name": start.name, "group": start.group}
        self._opened.add_text("run", _code(about | {"job_type": start.job_type}))
        self._opened.add_text("config", _code(start.config))

    @property
    def _writer(self) -> Any:
        if self._opened is None:
            self._open()
        return self._opened

    def log(self, values: Numbers, step: int | None = None) -> None:
        """Numbers of a step, under ``curve/``."""
        self._step = self._step + 1 if step is None else step
        if self._opened is None:
            self._open(self._step)
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(CURVE + name, value, self._step)

    def summary(self, values: Numbers) -> None:
        """The metrics, at the last step."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"summary/{name}", value, self._step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table as text, and a histogram of its eigenvalues where it has some."""
        stem = Path(name).stem
        self._writer.add_text(f"table/{stem}", _markdown(rows), self._step)
        for column in SPECTRUM:
            logs = [math.log10(r[column]) for r in rows if r.get(column) and r[column] > 0]
            if logs:
                import numpy as np

                where = f"histogram/{stem}/log10_{column}"
                self._writer.add_histogram(where, np.array(logs), self._step)

    def image(self, name: str, path: Path) -> None:
        """A picture."""
        import matplotlib.image
        import numpy as np

        pixels = np.asarray(matplotlib.image.imread(path))
        self._writer.add_image(f"figure/{name}", pixels, self._step, dataformats="HWC")

    def artifact(self, name: str, path: Path, kind: str) -> None:
        """Event files hold no files: where it lies is noted."""
        self._writer.add_text(f"artifact/{name}", f"{kind}: {path}", self._step)

    def finish(self, status: str) -> None:
        """Write the status and close the file."""
        self._writer.add_text("status", status, self._step)
        self._writer.close()


def _code(content: Any) -> str:
    text = json.dumps(content, indent=2, default=str)
    return "\n".join("    " + line for line in text.splitlines())


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [["" if row.get(c) is None else str(row[c]) for c in columns] for row in rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
