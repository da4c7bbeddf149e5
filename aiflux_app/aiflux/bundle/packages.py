"""The Python packages of a bundle: for each version of Python, all that it needs and no others.

Whatever ``--python-version`` says, pip evaluates environment markers such as
``python_version < "3.11"`` for the Python that runs it, and so downloads too few packages for
another version, or asks for some that do not exist for it. Here, pip only chooses and downloads
single wheels. Their own metadata, read for the other Python, says which ones are needed.
"""

from __future__ import annotations

import platform
import re
import shutil
import sys
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from email.parser import HeaderParser
from itertools import count
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from aiflux.errors import BundleError, ImageError
from aiflux.image.build import find_sources
from aiflux.image.run_tool import run
from aiflux.util.files import temporary_folder

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
ARCHITECTURES = ("x86_64", "aarch64")
_PLATFORMS = ("manylinux2014", "manylinux_2_28")
_OWN = "aiflux-slurm"
_METADATA = re.compile(r"[^/]+\.dist-info/METADATA")
_REMEDY = (
    "see pip's message above; pip downloads from PyPI or its configured index, and stores the "
    "wheels below TMPDIR until they are packed"
)
_NO_WHEEL = (
    f"{_REMEDY}; leave out a Python version that has no wheels (--python names the others); if "
    "requirements exclude each other, name an older release in a file for PIP_CONSTRAINT"
)


@dataclass(frozen=True)
class Wheel:
    """A wheel file.

    Attributes:
        metadata: its core metadata, such as ``Name``, ``Version`` and ``Requires-Dist``.
    """

    path: Path
    metadata: Message = field(repr=False)

    @property
    def name(self) -> str:
        """The normalized name of the package."""
        return canonicalize_name(str(self.metadata["Name"]))

    @property
    def version(self) -> str:
        """The version of the package."""
        return str(self.metadata["Version"])

    def requirements(
        self, extras: Iterable[str], environments: Sequence[Mapping[str, str]]
    ) -> Iterator[Requirement]:
        """Yield what the package with extras needs in any of the environments, without markers.

        Raises:
            BundleError: a requirement is invalid.
        """
        asked = tuple(extras) or ("",)
        for line in self.metadata.get_all("Requires-Dist") or ():
            try:
                needed = Requirement(line)
                marker, needed.marker = needed.marker, None
                applies = marker is None or any(
                    marker.evaluate({**environment, "extra": extra})
                    for environment in environments
                    for extra in asked
                )
            except ValueError as error:
                raise BundleError(
                    f"{self.path.name} has the invalid requirement {line!r}",
                    "exclude this release in a file for PIP_CONSTRAINT: "
                    f"{self.name}!={self.version}",
                ) from error
            if applies:
                yield needed


@dataclass(frozen=True)
class _Need:
    """What a package of a bundle needs.

    Attributes:
        by: name of that package; empty for AI-Flux itself.
        wheel: the wheel in the bundle; None if the package is missing.
    """

    requirement: Requirement
    by: str
    wheel: Wheel | None

    @property
    def name(self) -> str:
        """The normalized name of the needed package."""
        return canonicalize_name(self.requirement.name)

    @property
    def is_met(self) -> bool:
        """Whether the bundle has the package in a version that suits."""
        return self.wheel is not None and self.requirement.specifier.contains(
            self.wheel.version, prereleases=True
        )


def read_wheel(path: Path) -> Wheel:
    """Read a wheel's metadata.

    Raises:
        BundleError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(filter(_METADATA.fullmatch, archive.namelist()))
            text = archive.read(name).decode("utf-8", "replace")
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, StopIteration) as error:
        raise BundleError(
            f"{path.name} cannot be read: {error!r}; no bundle was written", "try again"
        ) from error
    return Wheel(path, HeaderParser().parsestr(text))


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
    with temporary_folder() as folder:
        own = _own_wheel(root, folder / "own")
        try:
            fetched = {}
            for python in pythons:
                say(f"downloading packages for Python {python} on {arch}")
                fetched[python] = download(own, extras, python, arch, folder / python)
            yield fetched
        finally:
            shutil.rmtree(folder / "own")


def download(
    own: Path, extras: Sequence[str], python: str, arch: str, folder: Path
) -> Sequence[Path]:
    """Download what a wheel of AI-Flux with extras needs on another machine.

    Each round downloads what the wheels so far need in addition: of each package, the newest
    release that all requirements known by then permit. A known requirement is never dropped, so
    this ends. It does not try older releases of a package in the hope that they need less.

    Returns:
        the wheels, with that of AI-Flux.
    Raises:
        BundleError: pip cannot download a wheel.
    """
    also = f" with the extras {', '.join(extras)}" if extras else ""
    what = f"packages for Python {python} on {arch}{also} could not be downloaded"
    wheels = _by_name([own])
    known: dict[str, dict[str, None]] = defaultdict(dict)  # by package, each once
    for number in count():
        needs = _needs(wheels, extras, python, arch)
        for need in needs:
            known[need.name][str(need.requirement)] = None
        unmet = {need.name for need in needs if not need.is_met}
        if not unmet:
            break
        requirements = [requirement for name in sorted(unmet) for requirement in known[name]]
        into = folder / str(number)
        _call(download_command(requirements, python, arch, into), what, _NO_WHEEL)
        wheels.update(_by_name(into.glob("*.whl")))
    paths = {need.wheel.path for need in needs if need.wheel is not None}
    return sorted(paths, key=lambda path: path.name)


def download_command(
    requirements: Sequence[str], python: str, arch: str, folder: Path
) -> list[str]:
    """Return the command that downloads wheels for another machine, without what they need."""
    platforms = [f"{name}_{arch}" for name in _PLATFORMS]
    return [
        *_pip("download"),
        *("--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python),
        *(word for name in platforms for word in ("--platform", name)),
        *("--dest", str(folder), *requirements),
    ]


def refuse_incomplete_packages(
    wheels: Iterable[Path], extras: Sequence[str], python: str, arch: str
) -> None:
    """Reject wheels that lack something that one of them needs.

    Raises:
        BundleError: a package is missing or has another version, or a wheel cannot be read.
    """
    for need in _needs(_by_name(wheels), extras, python, arch):
        if need.is_met:
            continue
        wanted = f"{need.requirement} for {need.by}" if need.by else str(need.requirement)
        found = f"{need.name} {need.wheel.version}" if need.wheel else "no such wheel"
        raise BundleError(
            f"the packages for Python {python} are incomplete: {wanted} is needed, and there is "
            f"{found}; no bundle was written",
            f"create the bundle again, or leave Python {python} out: name the others with --python",
        )


def _needs(
    wheels: Mapping[str, Wheel], extras: Sequence[str], python: str, arch: str
) -> list[_Need]:
    """Return what AI-Flux with extras needs, and what that needs in turn."""
    environments = _environments(python, arch)
    found = [_Need(Requirement(f"{_OWN}[{','.join(extras)}]"), "", wheels.get(_OWN))]
    seen = set()
    for need in found:  # it grows meanwhile
        key = (need.name, frozenset(need.requirement.extras))
        if need.wheel is None or key in seen:
            continue
        seen.add(key)
        for each in need.wheel.requirements(need.requirement.extras, environments):
            found.append(_Need(each, need.name, wheels.get(canonicalize_name(each.name))))
    return found


def _environments(python: str, arch: str) -> list[dict[str, str]]:
    """Return the values of markers on the cluster, for the first and the last release of a version.

    Which release the cluster has is unknown, and ``async-timeout; python_full_version < "3.11.3"``
    is needed by the first one only.
    """
    return [
        {
            "implementation_name": "cpython",
            "implementation_version": release,
            "os_name": "posix",
            "platform_machine": arch,
            "platform_python_implementation": "CPython",
            "platform_system": "Linux",
            "python_full_version": release,
            "python_version": python,
            "sys_platform": "linux",
        }
        for release in (f"{python}.0", f"{python}.99")
    ]


def _by_name(wheels: Iterable[Path]) -> dict[str, Wheel]:
    return {wheel.name: wheel for wheel in map(read_wheel, wheels)}


def _pip(action: str) -> list[str]:
    return [sys.executable, "-m", "pip", action, "--quiet", "--disable-pip-version-check"]


def _own_wheel(root: Path, folder: Path) -> Path:
    command = [*_pip("wheel"), "--no-deps", "--wheel-dir", str(folder), str(root)]
    _call(command, "the AI-Flux package could not be built", _REMEDY)
    return next(folder.glob("*.whl"))


def _call(command: Sequence[str], what: str, remedy: str) -> None:
    try:
        run(command, what, remedy)
    except ImageError as error:
        raise BundleError(error.message, error.remedy) from error
