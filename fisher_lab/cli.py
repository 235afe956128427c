"""The doors: the Hydra application behind ``python -m fisher_lab`` and ``fisher-lab``.

Bad input ends here, in one line on standard error and exit code 2, before anything is written. A
run that fails ends in exit code 1 with one line that names its log; a signal in ``128 + signal``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fisher_lab.config import paths
from fisher_lab.config.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hydra._internal.hydra import Hydra
    from omegaconf import DictConfig

    from fisher_lab.config.schema import Config
    from fisher_lab.tasks.runner import Outcome

COMMANDS = {
    "cancel": "fisher_lab.sweeps.commands:cancel",
    "claims": "fisher_lab.results.commands:claims_command",
    "diff": "fisher_lab.results.commands:diff_command",
    "report": "fisher_lab.results.commands:report_command",
    "status": "fisher_lab.sweeps.commands:status",
    "table": "fisher_lab.results.commands:table_command",
}
"""Sub-command -> the function that takes the arguments after its name and returns the exit code."""

OK, FAILED, BAD_INPUT = 0, 1, 2
CONFIG_NAME = "config"
VERSION_BASE = "1.3"


def entry() -> NoReturn:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run the application.

    Args:
        argv: the arguments after the program's name.

    Returns:
        The exit code: 0, 1 where a run failed, 2 for bad input, ``128 + signal``.
    """
    from fisher_lab.runs.signals import Interrupted

    try:
        if argv and argv[0] in COMMANDS:
            return _command(argv[0])(argv[1:])
        return _application(_parse(argv), argv)
    except ConfigError as error:
        print(f"fisher_lab: {error}", file=sys.stderr)
        return BAD_INPUT
    except Interrupted as stop:
        return 128 + stop.signum


def _command(name: str) -> Callable[[Sequence[str]], int]:
    module, _, function = COMMANDS[name].partition(":")
    return getattr(import_module(module), function)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from hydra._internal.utils import get_args_parser

    from fisher_lab.runs.arguments import raise_errors

    parser = get_args_parser()
    raise_errors(
        parser,
        lambda text: ConfigError(f"{text}; python -m fisher_lab --help shows what is allowed"),
    )
    args = parser.parse_intermixed_args(list(argv))
    if args.experimental_rerun is not None:
        raise ConfigError(
            "--experimental-rerun is not allowed: it unpickles a file; give the overrides of "
            "the run's run.json instead"
        )
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
    return args


def _application(args: argparse.Namespace, argv: Sequence[str]) -> int:
    if args.help:
        return _help(args)
    if args.hydra_help or args.shell_completion or args.cfg or args.info:
        return _hydra_flag(args, argv)
    from hydra.types import RunMode

    from fisher_lab.config import compose

    with _hydra(args) as hydra:
        name = args.config_name or CONFIG_NAME
        multirun = args.multirun
        if multirun:
            compose.requested(args.overrides)  # +sweeps=a,b has a message of its own
        cfg = compose.load(hydra.config_loader, args.overrides, name=name, multirun=multirun)
        if cfg.hydra.mode == RunMode.MULTIRUN and not multirun:
            multirun = True
            cfg = compose.load(hydra.config_loader, args.overrides, name=name, multirun=True)
        return (_sweep if multirun else _run)(hydra, cfg)


@contextmanager
def _hydra(args: argparse.Namespace) -> Iterator[Hydra]:
    """Hydra with our search path, as ``hydra.main`` sets it up."""
    from hydra import version
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra

    from fisher_lab.config import sweep_files

    version.setbase(VERSION_BASE)
    sweep_files.register()
    path = Path(args.config_path).resolve() if args.config_path else paths.conf()
    search_path = create_config_search_path(str(path))
    if args.config_dir is not None:
        search_path.prepend(
            provider="command-line",
            path=f"file://{Path(args.config_dir).resolve()}",
            anchor=SearchPathQuery(provider="schema"),
        )
    GlobalHydra.instance().clear()
    try:
        yield Hydra.create_main_hydra2("fisher_lab", search_path)
    finally:
        GlobalHydra.instance().clear()


def _help(args: argparse.Namespace) -> int:
    from fisher_lab.config import compose
    from fisher_lab.config import help as page

    with _hydra(args) as hydra:
        name = args.config_name or CONFIG_NAME
        cfg = compose.load(hydra.config_loader, args.overrides, name=name)
    print(page.text(cfg, resolve=args.resolve))
    return OK


def _hydra_flag(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """``--cfg``, ``--info`` and their like: Hydra's own, once the overrides were checked."""
    import hydra

    from fisher_lab.config import compose

    if args.overrides and not args.shell_completion:
        with _hydra(args) as instance:
            name = args.config_name or CONFIG_NAME
            compose.load(instance.config_loader, args.overrides, name=name)
    program = hydra.main(
        version_base=VERSION_BASE, config_path=str(paths.conf()), config_name=CONFIG_NAME
    )(_never)
    before = sys.argv
    # Hydra takes the name of the program and the arguments from here, flags before overrides.
    sys.argv = [before[0], *_flags_first(argv)]
    try:
        program()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else OK
    finally:
        sys.argv = before
    return OK


def _never(cfg: DictConfig) -> None:
    raise AssertionError("Hydra's flags do not run a task")


def _flags_first(argv: Sequence[str]) -> list[str]:
    """Overrides at the end: Hydra's parser wants them in one piece."""
    return sorted(argv, key=lambda text: "=" in text and not text.startswith("-"))


def preflight(config: Config) -> Mapping[str, Any]:
    """What can be known to fail before a directory is made or a model is built.

    Returns:
        The hashes of text and model, part of the run's identity.

    Raises:
        ConfigError: a device that this machine does not have; a text or a model that does not
            exist; a tracker whose package is missing.
    """
    from fisher_lab import tracking
    from fisher_lab.workload.content_identity import content_identity

    tracking.check(config.tracker)
    content = content_identity(config)
    _preflight_ranks(config)
    _preflight_devices(config)
    return content


def _preflight_devices(config: Config) -> None:
    """A CUDA device that is asked for by name is there."""
    asked = {"device": config.device}
    if config.task.name == "analyze" and config.spectral.enabled:
        asked["spectral.eigensolve_device"] = config.spectral.eigensolve_device
    if config.task.name == "analyze" and config.lanczos.enabled:
        asked["lanczos.vector_device"] = config.lanczos.vector_device
    if "cuda" not in asked.values():
        return
    import torch

    if torch.cuda.is_available():
        return
    for key, value in asked.items():
        if value == "cuda":
            raise ConfigError.value(key, value, "auto or cpu on a machine without a CUDA device")


def _check_nodes(config: Config) -> None:
    """The environment names the nodes (where a sweep is submitted, it does not yet)."""
    import os

    from fisher_lab.distributed import launch

    d = config.distributed
    try:
        launch.place(d.nproc, d.nodes, os.environ)
    except launch.LaunchError as error:
        raise ConfigError(str(error)) from None


def _preflight_ranks(config: Config) -> None:
    """There is a CUDA device for each rank."""
    d = config.distributed
    if d.nproc == 1 or config.device == "cpu" or d.backend == "gloo":
        return
    import torch

    found = torch.cuda.device_count()
    if d.nproc > found and (found or config.device == "cuda"):
        raise ConfigError.value(
            "distributed.nproc", d.nproc, f"at most {found}, the CUDA devices of this machine"
        )


def claim_directory(cfg: DictConfig) -> Path:
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


def _run(hydra: Hydra, cfg: DictConfig) -> int:
    from fisher_lab.config.validate import validate
    from fisher_lab.distributed.nodes import NodeError
    from fisher_lab.tasks import ranks

    config = validate(cfg)
    _check_single(cfg, config)
    _check_nodes(config)
    preflight(config)
    try:
        with ranks.of_one_run(config, cfg, lambda: claim_directory(cfg)):
            code = _run_job(hydra, cfg)
            if code != OK:
                raise ranks.RunFailed(code)  # a rank must not wait for others: it has failed
            return code
    except ranks.RunFailed as failed:
        return failed.code
    except NodeError as error:
        print(f"fisher_lab: {error}", file=sys.stderr)
        return FAILED


def _run_job(hydra: Hydra, cfg: DictConfig) -> int:
    from hydra._internal.callbacks import Callbacks
    from hydra.core.utils import env_override, run_job
    from hydra.types import HydraContext, RunMode

    cfg.hydra.mode = RunMode.RUN
    callbacks = Callbacks(cfg)
    callbacks.on_run_start(config=cfg, config_name=cfg.hydra.job.config_name)
    outcomes: list[Outcome] = []

    def task(task_cfg: DictConfig) -> None:
        from fisher_lab.tasks import runner

        outcomes.append(runner.execute(task_cfg))

    with env_override(_take_environment(cfg)):
        result = run_job(
            hydra_context=HydraContext(config_loader=hydra.config_loader, callbacks=callbacks),
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


def _check_single(cfg: DictConfig, config: Config) -> None:
    """Refuse what only a sweep understands, rather than run something else than was meant."""
    from fisher_lab.config import compose

    names, _ = compose.requested(list(cfg.hydra.overrides.task))
    if names:
        raise ConfigError(f"+sweeps={','.join(names)} names a sweep: add -m to run it")
    for key, on in (("dry_run", config.sweep.dry_run), ("detach", config.sweep.detach)):
        if on:
            raise ConfigError(f"sweep.{key}=true is for sweeps: add -m, with values to sweep over")


def _sweep(hydra: Hydra, cfg: DictConfig) -> int:
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
        hydra_context=HydraContext(config_loader=hydra.config_loader, callbacks=callbacks),
        task_function=_never,
    )
    overrides: Any = OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)
    code = sweeper.sweep(arguments=overrides)
    callbacks.on_multirun_end(config=cfg, config_name=cfg.hydra.job.config_name)
    return code
