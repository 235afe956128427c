"""TensorBoard event files. The sink runs in a child process (:mod:`.process`)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from fisher_lab.config.schema import TrackerConfig
from fisher_lab.tracking.base import Numbers, Row, Start, Tracker
from fisher_lab.tracking.wandb import CURVE, log_spectra

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

MISSING = "tracker=tensorboard needs the package tensorboard: pip install 'fisher-lab[tensorboard]'"


def installed() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("tensorboard") is not None


class Sink(Tracker):
    """Event files in ``tensorboard/`` of the tracker's directory.

    A run that was killed is resumed from its last saved state and repeats some steps. The event
    file of the later attempt says from which step on the earlier ones are void, and TensorBoard
    leaves those out.

    Args:
        config: the section ``tracker``.
    """

    def __init__(self, config: TrackerConfig) -> None:
        self._opened: SummaryWriter | None = None
        self._step = 0

    @override
    def start(self, start: Start) -> None:
        self._start = start
        if start.attempt == 1:  # the file of a later attempt is opened with its first step
            self._open()

    def _open(self, void_from: int | None = None) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        start = self._start
        writer = SummaryWriter(str(start.directory / "tensorboard"), purge_step=void_from)
        about = {"id": start.tracker_id, "name": start.name, "group": start.group}
        writer.add_text("run", _code(about | {"job_type": start.job_type}))
        writer.add_text("config", _code(start.config))
        self._opened = writer
        return writer

    @property
    def _writer(self) -> SummaryWriter:
        return self._opened or self._open()

    @override
    def log(self, values: Numbers, step: int | None = None) -> None:
        self._step = self._step + 1 if step is None else step
        writer = self._opened or self._open(void_from=self._step)
        for name, value in values.items():
            if value is not None:
                writer.add_scalar(CURVE + name, value, self._step)

    @override
    def summary(self, values: Numbers) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"summary/{name}", value, self._step)

    @override
    def table(self, name: str, rows: Sequence[Row]) -> None:
        import numpy as np

        stem = Path(name).stem
        self._writer.add_text(f"table/{stem}", _markdown(rows), self._step)
        for column, logs in log_spectra(rows).items():
            tag = f"histogram/{stem}/log10_{column}"
            self._writer.add_histogram(tag, np.array(logs), self._step)

    @override
    def image(self, name: str, path: Path) -> None:
        import matplotlib.image
        import numpy as np

        pixels = np.asarray(matplotlib.image.imread(path))
        self._writer.add_image(f"figure/{name}", pixels, self._step, dataformats="HWC")

    @override
    def artifact(self, name: str, path: Path, kind: str) -> None:
        # Event files cannot hold files.
        self._writer.add_text(f"artifact/{name}", f"{kind}: {path}", self._step)

    @override
    def finish(self, status: str) -> None:
        self._writer.add_text("status", status, self._step)
        self._writer.close()


def _code(content: object) -> str:
    text = json.dumps(content, indent=2, default=str)
    return "\n".join("    " + line for line in text.splitlines())


def _markdown(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [["" if row.get(c) is None else str(row[c]) for c in columns] for row in rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
