"""Checking answers against the JSON Schema that their request asks for (``response_format``)."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace
from typing import Any

from aiflux.core.batch.request import Request, parse_json
from aiflux.core.batch.results_file import answer_texts
from aiflux.core.batch.schema import (
    Check,
    SchemaError,
    compile_schema,
    requested_schema,
    schema_text,
)
from aiflux.core.config.run_options import RunOptions
from aiflux.engines.outcome import Kind, Outcome

CODE = "schema"
_KEPT = 256


class Checking:
    """Judges answers to requests with a ``response_format``; others pass. Thread-safe.

    Every choice of an answer has to be JSON; with ``json_schema`` it has to fit the schema.

    Attributes:
        attempts: times that an answer which does not fit is asked for again.

    Raises:
        ConfigError: jsonschema is not installed.
    """

    def __init__(self, attempts: int) -> None:
        self.attempts = attempts
        self._checks: OrderedDict[str, Check] = OrderedDict()
        self._lock = threading.Lock()
        compile_schema({})

    @classmethod
    def of(cls, options: RunOptions) -> Checking | None:
        """Return what a run asks for; None where answers are taken as they are."""
        return cls(options.revalidate_attempts) if options.validate else None

    def judge(self, request: Request, verdict: Outcome) -> Outcome:
        """Return the verdict on an answer that came, or UNFIT; FAILED for a schema that is none."""
        wanted = request.body.get("response_format")
        if verdict.kind is not Kind.ANSWERED or not isinstance(wanted, dict):
            return verdict
        try:
            problem = self._problem(wanted, verdict)
        except SchemaError as error:
            message = f"the schema in the request's response_format is wrong: {error}"
            return replace(verdict, kind=Kind.FAILED, code=CODE, message=message)
        if problem is None:
            return verdict
        return replace(verdict, kind=Kind.UNFIT, code=CODE, message=problem)

    def _problem(self, wanted: dict[str, Any], verdict: Outcome) -> str | None:
        kind = wanted.get("type")
        if kind not in ("json_schema", "json_object"):
            return None
        check = self._check(wanted) if kind == "json_schema" else None
        for text in answer_texts(parse_json(verdict.body.decode("utf-8"))):
            problem = self._text_problem(text, check)
            if problem is not None:
                cut = (
                    " (it was cut at the token limit)" if verdict.finish_reason == "length" else ""
                )
                return f"the answer {problem}{cut}"
        return None

    def _text_problem(self, text: str, check: Check | None) -> str | None:
        try:
            value = parse_json(text)
        except ValueError as error:
            return f"is not JSON: {error}"
        if check is None:
            return None if isinstance(value, dict) else "is not a JSON object"
        with self._lock:
            problem = check(value)
        return None if problem is None else f"does not fit the schema {problem}"

    def _check(self, wanted: dict[str, Any]) -> Check:
        """Return the compiled schema; the last few hundred are kept."""
        schema = requested_schema(wanted)
        key = schema_text(schema)
        with self._lock:
            if key not in self._checks:
                self._checks[key] = compile_schema(schema)
                if len(self._checks) > _KEPT:
                    self._checks.popitem(last=False)
            return self._checks[key]
