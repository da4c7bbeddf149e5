"""Run the worker several times at once: ``at_once.py FOLDER ENGINE_URL COUNT``.

All runs are forks of this process, so that they start within a millisecond. Prints the exit codes
as JSON; the output of each run is in ``output-N`` in the folder.
"""

from __future__ import annotations

import json
import os
import sys
import time

from aiflux.worker.main import main


def start(number: int, begin: float, url: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(f"output-{number}", "w", encoding="utf-8") as output:
            os.dup2(output.fileno(), 2)
        time.sleep(max(0.0, begin - time.monotonic()))
        code = main(["in.jsonl", "out.json", "--engine-url", url, "--concurrency", "4"])
    finally:
        os._exit(code)


if __name__ == "__main__":
    folder, url, count = sys.argv[1:]
    os.chdir(folder)
    begin = time.monotonic() + 0.1
    pids = [start(number, begin, url) for number in range(int(count))]
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]))
