"""The worker's peers: a plain loop, and llmflux's BatchProcessor; and the bare client's Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench.children import ROOT, Usage, run
from bench.engine import MODEL

LLMFLUX = "llmflux==2.0.0"
_LIMIT = 300.0


def plain_loop(engine_url: str, source: Path, output: Path) -> Usage:
    """Send the requests of an input with ``requests.post``, one after another."""
    script = str(ROOT / "bench" / "plain_loop.py")
    return run([sys.executable, script, str(source), str(output), engine_url], limit=_LIMIT)


class Llmflux:
    """llmflux and aiohttp in their own virtual environment in the user's cache.

    Attributes:
        python: its interpreter.
        problem: why it is not available; empty if it is.
    """

    def __init__(self) -> None:
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        folder = Path(cache) / "aiflux-bench" / LLMFLUX.replace("==", "-")
        self.python = folder / "bin" / "python"
        self.problem = "" if self._works() else self._install(folder)

    def run(self, engine_url: str, source: Path, output: Path) -> Usage:
        """Run its BatchProcessor over an input."""
        return self._run("ollama", engine_url, source, output, MODEL)

    def run_with_vllm(self, engine_url: str, source: Path, output: Path, model: str) -> Usage:
        """Run it over an input as with its engine vLLM: without Ollama's interface."""
        return self._run("vllm", engine_url, source, output, model)

    def _run(self, engine: str, url: str, source: Path, output: Path, model: str) -> Usage:
        script = str(ROOT / "bench" / "llmflux_batch.py")
        command = [str(self.python), script, str(source), str(output), model, engine]
        environ = {f"{engine.upper()}_HOST": url, "LOG_LEVEL": "WARNING"}
        environ["TMPDIR"] = str(output.parent)
        return run(command, limit=_LIMIT, environ=environ)

    def _works(self) -> bool:
        try:
            command = [str(self.python), "-c", "import aiohttp, llmflux.processors"]
            return (
                subprocess.run(command, capture_output=True, timeout=60, check=False).returncode
                == 0
            )
        except (OSError, subprocess.TimeoutExpired):
            return False

    def _install(self, folder: Path) -> str:
        pip = [str(self.python), "-m", "pip", "install", "--quiet", LLMFLUX, "aiohttp"]
        for command in ([sys.executable, "-m", "venv", str(folder)], pip):
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=_LIMIT, check=False
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                return f"not installed: {type(error).__name__}"
            if done.returncode != 0:
                return f"not installed: {done.stderr.strip().splitlines()[-1:]}"
        return "" if self._works() else "installed, but cannot be imported"
