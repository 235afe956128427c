"""The entry points: the Hydra application behind ``python -m fisher_lab``, and the sub-commands.

Bad input ends here, in one line on standard error and exit code 2, before anything is written. A
run that fails ends in exit code 1 with one line that names its log; a signal in ``128 + signal``.

Two names of ``hydra._internal`` are used, and here alone: Hydra has no public way to parse its
flags (``get_args_parser``) or to call the user's callbacks (``Callbacks``).
"""

from __future__ import annotations

import argparse
import errno
import itertools
import os
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import fisher_lab
from fisher_lab.config import paths
from fisher_lab.config.errors import ConfigError
from fisher_lab.config.spelling import did_you_mean
from fisher_lab.results.labels import LabelError
from fisher_lab.runs import atomic

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hydra.core.config_loader import ConfigLoader
    from omegaconf import DictConfig

    from fisher_lab.config.schema import Config
    from fisher_lab.tasks.runner import RunOutcome

COMMANDS = {
    "cancel": "fisher_lab.sweeps.status:cancel",
    "capsule": "fisher_lab.results.capsule:capsule_command",
    "check": "fisher_lab.cli:check_command",
    "claims": "fisher_lab.results.commands:claims_command",
    "diff": "fisher_lab.results.commands:diff_command",
    "explain": "fisher_lab.tasks.explain:explain_command",
    "report": "fisher_lab.results.commands:report_command",
    "reproduce": "fisher_lab.sweeps.reproduce:reproduce_command",
    "status": "fisher_lab.sweeps.status:status",
    "table": "fisher_lab.results.commands:table_command",
    "verify": "fisher_lab.results.verify:verify_command",
    "work": "fisher_lab.sweeps.work:work_command",
}
"""Sub-command -> the function that takes the arguments after its name and returns the exit code.
``config/help.py`` says what each does."""

AGAIN = ("decide", "register")
"""Sub-commands that stand for a multirun (`sweeps/again.py`)."""

OK, FAILED, BAD_INPUT = 0, 1, 2

OF_THE_DISK = (
    *atomic.DISK_ERRORS, errno.EACCES, errno.EISDIR, errno.ELOOP, errno.EMFILE,
    errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EPERM,
)  # fmt: skip
"""What is wrong with a disk or a folder, and not with the program: one line says it."""
CONFIG_NAME = "config"
VERBOSE_FLAG = "--verbose"
VERSION_BASE = "1.3"


def entry() -> NoReturn:
    """The console script."""
    from fisher_lab.runs import screen

    screen.install()
    code = main(sys.argv[1:])
    if (problem := screen.problem()) is not None:
        print(f"fisher_lab: {problem}", file=sys.stderr)
        code = code or FAILED
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Run the application.

    Args:
        argv: the arguments after the program's name.

    Returns:
        The exit code: 0, 1 where a run failed, 2 for bad input, ``128 + signal``.
    """
    from fisher_lab.runs.signals import Interrupted

    try:
        if argv and argv[0] in AGAIN:
            from fisher_lab.sweeps import again

            argv = again.command_line(argv[0], argv[1:])
        if argv and argv[0] in COMMANDS:
            module, _, function = COMMANDS[argv[0]].partition(":")
            return getattr(import_module(module), function)(argv[1:])
        if "--version" in argv:
            print(f"fisher_lab {fisher_lab.__version__}")
            return OK
        _check_command(argv)
        return _application(_parse(argv), [word for word in argv if word != VERBOSE_FLAG])
    except (ConfigError, LabelError) as error:
        print(f"fisher_lab: {error}", file=sys.stderr)
        return BAD_INPUT
    except Interrupted as stop:
        return 128 + stop.signum
    except Exception as error:
        if (line := _of_the_disk(error)) is None:
            raise
        print(f"fisher_lab: {line}", file=sys.stderr)
        return BAD_INPUT


def _of_the_disk(error: BaseException | None) -> str | None:
    """What was wrong with a disk or a folder, in one line; None where an error is of another kind.

    Logging, for one, raises another error from that of the file that it could not open.
    """
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    if error is None or error.errno not in OF_THE_DISK:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}"


def _check_command(argv: Sequence[str]) -> None:
    """Refuse a first word that is neither a sub-command, a flag nor an override."""
    if argv and argv[0].isalpha():
        near = did_you_mean(argv[0], list(COMMANDS)) or f"there are {', '.join(COMMANDS)}"
        raise ConfigError(
            f"{argv[0]}: there is no such command; {near} (a key is set as key=value)"
        )


# ---- flags ---------------------------------------------------------------------------------------


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from hydra._internal.utils import get_args_parser

    def fail(message: str) -> NoReturn:
        raise ConfigError(f"{message}; python -m fisher_lab --help shows what is allowed")

    parser = get_args_parser()
    parser.error = fail
    parser.add_argument(VERBOSE_FLAG, action="store_true")
    args = parser.parse_intermixed_args(list(argv))
    if args.verbose:
        os.environ["FISHER_LAB_VERBOSE"] = "1"  # which ranks and cells inherit
    if args.experimental_rerun is not None:
        allowed = "it unpickles a file; give the overrides of the run's run.json instead"
        raise ConfigError(f"--experimental-rerun is not allowed: {allowed}")
    modes = {
        "--run": args.run,
        "--multirun": args.multirun,
        "--cfg": args.cfg is not None,
        "--info": args.info is not None,
        "--shell-completion": args.shell_completion,
    }
    given = [flag for flag, on in modes.items() if on]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} together are not allowed: give one of them")
    if args.resolve and args.cfg is None and not args.help:
        raise ConfigError("--resolve alone is not allowed: it goes with --cfg or --help")
    for flag, folder in (("--config-dir", args.config_dir), ("--config-path", args.config_path)):
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"{flag} {folder}: there is no such directory")
    args.config_name = args.config_name or CONFIG_NAME
    return args


def _application(args: argparse.Namespace, argv: Sequence[str]) -> int:
    from fisher_lab.config import compose

    with config_loader(args) as loader:
        if args.help:
            from fisher_lab.config import help as page

            cfg = compose.load(loader, args.overrides, name=args.config_name)
            print(page.text(cfg, resolve=args.resolve))
            return OK
        if not (args.hydra_help or args.shell_completion or args.cfg or args.info):
            return _run_or_sweep(args, loader)
        if args.overrides and not args.shell_completion:
            compose.load(loader, args.overrides, name=args.config_name)
    return _hydra_flag(argv)


@contextmanager
def config_loader(args: argparse.Namespace) -> Iterator[ConfigLoader]:
    """Hydra's configuration loader, with the configuration of this project.

    Args:
        args: of the command line; ``config_path`` and ``config_dir`` are read.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    folder = paths.conf()
    if args.config_path:
        from fisher_lab.config import sweep_files

        folder = Path(args.config_path).resolve()
        sweep_files.register()  # the search-path plugin does so for our own folder alone
    GlobalHydra.instance().clear()
    with paths.further(args.config_dir):
        initialize_config_dir(str(folder), job_name="fisher_lab", version_base=VERSION_BASE)
        try:
            yield GlobalHydra.instance().config_loader()
        finally:
            GlobalHydra.instance().clear()


def _hydra_flag(argv: Sequence[str]) -> int:
    """``--cfg``, ``--info`` and their like: Hydra's own, once the overrides were checked."""
    import hydra

    program = hydra.main(
        version_base=VERSION_BASE, config_path=str(paths.conf()), config_name=CONFIG_NAME
    )(_never)
    before = sys.argv
    # Hydra takes the name of the program and the arguments from here, and overrides in one piece.
    overrides_last = sorted(argv, key=lambda text: "=" in text and not text.startswith("-"))
    sys.argv = [before[0], *overrides_last]
    try:
        program()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else OK
    finally:
        sys.argv = before
    return OK


def _never(cfg: DictConfig) -> None:
    raise AssertionError("Hydra's flags do not run a task")


def check_command(arguments: Sequence[str]) -> int:
    """Run ``fisher-lab check``; returns the exit code.

    Raises:
        ConfigError: no such model or text, or an override that is not allowed.
    """
    parser = argparse.ArgumentParser(
        "fisher-lab check", description="What K-FAC makes of a model of your own, in a minute."
    )

    def fail(message: str) -> NoReturn:
        raise ConfigError(f"{message}; {parser.prog} --help shows what is allowed")

    parser.error = fail
    parser.add_argument("model", help="a directory of save_pretrained, or a name on the hub")
    parser.add_argument("--data", metavar="FILE", help="a text; by default Python's documentation")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for a run")
    args = parser.parse_intermixed_args(list(arguments))
    overrides = ["model=pretrained", f"model.name_or_path={args.model}"]
    overrides += ["data=text_file", f"data.path={args.data}"] if args.data else []
    from fisher_lab.config import compose
    from fisher_lab.config.validate import validate

    small = ["data.batch_size=4", "data.seq_len=64", "task=analyze"]
    with config_loader(_parse([])) as loader:
        config = validate(compose.load(loader, [*small, *overrides, *args.overrides]))
    from fisher_lab.curvature.errors import CurvatureError
    from fisher_lab.tasks import check

    try:
        print(check.report(config, [*overrides, *args.overrides]))
    except CurvatureError as error:
        print(f"fisher_lab: {args.model}: {error}", file=sys.stderr)
        return FAILED
    return OK


# ---- a run, a sweep ------------------------------------------------------------------------------


def _run_or_sweep(args: argparse.Namespace, loader: ConfigLoader) -> int:
    from hydra.types import RunMode

    from fisher_lab.config import compose

    multirun = args.multirun
    if multirun:
        compose.requested(args.overrides)  # +sweeps=a,b has a message of its own
    cfg = compose.load(loader, args.overrides, name=args.config_name, multirun=multirun)
    if cfg.hydra.mode == RunMode.MULTIRUN and not multirun:
        multirun = True
        cfg = compose.load(loader, args.overrides, name=args.config_name, multirun=True)
    return (_sweep if multirun else _run)(loader, cfg)


def _run(loader: ConfigLoader, cfg: DictConfig) -> int:
    from fisher_lab.config.validate import validate
    from fisher_lab.distributed.nodes import NodeError
    from fisher_lab.tasks import preflight, ranks

    config = validate(cfg)
    _check_single(cfg, config)
    preflight.check_nodes(config)
    preflight.preflight(config)
    try:
        with ranks.of_one_run(config, cfg, lambda: make_run_directory(cfg)):
            if _run_job(loader, cfg) != OK:
                raise _RunFailed  # a rank under torchrun leaves without waiting for the others
            return OK
    except _RunFailed:
        return FAILED
    except NodeError as error:
        print(f"fisher_lab: {error}", file=sys.stderr)
        return FAILED


class _RunFailed(Exception):
    """The run's record says why."""


def _check_single(cfg: DictConfig, config: Config) -> None:
    """Refuse what only a sweep understands, rather than run something else than was meant."""
    from fisher_lab.config import compose

    names, _ = compose.requested(list(cfg.hydra.overrides.task))
    if names:
        raise ConfigError(f"+sweeps={','.join(names)} names a sweep: add -m to run it")
    for key in ("dry_run", "detach", "register"):
        if getattr(config.sweep, key):
            raise ConfigError(f"sweep.{key}=true is for sweeps: add -m, with values to sweep over")


def make_run_directory(cfg: DictConfig) -> Path:
    """Make the directory of a run, and write it into the configuration.

    The default is named after the second: where another process took that name, ``-2``, ``-3`` and
    so on is appended. A directory that the user named is used as it is.

    Args:
        cfg: the composed configuration; ``hydra.run.dir`` is set in it.

    Returns:
        The directory, which exists now.
    """
    wanted = Path(str(cfg.hydra.run.dir))
    if any(text.lstrip("+").startswith("hydra.run.dir=") for text in cfg.hydra.overrides.hydra):
        wanted.mkdir(parents=True, exist_ok=True)
        return wanted
    wanted.parent.mkdir(parents=True, exist_ok=True)
    directory = wanted
    for number in itertools.count(2):
        try:
            directory.mkdir()
            break
        except FileExistsError:
            directory = wanted.with_name(f"{wanted.name}-{number}")
    cfg.hydra.run.dir = str(directory)
    return directory


def _run_job(loader: ConfigLoader, cfg: DictConfig) -> int:
    from hydra._internal.callbacks import Callbacks
    from hydra.core.utils import env_override, run_job
    from hydra.types import HydraContext, RunMode

    cfg.hydra.mode = RunMode.RUN
    callbacks = Callbacks(cfg)
    callbacks.on_run_start(config=cfg, config_name=cfg.hydra.job.config_name)
    outcomes: list[RunOutcome] = []

    def task(task_cfg: DictConfig) -> None:
        from fisher_lab.tasks import runner

        outcomes.append(runner.execute(task_cfg))

    with env_override(_take_environment(cfg)):
        result = run_job(
            hydra_context=HydraContext(config_loader=loader, callbacks=callbacks),
            task_function=task,
            config=cfg,
            job_dir_key="hydra.run.dir",
            job_subdir_key=None,
        )
    callbacks.on_run_end(config=cfg, config_name=cfg.hydra.job.config_name, job_return=result)
    if not outcomes:
        _ = result.return_value  # raises what kept the run from being recorded at all
    return outcomes[0].report()


def _take_environment(cfg: DictConfig) -> dict[str, str]:
    """What ``hydra.job.env_set`` asks for, taken out: Hydra writes the rest down, in ``.hydra``.

    A key or a token is what such a variable often holds.
    """
    from omegaconf import OmegaConf, open_dict

    variables: Any = OmegaConf.to_container(cfg.hydra.job.env_set, resolve=True)
    with open_dict(cfg.hydra):
        cfg.hydra.job.env_set = {}
        cfg.hydra.overrides.hydra = [
            f"{text.partition('=')[0]}=(not recorded)" if "hydra.job.env_set" in text else text
            for text in cfg.hydra.overrides.hydra
        ]
    return {str(name): str(value) for name, value in variables.items()}


def _sweep(loader: ConfigLoader, cfg: DictConfig) -> int:
    from hydra._internal.callbacks import Callbacks
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode
    from omegaconf import OmegaConf

    from fisher_lab.distributed import launch

    if launch.inside():
        raise ConfigError(
            "--multirun under torchrun is not allowed: start the sweep plainly, with "
            "distributed.nproc=N every cell starts its own ranks"
        )
    cfg.hydra.mode = RunMode.MULTIRUN
    callbacks = Callbacks(cfg)
    callbacks.on_multirun_start(config=cfg, config_name=cfg.hydra.job.config_name)
    sweeper = Plugins.instance().instantiate_sweeper(
        config=cfg,
        hydra_context=HydraContext(config_loader=loader, callbacks=callbacks),
        task_function=_never,
    )
    overrides: Any = OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)
    code = sweeper.sweep(arguments=overrides)
    callbacks.on_multirun_end(config=cfg, config_name=cfg.hydra.job.config_name)
    return code
