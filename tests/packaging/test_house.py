"""Rules of the house that a linter does not know."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import fisher_lab
from fisher_lab.config import paths
from tests.processes import python

ROOT = paths.root()
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
SAYS = re.compile(r"^_?(assert|check|expect|raises|fail)")

SOURCES = sorted(
    file for top in ("fisher_lab", "hydra_plugins") for file in (ROOT / top).rglob("*.py")
)
MAX_FILE, MAX_FUNCTION, MAX_CONTRACTS = 600, 45, 7
WORDS = {
    *("retreat", "crew", "team", "meeting", "led", "elsewhere"),
    *("endings", "forming", "told", "doors", "rooms"),
}
"""Words of a private language; the words to use instead are those of docs/architecture.md."""
SAME_NAME = {"Sink"}
"""Classes that several modules define: every tracker is found by that name."""
SAYS_NOTHING = re.compile(r"(Nothing|None|See :\w+:`[^`]*`( for what .*)?)\.?")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(file: Path) -> Iterator[Definition]:
    """The classes, functions and methods of a module."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, Definition):
            yield node


def where(file: Path, node: Definition) -> str:
    return f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function beside its docstring, and of a constructor beside its options too."""
    first = node.body[1:2] if ast.get_docstring(node) else node.body[:1]
    if not first:
        return 0
    head = 0 if node.name == "__init__" else node.body[0].lineno - node.lineno
    return head + (node.end_lineno or 0) - first[0].lineno + 1


def words_of(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def called(node: ast.AST) -> set[str]:
    names = set()
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            name = call.func
            names.add(name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", ""))
    return names


def asserts(node: ast.AST) -> bool:
    return any(isinstance(inner, ast.Assert) for inner in ast.walk(node))


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_test_asserts_and_none_sleeps(file: Path):
    tree = ast.parse(file.read_text())
    assert "sleep" not in called(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    saying = {node.name for node in functions if asserts(node)}
    saying |= {name for name in called(tree) if SAYS.match(name)}
    tests = [node for node in functions if node.name.startswith("test_")]
    assert [t.name for t in tests if t.name not in saying and not called(t) & saying] == []


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import fisher_lab", {"hydra"}),
        ("sys.argv[1:] = ['--help']; import fisher_lab.__main__", set()),
        ("from fisher_lab import cli; assert cli.main(['--help']) == 0", set()),
        ("from fisher_lab import cli; assert cli.main(['kfac.damping=-1']) == 2", set()),
        ("from fisher_lab import cli; assert cli.main(['table', '--help']) == 0", {"pandas"}),
        (
            "from fisher_lab.results import *; from fisher_lab.results import commands, paper",
            {"hydra", "omegaconf"},
        ),
    ],
)
def test_nothing_large_is_imported_for_nothing(code, absent):
    absent |= {"torch", "transformers", "wandb"}
    done = python("-c", f"import sys; {code}\nassert not {absent} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_the_public_names_can_be_imported_and_no_other():
    for name in fisher_lab.__all__:
        assert getattr(fisher_lab, name) is not None
        assert name in dir(fisher_lab)
    assert dir(fisher_lab) == sorted(fisher_lab.__all__)
    assert fisher_lab.results.load is importlib.import_module("fisher_lab.results.loading").load
    assert (ROOT / "fisher_lab" / "py.typed").is_file()
    with pytest.raises(AttributeError, match="has no attribute 'KFACNaturalGradiant'"):
        _ = fisher_lab.KFACNaturalGradiant


def test_the_layers_hold():
    """Who may import whom, as pyproject.toml says it."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert len(settings["contracts"]) <= MAX_CONTRACTS


def test_no_file_is_too_long_and_no_function_is_longer_than_a_screen():
    assert [file for file in SOURCES if file.read_text().count("\n") > MAX_FILE] == []
    long = [
        f"{where(file, node)}: {length(node)} lines"
        for file in SOURCES
        for node in definitions(file)
        if not isinstance(node, ast.ClassDef) and length(node) > MAX_FUNCTION
    ]
    assert long == []


def test_names_are_in_the_language_of_the_field():
    names = {(file, node.name) for file in SOURCES for node in definitions(file)}
    names |= {(file, file.stem) for file in SOURCES}
    wrong = [f"{file.relative_to(ROOT)}: {name}" for file, name in names if words_of(name) & WORDS]
    assert wrong == []


def test_every_docstring_says_something():
    empty = [
        where(file, node)
        for file in SOURCES
        for node in definitions(file)
        if SAYS_NOTHING.fullmatch(ast.get_docstring(node) or "")
    ]
    assert empty == []


def test_no_two_classes_have_the_same_name_and_one_module_at_most_uses_what_is_hydras_own():
    nodes = [node for file in SOURCES for node in definitions(file)]
    classes = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
    assert {name for name, count in classes.items() if count > 1} <= SAME_NAME
    users = {file.name for file in SOURCES if "hydra._internal" in file.read_text()}
    assert len(users) <= 1


def test_modules_that_were_moved_are_found_for_one_more_release():
    for old, new in fisher_lab._MOVED.items():
        sys.modules.pop(old, None)
        with pytest.warns(DeprecationWarning, match=f"{old}: now {new}"):
            module = importlib.import_module(old)
        for name in getattr(importlib.import_module(new), "__all__", ()):
            assert getattr(module, name) is getattr(importlib.import_module(new), name)
    merged = importlib.import_module("fisher_lab.curvature.groups.ranks").merged
    assert merged.__name__ == "merge_over_ranks"
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fisher_lab.never")
