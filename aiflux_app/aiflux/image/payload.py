"""Stage the image's content: package, wheels, entry point and Ollama."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import aiflux
from aiflux.errors import ImageError
from aiflux.image.base import BaseChoice, BuildOptions
from aiflux.image.run_tool import ask, capture, run

_NETWORK_REMEDY = "see the message above; pip downloads the wheels from PyPI"


@dataclass(frozen=True)
class Checkout:
    """The checkout from which an image is built."""

    root: Path

    @property
    def container(self) -> Path:
        """Directory with definition, lock files and scripts."""
        return self.root / "container"

    @property
    def definition(self) -> Path:
        """The Apptainer definition."""
        return self.container / "aiflux.def"

    @property
    def entrypoint(self) -> Path:
        """Directory with the image's entry point."""
        return self.root / "entrypoint"

    def git(self, *words: str) -> str | None:
        """Return git's output for the checkout, or None if it is not a repository."""
        return ask(["git", "-c", f"safe.directory={self.root}", "-C", self.root, *words])

    @property
    def commit(self) -> str:
        """The commit, marked if tracked files were modified."""
        commit = self.git("rev-parse", "HEAD")
        if commit is None:
            return "unknown"
        return commit + ("-modified" if self.git("status", "--porcelain", "-uno") else "")

    @property
    def commit_time(self) -> str | None:
        """Unix time of the commit, for SOURCE_DATE_EPOCH."""
        return self.git("log", "-1", "--format=%ct")


def find_sources() -> Checkout:
    """Return the checkout that contains this package.

    Raises:
        ImageError: the package was installed without a checkout.
    """
    sources = Checkout(Path(aiflux.__file__).resolve().parents[2])
    if not sources.definition.is_file():
        raise ImageError(
            "images can only be built from a checkout of AI-Flux",
            "clone the repository, and run `make image` there",
        )
    return sources


def cache_dir() -> Path:
    """Return the download cache: AIFLUX_CACHE_DIR, else below XDG_CACHE_HOME or ~/.cache."""
    given = os.environ.get("AIFLUX_CACHE_DIR")
    if given:
        return Path(given).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "aiflux"


def stage(target: Path, sources: Checkout, options: BuildOptions, choice: BaseChoice) -> None:
    """Fill ``target``, which becomes /opt/aiflux (see container/aiflux.def)."""
    build = target / "build"
    build.mkdir(parents=True)
    shutil.copytree(
        Path(aiflux.__file__).parent,
        target / "app" / "aiflux",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    shutil.copytree(sources.entrypoint, target / "entrypoint")
    shutil.copy2(sources.container / "image-facts.py", build)
    (build / "facts.json").write_text(
        json.dumps(known_facts(sources, choice), indent=2) + "\n", encoding="utf-8"
    )
    _stage_wheels(target / "site", sources)
    _stage_ollama(target / "ollama.tar", sources, options, choice)


def known_facts(sources: Checkout, choice: BaseChoice) -> dict[str, str]:
    """Return the labels known on the host; the build adds the others."""
    image, digest = choice.image.removeprefix("docker://"), choice.digest or "unknown"
    if choice.source:
        image, digest = f"debootstrap {choice.source.suite}", "none"
    return {
        "version": aiflux.__version__,
        "commit": sources.commit,
        "base": choice.base,
        "base_image": image,
        "base_digest": digest,
        "engine": "ollama",
        "engine_description": choice.engine,
    }


def _stage_wheels(site: Path, sources: Checkout) -> None:
    fetch = sources.container / "fetch-wheels.sh"
    lock = sources.container / "requirements.txt"
    wheels = capture(
        [fetch, lock], "the worker's dependencies could not be downloaded", _NETWORK_REMEDY
    )
    for wheel in wheels.splitlines():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def _stage_ollama(
    archive: Path, sources: Checkout, options: BuildOptions, choice: BaseChoice
) -> None:
    if options.ollama_tarball:
        shutil.copyfile(options.ollama_tarball, archive)
    elif choice.cpu_build:
        assembled = cache_dir() / "cpu-ollama"
        script = sources.container / "cpu-ollama.sh"
        run([script, assembled], "the CPU Ollama could not be assembled", _NETWORK_REMEDY)
        run(
            ["tar", "-C", assembled, "-cf", archive, "bin", "lib"],
            "the CPU Ollama could not be packed",
            "free some space in the temporary directory (TMPDIR)",
        )
