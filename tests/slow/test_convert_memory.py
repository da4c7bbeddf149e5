"""Conversions of large files need little memory."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from aiflux.converters import csv_to_jsonl

SIZE = 300 << 20
BOUND = 150 << 20
CODE = """
import sys
from aiflux.converters import {function} as convert
summary = convert(*sys.argv[1:3], **{options})
print(summary.{count}, open("/proc/self/status").read())
"""
BACK = """
import sys
from aiflux.converters import {function} as write
from aiflux.converters.results import BackOptions
summary = write(*sys.argv[1:3], BackOptions(**{options}))
print(summary.answered, open("/proc/self/status").read())
"""


def measured(function: str, count: str, source: Path, target: Path, **options: object) -> list[int]:
    """Run a converter in a separate process; return its count, and its peak memory in bytes."""
    return figures_of(CODE.format(function=function, count=count, options=options), source, target)


def measured_back(function: str, output: Path, target: Path, **options: object) -> list[int]:
    """Write results as a table in a separate process; return the answers, and its peak memory."""
    return figures_of(BACK.format(function=function, options=options), output, target)


def figures_of(code: str, *files: Path) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", code, *files], capture_output=True, text=True, check=True
    )
    return figures(done.stdout)


def figures(printed: str) -> list[int]:
    """Return the count that a program printed, and its peak memory in bytes.

    VmHWM is the peak of the program alone; ru_maxrss starts with that of the forking process.
    """
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", printed, re.MULTILINE)
    assert peak is not None, printed
    return [int(printed.split(maxsplit=1)[0]), int(peak[1]) * 1024]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    path = tmp_path_factory.mktemp("large") / "in.csv"
    rows = 0
    with open(path, "w", encoding="utf-8") as file:
        file.write("id,text,note\n")
        while file.tell() < SIZE:
            block = (f'{rows + i},"words, more\nwörds {"x" * 400}",n\n' for i in range(1000))
            file.writelines(block)
            rows += 1000
    return path, rows


def answered(requests: Path, output: Path) -> Path:
    """Write an output with an answer to each request."""
    with open(requests, encoding="utf-8") as lines, open(output, "w", encoding="utf-8") as file:
        separator = "[\n"
        for line in lines:
            answer = {"choices": [{"message": {"content": "a" * 100}}]}
            entry = {"input": json.loads(line), "output": answer, "metadata": {}}
            file.write(separator + json.dumps(entry))
            separator = ",\n"
        file.write("\n]\n")
    return output


@pytest.mark.slow
def test_a_table_of_answers_needs_no_index(large: tuple[Path, int], tmp_path: Path) -> None:
    """As `aiflux ask` writes it: the results are in the order of the rows."""
    source, rows = large
    csv_to_jsonl(source, tmp_path / "q.jsonl", template="{text}")
    output = answered(tmp_path / "q.jsonl", tmp_path / "out.json")
    done, peak = measured_back(
        "results_to_table", output, tmp_path / "back.csv",
        source=str(source), custom_ids=False, errors=False, in_order=True,
    )  # fmt: skip
    assert done == rows
    assert peak < BOUND / 3


@pytest.mark.slow
def test_a_large_csv_and_its_results(large: tuple[Path, int], tmp_path: Path) -> None:
    source, rows = large
    requests = tmp_path / "q.jsonl"
    done, peak = measured(
        "csv_to_jsonl", "requests", source, requests, template="{text}", id_column="id"
    )
    assert done == rows
    assert peak < BOUND
    output = answered(requests, tmp_path / "out.json")
    done, peak = measured_back(
        "results_to_csv", output, tmp_path / "back.csv", source=str(source), id_column="id"
    )
    assert done == rows
    assert peak < BOUND


@pytest.mark.slow
def test_a_large_json_array(tmp_path: Path) -> None:
    source, rows = tmp_path / "in.json", 0
    with open(source, "w", encoding="utf-8") as file:
        file.write("[")
        while file.tell() < SIZE:
            file.write(",".join('{"q": "%s"}' % ("x" * 1000) for _ in range(1000)) + ",")
            rows += 1000
        file.write('{"q": "last"}]')
    done, peak = measured("json_to_jsonl", "requests", source, tmp_path / "q.jsonl", field="q")
    assert done == rows + 1
    assert peak < BOUND


@pytest.mark.slow
def test_an_unclosed_quote_in_a_large_file(tmp_path: Path) -> None:
    """The rest of the file would be one cell; it is rejected long before memory is full."""
    source = tmp_path / "in.csv"
    with open(source, "w", encoding="utf-8") as file:
        file.write('text\n"')
        file.writelines("x" * 999 + "\n" for _ in range(SIZE // 1000))
    code = "from aiflux.cli.main import main; import sys; sys.exit(main(sys.argv[1:]))"
    words = ["convert", "csv", "--input", source, "--template", "{text}", "--output", "q.jsonl"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert re.search(r"lines 2 to \d+: a cell larger than 64 MiB", done.stderr)
