"""A full disk: the run stops cleanly, reports where, and resumes when there is space."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.faulty_engine import FaultyEngine
from tests.unit.helpers import write_input

_MOUNT = 'mount -t tmpfs -o size="$1" none "$2" && cd "$2" && shift 2 && exec "$@"'


def on_small_disk(place: Path, size: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in its own tmpfs and namespaces; copy the files out at the end."""
    disk = place / "disk"
    disk.mkdir(exist_ok=True)
    keep = place / "kept"
    script = f'{_MOUNT.replace("exec ", "")}; code=$?; cp -r . "$KEEP"; exit $code'
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", size,
         str(disk), *command],
        env={**os.environ, "KEEP": str(keep)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_full_disk_is_exit_5_and_the_run_resumes(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.fail("unshare (util-linux) is needed to make a small disk")
    source = write_input(tmp_path / "in.jsonl", 400)
    with FaultyEngine() as engine:
        options = ["--engine-url", engine.url, "--concurrency", "8"]
        worker = [sys.executable, "-m", "aiflux.worker", str(source), "out.json", *options]
        done = on_small_disk(tmp_path, "96k", *worker)
        assert done.returncode == 5, done.stderr
        assert "No space left on device" in done.stderr
        assert "out.json.aiflux" in done.stderr
        kept = tmp_path / "kept"
        assert not (kept / "out.json").exists()
        sent = sum(engine.seen.values())
        assert 0 < sent < 400
        again = subprocess.run(worker, cwd=kept, capture_output=True, text=True, check=False)
        assert again.returncode == 0, again.stderr
    entries = json.loads((kept / "out.json").read_text(encoding="utf-8"))
    assert len(entries) == 400
    assert sum(engine.seen.values()) <= 400 + 16, "only the requests in flight are sent again"
