"""Leases: one holder at a time, and a dead holder's lease is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aiflux.errors import RunConflictError
from aiflux.util.lease import acquire

_HOLD = (
    "import sys, time; from pathlib import Path; from aiflux.util.lease import acquire\n"
    "lease = acquire(Path(sys.argv[1]), 'it'); print('held', flush=True); time.sleep(60)\n"
)


def hold(path: Path) -> subprocess.Popen[str]:
    """Hold a lease in another process."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_lease_is_released(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    with acquire(path, "it"):
        assert path.exists()
    assert not path.exists()
    acquire(path, "it").release()


def test_a_living_holder_is_reported(tmp_path: Path) -> None:
    process = hold(tmp_path / "lease")
    with pytest.raises(RunConflictError, match=f"it is in use by process {process.pid}"):
        acquire(tmp_path / "lease", "it")
    kill(process)


def test_the_lease_of_a_dead_holder_is_taken_over(tmp_path: Path) -> None:
    kill(hold(tmp_path / "lease"))
    acquire(tmp_path / "lease", "it").release()
    assert list(tmp_path.iterdir()) == []


def foreign(path: Path, **changes: str) -> None:
    """Write a lease as if from another node."""
    holder = {"host": "elsewhere", "pid": 1, "started": "1", "namespace": "other", "job": "7",
              "token": "t", **changes}  # fmt: skip
    path.write_bytes(b"0" * 12 + b" " + json.dumps(holder).encode() + b"\n")


def test_a_killed_holder_whose_parent_has_not_noticed_is_dead(tmp_path: Path) -> None:
    """A job's processes are like this for seconds after `scancel`."""
    process = hold(tmp_path / "lease")
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    acquire(tmp_path / "lease", "it").release()
    assert Path(f"/proc/{process.pid}").exists(), "it is a zombie"
    kill(process)


def test_a_silent_lease_of_another_node_expires_by_our_own_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(tmp_path / "lease")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        threading.Event().wait(0.01)

    ticks = iter(range(0, 10_000, 5))
    acquire(tmp_path / "lease", "it", sleep=sleep, clock=lambda: float(next(ticks))).release()
    assert waits


def test_a_beating_lease_of_another_node_is_respected(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    foreign(path)

    def beat(_: float) -> None:
        with open(path, "r+b") as file:
            count = int(file.read(12)) + 1
            file.seek(0)
            file.write(b"%012d" % count)

    with pytest.raises(RunConflictError, match="on elsewhere"):
        acquire(path, "it", sleep=beat)


def test_an_earlier_start_of_the_same_job_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    foreign(tmp_path / "lease")
    acquire(tmp_path / "lease", "it").release()


def test_a_waiting_process_is_notified_once_and_is_next(tmp_path: Path) -> None:
    process = hold(tmp_path / "lease")
    messages: list[str] = []

    def sleep(_: float) -> None:
        if process.poll() is None:
            kill(process)

    lease = acquire(tmp_path / "lease", "it", wait=True, on_wait=messages.append, sleep=sleep)
    lease.release()
    assert len(messages) == 1
    assert "waiting" in messages[0]


def test_a_mark_left_by_a_process_that_died_breaking_a_lease(tmp_path: Path) -> None:
    kill(hold(tmp_path / "lease"))
    (tmp_path / "lease.break").touch()
    ticks = iter(range(0, 10_000, 5))
    lease = acquire(
        tmp_path / "lease", "it", sleep=lambda _: None, clock=lambda: float(next(ticks))
    )
    lease.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("turn", range(5))
def test_only_one_of_many_gets_it(tmp_path: Path, turn: int) -> None:
    kill(hold(tmp_path / "lease"))
    got: list[object] = []
    refused: list[object] = []

    def take() -> None:
        try:
            got.append(acquire(tmp_path / "lease", "it"))
        except RunConflictError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 15)
    got[0].release()  # type: ignore[attr-defined]
    assert os.listdir(tmp_path) == []
