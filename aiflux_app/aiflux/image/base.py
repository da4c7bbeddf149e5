"""Chooses what the image is built on."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from aiflux.errors import ImageError
from aiflux.image import oci_registry
from aiflux.image.apt_source import AptSource, find_source
from aiflux.image.options import OLLAMA_IMAGE, OLLAMA_VERSION, BuildOptions

CPU_OLLAMA_VERSION = "0.9.3"


@dataclass(frozen=True)
class BaseChoice:
    """What the image is built on, and why.

    Attributes:
        base: ``docker`` or ``debian``.
        why: half a sentence for the user.
        image: the docker reference; for docker.
        digest: its digest, where known; for docker.
        source: mirror and suite; for debian.
        cpu_build: whether Ollama is the CPU build; for debian.
        engine: what the image's help says about its Ollama.
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
        """The docker image as Apptainer's ``From`` takes it, by digest where that is known."""
        reference = oci_registry.parse(self.image)
        if not self.digest:
            return self.image.removeprefix("docker://")
        return f"{reference.host}/{reference.name}@{self.digest}"

    @property
    def description(self) -> str:
        """One line for the user."""
        return f"base: {self.base} ({self.why}); engine: {self.engine}"


def choose_base(options: BuildOptions) -> BaseChoice:
    """Choose; ``auto`` takes docker where its registry answers, unless a tarball is given.

    Raises:
        ImageError: the base that was asked for cannot be used on this machine.
    """
    if options.base == "debian":
        return _debian(options, "as asked")
    if options.ollama_tarball:
        return _debian(options, "an Ollama archive was given")
    image = options.ollama_image or OLLAMA_IMAGE
    reference = oci_registry.parse(image)
    problem = oci_registry.why_unreachable(reference)
    if problem is None:
        why = "as asked" if options.base == "docker" else f"{reference.host} answers"
        return _docker(options, image, reference, why)
    if options.base == "docker":
        raise ImageError(
            f"the docker base cannot be fetched: {problem}",
            "build where the registry can be reached, name a copy with --ollama-image, "
            "or say --base debian",
        )
    return _debian(options, problem)


def _docker(
    options: BuildOptions, image: str, reference: oci_registry.Reference, why: str
) -> BaseChoice:
    engine = f"official Ollama {OLLAMA_VERSION}, with GPU support"
    if options.ollama_image:
        engine = f"Ollama of {image.removeprefix('docker://')}"
    return BaseChoice(
        "docker", why, engine, image=image, digest=oci_registry.digest(reference) or ""
    )


def _debian(options: BuildOptions, why: str) -> BaseChoice:
    source = _source(options)
    if options.ollama_tarball:
        engine = f"Ollama of {options.ollama_tarball.name}"
        return BaseChoice("debian", why, engine, source=source)
    if platform.machine() != "x86_64":
        raise ImageError(
            f"the Debian base has a CPU Ollama for x86_64 only, and this is {platform.machine()}",
            "name the official archive of Ollama with --ollama-tarball",
        )
    engine = f"CPU build of Ollama {CPU_OLLAMA_VERSION}: no GPU support"
    return BaseChoice("debian", why, engine, source=source, cpu_build=True)


def _source(options: BuildOptions) -> AptSource:
    found = find_source()
    mirror = options.mirror or (found and found.mirror)
    suite = options.suite or (found and found.suite)
    if not mirror or not suite:
        raise ImageError(
            "the Debian base needs a Debian mirror and suite, and this machine's apt names none",
            "say --mirror URL --suite NAME",
        )
    return AptSource(mirror, suite)
