"""``transformers serve`` with continuous batching."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.children import ROOT, tool_output


@dataclass(frozen=True)
class TransformersServe:
    """A Python with transformers, and one model."""

    python: str
    model: Path
    cache: Path
    options: tuple[str, ...] = ()
    name: str = "transformers serve"

    @property
    def environ(self) -> Mapping[str, str]:
        """Offline mode with an existing hub cache, which the list of models requires."""
        (self.cache / "hub").mkdir(parents=True, exist_ok=True)
        return {"HF_HOME": str(self.cache), "HF_HUB_OFFLINE": "1"}

    def command(self, port: int) -> list[str]:
        """Return the server's command."""
        return [
            *(self.python, "-m", "transformers.cli.transformers", "serve", str(self.model)),
            *("--continuous-batching", "--host", "127.0.0.1", "--port", str(port)),
            *self.options,
        ]

    @property
    def served_name(self) -> str:
        """The model name in requests: the directory."""
        return str(self.model)

    def own_tool(
        self, levels: Sequence[int], prompt: int, answer: int, seconds: float
    ) -> tuple[list[str], Mapping[int, float]]:
        """Run its continuous batching without a server; return tokens per second by level."""
        script = ROOT / "bench" / "gpu" / "offline.py"
        command = [self.python, str(script), str(self.model), ",".join(map(str, levels))]
        command += [str(prompt), str(answer), str(seconds)]
        output, _ = tool_output(command, self.environ)
        return command, offline_rates(output.splitlines())

    def version(self) -> str:
        """Return the versions of transformers and torch."""
        command = [self.python, "-m", "pip", "show", "transformers", "torch"]
        parts = tool_output(command, limit=60)[0].split("---")
        return ", ".join(f"{_field(part, 'Name')} {_field(part, 'Version')}" for part in parts)


def _field(text: str, name: str) -> str:
    lines = (line.partition(": ") for line in text.splitlines())
    return next((value for key, _, value in lines if key == name), "?")


def offline_rates(lines: Iterable[str]) -> dict[int, float]:
    """Return the rates that offline.py printed, by level."""
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    return {row["level"]: row["rate"] for row in rows}
