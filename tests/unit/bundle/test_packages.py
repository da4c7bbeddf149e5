"""Packages of a bundle: each Python version has all that it needs, whichever one creates it."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest

from aiflux.bundle.packages import download, download_command, refuse_incomplete_packages
from aiflux.bundle.writer import Ingredients, write_bundle
from aiflux.errors import BundleError

ARCH = "x86_64"


def make_package(
    folder: Path, name: str, version: str = "1.0", *needs: str, python: str = ">=3.10"
) -> Path:
    """Build a wheel that needs others; its extras are those that the markers name."""
    facts = [f"Name: {name}", f"Version: {version}", f"Requires-Python: {python}"]
    facts += [f"Requires-Dist: {need}" for need in needs]
    facts += [f"Provides-Extra: {extra}" for extra in re.findall(r"extra == '(\w+)'", str(needs))]
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{info}/METADATA", "\n".join(["Metadata-Version: 2.1", *facts, ""]))
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    return wheel


def own_wheel(folder: Path, *needs: str) -> Path:
    return make_package(folder / "own", "aiflux-slurm", "1.0", *needs)


@pytest.fixture
def index(awkward: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder from which pip takes wheels; it uses no network and no settings of this user."""
    folder = awkward / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    return folder


def downloaded(
    own: Path, target: Path, python: str, arch: str = ARCH, extras: tuple[str, ...] = ()
) -> list[str]:
    """Return the names and versions of the wheels that are needed in addition to AI-Flux."""
    wheels = [*download(own, extras, python, arch, target)]
    refuse_incomplete_packages(wheels, extras, python, arch)
    assert wheels.count(own) == 1
    wheels.remove(own)
    return ["-".join(path.name.split("-")[:2]) for path in wheels]


@pytest.mark.parametrize(
    ("python", "arch", "wanted"),
    [
        ("3.10", "x86_64", "always early gone library old plugin"),
        ("3.11", "x86_64", "always early gone library plugin"),
        ("3.11", "aarch64", "always arm early gone library plugin"),
        ("3.13", "x86_64", "always gone library new plugin"),
        ("3.14", "x86_64", "always library new plugin"),
    ],
)
def test_markers_are_those_of_the_cluster(
    index: Path, tmp_path: Path, python: str, arch: str, wanted: str
) -> None:
    """With one Python for all five, pip's own answer is wrong for at least three of them."""
    own = own_wheel(
        tmp_path,
        "library[some_extra]>=1; extra == 'more'",
        "gone; python_version < '3.14'",
        "unknown; sys_platform == 'win32' or implementation_name == 'pypy'",
        "other; extra == 'other'",
    )
    make_package(
        index,
        "library",
        "1.0",
        "always",
        "old; python_version < '3.11'",
        "early; python_full_version < '3.11.3'",
        "plugin; extra == 'some-extra'",
    )
    make_package(index, "plugin", "1.0", "new>=1; python_version >= '3.13'", "library[third]")
    make_package(index, "new", python=">=3.13")
    make_package(index, "gone", python="<3.14")
    make_package(index, "always", "1.0", "arm; platform_machine == 'aarch64'")
    for name in ("old", "early", "arm", "other"):
        make_package(index, name)
    expected = [f"{name}-1.0" for name in wanted.split()]
    assert downloaded(own, tmp_path / "to", python, arch, ("more",)) == expected


def test_a_release_that_is_known_too_late_is_left_out(index: Path, tmp_path: Path) -> None:
    own = own_wheel(tmp_path, "base", "user")
    make_package(index, "base", "1.0")
    make_package(index, "base", "2.0", "only-of-2")
    make_package(index, "only-of-2")
    make_package(index, "user", "1.0", "base<2; python_version < '3.12'")
    assert downloaded(own, tmp_path / "to", "3.11") == ["base-1.0", "user-1.0"]
    assert downloaded(own, tmp_path / "to 2", "3.12") == ["base-2.0", "only_of_2-1.0", "user-1.0"]


def test_requirements_that_exclude_each_other_are_an_error(
    index: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = own_wheel(tmp_path, "left", "right")
    make_package(index, "left", "1.0", "right>=2")
    make_package(index, "left", "2.0", "right<2")
    make_package(index, "right", "1.0", "left<2")
    make_package(index, "right", "2.0", "left>=2")
    with pytest.raises(BundleError, match=r"Python 3\.12 on x86_64 could not") as error:
        download(own, (), "3.12", ARCH, tmp_path / "to")
    assert "PIP_CONSTRAINT" in (error.value.remedy or "")
    assert "left<2 and left>=2" in capfd.readouterr().err


def test_a_python_without_wheels_is_an_error_that_names_it(
    index: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = own_wheel(tmp_path, "gone")
    make_package(index, "gone", python="<3.14")
    assert downloaded(own, tmp_path / "to", "3.13") == ["gone-1.0"]
    with pytest.raises(BundleError, match=r"Python 3\.14 on x86_64 with the extras a, b") as error:
        download(own, ("a", "b"), "3.14", ARCH, tmp_path / "to 2")
    assert "--python names the others" in (error.value.remedy or "")
    assert "gone" in capfd.readouterr().err


def test_a_bundle_without_a_needed_package_is_not_written(tmp_path: Path) -> None:
    own = own_wheel(tmp_path, "library[fast]", "plain")
    library = make_package(
        tmp_path, "library", "1.0", "late>=2; python_version >= '3.12' and extra == 'fast'"
    )
    plain = make_package(tmp_path, "plain")
    old = make_package(tmp_path, "late", "1.9")
    new = make_package(tmp_path, "late", "2.0")
    target = tmp_path / "b.tar"

    def write(*wheels: Path) -> None:
        both = {"3.11": [own, library, plain], "3.12": [*wheels]}
        write_bundle(target, Ingredients((), (), both, ARCH))

    incomplete = {
        "library[fast] for aiflux-slurm is needed, and there is no such wheel": [own, plain],
        "late>=2 for library is needed, and there is no such wheel": [own, library, plain],
        "late>=2 for library is needed, and there is late 1.9": [own, library, plain, old],
        "aiflux-slurm is needed, and there is no such wheel": [],
    }
    for words, wheels in incomplete.items():
        with pytest.raises(BundleError) as error:
            write(*wheels)
        assert "the packages for Python 3.12 are incomplete: " + words in error.value.message
        assert "leave Python 3.12 out" in (error.value.remedy or "")
        assert not target.exists()
    write(own, library, plain, new)
    assert target.exists()


@pytest.mark.parametrize("need", ["a b", "a; python_version", "a; platform_release > '1' or b"])
def test_an_invalid_requirement_names_its_package(tmp_path: Path, need: str) -> None:
    wheel = own_wheel(tmp_path, need)
    with pytest.raises(BundleError, match="has the invalid requirement") as error:
        refuse_incomplete_packages([wheel], (), "3.12", ARCH)
    assert repr(need) in error.value.message
    assert wheel.name in error.value.message


def test_pip_downloads_wheels_for_the_cluster() -> None:
    command = download_command(["a>=1"], "3.12", "aarch64", Path("/d"))
    assert "--only-binary=:all:" in command
    assert "--no-deps" in command
    assert command[command.index("--python-version") + 1] == "3.12"
    assert "manylinux2014_aarch64" in command
    assert command[-1] == "a>=1"
    assert shutil.which(command[0])
