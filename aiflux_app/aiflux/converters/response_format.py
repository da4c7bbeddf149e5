"""``--schema``: a JSON Schema becomes the ``response_format`` of every request."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiflux.core.batch.request import parse_json
from aiflux.core.batch.schema import SchemaError, can_check_schemas, compile_schema
from aiflux.errors import InputError

# A schema with none of these allows everything. What says more about one of them needs that one.
_KEYWORDS = {
    "$dynamicRef", "$recursiveRef", "$ref", "additionalProperties", "allOf", "anyOf", "const",
    "contains", "dependentRequired", "dependentSchemas", "enum", "exclusiveMaximum",
    "exclusiveMinimum", "if", "items", "maxItems", "maxLength", "maxProperties", "maximum",
    "minItems", "minLength", "minProperties", "minimum", "multipleOf", "not", "oneOf", "pattern",
    "patternProperties", "prefixItems", "properties", "propertyNames", "required", "type",
    "uniqueItems",
}  # fmt: skip


def response_format(schema: Path | str | Mapping[str, Any]) -> dict[str, Any]:
    """Return OpenAI's ``response_format`` for a schema, or for the file that holds it.

    Where jsonschema is installed, the schema is checked.

    Raises:
        InputError: the file cannot be read, or the schema is wrong.
    """
    if isinstance(schema, Mapping):
        content, place, name = dict(schema), "the schema", "answer"
    else:
        path = Path(schema)
        content, place, name = _read(path), f"the schema {str(path)!r}", path.stem
    _refuse_what_allows_all(content, place)
    if can_check_schemas():
        try:
            compile_schema(content)
        except SchemaError as error:
            raise InputError(f"{place} is wrong: {error}", "correct it") from None
    title = content.get("title")
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", title if isinstance(title, str) and title else name)
    return {
        "type": "json_schema",
        "json_schema": {"name": name[:64] or "answer", "schema": content, "strict": True},
    }


def _refuse_what_allows_all(schema: Mapping[str, Any], place: str) -> None:
    """Raise InputError for a whole ``response_format``, and for names without a keyword."""
    whole = "json_schema" in schema or isinstance(schema.get("schema"), dict)
    if whole and schema.get("type") in (None, "json_schema"):
        raise InputError(
            f"{place} is a whole response_format",
            'give only what stands under "schema" in it',
        )
    if schema and not _KEYWORDS & schema.keys():
        names = ", ".join(repr(name) for name in list(schema)[:5])
        raise InputError(
            f"{place} allows every answer: none of its keys ({names}) is a keyword of JSON Schema",
            'name fields under "properties", such as '
            '{"type": "object", "properties": {"label": {"type": "string"}}}',
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(
            f"the schema {str(path)!r} cannot be read: {error.strerror}", "check the path"
        ) from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"the schema {str(path)!r} is not JSON: {error.msg} at line {error.lineno}, "
            f"column {error.colno}",
            "correct it",
        ) from None
    except ValueError as error:
        raise InputError(f"the schema {str(path)!r} is not JSON: {error}", "correct it") from None
    if not isinstance(content, dict):
        raise InputError(
            f"the schema {str(path)!r} is not a JSON object",
            'give a JSON Schema, such as {"type": "object", "properties": {...}}',
        )
    return content
