"""Work distributed to processes: the same result, whatever happens to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiflux.util.parallel import helpers, share_out
from tests.unit.helpers import request_line

ROOT = Path(__file__).parents[3]


def start(mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.tools.sharing", mode],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(mode: str) -> Any:
    with start(mode) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(out)


Check = Callable[[Path, int], Any]


@pytest.fixture(scope="module")
def check() -> Iterator[Check]:
    """Get the two summaries of an input from a process."""
    with start("summaries") as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(path: Path, part_bytes: int) -> Any:
            print(part_bytes, path, file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())  # type: ignore[union-attr]

        yield ask
        process.stdin.close()


_names = st.integers(0, 12).map(lambda number: f"r{number}")
_bodies = st.fixed_dictionaries(
    {"messages": st.lists(st.builds(lambda text: {"content": text}, st.text()), max_size=2)},
    optional={"model": st.sampled_from(["a", "b", ""]), "max_tokens": st.integers()},
)
_requests = st.builds(
    lambda name, body, url: request_line(name, body=body, url=url).encode(),
    _names,
    _bodies,
    st.sampled_from(["/v1/chat/completions", "/v1/chat/completions", "/v1/embeddings"]),
)
_sound = st.builds(
    lambda number, model: request_line(
        f"s{number}", body={"model": model, "messages": [{}]}
    ).encode(),
    st.integers(),
    st.sampled_from(["a", "b"]),
)
_lines = st.one_of(
    _sound,
    _sound.map(lambda line: b" " + line),
    _sound.map(lambda line: line.replace(b"[]", b"[" + b"7," * 5000 + b"7]")),
    _requests,
    st.sampled_from([b"", b" ", b"\t\x0b", b"{", b"\xff", b"[]", b"\x00", b"\r"]),
)
_ends = st.sampled_from([b"\n", b"\n", b"\n", b"\r\n", b"\r\r\n", b"\n\n"])
_inputs = st.builds(
    lambda bom, lines, last: bom + b"".join(line + end for line, end in lines) + last,
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.lists(st.tuples(_sound, _ends)) | st.lists(st.tuples(_lines, _ends)),
    st.just(b"") | _lines,
)


@settings(max_examples=150)
@given(content=_inputs, part_bytes=st.integers(1, 2000))
def test_several_processes_find_the_same_as_one(
    tmp_path_factory: pytest.TempPathFactory, check: Check, content: bytes, part_bytes: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "shared.jsonl"
    path.write_bytes(content)
    alone, shared = check(path, part_bytes)
    assert shared == alone


def test_a_large_input_is_sampled_in_the_same_way(tmp_path: Path, check: Check) -> None:
    path = tmp_path / "in.jsonl"
    lines = (f'{{"custom_id":"x{n}"}}\n' for n in range(100))
    body = '"method":"POST","url":"/v1/embeddings","body":{"model":"m","input":""}'
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f'{{"custom_id":"{n}",{body}}}\n' for n in range(70_000))
    alone, shared = check(path, 1 << 20)
    assert shared == alone
    assert len(alone["marks"]) == 35_000
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(lines)
    alone, shared = check(path, 1 << 20)
    assert shared == alone
    assert alone[2][0].startswith("lines 70,001-70,020 and 80 more")


def test_the_work_of_a_killed_child_is_still_done() -> None:
    found = outcome("kill")
    assert [square for square, _ in found] == [number * number for number in range(10)]
    assert [number for number, (_, here) in enumerate(found) if here] == [0, 4, 9]


def test_an_error_is_raised_in_the_parent_and_no_child_is_left() -> None:
    found, error, left = outcome("fail")
    assert found == [0, 1]
    assert error == "two"
    assert not left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_child_is_left_behind(number: signal.Signals) -> None:
    with start("leave") as process:
        assert process.stdout is not None
        children = [int(process.stdout.readline()) for _ in range(3)]
        process.send_signal(number)
        assert process.wait(30) != 0
        deadline = time.monotonic() + 30
        while any(alive(child) for child in children):
            assert time.monotonic() < deadline, "a child lives on"
            time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"


def test_a_process_of_several_threads_does_not_fork() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    assert helpers() == 0
    release.set()
    thread.join()


def test_without_children_the_parent_does_the_work() -> None:
    assert list(share_out(lambda _: os.getpid(), range(3), 0)) == [os.getpid()] * 3
