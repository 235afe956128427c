"""Weights & Biases. Runs in the process of :mod:`fisher_lab.tracking.worker`.

Nothing that the library would find out by itself is recorded (command line, environment, host
metadata, git remote, console): a key or a token could be in it, and the run's own record says where
its numbers come from.
"""

from __future__ import annotations

import math
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fisher_lab.config.schema import TrackerConfig
from fisher_lab.tracking.base import Numbers, Say, Start

HOST = "https://api.wandb.ai"
INIT_S = 20.0
"""Seconds that the service may take to accept an online run; then the run is written offline."""
CURVE = "curve/"
"""Before the names of logged numbers, so that they do not run into those of the summary."""
STEP = CURVE + "step"
"""The step of the run, which charts go by. W&B's own is no use there: where a later attempt is sent
by ``wandb sync``, its steps are counted on from where the first one ended."""
SENT = ".sent"
"""After the name of a ``.wandb`` file: its size when it was sent (scripts/wandb_sync.sh)."""
SPECTRUM = ("eigenvalue", "eigenvalues")
"""Columns of which a histogram is drawn beside the table."""


def has_login(environ: Mapping[str, str]) -> bool:
    """Whether there are credentials for the service that the environment names."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL") or HOST).hostname or ""
    file = environ.get("NETRC") or os.path.expanduser("~/.netrc")
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def disabled(config: TrackerConfig, environ: Mapping[str, str]) -> bool:
    """Whether W&B is not to be used at all, by the configuration or else by the environment."""
    return (config.mode or environ.get("WANDB_MODE")) == "disabled"


def mode_of(config: TrackerConfig, environ: Mapping[str, str], say: Callable[[str], None]) -> str:
    """``online`` or ``offline``: as configured, else as the environment says, else by login.

    Args:
        config: the section ``tracker``; not :func:`disabled`.
        environ: ``WANDB_MODE`` is what the library takes it for, its older names too; a value that
            it does not know uploads nothing.
        say: is told why, where neither says so.
    """
    chosen = config.mode or environ.get("WANDB_MODE")
    if chosen:
        return "online" if chosen in ("online", "run", "shared") else "offline"
    if has_login(environ):
        return "online"
    say("there is no W&B login: the run is written offline (scripts/wandb_sync.sh sends it later)")
    return "offline"


def make(config: TrackerConfig, say: Say) -> WandbSink:
    """The sink."""
    return WandbSink(config, say)


class WandbSink:
    """One run of W&B.

    Args:
        config: the section ``tracker``.
        say: tells the run something.
    """

    def __init__(self, config: TrackerConfig, say: Say) -> None:
        self._config, self._say = config, say
        self._run: Any = None
        self._wandb: Any = None
        self._id = ""
        self._online = False
        self._later = False
        self._known: Last | None = None

    def start(self, start: Start) -> None:
        """Begin a run, or go on with the one of this name."""
        directory = start.directory
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):  # the library would take another one, and not say so
            raise PermissionError(f"{directory} cannot be written to")
        for variable, name in (("WANDB_DATA_DIR", "data"), ("WANDB_CACHE_DIR", "cache")):
            os.environ.setdefault(variable, str(directory / name))
        mode = mode_of(self._config, os.environ, self._say)
        import wandb

        self._wandb, self._id = wandb, start.tracker_id
        self._later = start.attempt > 1
        self._known = Last(directory / f"{start.tracker_id}.step", keep=self._later)
        self._begin(start, mode)
        self._run.define_metric(CURVE + "*", step_metric=STEP)

    def _begin(self, start: Start, mode: str) -> None:
        self._online = mode == "online"
        try:
            self._run = self._init(start, mode)
        except Exception as error:
            if mode != "online":
                raise
            self._say(f"{self._reason(error)}: the run is written offline", warning=True)
            # The service still holds the run that has timed out, and would refuse its id.
            self._wandb.teardown(exit_code=1)
            self._online = False
            self._run = self._init(start, "offline")

    def _reason(self, error: Exception) -> str:
        """Why a run cannot be online."""
        refused = isinstance(
            error, (self._wandb.UsageError, self._wandb.errors.AuthenticationError)
        )
        if not refused:
            return f"W&B does not answer ({type(error).__name__})"
        if not has_login(os.environ):
            return "there is no W&B login"
        lines = str(error).strip().splitlines()
        return f"W&B does not take the login ({lines[0] if lines else type(error).__name__})"

    def _init(self, start: Start, mode: str) -> Any:
        return self._wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            dir=str(start.directory),
            id=start.tracker_id,
            name=start.name or None,
            group=start.group,
            job_type=start.job_type,
            tags=[*start.tags],
            config={
                **start.config,
                "run_id": start.run_id,
                "attempt": start.attempt,
                "cell": start.cell,
            },
            mode=mode,
            # The first attempt has its id for itself; sent again, it replaces what is there.
            resume="allow" if self._later else None,
            settings=self._wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                disable_git=True,
                disable_code=True,
                init_timeout=INIT_S,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )

    def log(self, values: Numbers, step: int | None = None) -> None:
        """Numbers of a step, under ``curve/``; those that are not finite are left out.

        A run that was killed goes on at its last saved state and makes some steps again: those that
        were sent before are not sent twice.
        """
        kept = {CURVE + name: value for name, value in values.items() if value is not None}
        if step is None:
            self._run.log(kept)
            return
        assert self._known is not None
        if step <= self._known.step:
            return
        counted_on = self._later and self._online  # the service knows better where it is
        self._run.log({**kept, STEP: step}, step=None if counted_on else step)
        self._known.write(step)

    def summary(self, values: Numbers) -> None:
        """The metrics, under their own names."""
        self._run.summary.update(dict(values))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table, and a histogram of its eigenvalues where it has some."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[row.get(column) for column in columns] for row in rows]
        table = self._wandb.Table(columns=columns, data=data, allow_mixed_types=True)
        stem = Path(name).stem
        content: dict[str, Any] = {f"table/{stem}": table}
        for column in SPECTRUM:
            values = [row[column] for row in rows if row.get(column)]
            logs = [math.log10(value) for value in values if value > 0]
            if logs:
                content[f"histogram/{stem}/log10_{column}"] = self._wandb.Histogram(logs)
        self._run.log(content)

    def image(self, name: str, path: Path) -> None:
        """A picture."""
        self._run.log({f"figure/{name}": self._wandb.Image(str(path))})

    def artifact(self, name: str, path: Path, kind: str) -> None:
        """A file or directory, as an artifact of this run."""
        artifact = self._wandb.Artifact(f"{self._id}-{name}", kind)
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def finish(self, status: str) -> None:
        """End; every status but ``completed`` shows as failed."""
        self._run.summary.update({"status": status})
        file = Path(self._run.settings.sync_file)
        self._run.finish(exit_code=0 if status == "completed" else 1)
        # Only then is the file whole: `finish` does not wait for the service to have closed it, and
        # the service gives up what it has yet to write when this process ends.
        self._wandb.teardown()
        if self._online:
            file.with_name(file.name + SENT).write_text(f"{file.stat().st_size}\n")


class Last:
    """The last step that was handed on, kept in a file for the attempts that follow.

    Args:
        file: where; its directory exists.
        keep: whether what an earlier attempt has left counts.
    """

    def __init__(self, file: Path, *, keep: bool) -> None:
        self.step = -1
        if keep and file.exists():
            self.step = int(file.read_text() or -1)
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)

    def write(self, step: int) -> None:
        """Keep a step."""
        self.step = step
        os.pwrite(self._file, f"{step:<20}\n".encode(), 0)
