"""Run the worker in the test process against an engine."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.open import OpenedRun, draft_run
from aiflux.core.runs.plan import read_plan
from aiflux.engines.kinds import engine_kind
from aiflux.errors import AifluxError, ExitCode
from aiflux.models.tokenizer import ModelTokenizer, snapshot_tokenizer
from aiflux.worker.shard import Context, work
from aiflux.worker.stats import Stats
from aiflux.worker.stop import Stopper
from tests.tools.faulty_engine import FaultyEngine
from tests.tools.make_tiny_snapshot import TEMPLATE, tokenizer
from tests.unit.helpers import request_line


def bytewise_tokenizer(folder: Path) -> ModelTokenizer:
    """Return a tokenizer with one token for each byte, and a template, stored in a folder."""
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return snapshot_tokenizer(folder)


class Quiet:
    """A reporter that records messages."""

    def __init__(self) -> None:
        self.quiet = False
        self.messages: list[str] = []

    def say(self, text: str) -> None:
        self.messages.append(text)

    def show(self, stats: Stats, *, final: bool = False) -> None:
        pass

    def pull(self, step: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class Working:
    """One run in a directory: its input, options and results."""

    def __init__(
        self,
        directory: Path,
        url: str | None,
        output: str = "out.json",
        api_key: str | None = None,
        models_dir: Path | None = None,
        **options: Any,
    ) -> None:
        self.api_key = api_key
        self.models_dir = models_dir
        self.input = directory / "in.jsonl"
        self.output = directory / output
        self.reporter = Quiet()
        self.stopper = Stopper()
        self.deadline: float | None = None
        fast = {"retry_delay": 0.01, "request_timeout": 5.0, "drain_seconds": 1.0}
        self.options: dict[str, Any] = {"engine_url": url, **fast, **options}

    def prompts(self, *prompts: str, **body: Any) -> Working:
        """Write the input: one chat request per prompt, named by prompt and position."""
        lines = []
        for index, prompt in enumerate(prompts):
            messages = [{"role": "user", "content": prompt}]
            content = {"model": "m:1", "messages": messages, **body}
            lines.append(request_line(f"{index}:{prompt}", body=content))
        self.input.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return self

    def open(self, **more: Any) -> OpenedRun:
        options = RunOptions(**self.options)
        return draft_run(
            self.input, self.output, options, self.models_dir, engine_kind(options), **more
        ).open()

    def run(self, **more: Any) -> ExitCode:
        """Open the run and process it; return the exit code of the CLI."""
        self.context = Context(
            self.reporter, self.stopper, deadline=self.deadline, api_key=self.api_key
        )
        try:
            opened = self.open(**more)
            if not opened.finished:
                work(opened.plan, opened.run, 0, self.context)
        except AifluxError as error:
            self.error: AifluxError | None = error
            return error.exit_code
        self.error = None
        return ExitCode.OK

    def shard(self, index: int) -> ExitCode:
        """Process one shard of the existing plan, like an array task."""
        self.context = Context(self.reporter, self.stopper, deadline=self.deadline)
        run = RunDirectory.of_output(self.output)
        self.error = None
        try:
            work(read_plan(run), run, index, self.context)
        except AifluxError as error:
            self.error = error
            return error.exit_code
        return ExitCode.OK

    def stop_soon(self, reason: str = "a test", results: int = 1, **more: bool) -> None:
        """Stop the run once its journal has this many more results."""
        wanted = self._journalled() + results
        stopper = self.stopper

        def watch() -> None:
            while self._journalled() < wanted:
                time.sleep(0.005)
            stopper.stop(reason, **more)

        threading.Thread(target=watch, daemon=True).start()

    @contextmanager
    def reviving(self, engine: FaultyEngine) -> Iterator[None]:
        """Start the engine again after each crash, but not before the worker has seen it down.

        An engine that is back sooner lost a connection only, which is retried like any other.
        """
        over = threading.Event()

        def watch() -> None:
            seen = 0
            while not over.wait(0.01):
                if sum("is down; waiting" in each for each in self.reporter.messages) > seen:
                    seen += 1
                    engine.died.wait()
                    engine.start()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def cut_copy(self, original: Path, size: int) -> None:
        """Make a copy of a finished run an unfinished one, with the beginning of its journal.

        Args:
            original: the folder that this one was copied from.
            size: bytes of the journal to keep.
        """
        self.journal.write_bytes(self.journal.read_bytes()[:size])
        self.output.unlink()
        run = RunDirectory.of_output(self.output)
        shutil.rmtree(run.path / "status")
        (run.path / "status").mkdir()
        text = run.plan.read_text("utf-8")
        run.plan.write_text(text.replace(str(original), str(self.output.parent)), "utf-8")

    def _journalled(self) -> int:
        return self.journal.read_bytes().count(b"\n") if self.journal.exists() else 0

    @property
    def results(self) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = json.loads(self.output.read_text(encoding="utf-8"))
        return content

    @property
    def journal(self) -> Path:
        return self.output.with_name(self.output.name + ".aiflux") / "journal" / "shard-0000.jsonl"

    @property
    def status_file(self) -> Path:
        return self.output.with_name(self.output.name + ".aiflux") / "status" / "shard-0000.json"

    @property
    def status(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.status_file.read_text(encoding="utf-8"))
        return content
