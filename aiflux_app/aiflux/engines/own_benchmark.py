"""The benchmark tool that an engine brings, to compare a measured point with its figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class BenchmarkLoad:
    """A measured point, as a tool repeats it.

    Attributes:
        url: of a running server; None if the tool loads the model.
        in_flight: sequences at once.
        prompt_tokens, answer_tokens: of each request.
        on_gpus: the tool can use a GPU.
        threads: of the tool, as of the engine; None for its own choice.
    """

    model: str
    models_dir: Path
    url: str | None
    requests: int
    in_flight: int
    prompt_tokens: int
    answer_tokens: int
    on_gpus: bool = True
    threads: int | None = None


class OwnBenchmark(Protocol):
    """A tool of an engine.

    Attributes:
        tool: its name, with its subcommands.
    """

    tool: str

    def find(self, server: str | None, environ: Mapping[str, str]) -> str | None:
        """Return the program, or None.

        Args:
            server: the program of the engine, if there is one.
        """

    def words(self, load: BenchmarkLoad) -> list[str]:
        """Return its arguments.

        Raises:
            ModelError: the model is not stored.
        """

    def tokens_per_second(self, printed: str) -> float | None:
        """Return the answer tokens per second in what it printed, or None."""
