"""Compressed files are read like plain ones, and damaged ones are refused with the remedy."""

from __future__ import annotations

import gzip
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiflux.errors import InputError
from aiflux.util.compression import PlainFile, plain_name

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Compress = Callable[[bytes], bytes]
KINDS: dict[str, Compress] = {"gzip": gzip.compress, "zstd": zstd.compress}
each_kind = pytest.mark.parametrize("kind", KINDS)
# A skippable frame of 4 bytes, as pzstd writes at the start.
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"


def read(path: Path) -> bytes:
    with PlainFile(path) as file:
        return file.read()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@each_kind
@pytest.mark.parametrize("name", ["in.jsonl", "in.gz", "in.zst", "in"])
def test_the_content_decides_and_not_the_name(tmp_path: Path, kind: str, name: str) -> None:
    text = b"one\ntwo\n" * 100_000
    assert read(write(tmp_path / name, KINDS[kind](text))) == text
    assert read(write(tmp_path / name, text)) == text
    assert read(write(tmp_path / name, b"")) == b""


@each_kind
def test_several_members_are_one_text(tmp_path: Path, kind: str) -> None:
    compress = KINDS[kind]
    content = compress(b"one\n") + compress(b"") + compress(b"two\n")
    assert read(write(tmp_path / "in", content)) == b"one\ntwo\n"


def test_skippable_frames_and_padding_are_skipped(tmp_path: Path) -> None:
    framed = SKIPPABLE + zstd.compress(b"one\n") + SKIPPABLE + zstd.compress(b"two\n")
    assert read(write(tmp_path / "in", framed)) == b"one\ntwo\n"
    assert read(write(tmp_path / "in", gzip.compress(b"one\n") + bytes(512))) == b"one\n"


@given(st.lists(st.tuples(st.integers(0, 400_000), st.integers(0, 5000)), max_size=8))
def test_any_part_can_be_read(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[int, int]]
) -> None:
    text = random.Random(5).randbytes(300_000)
    for kind, compress in KINDS.items():
        path = tmp_path_factory.mktemp(kind) / "in"
        with PlainFile(write(path, compress(text))) as file:
            for start, size in parts:
                file.seek(start)
                assert file.read(size) == text[start : start + size]
                assert file.consumed <= path.stat().st_size


@each_kind
def test_a_file_that_was_cut_is_incomplete(tmp_path: Path, kind: str) -> None:
    content = KINDS[kind](random.Random(1).randbytes(100_000))
    for size in (5, len(content) // 2, len(content) - 1):
        path = write(tmp_path / "my file", content[:size])
        with pytest.raises(InputError, match=f"is incomplete: its {kind} data") as error:
            read(path)
        assert f"{kind} -t '{path}'" in str(error.value.remedy)


@each_kind
def test_other_data_at_the_end_is_refused(tmp_path: Path, kind: str) -> None:
    """A reader that stops there would lose the rest without a word."""
    path = write(tmp_path / "in", KINDS[kind](b"one\n") + b"{more text that is not compressed}\n")
    with pytest.raises(InputError, match="has other data at its end"):
        read(path)


@each_kind
def test_any_changed_byte_is_found_or_changes_nothing(tmp_path: Path, kind: str) -> None:
    text = b"".join(b"line %d of the text\n" % at for at in range(2000))
    options = {zstd.CompressionParameter.checksum_flag: 1}
    good = gzip.compress(text, mtime=0) if kind == "gzip" else zstd.compress(text, options=options)
    source = random.Random(7)
    for _ in range(200):
        bad = bytearray(good)
        bad[source.randrange(4, len(bad))] ^= 1 << source.randrange(8)
        with suppress(InputError):  # the error of damaged or incomplete data
            assert read(write(tmp_path / "in", bytes(bad))) == text


def test_a_window_that_is_too_large_gets_its_own_advice(tmp_path: Path) -> None:
    options = {
        zstd.CompressionParameter.window_log: 30,
        zstd.CompressionParameter.enable_long_distance_matching: 1,
    }
    compressor = zstd.ZstdCompressor(options=options)
    content = compressor.compress(b"one\n" * 1000) + compressor.flush()
    with pytest.raises(InputError, match="window that is too large") as error:
        read(write(tmp_path / "in.zst", content))
    assert "zstd -d --long=31" in str(error.value.remedy)


def test_files_of_gzip_itself_are_read(tmp_path: Path) -> None:
    text = write(tmp_path / "in.txt", random.Random(3).randbytes(200_000))
    for level in ("-1", "-9"):
        done = subprocess.run(["gzip", "-c", level, text], capture_output=True, check=True)
        assert read(write(tmp_path / "in.gz", done.stdout)) == text.read_bytes()


@pytest.mark.parametrize(
    ("name", "plain"), [("a.jsonl.gz", "a.jsonl"), ("a.CSV.ZST", "a.CSV"), ("a.json", "a.json")]
)
def test_the_plain_name(name: str, plain: str) -> None:
    assert plain_name(Path(name)) == Path(plain)
