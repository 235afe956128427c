"""Rules of the house that a linter does not know."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fisher_lab.config import paths

ROOT = paths.root()
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
SAYS = re.compile(r"^_?(assert|check|expect|raises|fail)")


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


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
    helpers = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and asserts(node)
    }
    idle = [
        test.name
        for test in functions(tree)
        if not asserts(test)
        and not any(name in helpers or SAYS.match(name) for name in called(test))
    ]
    assert idle == []


def test_importing_the_package_is_quick():
    """Under two seconds with room to spare: no numerical library is imported."""
    script = "import fisher_lab, sys; print('torch' in sys.modules, 'hydra' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_the_public_names_can_be_imported():
    import fisher_lab

    for name in fisher_lab.__all__:
        assert getattr(fisher_lab, name) is not None
        assert name in dir(fisher_lab)


def test_a_name_that_is_not_there():
    import fisher_lab

    with pytest.raises(AttributeError, match="has no attribute 'KFACNaturalGradiant'"):
        _ = fisher_lab.KFACNaturalGradiant


def test_the_layers_hold():
    """Who may import whom, as pyproject.toml says it."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout
