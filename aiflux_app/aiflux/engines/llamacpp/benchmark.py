"""``llama-batched-bench``, llama.cpp's tool that decodes several sequences at once.

Source: llama.cpp, ``tools/batched-bench/README.md``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from aiflux.engines.llamacpp.model_file import find_files
from aiflux.engines.own_benchmark import BenchmarkLoad

_ALL_LAYERS = "999"


class BatchedBench:
    """The tool."""

    tool = "llama-batched-bench"

    def find(self, server: str | None, environ: Mapping[str, str]) -> str | None:
        """Return the program on PATH, or next to the server."""
        found = shutil.which(self.tool, path=environ.get("PATH"))
        if found or server is None:
            return found
        near = Path(server).resolve().with_name(self.tool)
        return str(near) if os.access(near, os.X_OK) else None

    def words(self, load: BenchmarkLoad) -> list[str]:
        """Return the arguments for one batch of sequences.

        Raises:
            ModelError: the model is not stored.
        """
        files = find_files(load.models_dir, load.model)
        context = load.in_flight * (load.prompt_tokens + load.answer_tokens)
        threads = [] if load.threads is None else ["-t", str(load.threads)]
        return [
            *threads,
            "-m", str(files.model), "-c", str(context), "-ngl", _ALL_LAYERS,
            "-npp", str(load.prompt_tokens), "-ntg", str(load.answer_tokens),
            # The tool can lose the last line that it prints (seen with 0.7.0), so another, quick
            # measurement follows.
            "-npl", f"{load.in_flight},1", "--output-format", "jsonl",
        ]  # fmt: skip

    def tokens_per_second(self, printed: str) -> float | None:
        """Return the answer tokens per second of prompts and answers together."""
        for line in printed.splitlines():
            try:
                found = json.loads(line)
                return float(found["pl"] * found["tg"] / found["t"])
            except (ValueError, KeyError, TypeError, ZeroDivisionError):
                continue
        return None
