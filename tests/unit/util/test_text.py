"""Any text, including half characters and control characters, in every place."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.text import Text

from aiflux.cli.main import main
from aiflux.converters.results import (
    BackOptions,
    results_to_csv,
    results_to_jsonl,
    results_to_parquet,
)
from aiflux.errors import ExitCode
from aiflux.util.text import error_text, json_text, terminal_line, terminal_text, whole, whole_text
from aiflux.worker.console import TerminalConsole
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.helpers import request_line, words_of_python
from tests.unit.working import Working

ANY = st.text(st.characters(codec=None), max_size=12)
HALF, HOSTILE = "half \ud83d", "\x1b[2J\x1b]0;title\x07\x9b31m\x7f\u202egnp.exe\r\0\udc80"
UNSAFE = set(map(chr, (*range(9), 11, 12, *range(14, 32), *range(0x7F, 0xA0)))) | set(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


@pytest.fixture(scope="module")
def engine() -> Iterator[FaultyEngine]:
    with FaultyEngine() as running:
        yield running


def ask(folder: Path, engine: FaultyEngine, requests: list[dict[str, Any]], **more: Any) -> Working:
    """Write requests, each with every half character as an escape."""
    working = Working(folder, engine.url, max_failures="100%", **more)
    text = "".join(f"{json.dumps(request)}\n" for request in requests)
    working.input.write_text(text, encoding="utf-8")
    return working


def request(custom_id: str, prompt: str, metadata: dict[str, str]) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    body = {"model": "m:1", "messages": messages}
    made: dict[str, Any] = json.loads(request_line(custom_id, body=body, metadata=metadata))
    return made


def cli(*words: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "aiflux.cli", *words],
        cwd=folder,
        capture_output=True,
        check=False,
    )


def safe(text: str) -> bool:
    return not (UNSAFE | {"\r"}) & set(text.replace("\r\n", "\n"))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(ANY, st.sampled_from(["answer:", "fail:"]), ANY, st.dictionaries(ANY, ANY)),
        min_size=1,
        max_size=6,
    )
)
def test_a_run_accepts_any_text(
    engine: FaultyEngine,
    tmp_path_factory: pytest.TempPathFactory,
    made: list[tuple[str, str, str, dict[str, str]]],
) -> None:
    folder = tmp_path_factory.mktemp("run")
    requests = [
        request(f"{number}{name}", kind + text, metadata)
        for number, (name, kind, text, metadata) in enumerate(made)
    ]
    working = ask(folder, engine, requests)
    assert working.run() is ExitCode.OK
    for path in folder.rglob("*.json*"):
        if path.is_file():
            path.read_bytes().decode("utf-8")
    for entry, asked, (_, kind, text, _) in zip(working.results, requests, made, strict=True):
        assert entry["input"] == asked
        if kind == "answer:":
            assert entry["output"]["choices"][0]["message"]["content"] == text
        elif text.strip():
            assert entry["error"]["message"] == text
    assert whole(working.status) == working.status


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_half_characters_stay_in_results_and_are_replaced_in_tables(
    tmp_path: Path, engine: FaultyEngine, form: str
) -> None:
    requests = [
        request(f"id {HALF}", f'answer:{{"{HALF}": "{HALF}"}}', {"columns": {HALF: HALF}}),  # type: ignore[dict-item]
        request(f"failed {HOSTILE}", f"fail:{HOSTILE}", {}),
    ]
    working = ask(tmp_path, engine, requests, output=f"out.{form}")
    assert working.run() is ExitCode.OK
    shown = cli("results", "show", working.output.name, "--json", folder=tmp_path)
    assert [entry["custom_id"] for entry in json.loads(shown.stdout)] == [
        request["custom_id"] for request in requests
    ]

    everything = BackOptions(json_fields=())
    results_to_csv(working.output, tmp_path / "a.csv", everything)
    written = (tmp_path / "a.csv").read_bytes().decode("utf-8")
    rows = list(csv.reader(io.StringIO(written, newline="")))
    replaced = "half \ufffd"
    assert rows[0] == ["custom_id", replaced, "answer", "error", f"aiflux_{replaced}"]
    assert rows[1] == [f"id {replaced}", replaced, f'{{"{replaced}": "{replaced}"}}', "", replaced]
    assert rows[2][0] == f"failed {whole_text(HOSTILE)}".replace("\0", "\ufffd")

    results_to_jsonl(working.output, tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_bytes().decode("utf-8").split("\n")
    assert json.loads(lines[0])["custom_id"] == f"id {replaced}"
    assert json.loads(lines[1])["custom_id"] == f"failed {whole_text(HOSTILE)}"

    parquet = pytest.importorskip("pyarrow.parquet")
    results_to_parquet(working.output, tmp_path / "a.parquet", everything)
    assert parquet.read_table(tmp_path / "a.parquet").column("custom_id").to_pylist() == [
        f"id {replaced}", f"failed {whole_text(HOSTILE)}",
    ]  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_no_printed_text_controls_the_terminal(
    tmp_path: Path, engine: FaultyEngine, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.chdir(tmp_path)
    failing = request(f"id {HOSTILE}", f"fail:{HOSTILE}", {})
    ask(tmp_path, engine, [failing, request("b", f"answer:{HOSTILE}", {})])
    url = ("--engine-url", engine.url, "--input", "in.jsonl", "--output", "out.json")
    for code, *words in (
        (3, "run", *url),
        (3, "run", *url, "--retry-failed"),
        (0, "check", "in.jsonl"),
        (0, "status", "out.json"),
        (0, "status", "out.json", "--json"),
        (0, "results", "show", "out.json"),
        (0, "results", "show", "out.json", "--json"),
        (0, "report", "out.json", "--json"),
        (0, "report", "out.json", "--output", "-"),
    ):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding, "backslashreplace") for _ in "12"]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            assert main(words) == code, words
        for stream in streams:
            stream.flush()
        out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
        assert safe(out + err), (words, out, err)
        if "run" in words:
            assert "\\x1b[2J" in err
        if "--json" in words:
            json.loads(out)


def test_a_report_in_a_file_is_safe_too(tmp_path: Path, engine: FaultyEngine) -> None:
    working = ask(tmp_path, engine, [request(f"id {HOSTILE}", f"fail:{HOSTILE}", {})])
    assert working.run() is ExitCode.OK
    for name, *more in (("page.html",), ("report.json", "--json")):
        assert main(["report", str(working.output), "--output", str(tmp_path / name), *more]) == 0
        written = (tmp_path / name).read_bytes().decode("utf-8")
        assert safe(written)
        assert "title" in written


def test_results_that_are_nested_too_deeply_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text(f'[\n{{"input": {"[" * 5000}\n]\n')
    done = cli("results", "show", "out.json", folder=tmp_path)
    assert done.returncode == ExitCode.USAGE
    assert b"is not an output of AI-Flux" in done.stderr


def test_the_last_error_of_a_process_is_safe_to_show(tmp_path: Path, engine: FaultyEngine) -> None:
    ask(tmp_path, engine, [request(f"id {HOSTILE}", f"fail:{HOSTILE}", {})])
    done = cli("run", "--engine-url", engine.url, "--input", "in.jsonl", folder=tmp_path)
    assert done.returncode == ExitCode.FAILURES, done.stderr
    assert b"1 of 1 request failed" in done.stderr
    assert safe(done.stderr.decode("utf-8"))


def test_logs_show_no_escape_sequences(tmp_path: Path, engine: FaultyEngine) -> None:
    ask(tmp_path, engine, [request("a", "hi", {})]).run()
    log = tmp_path / "out.json.aiflux" / "logs" / "engine-0000-0.log"
    log.write_bytes(f"\x1b[31mred\x1b[0m {HOSTILE}\n".encode("utf-8", "surrogateescape"))
    done = cli("logs", "out.json", "--engine", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.decode("utf-8")
    assert printed.startswith("red \\x1b[2J")
    assert safe(printed)


def test_a_console_on_a_terminal_keeps_only_its_own_styles() -> None:
    leader, follower = pty.openpty()
    with open(follower, "w", encoding="utf-8") as terminal:
        console = TerminalConsole(file=terminal, force_terminal=True, color_system="standard")
        console.print(Text(HOSTILE, style="red"), "[bold]markup[/bold]")
    shown = os.read(leader, 4096).decode("utf-8")
    os.close(leader)
    assert "\x1b[31m" in shown
    assert "\x1b[2J" not in shown
    assert "\x1b]0;" not in shown


@given(ANY)
def test_text_for_a_terminal_is_safe_and_keeps_its_lines(text: str) -> None:
    shown = terminal_text(text)
    assert safe(shown)
    shown.encode("utf-8")
    assert terminal_text(shown) == shown
    assert shown.count("\n") == text.count("\n")
    assert "\n" not in terminal_line(text)
    if safe(text) and whole_text(text) == text:
        assert shown == text


@given(st.recursive(ANY, lambda part: st.lists(part) | st.dictionaries(ANY, part), max_leaves=9))
def test_json_for_files_and_streams_loses_nothing(value: Any) -> None:
    for text in (json_text(value), json_text(value, only_ascii=True)):
        assert json.loads(text.encode("utf-8")) == value
        assert not UNSAFE & set(text)
    json_text(whole(value)).encode("utf-8")


def _raised(call: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as raised:  # noqa: PT011 - any error of Python
        call()
    return raised.value


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (b"ab\xff".decode, "byte 0xff at offset 2 is not valid UTF-8"),
        (lambda: json.loads("{}")["config"], "'config' is missing"),
        (lambda: json.loads("null")["config"], "a value has the wrong type"),
        (lambda: json.loads("null").get, "a value has the wrong type"),
        (lambda: json.loads("[]")[0], "it ends too early"),
        (lambda: struct.unpack("<I", b"x"), "it ends too early"),
        (lambda: json.loads("[" * 100_000), "it is nested too deeply"),
        (lambda: json.loads("1" * 5000), "a number has too many digits"),
        (lambda: json.loads("x"), "Expecting value: line 1 column 1 (char 0)"),
        (Path("/nowhere/file").read_bytes, "No such file or directory"),
        (lambda: next(iter(())), "an unknown error"),
    ],
)  # fmt: skip
def test_errors_of_python_are_in_plain_words(call: Callable[[], object], words: str) -> None:
    assert error_text(_raised(call)) == words
    assert not words_of_python(words)
