"""What all requests of a conversion share: prompt template, body, response format and custom_id.

In a template, ``{name}`` is replaced by a value; ``{{`` and ``}}`` are literal braces.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiflux.core.batch.request import parse_json
from aiflux.core.batch.schema import SchemaError, can_check_schemas, compile_schema
from aiflux.errors import InputError, UsageError
from aiflux.models.endpoints import ENDPOINTS

_PARTS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")


class Template:
    """A parsed template.

    Args:
        text: the template.
        required: reject a template without names, as all prompts would be equal.

    Attributes:
        names: the names to fill in, in order of first appearance.

    Raises:
        InputError: the template has a single brace, an empty name or no name.
    """

    def __init__(self, text: str, *, required: bool = True) -> None:
        self.text = text
        # Literals and names alternate: texts[0] names[0] texts[1] names[1] ... texts[-1]
        self._texts: list[str] = [""]
        self._fields: list[str] = []
        for match in _PARTS.finditer(text):
            self._add(match)
        self.names = tuple(dict.fromkeys(self._fields))
        if required and not self.names:
            raise InputError(
                f"the template {_shown(text)} has nothing to fill in: all requests would be the "
                "same",
                'name a column or field in braces, for example "Summarize: {text}"',
            )

    def _add(self, match: re.Match[str]) -> None:
        part = match[0]
        if match[1] is not None:
            if not match[1].strip():
                raise self._wrong(match.start(), "{} without a name", "write a name in the braces")
            self._fields.append(match[1])
            self._texts.append("")
        elif part in ("{", "}"):
            raise self._wrong(
                match.start(), f"a single {part}", f"write a literal {part} as {part * 2}"
            )
        else:
            self._texts[-1] += part[0] if part in ("{{", "}}") else part

    def _wrong(self, position: int, problem: str, remedy: str) -> InputError:
        line = self.text.count("\n", 0, position) + 1
        column = position - self.text.rfind("\n", 0, position)
        return InputError(
            f"the template {_shown(self.text)} has {problem} at line {line}, column {column}",
            remedy,
        )

    def check(self, columns: Iterable[str], where: str, kind: str = "column") -> None:
        """Raise InputError unless every name is one of ``columns``."""
        known = list(columns)
        missing = [name for name in self.names if name not in known]
        if missing:
            raise InputError(
                f"the template names {_listed(missing)}, but {where} has no such {kind}",
                f"its {kind}s are {_listed(known)}; write literal braces as {{{{ and }}}}",
            )

    @property
    def only(self) -> str | None:
        """The name, if the template consists only of it."""
        return self.names[0] if self._fields and self._texts == ["", ""] else None

    def render(self, values: Mapping[str, str]) -> str:
        """Return the text with all names replaced. Raises KeyError if a value is missing."""
        parts = [self._texts[0]]
        for name, text in zip(self._fields, self._texts[1:], strict=True):
            parts += (values[name], text)
        return "".join(parts)


def escape(text: str) -> str:
    """Return a template that renders to ``text``."""
    return text.replace("{", "{{").replace("}", "}}")


def _listed(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names]
    more = f" and {len(shown) - 50} more" if len(shown) > 50 else ""
    return ", ".join(shown[:50]) + more


def check_columns(wanted: Iterable[str], columns: Iterable[str], option: str, where: str) -> None:
    """Raise InputError unless every column that an option names exists."""
    known = list(columns)
    missing = [name for name in wanted if name not in known]
    if missing:
        raise InputError(
            f"{option} names {_listed(missing)}, but {where} has no such column",
            f"its columns are {_listed(known)}",
        )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


if TYPE_CHECKING:
    from typing import TypedDict

    class RequestOptions(TypedDict, total=False):
        """Keyword arguments of every converter.

        Attributes:
            model: the model in each body; if unset, the run must name one.
            system: text of a system message.
            temperature, max_tokens: as in the API; ``params``: any other fields of the body.
            schema: a JSON Schema, or the path of a schema file, for ``response_format``.
            endpoint: ``chat``, ``completions`` or ``embeddings``.
        """

        model: str | None
        system: str | None
        temperature: float | None
        max_tokens: int | None
        params: Mapping[str, Any] | None
        schema: Path | str | Mapping[str, Any] | None
        endpoint: str


CONVERTED_TO = ("chat", "completions", "embeddings")
_OWN_OPTIONS = {
    "model": "--model",
    "messages": "--template and --system",
    "prompt": "--template",
    "input": "--template",
    "temperature": "--temperature",
    "max_tokens": "--max-tokens",
    "response_format": "--schema",
}


@dataclass(frozen=True, slots=True)
class RequestDraft:
    """The content of one request.

    Attributes:
        number: position in the input (line, row or list index), from 1.
        content: the user's text, the message parts with an image, or the whole conversation if
            ``messages`` is set.
        part: chunk number within a row or file, from 0.
        remark: reason for a warning, such as ``with nothing filled in``.
    """

    number: int
    custom_id: str
    content: Any
    metadata: dict[str, Any] = field(default_factory=dict)
    messages: bool = False
    part: int = 0
    remark: str = ""


@dataclass(frozen=True)
class RequestForm:
    """The parts that all requests share."""

    endpoint: str = "chat"
    fields: dict[str, Any] = field(default_factory=dict)
    system: str | None = None

    def line(self, draft: RequestDraft) -> bytes:
        """Return the request as one line, including the line ending."""
        entry: dict[str, Any] = {
            "custom_id": draft.custom_id,
            "method": "POST",
            "url": ENDPOINTS[self.endpoint].url,
            "body": {**self.fields, **self._content(draft)},
        }
        if draft.metadata:
            entry["metadata"] = draft.metadata
        try:
            return json.dumps(entry, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except UnicodeEncodeError:  # a lone surrogate can only be written as an escape
            return json.dumps(entry, allow_nan=False).encode() + b"\n"

    def _content(self, draft: RequestDraft) -> dict[str, Any]:
        if self.endpoint == "embeddings":
            return {"input": draft.content}
        if self.endpoint == "completions":
            return {"prompt": draft.content}
        messages = draft.content if draft.messages else [{"role": "user", "content": draft.content}]
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        return {"messages": messages}


def make_form(
    *,
    model: str | None = None,
    system: str | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
    params: Mapping[str, Any] | None = None,
    schema: Path | str | Mapping[str, Any] | None = None,
    endpoint: str = "chat",
) -> RequestForm:
    """Build and validate the shared parts of all requests; see ``RequestOptions``.

    Raises:
        UsageError: options conflict, or a value is invalid.
        InputError: the schema is invalid.
    """
    if endpoint not in CONVERTED_TO:
        raise UsageError(f"unknown endpoint {endpoint!r}", f"use {', '.join(CONVERTED_TO)}")
    _check_values(model, temperature, max_tokens, endpoint)
    given = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name, value in (params or {}).items():
        if name in _OWN_OPTIONS:
            raise UsageError(f"--param sets {name}", f"use {_OWN_OPTIONS[name]} instead")
        _check_param(name, value)
        fields[name] = value
    if schema is not None:
        fields["response_format"] = response_format(schema)
    if endpoint != "chat" and (system is not None or schema is not None):
        raise UsageError(
            f"--system and --schema require the chat endpoint, not {endpoint}",
            "remove them, or remove --endpoint",
        )
    return RequestForm(endpoint, fields, system)


def _check_values(
    model: str | None, temperature: float | None, max_tokens: int | None, endpoint: str
) -> None:
    if model is not None and not model.strip():
        raise UsageError(
            "--model is empty", "name a model such as llama3.2:3b, or remove the option"
        )
    if temperature is not None and not 0 <= temperature < math.inf:
        raise UsageError(f"--temperature {temperature} is not 0 or more", "--temperature 0.7")
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens} is not 1 or more", "--max-tokens 500")
    if endpoint == "embeddings" and (temperature, max_tokens) != (None, None):
        raise UsageError(
            "--temperature and --max-tokens do not apply to embeddings",
            "remove them, or remove --endpoint",
        )


def _check_param(name: str, value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"--param {name} is not valid JSON: {error}", "use numbers, strings, lists, objects"
        ) from None


# A schema without any of these keywords allows everything. Others only refine one of these.
_KEYWORDS = {
    "$dynamicRef", "$recursiveRef", "$ref", "additionalProperties", "allOf", "anyOf", "const",
    "contains", "dependentRequired", "dependentSchemas", "enum", "exclusiveMaximum",
    "exclusiveMinimum", "if", "items", "maxItems", "maxLength", "maxProperties", "maximum",
    "minItems", "minLength", "minProperties", "minimum", "multipleOf", "not", "oneOf", "pattern",
    "patternProperties", "prefixItems", "properties", "propertyNames", "required", "type",
    "uniqueItems",
}  # fmt: skip


def response_format(schema: Path | str | Mapping[str, Any]) -> dict[str, Any]:
    """Return OpenAI's ``response_format`` for a schema or schema file.

    The schema is validated if jsonschema is installed.

    Raises:
        InputError: the file cannot be read, or the schema is invalid.
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
            raise InputError(f"{place} is invalid: {error}", "correct it") from None
    title = content.get("title")
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", title if isinstance(title, str) and title else name)
    return {
        "type": "json_schema",
        "json_schema": {"name": name[:64] or "answer", "schema": content, "strict": True},
    }


def _refuse_what_allows_all(schema: Mapping[str, Any], place: str) -> None:
    """Raise InputError for a complete ``response_format``, or if no schema keyword is used."""
    whole = "json_schema" in schema or isinstance(schema.get("schema"), dict)
    if whole and schema.get("type") in (None, "json_schema"):
        raise InputError(
            f"{place} is a complete response_format",
            'use only the value of its "schema" key',
        )
    if schema and not _KEYWORDS & schema.keys():
        names = ", ".join(repr(name) for name in list(schema)[:5])
        raise InputError(
            f"{place} allows any answer: it has no JSON Schema keyword, only {names}",
            'define fields under "properties", such as '
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
            'use a JSON Schema such as {"type": "object", "properties": {...}}',
        )
    return content
