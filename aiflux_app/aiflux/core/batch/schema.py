"""Check answers against JSON Schemas, with jsonschema; nothing is downloaded."""

from __future__ import annotations

import inspect
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from itertools import count
from types import FrameType
from typing import Any
from urllib.parse import unquote

from aiflux.core.batch.request import parse_json
from aiflux.util.extras import need
from aiflux.util.text import error_text

Check = Callable[[Any], "str | None"]
_SHOWN = 300
# Without these, each part of a schema is applied at most once to each part of a value.
_SLOW = ('"pattern', '"uniqueItems"', '"unevaluated', '"$ref"', '"$dynamicRef"', '"$recursiveRef"')
_QUICK_PRODUCT = 2_000_000
# Time limit for reading a schema; jsonschema takes about 3 microseconds per byte.
_COMPILE_SECONDS = 1.5
_SECONDS_PER_BYTE = 30e-6
_CALLS_PER_LOOK = 512


class SchemaError(ValueError):
    """A schema is invalid, has a dangling reference, or cannot be applied."""


def can_check_schemas() -> bool:
    """Return whether jsonschema is installed."""
    return find_spec("jsonschema") is not None


def requested_schema(wanted: dict[str, Any]) -> Any:
    """Return the schema in a ``response_format`` of the type ``json_schema``.

    Raises:
        SchemaError: it has none.
    """
    holder = wanted.get("json_schema")
    if not isinstance(holder, dict):
        raise SchemaError("json_schema is not an object")
    if "schema" not in holder:
        raise SchemaError("json_schema.schema is missing")
    return holder["schema"]


def requested_format(body: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a body requests as the form of its answer, as ``response_format`` has it.

    ``/v1/responses`` has it in ``text.format``, with the schema in the same object.
    """
    wanted = body.get("response_format")
    if isinstance(wanted, dict):
        return wanted
    text = body.get("text")
    inside = text.get("format") if isinstance(text, dict) else None
    return {**inside, "json_schema": inside} if isinstance(inside, dict) else None


def format_field(body: dict[str, Any]) -> str:
    """Return the field of a body with the form of its answer."""
    return "response_format" if isinstance(body.get("response_format"), dict) else "text.format"


def schema_text(schema: Any) -> str:
    """Return a schema as JSON.

    Raises:
        SchemaError: it is nested too deeply.
    """
    try:
        return json.dumps(schema)
    except RecursionError:
        raise SchemaError("it is nested too deeply") from None


def schema_problem(body: dict[str, Any]) -> str | None:
    """Return the problem with the schema of a request's body, or None.

    Raises:
        ConfigError: jsonschema is not installed.
    """
    wanted = requested_format(body)
    if wanted is None or wanted.get("type") != "json_schema":
        return None
    try:
        problem = _problem(schema_text(requested_schema(wanted)))
    except SchemaError as error:
        problem = str(error)
    field = format_field(body)
    return None if problem is None else f"the schema in body.{field} is wrong: {problem}"


@lru_cache(maxsize=256)
def _problem(schema: str) -> str | None:
    try:
        compile_schema(json.loads(schema))
    except SchemaError as error:
        return str(error)
    return None


def is_quick(schema: str, text: str) -> bool:
    """Return whether the check of an answer certainly takes at most about a second.

    Args:
        schema: as ``schema_text`` writes it.
    """
    return len(schema) * len(text) <= _QUICK_PRODUCT and not any(word in schema for word in _SLOW)


def answer_problem(text: str, check: Check | None) -> str | None:
    """Return the problem with an answer that must be JSON, or None.

    Args:
        check: of its schema; None if any object is valid.
    """
    try:
        value = parse_json(text)
    except ValueError as error:
        return f"is not JSON: {error}"
    if check is None:
        return None if isinstance(value, dict) else "is not a JSON object"
    problem = check(value)
    return None if problem is None else f"does not fit the schema {problem}"


def compile_schema(schema: Any) -> Check:
    """Return a function that returns the problem with a value, or None. It is not thread-safe.

    Without ``$schema`` the schema is of draft 2020-12. The function raises SchemaError if a value
    leads to a reference that cannot be resolved or that is circular. Its duration depends on the
    value; in the middle of a pattern, only a separate process can be stopped.

    Raises:
        SchemaError: the schema is not valid, or takes too long to apply even to null.
        ConfigError: jsonschema is not installed.
    """
    library = need("jsonschema", "schema", "checking answers against a JSON Schema")
    if not isinstance(schema, dict):
        raise SchemaError("it is not a JSON object")
    if not isinstance(schema.get("$schema", ""), str):
        raise SchemaError("at $.$schema: it is not a string")
    try:
        kind = library.validators.validator_for(schema, default=library.Draft202012Validator)
        seconds = _COMPILE_SECONDS + _SECONDS_PER_BYTE * len(schema_text(schema))
        with time_limit(seconds, "jsonschema"):
            _check(schema, kind)
        validator = kind(schema)
    except library.SchemaError as error:
        raise SchemaError(f"at {error.json_path}: {_short(error.message)}") from None
    except RecursionError:
        raise SchemaError("it is nested too deeply") from None
    except (SchemaError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - of JSON that is no schema the library may raise any
        raise SchemaError(f"it cannot be read: {_short(error_text(error))}") from None

    def check(value: Any) -> str | None:
        try:
            error = library.exceptions.best_match(validator.iter_errors(value))
        except RecursionError:
            raise SchemaError("a reference in it is circular, or too deep") from None
        except (SchemaError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - the class of a bad reference varies by version
            raise SchemaError(f"it cannot be applied: {_short(error_text(error))}") from None
        return None if error is None else f"at {error.json_path}: {_short(error.message)}"

    with time_limit(seconds, "jsonschema"):
        check(None)
    return check


@contextmanager
def time_limit(seconds: float, package: str) -> Iterator[None]:
    """Raise SchemaError in a block that takes too much of this thread's time.

    Python calls a profile function at every call, of which jsonschema makes many; in a long regular
    expression it makes none, but none is run on a schema itself. Python ends profiling when the
    function raises, and drops what it raises while an abandoned generator is closed or a finalizer
    runs: the limit would be gone. So this raises in plain functions of ``package`` only.
    """
    deadline = time.thread_time() + seconds
    before = sys.getprofile()
    calls = count(1)

    def look(frame: FrameType, event: str, _: object) -> None:
        if (
            event == "call"
            and not frame.f_code.co_flags & inspect.CO_GENERATOR
            and frame.f_globals.get("__name__", "").startswith(f"{package}.")
            and next(calls) % _CALLS_PER_LOOK == 0
            and time.thread_time() > deadline
        ):
            raise SchemaError(f"it takes more than {seconds:g} s to read: too many combinations")

    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)


def _check(schema: dict[str, Any], kind: Any) -> None:
    outside = next(_outside(schema), None)
    if outside is not None:
        raise SchemaError(
            f"it refers to {outside!r}; nothing outside the schema is read: put it under $defs"
        )
    kind.check_schema(schema)
    dangling = next(_dangling(schema, schema), None)
    if dangling is not None:
        raise SchemaError(f"it refers to {dangling!r}, which does not exist")


def _outside(schema: Any) -> Iterator[str]:
    """Yield external references: those that do not begin with #."""
    if isinstance(schema, dict):
        for key in ("$ref", "$dynamicRef", "$recursiveRef"):
            target = schema.get(key)
            if isinstance(target, str) and not target.startswith("#"):
                yield target
        for key, value in schema.items():
            if key not in ("const", "enum", "default", "examples"):
                yield from _outside(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _outside(value)


def _dangling(schema: Any, root: dict[str, Any]) -> Iterator[str]:
    """Yield references by path (``#/$defs/x``) that lead nowhere.

    A part with its own ``$id`` is skipped: paths inside it do not start at the root.
    """
    if isinstance(schema, dict):
        if schema is not root and "$id" in schema:
            return
        target = schema.get("$ref")
        if isinstance(target, str) and target.startswith("#/") and not _leads(target, root):
            yield target
        for key, value in schema.items():
            if key not in ("const", "enum", "default", "examples"):
                yield from _dangling(value, root)
    elif isinstance(schema, list):
        for value in schema:
            yield from _dangling(value, root)


def _leads(target: str, root: Any) -> bool:
    """Return whether a JSON Pointer (RFC 6901) after ``#`` exists."""
    found = root
    for step in unquote(target[2:]).split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and re.fullmatch(r"\d+", name) and int(name) < len(found):
            found = found[int(name)]
        else:
            return False
    return True


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
