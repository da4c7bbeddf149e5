"""A server to start with ``--engine-command``: ``command_server.py --port PORT``.

``--socket PATH`` stands for a port. It answers as ``faulty_engine.py``, and ``/health`` with 503
while the file of ``--loading`` exists. The prompt ``die`` ends the process, and ``deaf`` closes its
sockets while it lives on; each happens once for a folder of ``--once``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from pathlib import Path

from faulty_engine import FaultyEngine, Reply  # in the folder of this program


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--socket")
    parser.add_argument("--model", default="tiny:latest")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--loading", type=Path)
    parser.add_argument("--once", type=Path)
    options, _ = parser.parse_known_args()

    def health(method: str, path: str, _: Mapping[str, str]) -> Reply | None:
        if path != "/health":
            return None
        loading = options.loading is not None and options.loading.exists()
        return (503 if loading else 200), b"{}", {}

    engine = FaultyEngine(
        delay=options.delay, models=(options.model,), instead=health, host=options.host,
        path=options.socket,
    )  # fmt: skip
    engine.port = options.port
    engine.once = options.once
    with engine:
        print("listening", flush=True)
        engine.died.wait()
        if engine.deaf:
            time.sleep(600)
        os._exit(1)


if __name__ == "__main__":
    main()
