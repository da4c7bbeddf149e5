"""Requests, inputs and programs for tests."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from aiflux.util.times import utc_now

# Words of Python's own messages, which mean nothing to a user.
_OF_PYTHON = re.compile(
    r"None|\b\w+Error\b|Traceback|codec|literal|subscript|unhashable|indices|recursion|max_str_digits"
    r"|\[Errno|object is not|has no attribute|unpack requires|not iterable|b'"
)


def words_of_python(text: str) -> list[str]:
    """Return the words of Python in a message."""
    return _OF_PYTHON.findall(text)


def request_line(custom_id: str = "r1", **changes: Any) -> str:
    """Return one valid request line, with top-level fields changed or (with ...) dropped."""
    entry: dict[str, Any] = {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m:1", "messages": [{"role": "user", "content": f"say {custom_id}"}]},
    }
    entry.update(changes)
    return json.dumps({key: value for key, value in entry.items() if value is not ...})


def write_input(path: Path, count: int, **changes: Any) -> Path:
    """Write ``count`` valid requests."""
    lines = [request_line(f"r{index}", **changes) for index in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_program(path: Path, text: str) -> Path:
    """Write an executable file."""
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def await_next_time() -> None:
    """Return once what is recorded next has a later time: records have milliseconds."""
    before = utc_now()
    while utc_now() == before:
        time.sleep(0.0005)


def logged_command(log: Path) -> list[str]:
    """Return the arguments that a server's stand-in was started with, by its log."""
    lines = log.read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if "command: " in line)
    words: list[str] = json.loads(line.partition("command: ")[2])
    return words
