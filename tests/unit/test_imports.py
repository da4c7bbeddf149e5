"""The house's import rule: cli -> {slurm, worker, converters} -> core -> errors."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "aiflux_app" / "aiflux"
MAY_IMPORT = {
    "errors": set(),
    "core": {"errors", "core", ""},
    "slurm": {"errors", "core", "slurm", ""},
    "worker": {"errors", "core", "worker", ""},
    "converters": {"errors", "core", "converters", ""},
    "image": {"errors", "core", "image", ""},
    "cli": {"errors", "core", "slurm", "worker", "converters", "image", "cli", ""},
    "__init__": set(),
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides what is imported"
            yield node.module or ""


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    for name in imported(path):
        if name == "aiflux" or name.startswith("aiflux."):
            target = [*name.split("."), ""][1]
            assert target in MAY_IMPORT[room(path)], f"{path} imports {name}"


@pytest.mark.parametrize(
    ("module", "rooms"),
    [
        ("requests", {"worker"}),
        ("urllib3", {"worker"}),
        ("subprocess", {"slurm", "image", "worker", "cli"}),
        ("spython", {"image"}),
        ("rich", {"cli", "worker"}),
        ("yaml", {"core"}),
    ],
)
def test_edges_stay_in_their_rooms(module: str, rooms: set[str]) -> None:
    for path in MODULES:
        names = {name.split(".")[0] for name in imported(path)}
        assert module not in names or room(path) in rooms, f"{path} imports {module}"


@pytest.mark.parametrize("module", ["aiflux", "aiflux.slurm", "aiflux.core.config"])
def test_importing_does_nothing(module: str, tmp_path: Path) -> None:
    code = f"import {module}, sys; print(sorted(m for m in sys.modules if m in {{'requests'}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
