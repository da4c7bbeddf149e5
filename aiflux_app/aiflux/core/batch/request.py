"""One request: a line of an OpenAI Batch input file, parsed and checked.

The form is OpenAI's (https://platform.openai.com/docs/guides/batch): an object with ``custom_id``,
``method``, ``url`` and ``body``; AI-Flux adds an optional ``metadata`` object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from hashlib import blake2b
from math import isinf
from operator import eq
from typing import Any, NamedTuple, NoReturn

from aiflux.models.endpoints import ENDPOINTS
from aiflux.util.unicode import is_whole

try:
    import orjson
except ImportError:  # the image holds pure Python only
    orjson = None  # type: ignore[assignment]

EMBEDDINGS = ENDPOINTS["embeddings"].url
RERANK = ENDPOINTS["rerank"].url
WITHOUT_TEXT = frozenset(each.url for each in ENDPOINTS.values() if not each.generates)
"""Endpoints that generate no text, and so have no parameters of sampling."""
_PAYLOAD_FIELD = {each.url: each.payload for each in ENDPOINTS.values()}
_URLS = tuple(_PAYLOAD_FIELD)
AcceptsModel = Callable[[str, str], bool]
"""Of the run's model and the one that a body names: whether both are the same."""
KEY_BYTES = 16
MAX_DEPTH = 200
TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"
_SHOWN_DIGITS = 40


class LineError(ValueError):
    """A line is not a valid request; ``problems`` holds one text for each thing wrong with it."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Request(NamedTuple):
    """One valid request.

    Attributes:
        raw: the input line as it stands in the file, without its line ending.
        custom_id: the user's name for the request, unique in the input.
        url: of an endpoint in ``ENDPOINTS``.
        body: what goes to the engine.
        metadata: the user's own fields, merged into the result's metadata.
    """

    raw: bytes
    custom_id: str
    url: str
    body: dict[str, Any]
    metadata: dict[str, Any] | None

    @property
    def model(self) -> str | None:
        """The model that the body names, if it names one."""
        model: str | None = self.body.get("model")
        return model


def request_key(raw: bytes) -> bytes:
    """Return the key (16 bytes) that binds a result to the exact request line it answers."""
    return blake2b(raw, digest_size=KEY_BYTES).digest()


class _RefusedValueError(json.JSONDecodeError):
    """JSON, or nearly, whose value cannot be passed on as it is."""


class _NumberError(ValueError):
    """A constant or a number that no double can hold."""


def _reject_constant(name: str) -> NoReturn:
    raise _NumberError(name)


def _float(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise _NumberError(text)
    return value


_decoder = json.JSONDecoder(parse_constant=_reject_constant, parse_float=_float)
_CONSTANTS = {"NaN", "Infinity", "-Infinity"}
_STRING = r'"(?:[^"\\]|\\.)*"'
_WORD = re.compile(_STRING + r"|-?Infinity|NaN|-?[0-9][0-9.eE+-]*", re.DOTALL)
_BRACKET = re.compile(_STRING + r"|[][{}]", re.DOTALL)


def parse_json(text: str) -> Any:
    """Decode strict JSON.

    Integers keep all their digits; of a key that stands twice in an object the last counts.

    Raises:
        ValueError: it is not JSON, holds NaN, Infinity or a number that no double can hold, or is
            nested more than ``MAX_DEPTH`` levels deep.
    """
    try:
        value = _decode(text)
    except RecursionError:
        raise _too_deep(text) from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # a number or a constant; the decoder does not say where
        raise _bad_number(text) from None
    if text.count("[") + text.count("{") > MAX_DEPTH and depth(value) > MAX_DEPTH:
        raise _too_deep(text)
    return value


def load_json(raw: bytes) -> Any:
    """Decode JSON that was checked before, quickly."""
    if orjson is not None:
        try:
            return orjson.loads(raw)
        except orjson.JSONDecodeError:
            pass  # half a surrogate pair, or a number of many digits
    return json.loads(raw)


def depth(value: Any) -> int:
    """Return how many levels of objects and arrays a value has."""
    levels, level = 0, [value]
    while level := [item for item in level if type(item) in (dict, list)]:
        levels += 1
        level = [part for item in level for part in (item.values() if type(item) is dict else item)]
    return levels


def _bad_number(text: str) -> _RefusedValueError:
    for found in _WORD.finditer(text):
        word = found[0]
        if word in _CONSTANTS:
            return _RefusedValueError(f"{word} is not JSON", text, found.start())
        if word[0] != '"' and _is_too_large(word):
            shown = word if len(word) <= _SHOWN_DIGITS else f"{word[:_SHOWN_DIGITS]}..."
            return _RefusedValueError(f"the number {shown} is too large", text, found.start())
    return _RefusedValueError("a number is too large", text, 0)


def _is_too_large(word: str) -> bool:
    """Tell whether no double can hold a number, or an integer has more digits than Python reads."""
    try:
        number = float(word) if set(word) & set(".eE") else int(word)
    except ValueError:
        return True
    return isinstance(number, float) and isinf(number)


def _too_deep(text: str) -> _RefusedValueError:
    levels = 0
    for found in _BRACKET.finditer(text):
        levels += (found[0] in "[{") - (found[0] in "]}")
        if levels > MAX_DEPTH:
            break
    return _RefusedValueError(TOO_DEEP, text, found.start())


def not_json(error: ValueError) -> str:
    """Return in words, and with its place in the line, why ``parse_json`` raised."""
    if isinstance(error, _RefusedValueError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    return f"not JSON: {error}"


def _decode(text: str) -> Any:
    try:
        value, end = _decoder.raw_decode(text)
        if end == len(text):
            return value
    except json.JSONDecodeError:
        pass  # decode() skips white space around the value, and says what is wrong
    return _decoder.decode(text)


def _load(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LineError(
            f"not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1}); "
            "save the file as UTF-8"
        ) from None
    try:
        return parse_json(text)
    except _RefusedValueError as error:
        raise LineError(not_json(error)) from None
    except ValueError as error:
        raise LineError(f"{not_json(error)}; each line must hold one JSON object") from None


def _load_quickly(raw: bytes) -> Any:
    """Decode for a check alone: integers of more than 64 bits come out as floats."""
    if orjson is not None:
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError:
            return _load(raw)  # it also refuses some valid JSON: the standard library judges
        if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH or depth(value) <= MAX_DEPTH:
            return value
    return _load(raw)


def parse_request(raw: bytes, model: str | None = None, accepts: AcceptsModel = eq) -> Request:
    """Parse and check one input line.

    Args:
        raw: the line, UTF-8, without its line ending.
        model: the run's model; a body that names another one is an error.
        accepts: compares names of models as the engine does.

    Raises:
        LineError: with every problem of the line.
    """
    entry = request_entry(raw, model, accepts)
    return Request(raw, entry["custom_id"], entry["url"], entry["body"], entry.get("metadata"))


def request_entry(
    raw: bytes, model: str | None = None, accepts: AcceptsModel = eq, *, exact: bool = True
) -> dict[str, Any]:
    """Check one input line as ``parse_request`` does; return the object that stands in it.

    Args:
        exact: False is quicker, and good for a check: numbers may lose digits.

    Raises:
        LineError: with every problem of the line.
    """
    entry = _load(raw) if exact else _load_quickly(raw)
    if type(entry) is not dict:
        raise LineError(f"{_kind(entry)} where a request object was expected")
    custom_id: Any = entry.get("custom_id")
    url: Any = entry.get("url")
    body: Any = entry.get("body")
    metadata = entry.get("metadata")
    valid = (
        type(custom_id) is str
        and custom_id
        and entry.get("method") == "POST"
        and url in _URLS
        and type(body) is dict
        and _PAYLOAD_FIELD[url] in body
        and (metadata is None or type(metadata) is dict)
        and _model_fits(body, model, accepts)
    )
    if not valid and not exact:
        return request_entry(raw, model, accepts)  # what is shown of the line keeps every digit
    if not valid:
        raise LineError(*_problems(entry, model, accepts))
    return entry


def custom_id_of(raw: bytes) -> str | None:
    """Return the name in a line, whatever else is wrong with it; None where there is none."""
    try:
        entry = _load_quickly(raw)
    except LineError:
        return None
    custom_id = entry.get("custom_id") if type(entry) is dict else None
    return custom_id if type(custom_id) is str and custom_id else None


def _model_fits(body: dict[str, Any], model: str | None, accepts: AcceptsModel) -> bool:
    named = body.get("model")
    if named is None:
        return model is not None
    if type(named) is not str or not named or not is_whole(named):
        return False
    return model is None or named == model or accepts(model, named)


def _problems(entry: dict[str, Any], model: str | None, accepts: AcceptsModel) -> list[str]:
    problems = [*_custom_id_problems(entry), *_method_problems(entry), *_url_problems(entry)]
    problems += _body_problems(entry, model, accepts)
    metadata = entry.get("metadata")
    if metadata is not None and type(metadata) is not dict:
        problems.append(f"metadata must be an object, not {_kind(metadata)}")
    return problems


def _custom_id_problems(entry: dict[str, Any]) -> list[str]:
    custom_id = entry.get("custom_id")
    if custom_id is None:
        return ["custom_id is missing; give every request a unique name"]
    if type(custom_id) is not str:
        return [f"custom_id must be a string, not {_kind(custom_id)}"]
    return [] if custom_id else ["custom_id is empty; give every request a unique name"]


def _method_problems(entry: dict[str, Any]) -> list[str]:
    method = entry.get("method")
    if method == "POST":
        return []
    seen = "is missing" if method is None else f"is {_show(method)}"
    return [f'method {seen}; it must be "POST"']


def _url_problems(entry: dict[str, Any]) -> list[str]:
    url = entry.get("url")
    if url in _URLS:
        return []
    seen = "is missing" if url is None else f"{_show(url)} is unknown"
    return [f"url {seen}; it must be one of {', '.join(_URLS)}"]


def _body_problems(entry: dict[str, Any], model: str | None, accepts: AcceptsModel) -> list[str]:
    body = entry.get("body")
    if type(body) is not dict:
        seen = "is missing" if body is None else f"is {_kind(body)}"
        return [f"body {seen}; it must be the object that the engine is sent"]
    problems = []
    url = entry.get("url")
    field = _PAYLOAD_FIELD.get(url) if isinstance(url, str) else None
    if field is not None and field not in body:
        problems.append(f"body.{field} is missing; {url} needs it")
    return problems + _model_problems(body, model, accepts)


def _model_problems(body: dict[str, Any], model: str | None, accepts: AcceptsModel) -> list[str]:
    if _model_fits(body, model, accepts):
        return []
    named = body.get("model")
    if named is None:
        return ["body.model is missing; add it, or name the model of the run with --model"]
    if type(named) is not str or not named:
        return [f"body.model must be a non-empty string, not {_show(named)}"]
    if not is_whole(named):
        return [f"body.model is {json.dumps(named)}, which holds half a character; correct it"]
    return [
        f"body.model is {_show(named)} but the run's model is {_show(model)}; "
        "drop one of the two, or run each model by itself"
    ]


_KINDS = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def _kind(value: Any) -> str:
    return _KINDS[type(value)]


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
