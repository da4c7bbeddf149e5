"""Measure the ways from a table or a folder to requests, and from results back to a table."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from bench.children import Usage, run
from bench.decoding import SEED
from bench.row import Row, say

_MB = 1_000_000
_TEMPLATE = "Summarize: {text}"
_MODEL = "small:1b"
_MOST_MEMORY = 150 * _MB
_LIMIT = 3000.0
_ALONE = """
import sys
from importlib.abc import MetaPathFinder

class WithoutPandas(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "pandas":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, WithoutPandas())
from aiflux.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def measure(folder: Path, rows: int, files: int) -> list[Row]:
    """Convert a table of about 200 bytes a row and a folder, and join results to the table.

    Args:
        rows: of the table; 5 million make 1 GB.
        files: in the folder, of 2 KB each.
    """
    say(f"converting: a table of {rows:,} rows")
    table = _write_table(folder / "rows.csv", rows)
    requests = folder / "rows.jsonl"
    found = [_conversion(table, requests, rows)]
    say("converting: joining results with it")
    found += _joins(table, requests, rows)
    say(f"converting: {files:,} files")
    return [*found, _folder(folder / "texts", files)]


def _aiflux(output: Path, *words: str | Path) -> Usage:
    """Return the usage of a command with an output, as where only its libraries are installed.

    pyarrow imports pandas if it is there, and with it 75 MB.
    """
    return _python(_ALONE, *words, "-o", output)


def _python(code: str, *words: str | Path) -> Usage:
    """Return the usage of some Python in a process of its own."""
    return run([sys.executable, "-c", code, *map(str, words)], limit=_LIMIT)


def _copy(source: Path, target: Path) -> float:
    """Return the seconds of ``cp -r``."""
    seconds = run(["cp", "-r", str(source), str(target)], limit=_LIMIT).wall
    run(["rm", "-r", str(target)], limit=_LIMIT)
    return seconds


def _write_table(path: Path, rows: int) -> Path:
    """Write a CSV of about 200 bytes a row: an id, a text with quotes and line ends, a number."""
    source = random.Random(SEED)
    words = ("lorem", "ipsum", '""dolor""', "sit,", "amet", "Größe", "e\nf", "consectetur")
    texts = [" ".join(source.choices(words, k=26)) for _ in range(64)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write("id,text,stars\n")
        for number in range(rows):
            file.write(f'r{number:08d},"{texts[number % 64]}",{number % 5}\n')
    return path


def _conversion(table: Path, requests: Path, rows: int) -> Row:
    usage = _aiflux(
        requests, "convert", "csv", table, "--template", _TEMPLATE, "--id-column", "id",
        "--model", _MODEL,
    )  # fmt: skip
    reading = (
        "import sys; from pyarrow import csv as c\n"
        "o = c.ParseOptions(newlines_in_values=True)\n"
        "assert sum(len(b) for b in c.open_csv(sys.argv[1], parse_options=o)) == int(sys.argv[2])"
    )
    arrow = _python(reading, table, str(rows)).wall
    polars = _python(
        "import sys, polars; assert len(polars.read_csv(sys.argv[1])) == int(sys.argv[2])",
        table, str(rows),
    ).wall  # fmt: skip
    copy = _copy(table, table.with_name("copy"))
    return Row(
        f"convert csv, {rows:,} rows with ids, {table.stat().st_size / _MB:,.0f} MB",
        f"{usage.wall:.1f} s, {usage.rss / _MB:.0f} MB: {usage.wall / arrow:.1f} x pyarrow's read "
        f"({arrow:.1f} s), {usage.wall / polars:.1f} x polars' ({polars:.1f} s), "
        f"{usage.wall / copy:.0f} x cp ({copy:.1f} s)",
        "<= 3 x pyarrow, 150 MB",
        usage.wall <= 3 * arrow and usage.rss <= _MOST_MEMORY,
    )


def _joins(table: Path, requests: Path, rows: int) -> list[Row]:
    results = table.parent / "out.json"
    for words in (("plan", requests, results, "1"), ("fill", requests, results, "256")):
        run([sys.executable, "-m", "bench.reading", *map(str, words)], limit=_LIMIT)
    run([sys.executable, "-m", "bench.reading", "finalise", "-", str(results)], limit=_LIMIT)
    found = []
    for name in ("csv", "parquet", "duckdb"):
        output = table.parent / f"joined.{name}"
        usage = _aiflux(
            output, "results", f"to-{name}", results, "--source", table, "--id-column", "id"
        )
        found.append(
            Row(
                f"results to-{name}, {rows:,} rows joined with their source",
                f"{usage.wall:.1f} s ({rows / usage.wall:,.0f} rows/s), {usage.rss / _MB:.0f} MB",
                "<= 150 MB",
                usage.rss <= _MOST_MEMORY,
            )
        )
        output.unlink()
    results.unlink()
    return found


def _folder(folder: Path, files: int) -> Row:
    text = "A line of a text that somebody wrote.\n" * 54
    for number in range(files):
        place = folder / f"{number // 1000:03d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:06d}.txt").write_text(text, encoding="utf-8")
    output = folder.with_name("folder.jsonl")
    usage = _aiflux(output, "convert", "dir", folder, "--recursive")
    copy = _copy(folder, folder.with_name("copy"))
    return Row(
        f"convert dir, {files:,} files of 2 KB",
        f"{usage.wall:.1f} s ({files / usage.wall:,.0f} files/s), {usage.rss / _MB:.0f} MB: "
        f"{usage.wall / copy:.1f} x cp -r ({copy:.1f} s)",
        "<= 150 MB",
        usage.rss <= _MOST_MEMORY,
    )
