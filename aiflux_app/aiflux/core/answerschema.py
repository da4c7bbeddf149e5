"""JSON Schemas that answers must fit. Validation is jsonschema's; nothing is fetched for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from aiflux.core.extras import need

Check = Callable[[Any], "str | None"]
_SHOWN = 300


class SchemaError(ValueError):
    """A schema is not one, or refers to something outside of itself."""


def compile_schema(schema: Any) -> Check:
    """Return a function that tells what is wrong with a value, or None. It is not thread-safe.

    Without ``$schema`` the schema is of draft 2020-12.

    Raises:
        SchemaError: the schema is not valid.
        ConfigError: jsonschema is not installed.
    """
    library = need("jsonschema", "schema", "checking answers against a JSON Schema")
    outside = next(_outside(schema), None)
    if outside is not None:
        raise SchemaError(
            f"it refers to {outside!r}; nothing outside the schema is read: put it under $defs"
        )
    if not isinstance(schema, dict):
        raise SchemaError("it is not a JSON object")
    kind = library.validators.validator_for(schema, default=library.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except library.SchemaError as error:
        raise SchemaError(f"at {error.json_path}: {_short(error.message)}") from None
    validator = kind(schema)

    def check(value: Any) -> str | None:
        error = library.exceptions.best_match(validator.iter_errors(value))
        return None if error is None else f"at {error.json_path}: {_short(error.message)}"

    return check


def _outside(schema: Any) -> Iterator[str]:
    """Yield what would have to be fetched: references that do not begin with #."""
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


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
