"""One request: a line of an OpenAI Batch input file, parsed and checked.

The form is OpenAI's (https://platform.openai.com/docs/guides/batch): an object with ``custom_id``,
``method``, ``url`` and ``body``; AI-Flux adds an optional ``metadata`` object. Fields of a body
that an engine accepts but ignores are counted, for a warning.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from math import isinf
from operator import eq
from typing import Any, NamedTuple, NoReturn

from aiflux.models.endpoints import ENDPOINTS, MAX_ANSWERS
from aiflux.util.text import counted, error_text, is_whole, joined, ranges

SHOWN_LINES = 5


try:
    import orjson
except ImportError:  # the image has pure Python packages only
    orjson = None  # type: ignore[assignment]

COMPLETIONS = ENDPOINTS["completions"].url
EMBEDDINGS = ENDPOINTS["embeddings"].url
RERANK = ENDPOINTS["rerank"].url
SCORE = ENDPOINTS["score"].url
RESPONSES = ENDPOINTS["responses"].url
WITHOUT_TEXT = frozenset(each.url for each in ENDPOINTS.values() if not each.generates)
"""Endpoints that generate no text, and so have no sampling parameters."""
WITH_CHOICES = frozenset({ENDPOINTS["chat"].url, ENDPOINTS["completions"].url})
"""Endpoints whose answers have choices: as many as ``n`` in the body asks for."""
_PAYLOADS = {each.url: each.payloads for each in ENDPOINTS.values()}
_URLS = tuple(_PAYLOADS)
# Of bodies with `input`, those for embeddings have none of these.
_OF_RESPONSES = frozenset({
    "background", "conversation", "instructions", "max_output_tokens", "max_tool_calls",
    "parallel_tool_calls", "previous_response_id", "reasoning", "store", "stream", "temperature",
    "text", "tool_choice", "tools", "top_p",
})  # fmt: skip
_TAILS = {url.removeprefix("/v1"): url for url in _URLS}
# A path of another service, such as /openai/deployments/NAME/chat/completions?api-version=V.
_OTHER_URL = re.compile(
    rf"(?:https?://[^/?#]+)?(?:/[^/?#]+)*?({'|'.join(map(re.escape, _TAILS))})/?(?:[?#].*)?"
)
AcceptsModel = Callable[[str, str], bool]
"""Returns whether the run's model and the model of a body are the same."""
KEY_BYTES = 16
MAX_DEPTH = 200
TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"
_SHOWN_DIGITS = 40


class LineError(ValueError):
    """A line is not a valid request; ``problems`` has one text for each problem."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Request(NamedTuple):
    """One valid request.

    Attributes:
        raw: the input line, without its line ending.
        custom_id: the user's name for the request, unique in the input.
        url: of an endpoint in ``ENDPOINTS``.
        body: the body for the engine.
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
    """JSON, or almost JSON, whose value cannot be passed on unchanged."""


class _NumberError(ValueError):
    """A constant, or a number that exceeds the range of a double."""


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

    Integers keep all their digits; of duplicate keys in an object, the last counts.

    Raises:
        ValueError: it is not JSON, contains NaN, Infinity or a number out of a double's
            range, or is nested more than ``MAX_DEPTH`` levels deep.
    """
    try:
        value = _decode(text)
    except RecursionError:
        raise _too_deep(text) from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # a number or a constant; the decoder gives no position
        raise _bad_number(text) from None
    if text.count("[") + text.count("{") > MAX_DEPTH and depth(value) > MAX_DEPTH:
        raise _too_deep(text)
    return value


def parse_quickly(raw: bytes) -> Any:
    """Decode like ``parse_json``, but integers of more than 64 bits may become floats."""
    if orjson is not None:
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError:
            pass  # orjson also refuses some valid JSON: the standard library decides
        else:
            if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH or depth(value) <= MAX_DEPTH:
                return value
    return parse_json(raw.decode("utf-8"))


def load_json(raw: bytes) -> Any:
    """Decode JSON that was already checked."""
    if orjson is not None:
        try:
            return orjson.loads(raw)
        except orjson.JSONDecodeError:
            pass  # half a surrogate pair, or a number of many digits
    return json.loads(raw)


def depth(value: Any) -> int:
    """Return the depth of nested objects and arrays in a value."""
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
    """Return whether a number exceeds a double's range, or Python's limit of digits."""
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
    """Return the reason why ``parse_json`` raised, with its position in the line."""
    if isinstance(error, _RefusedValueError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    return f"not JSON: {error_text(error)}"


def _decode(text: str) -> Any:
    try:
        value, end = _decoder.raw_decode(text)
        if end == len(text):
            return value
    except json.JSONDecodeError:
        pass  # decode() skips white space around the value, and reports errors
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
        raise LineError(f"{not_json(error)}; each line must be one JSON object") from None


def _load_quickly(raw: bytes) -> Any:
    try:
        return parse_quickly(raw)
    except ValueError:
        return _load(raw)  # raises the error of the line


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
    url = endpoint_url(entry)
    return Request(raw, entry["custom_id"], url, entry["body"], entry.get("metadata"))


def endpoint_url(entry: Mapping[str, Any]) -> str:
    """Return the endpoint of a request, as AI-Flux names it; "" if it is unknown.

    Files for other services have full URLs or other paths (Azure: ``/chat/completions``), or no url
    at all (Mistral, Together): then the fields of the body decide.
    """
    url = entry.get("url")
    if type(url) is str:
        if url in _URLS:
            return url
        found = _OTHER_URL.fullmatch(url)
        return "" if found is None else _TAILS[found[1]]
    body = entry.get("body")
    if url is not None or type(body) is not dict:
        return ""
    inferred = next((each for each in _URLS if _has_payload(each, body)), "")
    for_text = inferred != RESPONSES or _is_for_responses(body)
    return inferred if for_text else EMBEDDINGS


def _has_payload(url: str, body: dict[str, Any]) -> bool:
    return any(fields <= body.keys() for fields in _PAYLOADS[url])


def _is_filled(url: str, body: dict[str, Any]) -> bool:
    """Return whether a body has a payload that an engine can answer."""
    return any(not any(_fault(name, body.get(name)) for name in each) for each in _PAYLOADS[url])


def _fault(name: str, payload: Any) -> str:
    """Return what is wrong with a field of a payload; "" if nothing is."""
    if payload is None:
        return "is null"
    if payload == []:
        return "is an empty array"
    if name == "messages" and type(payload) is not list:
        return f"is {_kind(payload)}, not an array"
    return ""


def _is_for_responses(body: dict[str, Any]) -> bool:
    """Return whether a body with ``input`` is for text: inputs for embeddings have no objects."""
    given = body["input"]
    items = type(given) is list and any(type(item) is dict for item in given)
    return items or not _OF_RESPONSES.isdisjoint(body)


def expected_results(url: str, body: Mapping[str, Any]) -> int | None:
    """Return the number of embeddings or scores in a complete answer; None if it is unknown."""
    if url == EMBEDDINGS:
        return _count(body.get("input"))
    if url == RERANK:
        documents, most = _count(body.get("documents")), body.get("top_n")
        if documents is None or type(most) is not int or most < 1:
            return documents
        return min(documents, most)
    if url != SCORE:
        return None
    fields = next((each for each in _PAYLOADS[url] if each <= body.keys()), frozenset())
    counts = [count for name in fields if (count := _count(body[name])) is not None]
    return max(counts) if counts and len(counts) == len(fields) else None


def _count(payload: Any) -> int | None:
    """Return the number of texts in a payload: one, or a list of them; a list of tokens is one."""
    if type(payload) is not list:
        return 1
    kinds = {type(item) for item in payload}
    if kinds == {int}:
        return 1
    return len(payload) if kinds <= {str} or kinds <= {list} or kinds == {dict} else None


def answers_wanted(url: str, body: Mapping[str, Any]) -> int:
    """Return how many answers a request asks for; 1 if ``n`` is not a number of them."""
    wanted = body.get("n")
    return wanted if type(wanted) is int and wanted > 1 and url in WITH_CHOICES else 1


def adaptation(entry: Mapping[str, Any]) -> str:
    """Return how a request differs from OpenAI's form, for a note; "" if it does not."""
    url = entry.get("url")
    if url in _URLS:
        return ""
    what = "no url" if url is None else f"url {_show(url)}"
    return f"{what} (taken as {endpoint_url(entry)})"


def adapted_text(adapted: Mapping[str, int]) -> str:
    """Return the note about requests that are not in OpenAI's form, or for another model."""
    parts = [f"{counted(count, 'request')} with {text}" for text, count in adapted.items()]
    return f"the input is for another service: {'; '.join(parts)}"


def request_entry(
    raw: bytes, model: str | None = None, accepts: AcceptsModel = eq, *, exact: bool = True
) -> dict[str, Any]:
    """Check one input line like ``parse_request``; return its object.

    Args:
        exact: False is faster, for checks only: numbers can lose digits.

    Raises:
        LineError: with every problem of the line.
    """
    entry = _load(raw) if exact else _load_quickly(raw)
    if type(entry) is not dict:
        raise LineError(f"{_kind(entry)} instead of a request object")
    custom_id: Any = entry.get("custom_id")
    url: Any = endpoint_url(entry)
    body: Any = entry.get("body")
    metadata = entry.get("metadata")
    valid = (
        type(custom_id) is str
        and custom_id
        and entry.get("method") in ("POST", None)
        and url
        and type(body) is dict
        and _is_filled(url, body)
        and ("n" not in body or not _n_problems(url, body))
        and (metadata is None or type(metadata) is dict)
        and _model_fits(body, model, accepts)
    )
    if not valid and not exact:
        return request_entry(raw, model, accepts)  # the error shows every digit of the line
    if not valid:
        raise LineError(*_problems(entry, model, accepts))
    return entry


def custom_id_of(raw: bytes) -> str | None:
    """Return the custom_id in a line, even if the line is invalid; None if there is none."""
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
        return ["custom_id is missing; use a unique custom_id for every request"]
    if type(custom_id) is not str:
        return [f"custom_id must be a string, not {_kind(custom_id)}"]
    return [] if custom_id else ["custom_id is empty; use a unique custom_id for every request"]


def _method_problems(entry: dict[str, Any]) -> list[str]:
    method = entry.get("method")
    return [] if method in ("POST", None) else [f'method is {_show(method)}; it must be "POST"']


def _url_problems(entry: dict[str, Any]) -> list[str]:
    url = entry.get("url")
    if endpoint_url(entry) or (url is None and type(entry.get("body")) is not dict):
        return []
    seen = "is missing" if url is None else f"{_show(url)} is unknown"
    return [f"url {seen}; it must be one of {', '.join(_URLS)}"]


def _body_problems(entry: dict[str, Any], model: str | None, accepts: AcceptsModel) -> list[str]:
    body = entry.get("body")
    if type(body) is not dict:
        seen = "is missing" if body is None else f"is {_kind(body)}"
        return [f"body {seen}; it must be the object for the engine"]
    problems = []
    url = endpoint_url(entry)
    if url and not _is_filled(url, body):
        problems.append(_payload_problem(url, body))
    return problems + _n_problems(url, body) + _model_problems(body, model, accepts)


def _n_problems(url: str, body: dict[str, Any]) -> list[str]:
    wanted = body.get("n")
    if type(wanted) is int and wanted > MAX_ANSWERS and url in WITH_CHOICES:
        return [f"body.n is {_show(wanted)}; it can be at most {MAX_ANSWERS}"]
    if not url or url in WITH_CHOICES or wanted in (None, 1):
        return []
    return [f"body.n is {_show(body['n'])}, but {url} gives one answer; leave it out"]


def _payload_problem(url: str, body: dict[str, Any]) -> str:
    """Return what is wrong with the payload of which a body has the most fields."""
    fields = max(_PAYLOADS[url], key=lambda each: len(each & body.keys()))
    missing = [f"body.{name}" for name in sorted(fields - body.keys())]
    if not missing:
        faults = ((name, _fault(name, body[name])) for name in sorted(fields))
        name, fault = next((name, fault) for name, fault in faults if fault)
        return f"body.{name} {fault}; {url} needs at least one entry in it"
    verb, them = ("is", "it") if len(missing) == 1 else ("are", "them")
    return f"{joined(missing)} {verb} missing; {url} needs {them}"


def _model_problems(body: dict[str, Any], model: str | None, accepts: AcceptsModel) -> list[str]:
    if _model_fits(body, model, accepts):
        return []
    named = body.get("model")
    if named is None:
        return ["body.model is missing; add it, or name the model of the run with --model"]
    if type(named) is not str or not named:
        return [f"body.model must be a non-empty string, not {_show(named)}"]
    if not is_whole(named):
        return [
            f"body.model is {json.dumps(named)}, which contains half a surrogate pair; correct it"
        ]
    return [
        f"body.model is {_show(named)} but the run's model is {_show(model)}; "
        "use --replace-model to send all requests to the run's model, or run each model separately"
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


_FIX = "leave it out, or use a server that supports it: --engine-url URL"


@dataclass(frozen=True)
class FieldRule:
    """A field that an engine ignores or rejects.

    Attributes:
        instead: what happens instead.
        harmless: values that request exactly that.
        verb: what the engine does with it.
        fix: what the user can do.
        unless: setting of the run with which the engine supports the field; "" for none.
        off: another field, and its value with which this one is harmless.
        on: another field, and its value without which this one is harmless.
        url: the only endpoint for which this holds; "" for all.
    """

    instead: str
    harmless: tuple[Any, ...] = ()
    verb: str = "ignores"
    fix: str = _FIX
    unless: str = ""
    off: tuple[str, Any] | None = None
    on: tuple[str, Any] | None = None
    url: str = ""

    def concerns(self, url: str, body: Mapping[str, Any], name: str) -> bool:
        """Return whether a request sets the field to a value that is not harmless."""
        if self.url not in ("", url):
            return False
        if self.off is not None and body.get(self.off[0]) == self.off[1]:
            return False
        if self.on is not None and body.get(self.on[0]) != self.on[1]:
            return False
        return body[name] not in (None, {}, *self.harmless)


FieldRules = Mapping[str, FieldRule]
EQUAL_ANSWERS: FieldRules = {
    "n": FieldRule(
        "at temperature 0, all answers to a request are equal",
        (1,),
        verb="repeats one answer for",
        fix="set a temperature above 0, or ask for one answer",
        on=("temperature", 0),
    )
}
"""The rule for several answers, with every engine."""


@dataclass(frozen=True)
class IgnoredField:
    """The number of requests that set an ignored field, and the lines of the first ones."""

    requests: int
    lines: tuple[int, ...]


@dataclass
class IgnoredFields:
    """The number of requests with ignored fields, and the offsets of the first ones."""

    counts: Counter[str] = field(default_factory=Counter)
    offsets: dict[str, list[int]] = field(default_factory=dict)

    def add(self, url: str, body: Mapping[str, Any], offset: int, rules: FieldRules) -> None:
        """Add the ignored fields of one request, whose line starts at ``offset``."""
        for name in rules.keys() & body.keys():
            if rules[name].concerns(url, body, name):
                self.counts[name] += 1
                first = self.offsets.setdefault(name, [])
                if len(first) < SHOWN_LINES:
                    first.append(offset)

    def merge(self, other: IgnoredFields) -> None:
        """Add the fields of the following part of the input."""
        self.counts.update(other.counts)
        for name, offsets in other.offsets.items():
            self.offsets[name] = [*self.offsets.get(name, ()), *offsets][:SHOWN_LINES]


def ignored_texts(
    ignored: Mapping[str, IgnoredField], engine: str, rules: FieldRules
) -> Iterator[tuple[str, str]]:
    """Yield one warning for each field, and its fix.

    Args:
        engine: the engine's name in messages.
        rules: of the engine; other fields are skipped.
    """
    for name in sorted(ignored.keys() & rules.keys()):
        lines, requests = ignored[name].lines, ignored[name].requests
        more = ["..."] if requests > len(lines) else []
        where = ", ".join([*ranges(lines), *more]) if more else joined(ranges(lines))
        noun = "line" if requests == 1 else "lines"
        rule = rules[name]
        yield (
            f"{engine} {rule.verb} {name!r} in {counted(requests, 'request')} ({noun} {where}): "
            f"{rule.instead}",
            rule.fix,
        )
