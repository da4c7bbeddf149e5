"""Converters for images and Parquet, which need optional libraries."""

from __future__ import annotations

import base64
import io
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aiflux.converters import images_to_jsonl, parquet_to_jsonl, results_to_parquet
from aiflux.converters.results import BackOptions
from aiflux.errors import ConfigError, InputError, UsageError
from aiflux.util.extras import remedy
from tests.unit.converters.test_converters import prompts, refused, requests_in, write

ORIENTATION = 0x0112


def picture(path: Path, size: tuple[int, int] = (40, 20), mode: str = "RGB", **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path, **more)
    return path


def sent(request: dict[str, Any]) -> tuple[str, bytes]:
    """Return the type and bytes of the image in a request."""
    url = request["body"]["messages"][0]["content"][1]["image_url"]["url"]
    kind, _, data = url.removeprefix("data:").partition(";base64,")
    return kind, base64.b64decode(data)


def test_images_become_requests(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    png = picture(folder / "a.png")
    picture(folder / "b.webp")
    picture(folder / "deep" / "c.jpg")
    write(folder / "notes.txt", "x")
    output = tmp_path / "o.jsonl"
    summary = images_to_jsonl(folder, output, recursive=True, template="What is {name}?")
    first, second, third = requests_in(output)
    assert first["custom_id"] == "a.png"
    assert first["metadata"] == {"source_file": "a.png"}
    assert first["body"]["messages"][0]["content"][0] == {"type": "text", "text": "What is a?"}
    assert sent(first) == ("image/png", png.read_bytes())
    assert sent(second)[0] == "image/jpeg"
    assert third["custom_id"] == "deep/c.jpg"
    assert "notes.txt: not an image file name (.avif, .bmp" in str(summary.examples[0])


def test_large_images_are_scaled_down_and_rotated_upright(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture(folder / "a.jpg", (400, 200), exif=exif)
    picture(folder / "b.png", (400, 200), "RGBA")
    output = tmp_path / "o.jsonl"
    images_to_jsonl(folder, output, max_pixels=5000)
    (kind_a, content_a), (kind_b, content_b) = map(sent, requests_in(output))
    assert (kind_a, kind_b) == ("image/jpeg", "image/png")
    assert Image.open(io.BytesIO(content_a)).size == (50, 100)
    assert Image.open(io.BytesIO(content_b)).size == (100, 50)
    with pytest.raises(UsageError):
        images_to_jsonl(folder, output, max_pixels=0)


def test_a_list_of_images(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    source = write(tmp_path / "in" / "list.txt", "# comment\n\na.png\ngone.png\na.png\n")
    output = tmp_path / "o.jsonl"
    with pytest.raises(InputError, match="2 of 3 images") as error:
        images_to_jsonl(source, output)
    assert "line 4: gone.png: the image cannot be read: No such file" in refused(error)
    assert "line 5: custom_id 'a.png' was already used at line 3" in refused(error)
    assert images_to_jsonl(source, output, skip_bad=True).requests == 1
    with pytest.raises(InputError, match="is a single image"):
        images_to_jsonl(tmp_path / "in" / "a.png", output)


def test_invalid_images_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    whole = picture(folder / "good.png", (200, 200)).read_bytes()
    write(folder / "half.png", whole[: len(whole) // 2])
    write(folder / "text.jpg", "no image")
    with pytest.raises(InputError, match="2 of 3 images") as error:
        images_to_jsonl(folder, tmp_path / "o.jsonl")
    assert "text.jpg: not an image" in refused(error)
    assert "half.png: the image cannot be read" in refused(error)
    assert images_to_jsonl(folder, tmp_path / "o.jsonl", skip_bad=True).requests == 1


@pytest.mark.parametrize(
    ("mode", "ending"), [("I;16", "png"), ("I;16", "tif"), ("I", "tif"), ("F", "tif")]
)
def test_grayscale_with_more_than_8_bits_is_stretched(
    tmp_path: Path, mode: str, ending: str
) -> None:
    """Pillow's own conversion clips at 255, which would make the whole image white."""
    image = Image.new(mode, (64, 64), 300)
    image.paste(4000, (32, 0, 64, 64))
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / f"a.{ending}")
    images_to_jsonl(tmp_path / "in", tmp_path / "o.jsonl")
    kind, content = sent(requests_in(tmp_path / "o.jsonl")[0])
    shown = Image.open(io.BytesIO(content)).convert("L")
    assert kind == "image/jpeg"
    assert shown.getpixel((8, 32)) < 10
    assert shown.getpixel((56, 32)) > 245


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.jpg", mode="CMYK")
    images_to_jsonl(tmp_path / "in", tmp_path / "o.jsonl")
    _, content = sent(requests_in(tmp_path / "o.jsonl")[0])
    assert Image.open(io.BytesIO(content)).mode == "RGB"


def test_only_the_first_frame_is_sent_and_a_note_says_so(tmp_path: Path) -> None:
    pages = [Image.new("L", (20, 20), 80 * number) for number in range(3)]
    (tmp_path / "in").mkdir()
    pages[0].save(tmp_path / "in" / "a.tif", save_all=True, append_images=pages[1:])
    picture(tmp_path / "in" / "b.png")
    summary = images_to_jsonl(tmp_path / "in", tmp_path / "o.jsonl")
    assert summary.notes == ("1 image has several frames or pages; only the first is sent",)


def test_urls_in_a_list_are_not_downloaded(tmp_path: Path) -> None:
    source = write(tmp_path / "list.txt", "https://example.org/a.png\n")
    with pytest.raises(InputError) as error:
        images_to_jsonl(source, tmp_path / "o.jsonl")
    assert "line 1: https://example.org/a.png: it is a URL: download" in refused(error)


def test_missing_pillow_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    picture_folder = tmp_path / "in"
    picture_folder.mkdir()
    with pytest.raises(ConfigError) as error:
        images_to_jsonl(picture_folder, tmp_path / "o.jsonl")
    assert error.value.remedy == remedy("images", has_pip=True)


def parquet(path: Path, columns: dict[str, Any], **more: Any) -> Path:
    pq.write_table(pa.table(columns), path, **more)
    return path


def test_rows_of_parquet_become_requests(tmp_path: Path) -> None:
    source = parquet(
        tmp_path / "in.parquet",
        {
            "id": [10, 11, 12],
            "text": ["a", None, "c"],
            "day": [date(2026, 1, 2)] * 3,
            "x": [0.5, float("nan"), None],
            "tags": [["p"], [], None],
        },
        row_group_size=2,
    )
    output = tmp_path / "o.jsonl"
    summary = parquet_to_jsonl(
        source, output, template="{text} {day}", id_column="id", keep=["x", "tags"]
    )
    assert prompts(output) == {"10": "a 2026-01-02", "11": " 2026-01-02", "12": "c 2026-01-02"}
    kept = [entry["metadata"]["columns"] for entry in requests_in(output)]
    assert kept == [{"x": 0.5, "tags": ["p"]}, {"x": None, "tags": []}, {"x": None, "tags": None}]
    assert summary.notes == ("3 rows in 2 row groups",)


def test_nested_columns_are_json_in_a_prompt(tmp_path: Path) -> None:
    rows = {
        "tags": [["a", "é"], None],
        "meta": [{"at": date(2026, 1, 2), "who": [{"name": "Ann"}]}, None],
        "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
    }
    source = parquet(tmp_path / "in.parquet", rows)
    template = "{tags} {meta} {map} {meta.at} {meta.who.0.name} {tags.1}"
    parquet_to_jsonl(source, tmp_path / "o.jsonl", template=template, keep=["map"])
    meta = '{"at": "2026-01-02", "who": [{"name": "Ann"}]}'
    assert [*prompts(tmp_path / "o.jsonl").values()] == [
        f'["a", "é"] {meta} {{"k": 1}} 2026-01-02 Ann é', "     ",
    ]  # fmt: skip
    assert requests_in(tmp_path / "o.jsonl")[0]["metadata"]["columns"] == {"map": {"k": 1}}
    with pytest.raises(InputError, match="1 of 2 rows") as error:
        parquet_to_jsonl(source, tmp_path / "p.jsonl", template="{meta.when}")
    assert "column 'meta' has no field 'when'" in refused(error)
    with pytest.raises(InputError, match=r"names 'other.at'"):
        parquet_to_jsonl(source, tmp_path / "p.jsonl", template="{other.at}")


def test_binary_cells_are_invalid(tmp_path: Path) -> None:
    source = parquet(tmp_path / "in.parquet", {"text": [b"caf\xc3\xa9", b"\xff"]})
    with pytest.raises(InputError, match="1 of 2 rows") as error:
        parquet_to_jsonl(source, tmp_path / "o.jsonl", template="{text}")
    assert "row 2: column 'text' contains 1 byte of binary data" in refused(error)
    parquet_to_jsonl(source, tmp_path / "o.jsonl", template="{text}", skip_bad=True)
    assert prompts(tmp_path / "o.jsonl") == {"row-1": "café"}


def test_nanoseconds_are_kept(tmp_path: Path) -> None:
    """Python's datetime has microseconds; pyarrow refuses to convert finer values."""
    numbers = pa.array([1, 1_000, None], pa.int64())
    times = numbers.cast(pa.timestamp("ns", "Europe/Berlin"))
    source = parquet(tmp_path / "in.parquet", {"at": times, "for": numbers.cast(pa.duration("ns"))})
    parquet_to_jsonl(source, tmp_path / "o.jsonl", template="{at}", keep=["for"])
    assert list(prompts(tmp_path / "o.jsonl").values()) == [
        "1970-01-01T01:00:00.000000001+0100", "1970-01-01T01:00:00.000001+01:00", "",
    ]  # fmt: skip
    source = parquet(tmp_path / "in.parquet", {"at": times})
    entry = {"input": requests_in(tmp_path / "o.jsonl")[0], "output": {}, "metadata": {}}
    output = write(tmp_path / "r.json", f"[\n{json.dumps(entry)}\n]\n")
    results_to_parquet(output, tmp_path / "back.parquet", BackOptions(source=source))
    assert pq.read_table(tmp_path / "back.parquet")["at"].combine_chunks().equals(times)


def test_float32_values_keep_their_short_form(tmp_path: Path) -> None:
    source = parquet(tmp_path / "in.parquet", {"x": pa.array([0.1, None, 1e20], pa.float32())})
    parquet_to_jsonl(source, tmp_path / "o.jsonl", template="{x}")
    assert list(prompts(tmp_path / "o.jsonl").values()) == ["0.1", "", "1e+20"]


def test_a_directory_without_tables_is_rejected(tmp_path: Path) -> None:
    write(tmp_path / "_tmp.parquet", "left by a program that was killed")
    with pytest.raises(InputError, match="contains no file of") as error:
        parquet_to_jsonl(tmp_path, tmp_path / "o.jsonl", template="{x}")
    assert "aiflux convert dir" in str(error.value.remedy)


def test_files_that_are_not_parquet_are_rejected(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", "id,text\n1,2\n")
    with pytest.raises(InputError, match="cannot be read as Parquet") as error:
        parquet_to_jsonl(source, tmp_path / "o.jsonl", template="{text}")
    assert "aiflux convert csv" in refused(error)
    whole = parquet(source, {"text": ["abc" * 1000] * 100}, compression="none").read_bytes()
    write(source, whole[:4] + bytes(60) + whole[64:])
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        parquet_to_jsonl(source, tmp_path / "o.jsonl", template="{text}")


def test_a_missing_parquet_column_lists_the_existing_ones(tmp_path: Path) -> None:
    source = parquet(tmp_path / "in.parquet", {"a": [1]})
    with pytest.raises(InputError, match="'b'") as error:
        parquet_to_jsonl(source, tmp_path / "o.jsonl", template="{b}")
    assert "its columns are 'a'" in refused(error)


def test_missing_pyarrow_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError) as error:
        parquet_to_jsonl(tmp_path / "x.parquet", tmp_path / "o.jsonl", template="{b}")
    assert error.value.remedy == remedy("parquet", has_pip=True)
