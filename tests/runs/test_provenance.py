"""Where a result comes from, and nothing that is secret."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fisher_lab.runs import provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.check_output(command, text=True, timeout=30).strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    package = tmp_path / "repository" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(package.parent, "init", "-q")
    git(package.parent, "add", "package")
    git(package.parent, "commit", "-q", "-m", "first")
    return package


def test_commit_and_dirtiness(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    assert provenance.git(checkout) == {"commit": commit, "dirty": False}
    (checkout / "new.py").write_text("")  # untracked: nothing imports it
    assert provenance.git(checkout)["dirty"] is False
    (checkout / "__init__.py").write_text("x = 1\n")
    assert provenance.git(checkout) == {"commit": commit, "dirty": True}


def test_a_package_inside_another_repository_or_without_git_has_no_commit(
    checkout, monkeypatch, tmp_path
):
    nothing = {"commit": None, "dirty": None}
    installed = checkout.parent / "venv" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert provenance.git(installed) == nothing
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert provenance.git(checkout) == nothing


def test_versions_and_host_and_nothing_of_the_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a-very-secret-key")
    found = provenance.collect()
    text = json.dumps(found)
    assert json.loads(text) == found
    assert "a-very-secret-key" not in text
    assert "WANDB_API_KEY" not in text
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["hydra-core"].startswith("1.3.")
    assert found["host"]["cpus"] >= found["host"]["cpus_allowed"] >= 1
    assert found["host"]["memory_mb"] > 100


def test_commit_and_versions_are_looked_up_once_a_process(monkeypatch):
    looked: list[str] = []
    monkeypatch.setattr(provenance, "git", lambda _: looked.append("git") or {"commit": "abc"})
    provenance._code.cache_clear()
    first = provenance.collect()
    first["git"]["commit"] = "changed by whoever got it"
    assert provenance.collect()["git"] == {"commit": "abc"}
    assert looked == ["git"]
    provenance._code.cache_clear()


def test_a_machine_is_described_without_its_name():
    host, machine = provenance.host(), provenance.machine()
    assert (machine["processor"], machine["cores"]) == (host["cpu"], host["cpus"])
    assert machine["memory_gib"] * 1024 == pytest.approx(host["memory_mb"], abs=52)  # 0.05 GiB
    assert not {"name", "pid"} & machine.keys()
    assert set(machine) == {"processor", "cores", "memory_gib", "system", "python"}


def test_the_code_is_its_commit_and_what_differs_from_it(checkout):
    commit = git(checkout, "rev-parse", "HEAD")[:12]
    assert provenance.code(checkout)["code"] == commit
    (checkout / "__pycache__").mkdir()
    (checkout.parent / "notes.txt").write_text("beside the package")
    assert provenance.code(checkout)["code"] == commit
    (checkout / "new.py").write_text("x = 1\n")
    one = provenance.code(checkout)["code"]
    (checkout / "new.py").write_text("x = 2\n")
    two = provenance.code(checkout)["code"]
    assert one.startswith(f"{commit}+")
    assert two.startswith(f"{commit}+")
    assert one != two
    git(checkout, "add", "new.py")
    assert provenance.code(checkout)["code"] == two


def test_the_code_of_an_installed_package_is_its_version_and_content(tmp_path):
    found = []
    for text in ("x = 1\n", "x = 2\n", "x = 1\n"):
        (tmp_path / "package").mkdir(exist_ok=True)
        (tmp_path / "package" / "__init__.py").write_text(text)
        found.append(provenance.code(tmp_path / "package"))
    assert found[0] == found[2] != found[1]
    assert "+" in found[0]["code"]
    assert found[0]["git"] == {"commit": None, "dirty": None}


def test_variables_of_gits_own_hooks_do_not_change_the_commit(checkout, monkeypatch, tmp_path):
    git(tmp_path, "init", "-q", "another")
    found = provenance.git(checkout)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another" / ".git"))
    assert provenance.git(checkout) == found
