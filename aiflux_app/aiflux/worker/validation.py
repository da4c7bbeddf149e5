"""Check answers against the JSON Schema of their request (``response_format``, ``text.format``)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from queue import LifoQueue
from typing import Any

from aiflux.core.batch.request import Request, parse_json
from aiflux.core.batch.results_file import answer_texts
from aiflux.core.batch.schema import (
    SchemaError,
    answer_problem,
    compile_schema,
    format_field,
    is_quick,
    requested_format,
    requested_schema,
    schema_text,
)
from aiflux.core.config.settings import RunOptions
from aiflux.engines.outcome import Kind, Outcome
from aiflux.worker.schema_process import (
    FITS,
    SECONDS,
    UNFIT,
    WRONG,
    CheckAbortedError,
    SchemaProcess,
    find,
)

CODE = "schema"
CHECK_FAILED = "schema_check_failed"
_MOST_PROCESSES = 4


class CheckFailedError(Exception):
    """The check did not finish, so it is unknown whether the answer fits."""


class Checking:
    """Checks answers to requests that want JSON; accepts others. Thread-safe.

    Every choice of an answer must be JSON; with ``json_schema`` it must fit the schema.

    Attributes:
        attempts: number of times that an answer that does not fit is requested again.

    Args:
        seconds: time limit for checking one text.

    Raises:
        ConfigError: jsonschema is not installed.
    """

    def __init__(self, attempts: int, seconds: float = SECONDS) -> None:
        self.attempts = attempts
        most = min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))
        self._processes = [SchemaProcess(seconds) for _ in range(most)]
        # The last used process comes first, so that only as many as needed are started.
        self._idle: LifoQueue[SchemaProcess] = LifoQueue()
        for process in reversed(self._processes):
            self._idle.put(process)
        self._lock = threading.Lock()
        compile_schema({})

    @classmethod
    def of(cls, options: RunOptions) -> Checking | None:
        """Return the check that a run requests, or None."""
        return cls(options.revalidate_attempts) if options.validate else None

    def judge(self, request: Request, verdict: Outcome) -> Outcome:
        """Return the outcome after the check: unchanged, UNFIT, or FAILED for an invalid schema."""
        expected = requested_format(request.body)
        if verdict.kind is not Kind.ANSWERED or expected is None:
            return verdict
        try:
            problem = self._problem(expected, verdict)
        except SchemaError as error:
            field = format_field(request.body)
            message = f"the schema in the request's {field} is invalid: {error}"
            return replace(verdict, kind=Kind.FAILED, code=CODE, message=message)
        except CheckFailedError as error:
            message = f"the check of the answer against its schema {error}"
            return replace(verdict, kind=Kind.FAILED, code=CHECK_FAILED, message=message)
        except CheckAbortedError:
            return Outcome(Kind.UNATTEMPTED, "aborted", "ended by the worker")
        if problem is None:
            return verdict
        return replace(verdict, kind=Kind.UNFIT, code=CODE, message=problem)

    def abort(self) -> None:
        """Abort all running checks; their requests count as not attempted."""
        for process in self._processes:
            process.abort()

    def close(self) -> None:
        """End the processes; no check may be running."""
        for process in self._processes:
            process.close()

    def _problem(self, expected: dict[str, Any], verdict: Outcome) -> str | None:
        kind = expected.get("type")
        if kind not in ("json_schema", "json_object"):
            return None
        schema = schema_text(requested_schema(expected)) if kind == "json_schema" else None
        for text in answer_texts(parse_json(verdict.body.decode("utf-8"))):
            problem = answer_problem(text, None) if schema is None else self._misfit(schema, text)
            if problem is not None:
                cut = (
                    " (it was cut at the token limit)" if verdict.finish_reason == "length" else ""
                )
                return f"the answer {problem}{cut}"
        return None

    def _misfit(self, schema: str, text: str) -> str | None:
        if is_quick(schema, text):
            with self._lock:
                finding, words = find(schema, text)
        else:
            with self._process() as process:
                finding, words = process.check(schema, text)
        if finding == WRONG:
            raise SchemaError(words)
        if finding not in (FITS, UNFIT):
            raise CheckFailedError(words)
        return words if finding == UNFIT else None

    @contextmanager
    def _process(self) -> Iterator[SchemaProcess]:
        process = self._idle.get()
        try:
            yield process
        finally:
            self._idle.put(process)
