"""Read an image's architecture and labels directly from its file.

This needs no Apptainer, so it works on every login node and takes a millisecond.
Format: the ``sif`` package of Apptainer (``pkg/sif/sif.go``). A global header, then descriptors of
data objects, all little-endian and unpadded. Apptainer stores the labels in the object
``inspect-metadata.json``; images without it have none.
"""

from __future__ import annotations

import json
import re
import shlex
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from uuid import UUID

from aiflux import __version__
from aiflux.core.config.engine_kinds import COMMAND, EXTERNAL
from aiflux.core.config.settings import AMD, VENDOR_TITLES
from aiflux.errors import ImageError

# launch script, magic, version, architecture, UUID; times; free, total, offset and length of the
# descriptors; offset and length of the data
_HEADER = struct.Struct("<32s10s3s3s16s2q6q")
# kind, used, id, group, link, offset, length, stored length; times, owners; name; extra
_DESCRIPTOR = struct.Struct("<i?3I3q4q128s384s")
_MAGIC = b"SIF_MAGIC\0"
_GENERIC_JSON = 0x4006
_METADATA = b"inspect-metadata.json"
_MAX_DESCRIPTORS = 4096
_MAX_METADATA = 16 << 20
_OWN = "aiflux."

CHECKOUT = Path(__file__).parents[3]  # the repository, if the package runs from one
ARCHITECTURES = {
    "01": "386", "02": "amd64", "03": "arm", "04": "arm64", "05": "ppc64", "06": "ppc64le",
    "07": "mips", "08": "mipsle", "09": "mips64", "10": "mips64le", "11": "s390x", "12": "riscv64",
}  # fmt: skip
"""Architecture codes of the header, with Go's names."""

_MACHINES = {
    "x86_64": "amd64", "aarch64": "arm64", "i386": "386", "i486": "386", "i586": "386",
    "i686": "386", "armv7l": "arm",
}  # fmt: skip


def how_to_build(options: str = "") -> str:
    """Return the remedy that builds an image, with the command to type from here.

    Args:
        options: options of ``make image``, such as ``BASE=docker``.
    """
    make = "make" if Path.cwd() == CHECKOUT else f"make -C {shlex.quote(str(CHECKOUT))}"
    if not (CHECKOUT / "Makefile").is_file():
        return f"build it with `{f'make image {options}'.strip()}` in a clone of AI-Flux"
    return f"build it: {f'{make} image {options}'.strip()}"


def uses_default_image(engine: str) -> bool:
    """Return whether the worker runs in the image that is built without options: Ollama's."""
    return engine in ("ollama", COMMAND, EXTERNAL)


def make_options(engine: str, vendor: str) -> str:
    """Return the options of ``make image`` for an engine and the vendor of the GPUs."""
    words = [] if uses_default_image(engine) else [f"ENGINE={engine}"]
    return " ".join([*words, f"GPU={AMD}"] if vendor == AMD else words)


@dataclass(frozen=True)
class ImageFacts:
    """Metadata of an image.

    Attributes:
        arch: for example amd64 or arm64; None if unknown (a sandbox directory).
        labels: all labels; empty if none are known.
        id: the image's own id, as in ``apptainer sif header``; None of a sandbox directory.
    """

    path: Path
    arch: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    id: str | None = None

    def fact(self, name: str) -> str | None:
        """Return one of AI-Flux's own labels, such as ``version``, ``base`` or ``engine``."""
        return self.labels.get(_OWN + name)

    @property
    def facts(self) -> dict[str, str]:
        """AI-Flux's own labels, without their prefix."""
        own = {name: value for name, value in self.labels.items() if name.startswith(_OWN)}
        return {name.removeprefix(_OWN): value for name, value in own.items()}

    @property
    def engine(self) -> str | None:
        """The kind of its engine; None where it is unknown.

        Earlier versions built images for Ollama only, and described it in the label ``engine``.
        """
        if self.fact("engine_version"):
            return self.fact("engine")
        return "ollama" if self.fact("ollama") else None

    @property
    def engine_version(self) -> str | None:
        """The version of its engine; None where it is unknown."""
        return self.fact("engine_version") or self.fact("ollama")

    @property
    def engine_description(self) -> str | None:
        """Its engine in words; None where there are none."""
        return self.fact("engine_description") or self.fact("engine")

    @property
    def cpu_only(self) -> bool:
        """Whether its engine is known not to support GPUs."""
        return self.fact("cpu_only") == "yes"

    @property
    def gpu_vendors(self) -> tuple[str, ...]:
        """The vendors whose GPUs its engine supports; () if there are none, or if unknown."""
        words = (self.fact("gpu_vendors") or "").split()
        return tuple(word for word in words if word in VENDOR_TITLES)

    def suits(self, kind: str) -> bool:
        """Return whether its engine is of a kind, or unknown."""
        return self.engine in (None, kind)


def machine_arch(machine: str) -> str:
    """Return the architecture name used by images for a machine (``uname -m``)."""
    return _MACHINES.get(machine, machine)


def refuse_other_engine(image: ImageFacts, kind: str, title: str) -> None:
    """Refuse an image with another engine than a run needs.

    Args:
        kind, title: of the engine that the run needs.

    Raises:
        ImageError: it has another one; names the image to build.
    """
    if not image.suits(kind):
        raise ImageError(
            f"the image {image.path} has the engine {image.engine}, and the run needs {title}",
            f"{how_to_build(f'ENGINE={kind}')}, and name it: --image FILE; or --engine "
            f"{image.engine}",
        )


def refuse_other_vendor(image: ImageFacts, vendor: str) -> None:
    """Refuse an image whose engine is for the GPUs of another vendor.

    Raises:
        ImageError: it is; names the image to build.
    """
    if image.gpu_vendors and vendor not in image.gpu_vendors:
        engine = image.engine or "ollama"
        build = how_to_build(make_options(engine, vendor) or "BASE=docker")
        raise ImageError(
            f"the image {image.path} is for GPUs of {VENDOR_TITLES[image.gpu_vendors[0]]}, and "
            f"the run gets GPUs of {VENDOR_TITLES[vendor]}",
            f"{build}, and name it: --image FILE; or correct --gpu-vendor; or run on the CPU: "
            "--allow-cpu",
        )


def refuse_other_version(image: ImageFacts) -> None:
    """Refuse an image that cannot read this command's plans: of another major version.

    Raises:
        ImageError: it is one.
    """
    found, own = _version(image.fact("version")), _version(__version__)
    if found and own and found[0] != own[0]:
        raise ImageError(
            f"the image {image.path} has AI-Flux {image.fact('version')}, which cannot read the "
            f"runs of this command ({__version__})",
            how_to_build().replace("build it", "build it again", 1),
        )


def older_version(image: ImageFacts, command: str = __version__) -> tuple[str, str] | None:
    """Return a warning and its remedy if the image may not know all of this command's settings.

    The second number of a version changes with new settings; see ``docs/upgrading.md``.

    Args:
        command: version of the command.
    """
    found, own = _version(image.fact("version")), _version(command)
    if len(found) < 2 or not found < own:
        return None
    return (
        f"the image {image.path} has AI-Flux {image.fact('version')}, older than this command "
        f"({command}): it refuses runs with settings that it does not know",
        how_to_build().replace("build it", "build it again", 1),
    )


def _version(text: str | None) -> tuple[int, ...]:
    """Return the first two numbers of a version; fewer where they are unknown."""
    match = re.match(r"(\d+)(?:\.(\d+))?", text or "")
    return tuple(int(number) for number in match.groups() if number) if match else ()


def read_image(path: Path) -> ImageFacts:
    """Read an image's architecture and labels. A sandbox directory has none.

    Raises:
        ImageError: the file does not exist, cannot be read, or is not an image.
    """
    try:
        if path.is_dir():
            return ImageFacts(path)
        if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
            raise ImageError(f"{path} is a pipe or a device, not an image", "name another image")
        with path.open("rb") as file:
            return _read(path, file)
    except FileNotFoundError:
        raise ImageError(f"image not found: {path}", how_to_build()) from None
    except OSError as error:
        raise ImageError(
            f"the image {path} cannot be read: {error.strerror}",
            f"check its permissions: ls -l {shlex.quote(str(path))}",
        ) from error


def own_image(path: Path) -> ImageFacts:
    """Read an image with AI-Flux's labels, without executing anything from it.

    The label prevents other images from being run by accident. It does not prove the origin, as
    anyone can set it (see ``docs/security.md``).

    Raises:
        ImageError: the file does not exist, cannot be read, or is another image.
    """
    image = read_image(path)
    if not image.fact("version"):
        raise ImageError(
            f"{path} is not an AI-Flux image: it has no label aiflux.version",
            f"{how_to_build()}; or use another image: --image FILE",
        )
    return image


def _read(path: Path, file: IO[bytes]) -> ImageFacts:
    head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or head[32:42] != _MAGIC:
        raise ImageError(
            f"{path} is not an Apptainer image: it has no SIF header",
            f"{how_to_build()}; or use another image: --image FILE",
        )
    _, _, _, arch, id_, _, _, _, total, offset, *_ = _HEADER.unpack(head)
    size = file.seek(0, 2)
    if not 0 < total <= _MAX_DESCRIPTORS or not _HEADER.size <= offset <= size:
        raise _damaged(path, "its table of contents is out of bounds")
    file.seek(offset)
    table = file.read(_DESCRIPTOR.size * total)
    if len(table) < _DESCRIPTOR.size * total:
        raise _damaged(path, "it ends inside its table of contents")
    labels: dict[str, str] = {}
    for data in _objects(table):
        if data.start < 0 or data.length < 0 or data.start + data.length > size:
            raise _damaged(
                path, f"it has {size} bytes instead of at least {data.start + data.length}"
            )
        if data.holds_labels and data.length <= _MAX_METADATA:
            file.seek(data.start)
            labels |= _labels(path, file.read(data.length))
    code = arch.rstrip(b"\0").decode("ascii", "replace")
    return ImageFacts(path, ARCHITECTURES.get(code), labels, str(UUID(bytes=id_)))


@dataclass(frozen=True)
class _DataObject:
    start: int
    length: int
    holds_labels: bool


def _objects(table: bytes) -> Iterator[_DataObject]:
    for row in _DESCRIPTOR.iter_unpack(table):
        kind, used, start, length, name = row[0], row[1], row[5], row[6], row[12]
        if used:
            labels = kind == _GENERIC_JSON and name.rstrip(b"\0") == _METADATA
            yield _DataObject(start, length, labels)


def _labels(path: Path, text: bytes) -> dict[str, str]:
    try:
        content: Any = json.loads(text)
        labels = content["data"]["attributes"].get("labels") or {}
        return {str(name): str(value) for name, value in labels.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its labels cannot be read ({error!r})") from error


def _damaged(path: Path, why: str) -> ImageError:
    return ImageError(f"the image {path} is damaged: {why}", f"copy it again, or {how_to_build()}")
