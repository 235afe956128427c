"""The wheel: only our two packages land, and the console script works from anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from fisher_lab.config import paths

pytestmark = [pytest.mark.wheel, pytest.mark.xdist_group("wheel")]

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by pip from the checkout, with the build tools that are installed: no network."""
    folder = tmp_path_factory.mktemp("wheel")
    offline = ("--no-deps", "--no-build-isolation")
    done = run(*PIP, "wheel", *offline, "-w", str(folder), str(paths.root()), cwd=folder)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with nothing but the wheel in it; what it needs comes by a path."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    made = run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder.parent)
    assert made.returncode == 0, made.stderr
    python = folder / "bin" / "python"
    command = (*PIP, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    done = run(*command, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def site(environment: Path) -> Path:
    (folder,) = environment.glob("lib/python*/site-packages")
    return folder


def test_nothing_else_lands(site):
    names = {entry.name for entry in site.iterdir() if not entry.name.endswith(".dist-info")}
    assert names == {"fisher_lab", "hydra_plugins"}
    assert not (site / "hydra_plugins" / "__init__.py").exists()  # shared with other plugins


def test_configuration_and_sweeps_travel_inside(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, source in (("conf", paths.conf()), ("conf_sweeps", paths.sweeps())):
        for file in source.rglob("*.yaml"):
            assert f"fisher_lab/{folder}/{file.relative_to(source).as_posix()}" in names
    assert not [name for name in names if name.startswith(("tests", "docs", "conf", "benchmarks"))]


@pytest.fixture
def other_directory(tmp_path: Path) -> Path:
    folder = tmp_path / "other_directory"
    folder.mkdir()
    return folder


@pytest.fixture
def installed(environment: Path, other_directory: Path, tmp_path: Path):
    """Run a program of the environment in another directory.

    It has the installed dependencies, but not the checkout: links to all but our own packages.
    """
    folder = tmp_path / "dependencies"
    folder.mkdir()
    ours = ("fisher_lab", "_editable_impl_fisher_lab", "__editable__")
    for entry in Path(yaml.__file__).parents[1].iterdir():
        if not entry.name.startswith(ours) and entry.name != "hydra_plugins":
            (folder / entry.name).symlink_to(entry)
    needs = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}

    def call(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(str(environment / "bin" / program), *arguments, cwd=other_directory, **needs)

    return call


def test_the_console_script_works_from_another_directory(installed, site, other_directory):
    shown = installed("fisher-lab", "--cfg", "job", "kfac/policy=hybrid")
    assert shown.returncode == 0, shown.stderr
    assert yaml.safe_load(shown.stdout)["kfac"]["policy"] == "hybrid"
    where = installed("python", "-c", "import fisher_lab; print(fisher_lab.__file__)")
    assert Path(where.stdout.strip()) == site / "fisher_lab" / "__init__.py"
    helped = installed("fisher-lab", "--help")
    assert "sweeps: appendix, appendix_full, damping" in helped.stdout
    sweep = installed("fisher-lab", "-m", "+sweeps=damping", "seed=0", "sweep.dry_run=true")
    assert sweep.returncode == 0, sweep.stderr
    assert "10 cells: 10 to run" in sweep.stdout
    bad = installed("fisher-lab", "kfac.damping=-1")
    assert (bad.returncode, len(bad.stderr.splitlines())) == (2, 1)
    assert list(other_directory.iterdir()) == []


def test_a_run_by_the_console_script(installed, other_directory):
    """A training of two steps: through workload, record and summary."""
    small = ["model.layers=1", "model.width=16", "model.heads=2", "data.seq_len=16"]
    training = ["train.steps=2", "train.seq_len=16", "train.batch_size=2", "hydra.run.dir=here"]
    done = installed("fisher-lab", "task=train", *small, *training)
    assert done.returncode == 0, done.stderr
    assert (other_directory / "here" / "run.json").is_file()
    assert "run directory" in done.stdout
