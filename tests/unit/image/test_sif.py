"""Reading images without Apptainer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aiflux.errors import ImageError
from aiflux.image.sif import machine_arch, older_version, read_image
from tests.tools.make_sif import make_raw_sif, make_sif


@pytest.mark.parametrize(("machine", "arch"), [("x86_64", "amd64"), ("aarch64", "arm64")])
def test_architecture_and_labels(awkward: Path, machine: str, arch: str) -> None:
    image = read_image(make_sif(awkward / "a.sif", arch, cpu_only="yes", version="1.2"))
    assert image.arch == arch == machine_arch(machine)
    assert image.cpu_only
    assert image.fact("version") == "1.2"
    assert image.fact("ollama") is None


@pytest.mark.parametrize(
    ("image", "command", "warns"),
    [
        ("1.2.0", "1.3.0", True),
        ("1.9.0", "1.10.0", True),
        ("1.3.0", "1.3.1", False),
        ("1.4.0", "1.3.0", False),
        ("1", "1.3.0", False),
        ("?", "1.3.0", False),
    ],
)
def test_an_image_with_an_older_second_number_is_a_warning(
    tmp_path: Path, image: str, command: str, warns: bool
) -> None:
    found = older_version(read_image(make_sif(tmp_path / "a.sif", version=image)), command)
    assert (found is not None) is warns
    if found is not None:
        assert f"has AI-Flux {image}, older than this command ({command})" in found[0]
        assert found[1] == "build it again: make image"


def test_an_image_without_labels_is_not_cpu_only(tmp_path: Path) -> None:
    assert not read_image(make_sif(tmp_path / "a.sif")).cpu_only


def test_null_labels_are_ignored(tmp_path: Path) -> None:
    made = make_raw_sif(tmp_path / "a.sif", b'{"data": {"attributes": {"labels": null}}}')
    assert read_image(made).labels == {}


def test_a_sandbox_has_no_facts(tmp_path: Path) -> None:
    assert read_image(tmp_path).arch is None


def test_a_missing_image_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="image not found") as raised:
        read_image(tmp_path / "none.sif")
    assert raised.value.remedy == "build it: make image"


@pytest.mark.parametrize(
    "content", [b"", b"#!/bin/sh\n", b"hsqs" * 100, b"SIF_MAGIC\0" * 20], ids=len
)
def test_other_files_are_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.sif").write_bytes(content)
    with pytest.raises(ImageError, match="is not an Apptainer image"):
        read_image(tmp_path / "a.sif")


@pytest.mark.parametrize("kept", [128, 4096, 4700, 32176, 32200, -1])
def test_a_truncated_image_is_damaged(tmp_path: Path, kept: int) -> None:
    path = make_sif(tmp_path / "a.sif", cpu_only="no")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ImageError, match="is damaged") as raised:
        read_image(path)
    assert "copy it again" in str(raised.value.remedy)


@pytest.mark.parametrize("metadata", [b"", b"[]", b"{", b'{"data": 3}', b"\xff"])
def test_invalid_labels_are_reported(tmp_path: Path, metadata: bytes) -> None:
    with pytest.raises(ImageError, match="its labels cannot be read"):
        read_image(make_raw_sif(tmp_path / "a.sif", metadata))


def test_a_pipe_is_not_an_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.sif")
    with pytest.raises(ImageError, match="is a pipe or a device"):
        read_image(tmp_path / "pipe.sif")
