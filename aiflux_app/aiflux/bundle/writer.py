"""Write a bundle: what a cluster without internet needs, in one tar file.

Below ``aiflux-bundle/``, in this order: ``SHA256SUMS`` (as ``sha256sum -c`` takes it),
``bundle.json``, ``README.txt``, ``install.py``, ``wheels/``, ``image/`` and ``models/``, which is
laid out as a models directory. Nothing is compressed: images and weights do not get smaller.
``core/bundleinstaller.py`` reads it.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from aiflux import __version__
from aiflux.bundle import installer
from aiflux.bundle.installer import CONTENTS, SUMS, TOP, VERSION
from aiflux.engines.ollama.store import (
    HashedReader,
    OnBytes,
    blob_path,
    digest_of,
    missing_parts,
    read_manifest,
)
from aiflux.errors import BundleError
from aiflux.image.sif import ImageFacts, read_image
from aiflux.models.name import ModelName
from aiflux.util.files import atomic_write

_CHUNK = 4 << 20
_OPTIONS: dict[str, Any] = {"copybufsize": _CHUNK}  # 16 kB would be slow

_README = """\
AI-Flux {aiflux} for a machine without internet, made {created}
  Python packages for {arch}, Python {pythons}
  extras of them: {extras}
  image: {image}
  models: {models}

Check it:     sha256sum bundle.tar        (aiflux bundle create told the sum)
Install it:   tar -xf bundle.tar aiflux-bundle/install.py
              python3 aiflux-bundle/install.py bundle.tar --prefix DIR [--models-dir DIR]
Then:         DIR/bin/aiflux doctor

install.py needs one of the Pythons above and nothing else. It reads the bundle where it lies: there
is no need to unpack it. Where it is unpacked all the same: sha256sum -c SHA256SUMS
"""


@dataclass(frozen=True)
class Member:
    """One file of a bundle.

    Attributes:
        content: a file, or the bytes themselves.
        digest: SHA-256 in hexadecimal digits.
    """

    name: str
    content: Path | bytes
    digest: str

    @property
    def size(self) -> int:
        """Its bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Ingredients:
    """What goes into a bundle.

    Attributes:
        image: None leaves it out.
        models_dir: where the models are.
        wheels: wheel files by versions of Python such as 3.11.
        arch: what the wheels are for, as ``uname -m`` names it.
        extras: of AI-Flux's own, whose wheels are among them.
    """

    image: Path | None
    models_dir: Path
    models: tuple[ModelName, ...]
    wheels: Mapping[str, Sequence[Path]]
    arch: str
    extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        digest: SHA-256 of the whole file.
    """

    path: Path
    size: int
    digest: str
    contents: dict[str, Any] = field(repr=False)


def write_bundle(target: Path, parts: Ingredients, on_bytes: OnBytes = lambda _: None) -> Written:
    """Write a bundle, which is whole or not there.

    Args:
        on_bytes: told how many bytes were read since it was last told.

    Raises:
        ModelError: a model is missing or damaged.
        ImageError: the image is missing or damaged.
        BundleError: a file changed while it was read, or a blob is not what its name says.
        StorageError: the file cannot be written.
    """
    files = [*_wheels(parts), *_image(parts, on_bytes), *_models(parts)]
    contents = _contents(parts, files)
    texts = [
        _text(CONTENTS, json.dumps(contents, indent=2, ensure_ascii=False) + "\n"),
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


def payload_size(image: Path | None, models_dir: Path, models: Sequence[ModelName]) -> int:
    """Return about how many bytes image and models have."""
    of_image = image.stat().st_size if image else 0
    return of_image + sum(read_manifest(models_dir, name).size for name in models)


class _Hashing:
    """A file that is hashed as it is written."""

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
            raise _changed(member) from error  # tarfile's own: "unexpected end of data"
    if _bare(checked.digest) != member.digest:
        raise _changed(member)


def _changed(member: Member) -> BundleError:
    if "blobs" in member.name:
        return BundleError(
            f"{member.name} is not what its name says; no bundle was written",
            "aiflux models verify tells which model is damaged; pull that one again",
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


def _image(parts: Ingredients, on_bytes: OnBytes) -> list[Member]:
    if parts.image is None:
        return []
    return [Member("image/aiflux.sif", parts.image, _digest(parts.image, on_bytes))]


def _models(parts: Ingredients) -> list[Member]:
    """Manifests first; a blob that several models share stands once."""
    manifests, blobs = [], {}
    for name in parts.models:
        manifest = read_manifest(parts.models_dir, name)
        refuse_torn(parts.models_dir, name)
        path = parts.models_dir / name.manifest_path
        manifests.append(Member(f"models/{name.manifest_path}", path, manifest.digest))
        for digest in manifest.blobs:
            path = blob_path(parts.models_dir, digest)
            blobs[digest] = Member(f"models/blobs/{path.name}", path, digest.partition(":")[2])
    return [*manifests, *blobs.values()]


def refuse_torn(models_dir: Path, name: ModelName) -> None:
    """Refuse a model that is not whole, as far as sizes tell.

    Raises:
        BundleError: a blob is missing or cut.
    """
    missing = missing_parts(models_dir, name)
    if missing:
        raise BundleError(
            f"{name.served} is not whole in {models_dir}: {missing[0]} is missing or cut",
            f"pull it again: aiflux models pull {name.served}",
        )


def _digest(path: Path, on_bytes: OnBytes) -> str:
    with open(path, "rb") as file:
        return _bare(digest_of(file, on_bytes))


def _bare(digest: str) -> str:
    """Return a digest as ``sha256sum`` writes it."""
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
        "image": None if parts.image is None else _image_facts(read_image(parts.image)),
        "models": [
            {
                "name": name.served,
                "digest": f"sha256:{read_manifest(parts.models_dir, name).digest}",
                "size": read_manifest(parts.models_dir, name).size,
                "manifest": f"models/{name.manifest_path}",
            }
            for name in parts.models
        ],
        "bytes": sum(member.size for member in files),
    }


def _image_facts(image: ImageFacts) -> dict[str, Any]:
    known = ("version", "ollama", "engine", "base", "cpu_only")
    facts = {name: image.fact(name) for name in known}
    return {"path": "image/aiflux.sif", "arch": image.arch, **facts}


def _readme(contents: Mapping[str, Any]) -> str:
    image = contents["image"]
    return _README.format(
        aiflux=contents["aiflux"],
        created=contents["created"],
        arch=contents["arch"],
        pythons=", ".join(contents["pythons"]),
        extras=", ".join(contents["extras"]) or "none",
        image=f"{image['engine'] or 'yes'}, {image['arch']}" if image else "none",
        models=", ".join(model["name"] for model in contents["models"]) or "none",
    )
