"""Write a bundle: everything that a cluster without internet needs, in one tar file.

Below ``aiflux-bundle/``, in this order: ``SHA256SUMS`` (for ``sha256sum -c``), ``bundle.json``,
``sbom.cdx.json``, ``README.txt``, ``install.py``, ``wheels/``, ``image/``, and ``models/`` in the
layout of a models directory; ``bundle.json`` names the files of a snapshot of Hugging Face, which
the installer links to its blobs. Nothing is compressed, as images and weights do not shrink.
``bundle/installer.py`` reads it.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from aiflux import __version__
from aiflux.bundle import installer
from aiflux.bundle.installer import CONTENTS, SUMS, TOP, VERSION
from aiflux.bundle.model_archive import packed_size
from aiflux.bundle.packages import read_wheel, refuse_incomplete_packages
from aiflux.core.config.settings import AMD, NVIDIA
from aiflux.engines.base import PackedModel
from aiflux.engines.ollama.store import (
    HashedReader,
    OnBytes,
    blob_path,
    digest_of,
    parse_manifest,
)
from aiflux.errors import BundleError
from aiflux.image import sbom
from aiflux.image.container import image_names
from aiflux.image.sbom import NAME as SBOM
from aiflux.image.sif import ImageFacts, read_image
from aiflux.models.name import parse_model_name
from aiflux.util.files import atomic_write

_CHUNK = 4 << 20
_OPTIONS: dict[str, Any] = {"copybufsize": _CHUNK}  # the default of 16 kB is slow

_README = """\
AI-Flux {aiflux} for a machine without internet, created {created}
  Python packages for {arch}, Python {pythons}
  extras: {extras}
  images: {images}
  models: {models}

Check it:     sha256sum bundle.tar        (compare with aiflux bundle create)
Install it:   tar -xf bundle.tar aiflux-bundle/install.py
              python3 aiflux-bundle/install.py bundle.tar --prefix DIR [--models-dir DIR]
Then:         DIR/bin/aiflux doctor

install.py requires one of the Python versions above and nothing else. It reads the bundle directly;
there is no need to unpack it. To check an unpacked bundle: sha256sum -c SHA256SUMS
"""


@dataclass(frozen=True)
class Member:
    """One file of a bundle.

    Attributes:
        content: a file, or bytes.
        digest: SHA-256 in hexadecimal.
    """

    name: str
    content: Path | bytes
    digest: str

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Ingredients:
    """The inputs of a bundle.

    Attributes:
        images: none for a bundle without image; of several, each has another engine.
        wheels: wheel files by Python version, such as 3.11.
        arch: the architecture of the wheels, as in ``uname -m``.
        extras: extras of AI-Flux whose wheels are included.
    """

    images: tuple[Path, ...]
    models: tuple[PackedModel, ...]
    wheels: Mapping[str, Sequence[Path]]
    arch: str
    extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """The bundle that was written.

    Attributes:
        digest: SHA-256 of the file.
    """

    path: Path
    size: int
    digest: str
    contents: dict[str, Any] = field(repr=False)


def write_bundle(target: Path, parts: Ingredients, on_bytes: OnBytes = lambda _: None) -> Written:
    """Write a bundle, completely or not at all.

    Args:
        on_bytes: called with the number of bytes read since the last call.

    Raises:
        ModelError: a model is missing or damaged.
        ImageError: the image is missing or damaged.
        BundleError: a package is missing, a file changed while it was read, or a blob does not
            match its digest.
        StorageError: the file cannot be written.
    """
    for python, wheels in parts.wheels.items():
        refuse_incomplete_packages(wheels, parts.extras, python, parts.arch)
    files = [*_wheels(parts), *_images(parts, on_bytes), *_models(parts)]
    contents = _contents(parts, files)
    texts = [
        _text(CONTENTS, json.dumps(contents, indent=2, ensure_ascii=False) + "\n"),
        _text(SBOM, json.dumps(_bill(parts, files), indent=1, ensure_ascii=False) + "\n"),
        _text("README.txt", _readme(contents)),
        _text("install.py", Path(installer.__file__).read_text(encoding="utf-8")),
    ]
    members = [*texts, *files]
    sums = "".join(f"{member.digest}  {member.name}\n" for member in members)
    with atomic_write(target) as file:
        hashing: Any = _Hashing(file)
        with tarfile.open(fileobj=hashing, mode="w", **_OPTIONS) as tar:
            for member in [_text(SUMS, sums), *members]:
                _add(tar, member, on_bytes)
    return Written(target, target.stat().st_size, hashing.digest, contents)


def _bill(parts: Ingredients, files: Sequence[Member]) -> dict[str, Any]:
    """Return the bill of materials; the image has one of its own content."""
    found = [
        sbom.python_package(read_wheel(each.content).metadata, each.digest)
        for each in files
        if each.name.startswith("wheels/") and isinstance(each.content, Path)
    ]
    for image in map(read_image, parts.images):
        found.append(sbom.engine(image.engine or "ollama", image.engine_version or "unknown"))
        digest = next(each.digest for each in files if each.name == _image_member(image))
        found.append(
            sbom.component(
                "container", _image_member(image), image.fact("version") or "unknown", sha256=digest
            )
        )
    for model in parts.models:
        digest = _bare(model.digest)
        sha256 = digest if len(digest) == 64 else ""
        found.append(sbom.component("machine-learning-model", model.name, digest, sha256=sha256))
    return sbom.document(__version__, found)


def payload_size(images: Sequence[Path], models: Sequence[PackedModel]) -> int:
    """Return the approximate size of images and models in bytes."""
    return sum(image.stat().st_size for image in images) + sum(map(packed_size, models))


class _Hashing:
    """A file that hashes what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


def _add(tar: tarfile.TarFile, member: Member, on_bytes: OnBytes) -> None:
    info = tarfile.TarInfo(TOP + member.name)
    info.size, info.mode, info.mtime = member.size, 0o644, int(time.time())
    if isinstance(member.content, bytes):
        tar.addfile(info, io.BytesIO(member.content))
        return
    with open(member.content, "rb") as file:
        checked: Any = HashedReader(file, on_bytes)
        try:
            tar.addfile(info, checked)
        except OSError as error:
            if error.errno is not None:
                raise
            raise _changed(member) from error  # raised by tarfile: "unexpected end of data"
    if _bare(checked.digest) != member.digest:
        raise _changed(member)


def _changed(member: Member) -> BundleError:
    if "blobs" in member.name:
        return BundleError(
            f"{member.name} does not match its digest; no bundle was written",
            "run aiflux models verify to find the damaged model, and pull it again",
        )
    return BundleError(
        f"{member.name} changed while it was read; no bundle was written", "try again"
    )


def _text(name: str, text: str) -> Member:
    content = text.encode()
    return Member(name, content, hashlib.sha256(content).hexdigest())


def _wheels(parts: Ingredients) -> list[Member]:
    files = {path.name: path for wheels in parts.wheels.values() for path in wheels}
    return [
        Member(f"wheels/{name}", path, _digest(path, lambda _: None))
        for name, path in sorted(files.items())
    ]


def _images(parts: Ingredients, on_bytes: OnBytes) -> list[Member]:
    return [
        Member(_image_member(image), image.path, _digest(image.path, on_bytes))
        for image in map(read_image, parts.images)
    ]


def _image_member(image: ImageFacts) -> str:
    """Return the name of an image in the bundle: the one that runs with its engine look for."""
    vendor = AMD if image.gpu_vendors == (AMD,) else NVIDIA
    return f"image/{image_names(image.engine or 'ollama', vendor)[0]}"


def _models(parts: Ingredients) -> list[Member]:
    """Return manifests first, then blobs; a shared blob is included once."""
    manifests, blobs = [], {}
    for model in parts.models:
        refuse_incomplete(model)
        if not model.folder:
            raw = model.manifest
            name = _manifest_member(model)
            manifests.append(Member(name, raw, hashlib.sha256(raw).hexdigest()))
        for name, digest in _blob_members(model):
            blobs[name] = Member(name, model.blobs[digest], _bare(digest))
    return [*manifests, *blobs.values()]


def refuse_incomplete(model: PackedModel) -> None:
    """Reject an incomplete model, judged by file sizes.

    Raises:
        BundleError: a blob is missing or truncated.
    """
    for digest, size in parse_manifest(model.manifest).blobs.items():
        blob = model.blobs[digest]
        if not blob.is_file() or blob.stat().st_size != size:
            raise BundleError(
                f"{model.name} is incomplete: {blob} is missing or truncated",
                f"pull it again: aiflux models pull {model.name}",
            )


def _manifest_member(model: PackedModel) -> str:
    return f"models/{parse_model_name(model.name).manifest_path}"


def _blob_members(model: PackedModel) -> Iterator[tuple[str, str]]:
    """Yield the members with a model's files, and their digests."""
    if model.folder:
        for file in _files(model):
            yield f"models/{model.folder}/blobs/{file['blob']}", file["digest"]
        return
    for digest in model.blobs:
        yield f"models/{blob_path(Path(), digest)}", digest


def _files(model: PackedModel) -> list[dict[str, Any]]:
    manifest = json.loads(model.manifest)
    return [manifest["config"], *manifest["layers"]]


def _model_facts(model: PackedModel) -> dict[str, Any]:
    facts = {"name": model.name, "digest": model.digest, "size": packed_size(model)}
    if not model.folder:
        return {**facts, "manifest": _manifest_member(model)}
    snapshot = {
        "folder": model.folder,
        "commit": model.digest,
        "ref": json.loads(model.manifest)["ref"],
        "files": {file["path"]: file["blob"] for file in _files(model)},
    }
    return {**facts, "snapshot": snapshot}


def _digest(path: Path, on_bytes: OnBytes) -> str:
    with open(path, "rb") as file:
        return _bare(digest_of(file, on_bytes))


def _bare(digest: str) -> str:
    """Return a digest in the notation of ``sha256sum``."""
    return digest.removeprefix("sha256:")


def _contents(parts: Ingredients, files: Sequence[Member]) -> dict[str, Any]:
    return {
        "version": VERSION,
        "aiflux": __version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "arch": parts.arch,
        "extras": list(parts.extras),
        "pythons": {
            python: [f"wheels/{wheel.name}" for wheel in wheels]
            for python, wheels in parts.wheels.items()
        },
        "images": [_image_facts(image) for image in map(read_image, parts.images)],
        "models": [_model_facts(model) for model in parts.models],
        "bytes": sum(member.size for member in files),
    }


def _image_facts(image: ImageFacts) -> dict[str, Any]:
    facts = {name: image.fact(name) for name in ("version", "ollama", "base", "cpu_only")}
    return {
        "path": _image_member(image),
        "arch": image.arch,
        "engine": image.engine_description,
        "engine_version": image.engine_version,
        **facts,
    }


def _readme(contents: Mapping[str, Any]) -> str:
    images = [f"{image['engine'] or 'yes'}, {image['arch']}" for image in contents["images"]]
    return _README.format(
        aiflux=contents["aiflux"],
        created=contents["created"],
        arch=contents["arch"],
        pythons=", ".join(contents["pythons"]),
        extras=", ".join(contents["extras"]) or "none",
        images="; ".join(images) or "none",
        models=", ".join(model["name"] for model in contents["models"]) or "none",
    )
