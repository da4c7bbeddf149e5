"""What all requests of a conversion share: body, system message, examples, response format."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiflux.converters.template import PromptTemplate, as_template
from aiflux.core.batch.request import parse_json
from aiflux.core.batch.schema import SchemaError, can_check_schemas, compile_schema
from aiflux.errors import InputError, UsageError
from aiflux.models.endpoints import ENDPOINTS, SCORES
from aiflux.util.text import joined

if TYPE_CHECKING:
    from typing import TypedDict

    class RequestOptions(TypedDict, total=False):
        """Keyword arguments of every converter.

        Attributes:
            model: the model in each body; if unset, the run must name one.
            system: text of a system message.
            system_template: a template of the system message, which is another one for each row.
            turns: a conversation of each row, instead of a template: pairs of a role (``user`` or
                ``assistant``) and a plain template.
            examples: rows with the columns that the template uses, and the answers to them; see
                ``aiflux.converters.read_examples``. Each request begins with them.
            example_answer: the column with the answers of the examples.
            temperature, max_tokens: as in the API; ``params``: any other fields of the body.
            schema: a JSON Schema, or the path of a schema file, for ``response_format``.
            endpoint: one of ``CONVERTED_TO``.
            documents: for ``rerank`` and ``score``: the columns with the documents that the prompt
                is compared with. A cell may have a list of them.
            drop_last_assistant: remove the assistant's turns at the end of a conversation.
        """

        model: str | None
        system: str | None
        system_template: str | Path | PromptTemplate | None
        turns: Sequence[tuple[str, str]]
        examples: Sequence[Mapping[str, Any]]
        example_answer: str
        temperature: float | None
        max_tokens: int | None
        params: Mapping[str, Any] | None
        schema: Path | str | Mapping[str, Any] | None
        endpoint: str
        documents: Sequence[str]
        drop_last_assistant: bool


CONVERTED_TO = tuple(ENDPOINTS)
WITH_MESSAGES = ("chat", "responses")
"""Endpoints whose requests can have a conversation."""
_OWN_OPTIONS = {
    "model": "--model",
    "messages": "--template and --system",
    "prompt": "--template",
    "input": "--template",
    "temperature": "--temperature",
    "max_tokens": "--max-tokens",
    "max_output_tokens": "--max-tokens",
    "instructions": "--system",
    "response_format": "--schema",
    "query": "--template",
    "text_1": "--template",
    "documents": "--documents",
    "text_2": "--documents",
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
        system: text of its own system message.
        documents: texts that the prompt is compared with.
    """

    number: int
    custom_id: str
    content: Any
    metadata: dict[str, Any] = field(default_factory=dict)
    messages: bool = False
    part: int = 0
    remark: str = ""
    system: str | None = None
    documents: Sequence[Any] = ()


def with_image(text: str, url: str) -> list[dict[str, Any]]:
    """Return the content of a message with an image."""
    return [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]


# json.dumps makes a new encoder for each call with such options.
encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
CONVERSATION_ROLES = ("user", "assistant")
ANSWER = "answer"
MAX_EXAMPLES = 1000


@dataclass(frozen=True)
class RequestForm:
    """The parts that all requests share; see ``RequestOptions``.

    Attributes:
        shots: the turns of the examples.
    """

    endpoint: str = "chat"
    fields: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    drop_last_assistant: bool = False
    system_template: PromptTemplate | None = None
    turns: tuple[tuple[str, PromptTemplate], ...] = ()
    examples: tuple[Mapping[str, Any], ...] = ()
    example_answer: str = ANSWER
    documents: tuple[str, ...] = ()
    shots: tuple[dict[str, Any], ...] = ()

    @cached_property
    def example_prompts(self) -> frozenset[str]:
        """The texts that the examples answer."""
        texts = (turn["content"] for turn in self.shots if turn["role"] == "user")
        return frozenset(text for text in texts if isinstance(text, str))

    def system_of(self, draft: RequestDraft) -> str | None:
        """Return the system message of a request."""
        return self.system if draft.system is None else draft.system

    def line(self, draft: RequestDraft) -> bytes:
        """Return the request as one line, including the line ending."""
        entry = self.entry(draft)
        try:
            return encode_json(entry).encode() + b"\n"
        except UnicodeEncodeError:  # a lone surrogate can only be written as an escape
            return json.dumps(entry, allow_nan=False).encode() + b"\n"

    def entry(self, draft: RequestDraft) -> dict[str, Any]:
        """Return the request."""
        entry: dict[str, Any] = {
            "custom_id": draft.custom_id,
            "method": "POST",
            "url": ENDPOINTS[self.endpoint].url,
            "body": {**self.fields, **self._content(draft)},
        }
        if draft.metadata:
            entry["metadata"] = draft.metadata
        return entry

    def _content(self, draft: RequestDraft) -> dict[str, Any]:
        if self.endpoint == "embeddings":
            return {"input": draft.content}
        if self.endpoint == "completions":
            return {"prompt": draft.content}
        if self.endpoint == "rerank":
            return {"query": draft.content, "documents": [*draft.documents]}
        if self.endpoint == "score":
            one = len(draft.documents) == 1
            return {
                "text_1": draft.content,
                "text_2": draft.documents[0] if one else [*draft.documents],
            }
        turns = draft.content if draft.messages else [{"role": "user", "content": draft.content}]
        system = self.system_of(draft)
        first = [] if system is None else [{"role": "system", "content": system}]
        if self.shots and turns[0].get("role") == "system":
            first, turns = turns[:1], turns[1:]
        messages = [*first, *self.shots, *turns]
        return {"messages": messages} if self.endpoint == "chat" else _response_input(messages)


def _response_input(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the fields of ``/v1/responses`` for the messages of a chat."""
    fields: dict[str, Any] = {}
    if messages[0].get("role") == "system" and isinstance(messages[0].get("content"), str):
        fields["instructions"] = messages[0]["content"]
        messages = messages[1:]
    items = [item for message in messages for item in _response_items(message)]
    texts = [message["content"] for message in messages if message.get("role") == "user"]
    alone = len(items) == 1 and len(texts) == 1 and isinstance(texts[0], str)
    return {**fields, "input": texts[0] if alone else items}


def _response_items(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the items for a message, the calls of tools in it, or the result of one."""
    role, content = message.get("role"), message.get("content")
    calls = message.get("tool_calls") or ()
    if isinstance(content, list):
        content = [_response_part(part, role) for part in content]
    if role == "tool":
        call = message.get("tool_call_id")
        yield {"type": "function_call_output", "call_id": call, "output": content}
    elif content or not calls:
        yield {"type": "message", "role": role, "content": content}
    for call in calls:
        yield {"type": "function_call", "call_id": call.get("id"), **call.get("function", {})}


def _response_part(part: Any, role: Any) -> Any:
    """Return a part of a message with the type that it has in responses."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return {**part, "type": "output_text" if role == "assistant" else "input_text"}
    if kind == "image_url":
        image = part["image_url"]
        details = {"detail": "auto", **image} if isinstance(image, dict) else {"url": image}
        return {"type": "input_image", "image_url": details.pop("url", None), **details}
    return part


def make_form(
    *,
    model: str | None = None,
    system: str | None = None,
    system_template: str | Path | PromptTemplate | None = None,
    turns: Sequence[tuple[str, str]] = (),
    examples: Sequence[Mapping[str, Any]] = (),
    example_answer: str = ANSWER,
    temperature: float | None = None,
    max_tokens: int | None = None,
    params: Mapping[str, Any] | None = None,
    schema: Path | str | Mapping[str, Any] | None = None,
    endpoint: str = "chat",
    documents: Sequence[str] = (),
    drop_last_assistant: bool = False,
) -> RequestForm:
    """Build and validate the shared parts of all requests; see ``RequestOptions``.

    Raises:
        UsageError: options conflict, or a value is invalid.
        InputError: the schema or a template is invalid.
    """
    if endpoint not in CONVERTED_TO:
        raise UsageError(f"unknown endpoint {endpoint!r}", f"use {', '.join(CONVERTED_TO)}")
    _check_values(model, temperature, max_tokens, endpoint)
    documents = (documents,) if isinstance(documents, str) else tuple(documents)
    _check_documents(documents, endpoint)
    limit = "max_output_tokens" if endpoint == "responses" else "max_tokens"
    given = {"model": model, "temperature": temperature, limit: max_tokens}
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name, value in (params or {}).items():
        if name in _OWN_OPTIONS:
            raise UsageError(f"--param sets {name}", f"use {_OWN_OPTIONS[name]} instead")
        _check_param(name, value)
        fields[name] = value
    if schema is not None and endpoint == "responses":
        form = response_format(schema)
        text = {"format": {"type": form["type"], **form["json_schema"]}}
        fields["text"] = {**fields.get("text", {}), **text}
    elif schema is not None:
        fields["response_format"] = response_format(schema)
    if system is not None and system_template is not None:
        raise UsageError("--system and --system-template cannot be combined", "use one of them")
    if example_answer != ANSWER and not examples:
        raise UsageError("--example-answer needs --examples", "--examples FILE, or leave it out")
    chat_only = {
        "--system": system is not None,
        "--system-template": system_template is not None,
        "--schema": schema is not None,
        "--turn": bool(turns),
        "--examples": bool(examples),
    }
    wrong = [name for name, given in chat_only.items() if given]
    if endpoint not in WITH_MESSAGES and wrong:
        raise UsageError(
            f"{joined(wrong)} {'requires' if len(wrong) == 1 else 'require'} the chat endpoint, "
            f"not {endpoint}",
            "remove --endpoint, or write everything into the template",
        )
    return RequestForm(
        endpoint,
        fields,
        system,
        drop_last_assistant,
        None if system_template is None else as_template(system_template),
        _turns(turns),
        _examples(examples),
        example_answer,
        documents,
    )


def _check_documents(documents: Sequence[str], endpoint: str) -> None:
    compares = ENDPOINTS[endpoint].use == SCORES
    if compares and not documents:
        raise UsageError(
            f"--endpoint {endpoint} needs the columns with the documents", "--documents COLUMN"
        )
    if documents and not compares:
        named = joined([name for name, each in ENDPOINTS.items() if each.use == SCORES])
        raise UsageError(
            f"--documents applies to {named}, not {endpoint}", "remove it, or set --endpoint"
        )


def _turns(given: Sequence[tuple[str, str]]) -> tuple[tuple[str, PromptTemplate], ...]:
    for role, _ in given:
        if role not in CONVERSATION_ROLES:
            known = " or ".join(CONVERSATION_ROLES)
            more = "; for a system message: --system-template" if role == "system" else ""
            raise UsageError(f"--turn has the role {role!r}", f"use {known}{more}")
    return tuple((role, as_template(text)) for role, text in given)


def _examples(given: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    if isinstance(given, str | Path):
        raise UsageError(
            f"the examples {str(given)!r} are not rows",
            "read them from a file with aiflux.converters.read_examples",
        )
    if len(given) > MAX_EXAMPLES:
        raise UsageError(
            f"{len(given)} examples are more than {MAX_EXAMPLES}: each request has all of them",
            "choose a few rows that show how to answer",
        )
    return tuple(given)


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
    if not ENDPOINTS[endpoint].generates and (temperature, max_tokens) != (None, None):
        raise UsageError(
            f"--temperature and --max-tokens do not apply to {endpoint}",
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
