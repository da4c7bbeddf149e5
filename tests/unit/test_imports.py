"""The import rule: the table of docs/structure.md, and which libraries each package may use."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PACKAGE = Path(__file__).parents[2] / "aiflux_app" / "aiflux"
# A package can import the packages below it; packages on one line never import each other.
LAYERS = (
    ("cli",),
    ("gateway",),
    ("api",),
    ("doctor",),
    ("slurm", "report", "worker", "bundle"),
    ("engines", "estimates", "image", "converters"),
    ("core.runs",),
    ("core.config", "core.batch"),
    ("models",),
    ("util",),
    ("errors",),
)
LEVELS = {package: level for level, layer in enumerate(LAYERS) for package in layer}
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = {
    ".".join(("aiflux", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in MODULES
}
MOST_IN_A_FOLDER = 25


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides what is imported"
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            # `from aiflux.image import base` imports the module `aiflux.image.base`.
            yield from names & NAMES or {module}


def package_of(dotted: str) -> str | None:
    """Return the package of the table that a module belongs to; None for `aiflux` itself."""
    parts = dotted.split(".")
    return next((name for name in (".".join(parts[:2]), parts[0]) if name in LEVELS), None)


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def test_every_module_is_in_a_package_of_the_table() -> None:
    outside = {dotted(path) for path in MODULES if package_of(dotted(path)) is None}
    assert outside == {"__init__", "core.__init__"}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_run_one_way(path: Path) -> None:
    own = package_of(dotted(path))
    if dotted(path) == "__init__":  # its names are imported when they are used
        own = "api"
    for name in imported(path):
        other = package_of(name.removeprefix("aiflux.")) if name.startswith("aiflux.") else None
        if other is not None and other != own:
            assert own is not None, f"{path} imports {name}"
            assert LEVELS[own] < LEVELS[other], f"{path} imports {name}"


def test_no_package_imports_in_a_circle() -> None:
    """A circle between modules would show only where somebody imports them in another order."""
    edges = {dotted(path).removesuffix(".__init__"): set(imported(path)) for path in MODULES}
    inside = {
        name: {one.removeprefix("aiflux.") for one in names if one.startswith("aiflux.")} & {*edges}
        for name, names in edges.items()
    }
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in sorted(inside[name] - {name}):
                walk(other, (*above, name))
            done.add(name)

    for name in sorted(inside):
        walk(name, ())


@pytest.mark.parametrize(
    ("module", "packages"),
    [
        ("requests", {"engines"}),
        ("urllib3", {"engines"}),
        ("urllib.request", {"image"}),
        (
            "subprocess",
            {
                *("slurm", "image", "worker", "engines", "doctor", "bundle", "api", "gateway"),
                *("cli", "converters"),  # converters: pandoc
            },
        ),
        ("spython", {"image"}),
        ("rich", {"cli", "api", "worker"}),
        ("click", {"cli"}),
        ("rich_click", {"cli"}),
        ("argparse", {"worker", "bundle"}),
        ("jinja2", {"report", "converters"}),
        ("starlette", {"gateway"}),
        ("uvicorn", {"gateway"}),
        ("python_multipart", {"gateway"}),
        ("yaml", {"util", "models"}),
    ],
)
def test_libraries_stay_in_their_packages(module: str, packages: set[str]) -> None:
    for path in MODULES:
        names = {*imported(path)}
        used = module in names or any(name.startswith(f"{module}.") for name in names)
        assert not used or package_of(dotted(path)) in packages, f"{path} imports {module}"


def test_no_folder_is_crowded() -> None:
    count: dict[Path, int] = defaultdict(int)
    for path in MODULES:
        count[path.parent] += path.stem != "__init__"
    assert {folder: n for folder, n in count.items() if n > MOST_IN_A_FOLDER} == {}


def test_a_class_name_exists_once() -> None:
    homes = defaultdict(list)
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(dotted(path))
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


def test_each_package_says_what_belongs_in_it() -> None:
    for path in MODULES:
        if path.name == "__init__.py":
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            assert docstring.partition("\n")[0].endswith("."), path


@pytest.mark.parametrize("module", ["aiflux", "aiflux.slurm", "aiflux.core.config"])
def test_importing_does_nothing(module: str, tmp_path: Path) -> None:
    code = f"import {module}, sys; print(sorted(m for m in sys.modules if m in {{'requests'}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "statement",
    [
        "from aiflux import Result, Run, RunState, RunView, open_run, run",
        "from aiflux.slurm import SlurmRunner",
        "from aiflux.core.config import Config",
        "from aiflux.converters import csv_to_jsonl, results_to_csv",
        "from aiflux.converters.results import BackOptions",
    ],
)
def test_promised_import_paths_work(statement: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", statement], cwd=tmp_path, check=True)


def test_the_image_of_vllm_carries_what_pulls_a_model() -> None:
    """Except hf-xet, which is not pure Python: the hub sends files over HTTP as well."""
    container = PACKAGE.parents[1] / "container"
    locks = (container / "requirements.txt", container / "engines" / "vllm" / "requirements.txt")
    text = "\n".join(lock.read_text(encoding="utf-8") for lock in locks)
    carried = {name.replace("-", "_") for name in re.findall(r"(?m)^([\w.-]+)==", text)}
    carried |= {"pyyaml", "hf_xet"}  # Debian's python3-yaml
    todo, seen = ["huggingface_hub"], set()
    while todo:
        name = todo.pop()
        seen.add(name)
        for line in requires(name) or ():
            need = Requirement(line)
            marker = need.marker
            if marker is None or marker.evaluate({"extra": "", "python_version": "3.11"}):
                todo += {need.name.lower().replace("-", "_")} - seen
    assert seen <= carried
    assert f"huggingface-hub=={version('huggingface_hub')} " in text, "the version that is tested"


def test_the_worker_needs_only_what_the_image_carries(tmp_path: Path) -> None:
    root = PACKAGE.parents[1]
    carried = (root / "container" / "requirements.txt").read_text(encoding="utf-8")
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    listed = project.partition("dependencies = [")[2].partition("]")[0]
    wanted = re.findall(r'"([A-Za-z0-9_-]+)>=', listed)
    absent = {name for name in wanted if not re.search(rf"(?m)^{name}==", carried, re.IGNORECASE)}
    assert {"spython", "requests"} <= {*wanted}
    assert "spython" in absent
    block = f"import sys; sys.modules.update(dict.fromkeys({sorted(absent)}))"
    code = f"{block}; import aiflux.worker.main, aiflux.worker.shard"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_threads_start_only_where_their_memory_is_checked() -> None:
    """`Thread.start` waits forever without it (see `require_thread_memory`)."""
    for path in MODULES:
        names = {
            getattr(node.func, "attr", getattr(node.func, "id", ""))
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
        }
        if names & {"Thread", "Timer", "ThreadPoolExecutor", "run_in_threadpool"}:
            assert "require_thread_memory" in names, path
