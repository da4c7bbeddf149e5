"""Push an image with the layout of the official Ollama image to a registry, without docker.

``make_oci_image.py REGISTRY NAME TAG ROOTFS OLLAMA`` prints the manifest's digest. ROOTFS is an
unpacked root without Python (debootstrap --variant=minbase), OLLAMA is a tree with bin/ and lib/.
Protocol: https://github.com/opencontainers/distribution-spec/blob/main/spec.md
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import sys
import tarfile
import tempfile
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"

RUNTIME = {
    "Env": [
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64",
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        "NVIDIA_VISIBLE_DEVICES=all",
        "OLLAMA_HOST=0.0.0.0:11434",
    ],
    "Entrypoint": ["/bin/ollama"],
    "Cmd": ["serve"],
    "ExposedPorts": {"11434/tcp": {}},
}
"""As in the last stage of Ollama's own Dockerfile."""


@dataclass(frozen=True)
class Layer:
    """A packed layer, with the digests of its compressed and uncompressed form."""

    path: Path
    digest: str
    diff_id: str

    @property
    def descriptor(self) -> dict[str, Any]:
        """The layer's entry in a manifest."""
        return {"mediaType": LAYER, "digest": self.digest, "size": self.path.stat().st_size}


class Hashing:
    """A write-only file with its SHA-256."""

    def __init__(self, sink: IO[bytes]) -> None:
        self._sink = sink
        self._sum = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write all of it."""
        self._sum.update(data)
        return self._sink.write(data)

    def flush(self) -> None:
        """Flush the underlying file."""
        self._sink.flush()

    @property
    def digest(self) -> str:
        """SHA-256 of the data written so far."""
        return f"sha256:{self._sum.hexdigest()}"


def owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Skip device nodes, which an ordinary user cannot unpack."""
    if member.isdev():
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def pack(path: Path, trees: list[tuple[Path, str]]) -> Layer:
    """Pack directories under the given names into one layer."""
    with path.open("wb") as file:
        compressed = Hashing(file)
        with gzip.GzipFile(fileobj=compressed, mode="wb", compresslevel=1, mtime=0) as zipped:
            plain = Hashing(zipped)  # type: ignore[arg-type]
            with tarfile.open(fileobj=plain, mode="w|", format=tarfile.GNU_FORMAT) as tar:  # type: ignore[call-overload]
                for tree, name in trees:
                    tar.add(tree, arcname=name, filter=owned_by_root)
    return Layer(path, compressed.digest, plain.digest)


class Registry:
    """A registry on loopback, in plain http."""

    def __init__(self, address: str, name: str) -> None:
        self._address = address
        self._root = f"/v2/{name}"

    def _exchange(
        self, method: str, path: str, body: bytes | IO[bytes] | None, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self._address, timeout=60)
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        if response.status not in (200, 201, 202):
            raise SystemExit(f"{method} {path}: {response.status} {answer[:500]!r}")
        return response

    def put_blob(self, body: bytes | IO[bytes], size: int, digest: str) -> None:
        """Upload a blob in one piece."""
        start = self._exchange("POST", f"{self._root}/blobs/uploads/", None, {})
        place = urllib.parse.urlsplit(start.headers["Location"])
        query = urllib.parse.urlencode([*urllib.parse.parse_qsl(place.query), ("digest", digest)])
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        self._exchange("PUT", f"{place.path}?{query}", body, headers)

    def put_manifest(self, tag: str, manifest: bytes) -> str:
        """Upload a manifest under a tag; return its digest."""
        path = f"{self._root}/manifests/{tag}"
        answer = self._exchange("PUT", path, manifest, {"Content-Type": MANIFEST})
        return str(answer.headers["Docker-Content-Digest"])


def image_config(layers: list[Layer]) -> bytes:
    """Return the image's configuration."""
    rootfs = {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]}
    config = {"architecture": "amd64", "os": "linux", "config": RUNTIME, "rootfs": rootfs}
    return json.dumps(config).encode()


def push_image(address: str, name: str, tag: str, layers: list[Layer]) -> str:
    """Push layers, configuration and manifest; return the manifest's digest."""
    registry = Registry(address, name)
    for layer in layers:
        with layer.path.open("rb") as file:
            registry.put_blob(file, layer.path.stat().st_size, layer.digest)
    config = image_config(layers)
    digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
    registry.put_blob(config, len(config), digest)
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": digest, "size": len(config)},
        "layers": [layer.descriptor for layer in layers],
    }
    return registry.put_manifest(tag, json.dumps(manifest).encode())


def children(directory: Path, prefix: str = "") -> Iterator[tuple[Path, str]]:
    """Yield each entry of a directory with its name in the layer."""
    for child in sorted(directory.iterdir()):
        yield child, prefix + child.name


def main(address: str, name: str, tag: str, rootfs: str, ollama: str) -> None:
    """Pack and push the two layers."""
    with tempfile.TemporaryDirectory() as scratch:
        layers = [
            pack(Path(scratch, "rootfs.tar.gz"), list(children(Path(rootfs)))),
            pack(
                Path(scratch, "ollama.tar.gz"),
                [
                    (Path(ollama, "bin/ollama"), "usr/bin/ollama"),
                    (Path(ollama, "lib/ollama"), "usr/lib/ollama"),
                ],
            ),
        ]
        print(push_image(address, name, tag, layers))


if __name__ == "__main__":
    if len(sys.argv) != 6:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
