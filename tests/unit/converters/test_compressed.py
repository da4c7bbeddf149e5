"""Compressed tables, JSON, lists and texts convert to the same requests as plain ones."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aiflux.converters import csv_to_jsonl, directory_to_jsonl, images_to_jsonl, json_to_jsonl
from aiflux.errors import InputError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEXT = "Die Lieferung war schön und überraschend günstig, aber größer als gedacht"
ROWS = "".join(f"{at}\t{TEXT} {at}\n" for at in range(3000))
INPUTS: dict[str, tuple[Callable[..., Any], bytes, dict[str, Any]]] = {
    "t.tsv": (csv_to_jsonl, f"id\ttext\n{ROWS}".encode(), {"template": "{text}"}),
    "u.csv": (csv_to_jsonl, f"id\ttext\n{ROWS}".encode("utf-16"), {"template": "{text}"}),
    "w.csv": (csv_to_jsonl, f"id\ttext\n{ROWS}".encode("cp1252"), {"template": "{text}"}),
    "a.json": (json_to_jsonl, b'[{"q": "one"}, {"q": "two"}]', {"field": "q"}),
    "l.jsonl": (json_to_jsonl, b'{"q": "one"}\n{"q": "two"}\n', {"field": "q"}),
}


@pytest.mark.parametrize("suffix", [".gz", ".zst", ""])
@pytest.mark.parametrize("name", INPUTS)
def test_the_requests_are_those_of_the_plain_file(tmp_path: Path, name: str, suffix: str) -> None:
    convert, content, options = INPUTS[name]
    (tmp_path / name).write_bytes(content)
    done: list[tuple[int, int]] = []
    convert(tmp_path / name, tmp_path / "plain.jsonl", **options)
    compress = zstd.compress if suffix == ".zst" else gzip.compress
    source = tmp_path / (name + suffix)
    source.write_bytes(compress(content))
    summary = convert(source, tmp_path / "q.jsonl", **options, progress=lambda *at: done.append(at))
    assert (tmp_path / "q.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    assert summary.requests == summary.rows > 0
    assert all(at <= whole for at, whole in done)


def test_texts_of_a_directory_and_a_list_of_images(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"hello"))
    (folder / "b.txt.gz").write_bytes(gzip.compress(bytes(100_000)))
    (folder / "c.md").write_bytes(gzip.compress(b"a" * 100_000))
    summary = directory_to_jsonl(folder, tmp_path / "q.jsonl", max_file_size=50_000)
    assert summary.requests == 1
    assert {each.place: each.reason for each in summary.examples} == dict.fromkeys(
        ("b.txt.gz", "c.md"), "decompresses to more than 50 KB; --max-file-size"
    )
    (folder / "d.txt.gz").write_bytes(gzip.compress(b"hello")[:-3])
    with pytest.raises(InputError, match="1 of 4 files") as error:
        directory_to_jsonl(folder, tmp_path / "p.jsonl", max_file_size=50_000)
    assert "is incomplete" in error.value.problems[0]
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    (tmp_path / "list.txt.gz").write_bytes(gzip.compress(b"x.png\n"))
    assert images_to_jsonl(tmp_path / "list.txt.gz", tmp_path / "i.jsonl").requests == 1


@pytest.mark.parametrize("name", INPUTS)
def test_a_damaged_file_writes_nothing(tmp_path: Path, name: str) -> None:
    convert, content, options = INPUTS[name]
    (tmp_path / name).write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(InputError, match="is incomplete") as error:
        convert(tmp_path / name, tmp_path / "q.jsonl", **options)
    assert "gzip -t" in str(error.value.remedy)
    assert {path.name for path in tmp_path.iterdir()} == {name}
