"""Download what pip would install on another machine: AI-Flux's own wheel and dependencies."""

from __future__ import annotations

import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from aiflux.errors import BundleError, ImageError
from aiflux.image.build import find_sources
from aiflux.image.run_tool import run

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
ARCHITECTURES = ("x86_64", "aarch64")
_PLATFORMS = ("manylinux2014", "manylinux_2_28")
_REMEDY = (
    "see pip's message above; pip downloads from PyPI or its configured index, and stores the "
    "wheels below TMPDIR until they are packed"
)


def this_architecture() -> str:
    """Return this machine's architecture in the notation of wheels."""
    return platform.machine()


@contextmanager
def packages(
    pythons: Sequence[str],
    arch: str,
    extras: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Mapping[str, Sequence[Path]]]:
    """Yield the wheels for each Python version, in a directory that is removed afterwards.

    Args:
        extras: extras of AI-Flux whose wheels are included.
        say: called with one line of output for the user.
    Raises:
        BundleError: pip cannot download the wheels, or there is no checkout to build AI-Flux from.
    """
    try:
        root = find_sources().root
    except ImageError as error:
        raise BundleError(
            "bundles can only be created from a checkout of AI-Flux",
            error.remedy,
        ) from error
    with tempfile.TemporaryDirectory(prefix="aiflux-wheels.") as name:
        folder = Path(name)
        own = _own_wheel(root, folder / "own")
        try:
            fetched = {}
            for python in pythons:
                say(f"downloading packages for Python {python} on {arch}")
                fetched[python] = _fetch(own, extras, python, arch, folder / python)
            yield fetched
        finally:
            shutil.rmtree(folder / "own")


def download_command(
    wheel: Path, extras: Sequence[str], python: str, arch: str, folder: Path
) -> list[str]:
    """Return the command that downloads a wheel's dependencies for another machine."""
    platforms = [f"{name}_{arch}" for name in _PLATFORMS]
    return [
        *_pip("download"),
        *("--only-binary=:all:", "--implementation", "cp", "--python-version", python),
        *(word for name in platforms for word in ("--platform", name)),
        *("--dest", str(folder), _requirement(wheel, extras)),
    ]


def _requirement(wheel: Path, extras: Sequence[str]) -> str:
    """Return a requirement (PEP 508) for a wheel with extras."""
    return f"aiflux-slurm[{','.join(extras)}] @ {wheel.absolute().as_uri()}"


def _pip(action: str) -> list[str]:
    return [sys.executable, "-m", "pip", action, "--quiet", "--disable-pip-version-check"]


def _own_wheel(root: Path, folder: Path) -> Path:
    command = [*_pip("wheel"), "--no-deps", "--wheel-dir", str(folder), str(root)]
    _call(command, "the AI-Flux package could not be built")
    return next(folder.glob("*.whl"))


def _fetch(
    own: Path, extras: Sequence[str], python: str, arch: str, folder: Path
) -> Sequence[Path]:
    also = f" with the extras {', '.join(extras)}" if extras else ""
    what = f"packages for Python {python} on {arch}{also} could not be downloaded"
    _call(download_command(own, extras, python, arch, folder), what)
    return sorted(folder.glob("*.whl"))


def _call(command: Sequence[str], what: str) -> None:
    try:
        run(command, what, _REMEDY)
    except ImageError as error:
        raise BundleError(error.message, error.remedy) from error
