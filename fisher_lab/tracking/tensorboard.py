"""TensorBoard event files. The sink runs in a child process (:mod:`.process`)."""

from __future__ import annotations

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
            self._writer()

    def _writer(self, void_from: int | None = None) -> SummaryWriter:
        """The event file, opened when it is first needed."""
        if self._opened is None:
            from torch.utils.tensorboard import SummaryWriter

            start = self._start
            folder = str(start.directory / "tensorboard")
            self._opened = SummaryWriter(folder, purge_step=void_from)
            about = {"id": start.tracker_id, "name": start.name, "group": start.group}
            self._opened.add_text("run", _code(about | {"job_type": start.job_type}))
            self._opened.add_text("config", _code(start.config))
        return self._opened

    @override
    def log(self, values: Numbers, step: int | None = None) -> None:
        self._step = self._step + 1 if step is None else step
        writer = self._writer(void_from=self._step)
        for name, value in values.items():
            if value is not None:
                writer.add_scalar(CURVE + name, value, self._step)

    @override
    def summary(self, values: Numbers) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer().add_scalar(f"summary/{name}", value, self._step)

    @override
    def table(self, name: str, rows: Sequence[Row]) -> None:
        import numpy as np

        stem = Path(name).stem
        self._writer().add_text(f"table/{stem}", _markdown(rows), self._step)
        for column, logs in log_spectra(rows).items():
            tag = f"histogram/{stem}/log10_{column}"
            self._writer().add_histogram(tag, np.array(logs), self._step)

    @override
    def image(self, name: str, path: Path) -> None:
        import matplotlib.image
        import numpy as np

        pixels = np.asarray(matplotlib.image.imread(path))
        self._writer().add_image(f"figure/{name}", pixels, self._step, dataformats="HWC")

    @override
    def artifact(self, name: str, path: Path, kind: str) -> None:
        # Event files cannot hold files.
        self._writer().add_text(f"artifact/{name}", f"{kind}: {path}", self._step)

    @override
    def finish(self, status: str) -> None:
        self._writer().add_text("status", status, self._step)
        self._writer().close()


def _code(content: object) -> str:
    text = json.dumps(content, indent=2, default=str)
    return "\n".join("    " + line for line in text.splitlines())


def _markdown(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [["" if row.get(c) is None else str(row[c]) for c in columns] for row in rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
