"""Temporary folders: removed at the end, or at the next start after a SIGKILL."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aiflux.util.files import storage_error, temporary_folder

HOLDING = """
import sys, time
from pathlib import Path
from aiflux.util.files import temporary_folder
with temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "models").mkdir()
    (folder / "models" / "content").write_text("x")
    print(folder, flush=True)
    time.sleep(60)
"""


def holder(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(parent)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free some space and run the same command again"),
        (errno.EDQUOT, "free some space and run the same command again"),
        (errno.EACCES, "make it writable and run the same command again"),
        (errno.EROFS, "make it writable and run the same command again"),
    ],
)
def test_the_remedy_of_a_failed_write_is_that_of_its_reason(number: int, fix: str) -> None:
    error = storage_error(OSError(number, os.strerror(number)), Path("/o"))
    assert error.message == f"cannot write /o: {os.strerror(number)}"
    assert error.remedy is not None
    assert error.remedy.startswith(fix)


def test_a_folder_is_private_and_removed(tmp_path: Path) -> None:
    with temporary_folder(tmp_path) as folder:
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


def test_only_the_folder_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    killed, left = holder(tmp_path)
    living, used = holder(tmp_path)
    with killed, living:
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
        assert left.is_dir()
        with temporary_folder(tmp_path) as folder:
            assert set(tmp_path.iterdir()) == {used, folder}
        assert (used / "models" / "content").read_text() == "x"
        living.kill()


@pytest.mark.parametrize("kind", ["no lock", "symlink", "file", "lock is a symlink"])
def test_folders_that_may_not_be_ours_are_kept(kind: str, tmp_path: Path) -> None:
    elsewhere, place = tmp_path / "elsewhere", tmp_path / "aiflux-abc"
    elsewhere.mkdir()
    (elsewhere / ".in-use").touch()
    if kind == "symlink":
        place.symlink_to(elsewhere)
    elif kind == "file":
        place.touch()
    else:
        place.mkdir()
    if kind == "lock is a symlink":
        (place / ".in-use").symlink_to(elsewhere / ".in-use")
    with temporary_folder(tmp_path):
        pass
    assert place.exists()
    assert (elsewhere / ".in-use").exists()
