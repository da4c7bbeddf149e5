"""``aiflux convert`` as a command, alone and in front of a pipe."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aiflux.cli.main import main
from aiflux.errors import StorageError, UsageError
from aiflux.util.files import atomic_write
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.converters.test_converters import prompts, requests_in, write

AIFLUX = [sys.executable, "-m", "aiflux.cli"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    return tmp_path


def convert(kind: str, *options: str, output: str = "q.jsonl") -> int:
    return main(["convert", kind, *options, "--output", output])


def test_every_kind(place: Path) -> None:
    write(place / "d" / "a.md", "A")
    Image.new("RGB", (2, 2)).save(place / "d" / "b.png")
    pq.write_table(pa.table({"text": ["p"]}), place / "t.parquet")
    write(place / "t.tsv", "text\tid\nc\t1\n")
    write(place / "t.json", '[{"q": "j"}]')
    table = ("--template", "{text}")
    assert convert("csv", "--input", "t.tsv", *table, "--id-column", "id", output="1") == 0
    assert convert("dir", "--input", "d", "--pattern", "*.md", output="2") == 0
    assert convert("json", "--input", "t.json", "--field", "q", output="3") == 0
    assert convert("images", "--input", "d", "--pattern", "*.png", output="4") == 0
    assert convert("parquet", "--input", "t.parquet", *table, output="5") == 0
    assert [list(prompts(place / name)) for name in "12345"] == [
        ["1"], ["a.md"], ["row-1"], ["b.png"], ["row-1"],
    ]  # fmt: skip


def test_prompts_of_several_parts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "t.csv", "text,by\na,Ann\n")
    write(place / "e.csv", "text,answer\nx,y\n")
    write(place / "p.j2", "{{ text | upper }}\n")
    write(place / "s.j2", "For {{ by }}.\n")
    more = ("--template-file", "p.j2", "--system-file", "s.j2", "--examples", "e.csv")
    assert convert("csv", "t.csv", *more) == 0
    turns = requests_in(place / "q.jsonl")[0]["body"]["messages"]
    assert [turn["content"] for turn in turns] == ["For Ann.", "X", "y", "A"]
    wrong = {
        ("--template", "p.j2"): "for a file: --template-file p.j2",
        ("--template", "{text.0}"): "line 2: column 'text' has no field '0'",
        ("--template", "{text}", "--system", "S", "--system-file", "s.j2"): "cannot be combined",
        ("--turn", "{text}"): "--turn '{text}' is not ROLE=TEMPLATE",
        ("--template-file", "none.j2"): "the template 'none.j2' cannot be read",
    }
    for words, message in wrong.items():
        assert convert("csv", "t.csv", "--force", *words) == 2
        assert message in capsys.readouterr().err


def test_what_every_request_has(place: Path) -> None:
    write(place / "t.csv", "text\na\n")
    write(place / "t.txt", "Say:\n{text}\n")
    write(place / "s.json", '{"type": "object"}')
    assert convert(
        "csv", "--input", "t.csv", "--template-file", "t.txt", "--model", "m:1", "--system", "S",
        "--temperature", "0.2", "--max-tokens", "5", "--param", 'stop=["END"]', "--param", "n=1",
        "--schema", "s.json",
    ) == 0  # fmt: skip
    body = requests_in(place / "q.jsonl")[0]["body"]
    assert body.pop("response_format")["json_schema"]["name"] == "s"
    assert body.pop("messages")[1]["content"] == "Say:\na"
    assert body == {
        "model": "m:1", "temperature": 0.2, "max_tokens": 5, "stop": ["END"], "n": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--template", "{text}", "--param", "stop=END"), "a text needs quotes"),
        (("--template", "{text}", "--param", "x"), "KEY= is missing"),
        (("--template", "{text}", "--param", "x=NaN"), "NaN is not JSON"),
        ((), "no template was given"),
        (("--template-file", "none.txt"), "'none.txt' cannot be read"),
    ],
)
def test_usage(
    place: Path, options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "t.csv", "text\na\n")
    assert convert("csv", "--input", "t.csv", *options) == 2
    assert words in capsys.readouterr().err
    assert main(["convert", "csv", "--input", "t.csv", "--template", "{text}"]) == 2
    assert "no output was given" in capsys.readouterr().err


def test_a_dry_run_shows_the_first_three(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "t.csv", "text\n" + "a\n" * 5)
    assert main(["convert", "csv", "--input", "t.csv", "--template", "{text}", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count('"custom_id"') == 3
    assert "nothing was written" in printed.err
    Image.effect_noise((64, 64), 50).save(place / "x.png")
    assert main(["convert", "images", "--input", ".", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "characters)" in shown
    assert len(shown) < 1000
    assert {path.name for path in place.iterdir()} == {"t.csv", "x.png"}


def test_the_summary_lists_what_was_skipped(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "t.csv", "text,b\n1,2\n" + "x\n" * 30)
    assert convert("csv", "--input", "t.csv", "--template", "{text}", "--skip-bad") == 0
    printed = capsys.readouterr().out
    assert "1 request from 31 rows of t.csv -> q.jsonl" in printed
    assert "skipped 30:" in printed
    assert "line 3: 1 cell, but the header has 2: 'x'" in printed
    assert "... and 10 more" in printed
    assert "all of them: " in printed
    assert "q.skipped.jsonl" in printed


def run(*words: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*AIFLUX, *words], capture_output=True, check=False, **more)


def test_convert_in_front_of_run(place: Path) -> None:
    write(place / "t.csv", "text\na\nb\n")
    piped = ("convert", "csv", "--input", "t.csv", "--template", "{text}", "--output", "-")
    with FaultyEngine() as engine:
        words = ("run", "--input", "-", "--model", "m:1", "--engine-url", engine.url)
        converted = run(*piped)
        assert b"2 requests from 2 rows" in converted.stderr
        assert run(*words, input=converted.stdout).returncode == 2  # no --output
        done = run(*words, "--output", "out.json", input=converted.stdout)
        assert done.returncode == 0, done.stderr
        kept = place / "out.json.input.jsonl"
        assert kept.read_bytes() == converted.stdout
        before = kept.stat()
        again = run(*words, "--output", "out.json", input=converted.stdout)
        assert b"already finished" in again.stdout
        assert kept.stat() == before
        assert engine.seen.total() == 2
    empty = run(*words, "--output", "out.json", input=b"")
    assert empty.returncode == 2
    assert b"no request came through the pipe" in empty.stderr
    assert kept.read_bytes() == converted.stdout


def test_a_refused_conversion_puts_nothing_into_a_pipe(place: Path) -> None:
    write(place / "t.csv", "text\na\nb,c\n")
    done = run("convert", "csv", "--input", "t.csv", "--template", "{text}", "--output", "-")
    assert done.returncode == 2
    assert done.stdout == b""
    assert b"line 3: 2 cells" in done.stderr


def test_what_is_no_file_is_not_replaced(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "t.csv", "text\na\n")
    os.mkfifo(place / "pipe")
    (place / "folder").mkdir()
    (place / "to-pipe").symlink_to("pipe")
    for name, words in (
        ("pipe", "a device or a pipe"),
        ("folder", "a directory"),
        ("to-pipe", "pipe"),
    ):
        for force in ((), ("--force",)):
            options = ("--input", "t.csv", "--template", "{text}", *force)
            assert convert("csv", *options, output=name) == 2
            assert words in capsys.readouterr().err
        with pytest.raises((UsageError, StorageError)), atomic_write(place / name):
            pass
    assert (place / "pipe").is_fifo()
    assert (place / "to-pipe").is_symlink()


def test_a_link_stays_and_its_file_is_replaced(place: Path) -> None:
    write(place / "t.csv", "text\na\n")
    (place / "scratch").mkdir()
    (place / "q.jsonl").symlink_to("scratch/q.jsonl")
    assert convert("csv", "--input", "t.csv", "--template", "{text}") == 0
    assert (place / "q.jsonl").is_symlink()
    assert prompts(place / "scratch" / "q.jsonl") == {"row-1": "a"}


def test_the_list_of_what_is_skipped_replaces_nothing_unasked(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = write(place / "q.skipped.jsonl", "text\na\n")
    write(place / "t.csv", "text\na\n")
    assert convert("csv", "--input", "t.csv", "--template", "{text}") == 2
    assert "q.skipped.jsonl" in capsys.readouterr().err
    assert convert("csv", "--input", mine.name, "--template", "{text}", "--force") == 2
    assert "is the input, but the skipped rows would be listed there" in capsys.readouterr().err
    assert mine.read_text() == "text\na\n"


def test_an_input_through_a_pipe(place: Path) -> None:
    table = b"text\na\nb\n"
    words = ("csv", "--template", "{text}", "--output", "q.jsonl", "--force")
    done = run("convert", *words, "--input", "-", input=table)
    assert done.returncode == 0, done.stderr
    assert prompts(place / "q.jsonl") == {"row-1": "a", "row-2": "b"}
    with open(write(place / "t.csv", table), "rb") as file:
        assert run("convert", *words, "--input", "-", stdin=file).returncode == 0
    empty = run("convert", *words, "--input", "-", input=b"")
    assert empty.returncode == 2
    assert b"'/dev/stdin' is empty" in empty.stderr
    assert b"needs a directory" in run("convert", "dir", "--input", "-", "--output", "x").stderr


def test_a_full_disk_for_stdout_is_reported(place: Path) -> None:
    write(place / "t.csv", "text\na\n")
    with open("/dev/full", "wb") as full:
        words = ("csv", "--input", "t.csv", "--template", "{text}", "--output", "-")
        done = subprocess.run(
            [*AIFLUX, "convert", *words], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 5
    assert b"stdout has only part of the output: No space left" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(place: Path, number: signal.Signals) -> None:
    write(place / "t.csv", "text\n" + "some text\n" * 600_000)
    words = ("csv", "--input", "t.csv", "--template", "{text}", "--output", "q.jsonl")
    process = subprocess.Popen([*AIFLUX, "convert", *words], stderr=subprocess.PIPE)
    while process.poll() is None and not list(place.glob(".q.jsonl.*")):
        time.sleep(0.02)
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 5
    assert b"stopped; nothing was written" in printed
    assert [path.name for path in place.iterdir()] == ["t.csv"]


def test_run_from_a_terminal_waits_for_no_pipe() -> None:
    ours, theirs = pty.openpty()
    try:
        done = run("run", "--input", "-", "--output", "o.json", stdin=theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 2
    assert b"reads stdin, which is a terminal" in done.stderr


def test_results_of_a_job_number_that_nobody_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", "show", "no-such-output.json"]) == 2
    assert "no run found" in capsys.readouterr().err


def test_a_trial_is_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "t.csv", "text\na\n")
    main(["convert", "csv", "--input", "t.csv", "--template", "{text}", "--dry-run"])
    shown = capsys.readouterr().out.removeprefix("request 1:\n")
    assert json.loads(shown)["custom_id"] == "row-1"


NO_THREADS = """
import resource, sys, threading

threading.stack_size(4 << 30)
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from aiflux.cli.main import main
from aiflux.cli.render.progress import byte_bar

with byte_bar("reading", 10) as advance:
    advance(10)
sys.exit(main())
"""


def test_a_bar_on_a_terminal_needs_no_thread(place: Path) -> None:
    """A system at its limit (``ulimit -u``) starts none; here, no thread's stack has room."""
    write(place / "d" / "a.md", "A")
    ours, theirs = pty.openpty()
    words = ["convert", "dir", "--input", "d", "--output", "q.jsonl"]
    try:
        done = subprocess.run(
            [sys.executable, "-c", NO_THREADS, *words],
            stdout=subprocess.PIPE, stderr=theirs, check=False, timeout=60,
        )  # fmt: skip
        shown = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0, shown
    assert "reading" in shown
    assert "converting" in shown
    assert "\\x1b" not in shown, "escape sequences are not shown as text"
    assert list(prompts(place / "q.jsonl").values()) == ["A"]
