"""Write a small file in Apptainer's image format (SIF): a header, a table and one JSON object.

The layout is that of Apptainer 1.4 (``pkg/sif/sif.go``), without a file system inside.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

ARCHITECTURES = {"amd64": b"02", "arm64": b"04", "ppc64le": b"06"}
_TABLE, _TOTAL, _DESCRIPTOR = 4096, 48, 585


def make_sif(path: Path, arch: str = "amd64", **labels: str) -> Path:
    """Write an image; ``labels`` are AI-Flux's own, without their prefix."""
    named = {f"aiflux.{name}": value for name, value in labels.items()}
    text = json.dumps({"data": {"attributes": {"labels": named}}, "type": "container"}).encode()
    return make_raw_sif(path, text, arch)


def make_raw_sif(path: Path, metadata: bytes, arch: str = "amd64") -> Path:
    """Write an image with these bytes as metadata."""
    data = _TABLE + _TOTAL * _DESCRIPTOR
    header = b"".join(
        (
            b"#!/usr/bin/env run-singularity\n".ljust(32, b"\0"),
            b"SIF_MAGIC\0",
            b"01\0",
            ARCHITECTURES[arch] + b"\0",
            bytes(range(16)),  # the image's id
            struct.pack(
                "<8q", 0, 0, _TOTAL - 1, _TOTAL, _TABLE, data - _TABLE, data, len(metadata)
            ),
        )
    )
    fields = struct.pack(
        "<i?3I3q4q", 0x4006, True, 1, 0xF0000001, 0, data, len(metadata), len(metadata), 0, 0, 0, 0
    )
    descriptor = fields + b"inspect-metadata.json".ljust(128, b"\0") + bytes(384)
    path.write_bytes(
        header.ljust(_TABLE, b"\0") + descriptor.ljust(_TOTAL * _DESCRIPTOR, b"\0") + metadata
    )
    return path
