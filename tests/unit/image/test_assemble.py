"""container/assemble.sh: an engine's files are assembled once, also by several builds at once."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
BUILD = """\
set -eu
what="thing" mark=mark
. "$1/container/assemble.sh"
stamp() {{ echo {version}; }}
assemble() {{ sleep {seconds}; seq 1000 >"$1/content"; }}
assemble_once "$2"
seq 1000 | cmp - "$2/content"
"""


def build(target: Path, version: str, seconds: float) -> subprocess.Popen[str]:
    script = BUILD.format(version=version, seconds=seconds)
    words = ["sh", "-c", script, "build", str(ROOT), str(target)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


def ended(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")


def test_builds_at_once_leave_one_complete_result(awkward: Path) -> None:
    target = awkward / "engine"
    ended([build(target, "1", number % 3 * 0.02) for number in range(24)])
    first = target.stat().st_ino
    ended([build(target, "1", 0)])
    assert target.stat().st_ino == first, "it was made again"
    ended([build(target, "2", 0)])
    assert (target / "mark").read_text() == "2\n"
    assert [path.name for path in awkward.iterdir()] == ["engine"]


def test_a_newer_version_replaces_an_older_one_in_builds_at_once(awkward: Path) -> None:
    target = awkward / "engine"
    ended([build(target, "1", 0)])
    ended([build(target, "2", number % 3 * 0.02) for number in range(24)])
    assert (target / "mark").read_text() == "2\n"
    assert [path.name for path in awkward.iterdir()] == ["engine"]


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    process = build(tmp_path / "mine", "1", 0)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "exists and is not a thing" in errors
