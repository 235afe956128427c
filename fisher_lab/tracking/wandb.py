"""Weights & Biases. The sink runs in a child process (:mod:`.process`).

Nothing that the library would find out by itself is recorded (command line, environment, host
metadata, git remote, console): it could contain a key or a token, and the run's own record says
where its numbers come from.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from fisher_lab.config.schema import TrackerConfig
from fisher_lab.runs.status import Status
from fisher_lab.tracking.base import Numbers, Row, Start, Tracker

if TYPE_CHECKING:
    from wandb import Run

log = logging.getLogger(__name__)

ONLINE = ("online", "run", "shared")
"""Modes of the library in which a run is uploaded, an older name included."""
NOT_RECORDED = "not-recorded"
INIT_S = 20.0
"""Seconds that the service may take to accept an online run before the run is written offline."""
CURVE = "curve/"
"""Prefix of logged numbers, so that their names do not collide with those of the summary."""
STEP = CURVE + "step"
"""The step of the run, and the x axis of the charts. W&B's own step does not serve: ``wandb sync``
counts the steps of a resumed attempt from where the first one ended."""
SENT = ".sent"
"""Suffix of the file that holds the size of a ``.wandb`` file when it was sent."""
SPECTRUM = ("eigenvalue", "eigenvalues")
"""Columns for which a histogram is drawn beside the table."""


def disabled(config: TrackerConfig, environ: Mapping[str, str]) -> bool:
    """Whether the configuration, or else the environment, switches W&B off."""
    return (config.mode or environ.get("WANDB_MODE")) == "disabled"


class Sink(Tracker):
    """One run of W&B.

    Args:
        config: the section ``tracker``.
    """

    def __init__(self, config: TrackerConfig) -> None:
        self._config = config
        self._online = False

    @override
    def start(self, start: Start) -> None:
        directory = start.directory
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):  # the library would silently use another directory
            raise PermissionError(f"{directory} cannot be written to")
        for variable, name in (("WANDB_DATA_DIR", "data"), ("WANDB_CACHE_DIR", "cache")):
            os.environ.setdefault(variable, str(directory / name))
        chosen = self._config.mode or os.environ.get("WANDB_MODE")
        self._online = (chosen or "online") in ONLINE
        import wandb

        self._wandb, self._start = wandb, start
        self._resumed = start.attempt > 1
        file = directory / f"{start.tracker_id}.step"
        self._last_step = int(file.read_text() or -1) if self._resumed and file.exists() else -1
        self._step_file = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            self._run = self._init()
        except Exception as error:
            if not self._online:
                raise
            from wandb.errors import AuthenticationError, UsageError

            refused = isinstance(error, AuthenticationError | UsageError)
            log.log(
                logging.INFO if refused and not chosen else logging.WARNING,
                "%s (%s): the run is written offline (scripts/wandb_sync.sh sends it later)",
                "W&B does not accept the login" if refused else "W&B does not answer",
                next(iter(str(error).strip().splitlines()), type(error).__name__),
            )
            # The service still holds the run that has timed out, and would refuse its id.
            wandb.teardown(exit_code=1)
            self._online = False
            self._run = self._init()
        self._run.define_metric(CURVE + "*", step_metric=STEP)

    def _init(self) -> Run:
        start = self._start
        about = {"run_id": start.run_id, "attempt": start.attempt, "cell": start.cell}
        return self._wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            dir=str(start.directory),
            id=start.tracker_id,
            name=start.name or None,
            group=start.group,
            job_type=start.job_type,
            tags=[*start.tags],
            config={**start.config, **about},
            mode="online" if self._online else "offline",
            # A first attempt that is sent again replaces what is there.
            resume="allow" if self._resumed else None,
            settings=self._wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                host=NOT_RECORDED,
                username=NOT_RECORDED,
                disable_git=True,
                disable_code=True,
                init_timeout=INIT_S,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )

    @override
    def log(self, values: Numbers, step: int | None = None) -> None:
        # A run that was killed is resumed from its last saved state and repeats some steps: those
        # that were sent before are not sent again.
        kept = {CURVE + name: value for name, value in values.items() if value is not None}
        if step is None:
            self._run.log(kept)
        elif step > self._last_step:
            service_counts = self._resumed and self._online
            self._run.log({**kept, STEP: step}, step=None if service_counts else step)
            self._last_step = step
            os.pwrite(self._step_file, f"{step:<20}\n".encode(), 0)

    @override
    def summary(self, values: Numbers) -> None:
        self._run.summary.update(dict(values))

    @override
    def table(self, name: str, rows: Sequence[Row]) -> None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[row.get(column) for column in columns] for row in rows]
        stem = Path(name).stem
        content: dict[str, object] = {
            f"table/{stem}": self._wandb.Table(columns=columns, data=data, allow_mixed_types=True)
        }
        for column, logs in log_spectra(rows).items():
            content[f"histogram/{stem}/log10_{column}"] = self._wandb.Histogram(logs)
        self._run.log(content)

    @override
    def image(self, name: str, path: Path) -> None:
        self._run.log({f"figure/{name}": self._wandb.Image(str(path))})

    @override
    def artifact(self, name: str, path: Path, kind: str) -> None:
        artifact = self._wandb.Artifact(f"{self._start.tracker_id}-{name}", kind)
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    @override
    def finish(self, status: str) -> None:
        self._run.summary.update({"status": status})
        file = Path(self._run.settings.sync_file)
        self._run.finish(exit_code=0 if status == Status.COMPLETED else 1)
        # The file is only complete after this: `finish` does not wait for the service to close it,
        # and the service drops what it has not written when this process ends.
        self._wandb.teardown()
        if self._online:
            file.with_name(file.name + SENT).write_text(f"{file.stat().st_size}\n")


def log_spectra(rows: Sequence[Row]) -> dict[str, list[float]]:
    """The decimal logarithms of the positive values in each column of eigenvalues."""
    values = {
        column: [math.log10(row[column]) for row in rows if (row.get(column) or 0) > 0]
        for column in SPECTRUM
    }
    return {column: logs for column, logs in values.items() if logs}
