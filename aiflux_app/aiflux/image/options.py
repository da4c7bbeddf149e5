"""What a user may choose when an image is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aiflux.errors import ImageError

OLLAMA_VERSION = "0.33.3"
OLLAMA_IMAGE = (
    "docker://docker.io/ollama/ollama"
    "@sha256:32931b46719f673c05fdbaa81ccb26da18ea4a1c57590a754874ab28ba269eb2"
)
"""The official image of OLLAMA_VERSION, by digest (Apptainer takes a tag or a digest, not both)."""

BASES = ("auto", "docker", "debian")


@dataclass(frozen=True)
class BuildOptions:
    """What to build, and from what.

    Attributes:
        output: the image file to write.
        base: ``docker`` (the official Ollama image), ``debian`` (debootstrap), or ``auto``:
            docker where its registry answers.
        ollama_image: the docker base, as ``docker://HOST/NAME:TAG``; plain http on loopback.
        ollama_tarball: Ollama's official archive for Linux; for the Debian base.
        mirror: Debian mirror; by default the one that this machine's apt uses.
        suite: Debian suite; by default this machine's.
        force: replace an output that is there.
        run_tests: run the image's own test at the end of the build.
        sign: sign the image with a PGP key of the user's.
        key: which one, as ``apptainer key list --secret`` counts them; needed where there are
            several.
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
        """Raises ImageError where two of them cannot go together."""
        if self.base not in BASES:
            raise ImageError(f"base {self.base!r} is unknown", f"name one of {', '.join(BASES)}")
        if self.base == "docker" and self.ollama_tarball:
            raise ImageError(
                "the docker base has an Ollama already, and --ollama-tarball names another",
                "say --base debian, or leave the tarball away",
            )
        if self.ollama_image and not self.ollama_image.startswith("docker://"):
            raise ImageError(
                f"--ollama-image {self.ollama_image!r} is no docker reference",
                "write it as docker://HOST/NAME:TAG, e.g. docker://docker.io/ollama/ollama:latest",
            )
        if self.key is not None and not self.sign:
            raise ImageError("--key names a key, and nothing is to be signed", "say --sign as well")
        if self.ollama_tarball and not self.ollama_tarball.is_file():
            raise ImageError(
                f"the Ollama archive {self.ollama_tarball} is not there",
                "download ollama-linux-amd64.tgz (or arm64, or .tar.zst) of an Ollama release",
            )
