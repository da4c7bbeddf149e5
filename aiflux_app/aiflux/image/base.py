"""Choose the base of an image (Docker Hub or Debian), and define the build options."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aiflux.errors import ImageError
from aiflux.image import oci_registry

CPU_OLLAMA_VERSION = "0.9.3"


@dataclass(frozen=True)
class BaseChoice:
    """The base of an image, and the reason for it.

    Attributes:
        base: ``docker`` or ``debian``.
        why: the reason, as half a sentence for the user.
        image: docker reference; for docker.
        digest: its digest, if known; for docker.
        source: mirror and suite; for debian.
        cpu_build: whether Ollama is the CPU build; for debian.
        engine: description of Ollama for the image's help.
    """

    base: str
    why: str
    engine: str
    image: str = ""
    digest: str = ""
    source: AptSource | None = None
    cpu_build: bool = False

    @property
    def pinned_image(self) -> str:
        """The image for Apptainer's ``From``, by digest if it is known."""
        reference = oci_registry.parse(self.image)
        if not self.digest:
            return self.image.removeprefix("docker://")
        return f"{reference.host}/{reference.name}@{self.digest}"

    @property
    def description(self) -> str:
        """One line for the user."""
        return f"base: {self.base} ({self.why}); engine: {self.engine}"


def choose_base(options: BuildOptions) -> BaseChoice:
    """Choose the base; ``auto`` uses docker if its registry is reachable and no tarball is given.

    Raises:
        ImageError: the requested base cannot be used on this machine.
    """
    if options.base == "debian":
        return _debian(options, "as requested")
    if options.ollama_tarball:
        return _debian(options, "an Ollama archive was given")
    image = options.ollama_image or OLLAMA_IMAGE
    reference = oci_registry.parse(image)
    problem = oci_registry.why_unreachable(reference)
    if problem is None:
        why = "as requested" if options.base == "docker" else f"{reference.host} is reachable"
        return _docker(options, image, reference, why)
    if options.base == "docker":
        raise ImageError(
            f"the docker base cannot be downloaded: {problem}",
            "build where the registry is reachable, name a mirror with --ollama-image, or use "
            "--base debian",
        )
    return _debian(options, problem)


def _docker(
    options: BuildOptions, image: str, reference: oci_registry.Reference, why: str
) -> BaseChoice:
    engine = f"official Ollama {OLLAMA_VERSION} with GPU support"
    if options.ollama_image:
        engine = f"Ollama from {image.removeprefix('docker://')}"
    return BaseChoice(
        "docker", why, engine, image=image, digest=oci_registry.digest(reference) or ""
    )


def _debian(options: BuildOptions, why: str) -> BaseChoice:
    source = _source(options)
    if options.ollama_tarball:
        engine = f"Ollama from {options.ollama_tarball.name}"
        return BaseChoice("debian", why, engine, source=source)
    if platform.machine() != "x86_64":
        raise ImageError(
            f"the Debian base has a CPU build of Ollama for x86_64 only, not {platform.machine()}",
            "provide the official Ollama archive with --ollama-tarball",
        )
    engine = f"CPU build of Ollama {CPU_OLLAMA_VERSION}, without GPU support"
    return BaseChoice("debian", why, engine, source=source, cpu_build=True)


def _source(options: BuildOptions) -> AptSource:
    found = find_source()
    mirror = options.mirror or (found and found.mirror)
    suite = options.suite or (found and found.suite)
    if not mirror or not suite:
        raise ImageError(
            "the Debian base requires a mirror and suite, and apt has none configured here",
            "use --mirror URL --suite NAME",
        )
    return AptSource(mirror, suite)


APT = Path("/etc/apt")


@dataclass(frozen=True)
class AptSource:
    """A Debian mirror and suite."""

    mirror: str
    suite: str


def find_source(apt: Path = APT) -> AptSource | None:
    """Return the first source of a full release (not updates), or None without apt."""
    for source in _all_sources(apt):
        if source.mirror.startswith(("http://", "https://")) and _is_release(source.suite):
            return source
    return None


def _is_release(suite: str) -> bool:
    return "-" not in suite and "/" not in suite


def _all_sources(apt: Path) -> Iterator[AptSource]:
    for path in [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*.list"))]:
        if path.is_file():
            yield from _one_line_sources(path.read_text(encoding="utf-8", errors="replace"))
    for path in sorted((apt / "sources.list.d").glob("*.sources")):
        yield from _deb822_sources(path.read_text(encoding="utf-8", errors="replace"))


def _one_line_sources(text: str) -> Iterator[AptSource]:
    """Parse ``deb [options] URI SUITE main ...``; see sources.list(5)."""
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        if kind != "deb":
            continue
        if rest.lstrip().startswith("["):
            rest = rest.partition("]")[2]
        words = rest.split()
        if len(words) >= 3 and "main" in words[2:]:
            yield AptSource(words[0], words[1])


def _deb822_sources(text: str) -> Iterator[AptSource]:
    """Parse stanzas of ``Types``, ``URIs``, ``Suites`` and ``Components``; see sources.list(5)."""
    for stanza in text.split("\n\n"):
        fields = dict(_fields(stanza))
        if "deb" not in fields.get("types", []) or "main" not in fields.get("components", []):
            continue
        if fields.get("enabled", ["yes"]) == ["no"]:
            continue
        for mirror in fields.get("uris", []):
            for suite in fields.get("suites", []):
                yield AptSource(mirror, suite)


def _fields(stanza: str) -> Iterator[tuple[str, list[str]]]:
    for line in stanza.splitlines():
        name, colon, value = line.partition(":")
        if colon and not line.startswith(("#", " ", "\t")):
            yield name.strip().lower(), value.split()


OLLAMA_VERSION = "0.33.3"
OLLAMA_IMAGE = (
    "docker://docker.io/ollama/ollama"
    "@sha256:32931b46719f673c05fdbaa81ccb26da18ea4a1c57590a754874ab28ba269eb2"
)
"""The official image of OLLAMA_VERSION, by digest (Apptainer accepts a tag or digest, not both)."""

BASES = ("auto", "docker", "debian")


@dataclass(frozen=True)
class BuildOptions:
    """Options of an image build.

    Attributes:
        output: the image file to write.
        base: ``docker`` (the official Ollama image), ``debian`` (debootstrap), or ``auto``:
            docker if its registry is reachable.
        ollama_image: docker base as ``docker://HOST/NAME:TAG``; plain http on loopback.
        ollama_tarball: Ollama's official archive for Linux; for the Debian base.
        mirror: Debian mirror; by default that of this machine's apt.
        suite: Debian suite; by default this machine's.
        force: replace an existing output.
        run_tests: run the image's own test at the end of the build.
        sign: sign the image with one of the user's PGP keys.
        key: number of the key in ``apptainer key list --secret``; required if there are several.
    """

    output: Path = Path("aiflux.sif")
    base: str = "auto"
    ollama_image: str | None = None
    ollama_tarball: Path | None = None
    mirror: str | None = None
    suite: str | None = None
    force: bool = False
    run_tests: bool = True
    sign: bool = False
    key: int | None = None

    def __post_init__(self) -> None:
        """Raise ImageError for options that cannot be combined."""
        if self.base not in BASES:
            raise ImageError(f"unknown base {self.base!r}", f"use one of {', '.join(BASES)}")
        if self.base == "docker" and self.ollama_tarball:
            raise ImageError(
                "--ollama-tarball cannot be combined with the docker base, which contains Ollama",
                "use --base debian, or remove --ollama-tarball",
            )
        if self.ollama_image and not self.ollama_image.startswith("docker://"):
            raise ImageError(
                f"--ollama-image {self.ollama_image!r} is not a docker reference",
                "write it as docker://HOST/NAME:TAG, e.g. docker://docker.io/ollama/ollama:latest",
            )
        if self.key is not None and not self.sign:
            raise ImageError("--key has no effect without --sign", "add --sign")
        if self.ollama_tarball and not self.ollama_tarball.is_file():
            raise ImageError(
                f"Ollama archive not found: {self.ollama_tarball}",
                "download ollama-linux-amd64.tgz (or arm64, or .tar.zst) from an Ollama release",
            )
