"""A stand-in for `srun` that runs a step's tasks on this machine.

As srun does, it copies its input to all tasks and their output to its own, ends all if one fails
(--kill-on-bad-exit), and kills them on SIGTERM. Node n1 is the first of the job.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
from typing import IO


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="srun", allow_abbrev=False)
    for name in ("nodes", "ntasks", "ntasks-per-node", "relative", "cpus-per-task"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--export", choices=["ALL"])
    parser.add_argument("--mpi", choices=["none"])
    parser.add_argument("--kill-on-bad-exit", choices=["1"])
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(words)
    if options.nodes != options.ntasks or options.relative != 1:
        parser.error("there is one task on each node but the first")
    return options


def copy_input(tasks: list[subprocess.Popen[bytes]]) -> None:
    while chunk := os.read(0, 1024):
        for task in tasks:
            assert task.stdin is not None
            task.stdin.write(chunk)
    for task in tasks:
        assert task.stdin is not None
        task.stdin.close()


def copy_output(stream: IO[bytes]) -> None:
    for line in stream:
        os.write(1, line)


def start(options: argparse.Namespace, number: int) -> subprocess.Popen[bytes]:
    own = {
        "SLURM_PROCID": str(number),
        "SLURMD_NODENAME": f"n{number + 2}",
        "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
    }
    return subprocess.Popen(
        options.command,
        env={**os.environ, **own},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    )


def main() -> int:
    options = parse(sys.argv[1:])
    tasks = [start(options, number) for number in range(options.ntasks)]

    def kill(*_: object) -> None:
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, signal.SIGKILL)

    signal.signal(signal.SIGTERM, kill)
    threading.Thread(target=copy_input, args=(tasks,), daemon=True).start()
    copies = []
    for task in tasks:
        assert task.stdout is not None
        copies.append(threading.Thread(target=copy_output, args=(task.stdout,), daemon=True))
        copies[-1].start()

    def watch(task: subprocess.Popen[bytes]) -> None:
        if task.wait():
            kill()

    watches = [threading.Thread(target=watch, args=(task,)) for task in tasks]
    for each in (*watches, *copies):
        if each in watches:
            each.start()
    for each in (*watches, *copies):
        each.join()
    return max(task.returncode & 127 for task in tasks)


if __name__ == "__main__":
    sys.exit(main())
