"""What an attempt's outcome means: an answer, another attempt, or a final failure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from aiflux.core.batch.prompt_lengths import TOO_LONG
from aiflux.core.batch.request import (
    EMBEDDINGS,
    WITHOUT_TEXT,
    expected_results,
    parse_json,
    parse_quickly,
)
from aiflux.core.batch.results_file import choices, empty_reason, scores, token_counts
from aiflux.engines.http import Answer, ExchangeError
from aiflux.util.text import counted

RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
OVERLOADED_STATUSES = frozenset({429, 503})
UNREADY_STATUSES = frozenset({502, 503, 504})
"""Messages of servers and gateways while the model is not (yet) loaded."""
_SHOWN = 500
_KEPT_BODY = 65536
_BEFORE = 60
_EXCERPT = 200
# Sent by llama-server and others with a 503 while the model is loaded.
_LOADING = re.compile(r"\bloading\b", re.IGNORECASE)
# Of vLLM, llama-server, OpenAI and SGLang.
_LONG = re.compile(
    r"context (?:length|size|window)|context_length_exceeded|exceed_context_size"
    r"|longer than the (?:model|context)|prompt is too long",
    re.IGNORECASE,
)
_OF_THE_REQUEST = frozenset({400, 413, 422})
_TITLE = re.compile(rb"<title[^>]*>([^<]*)", re.IGNORECASE)
CrashCode = Callable[[int, str], str | None]
"""From status and message: the code of an answer that means an engine crash."""
_CONTENT = frozenset({"choices", "output", "data", "results"})
"""Fields that hold an answer."""
# Codes of OpenAI's API in a 429 that waiting does not help.
_NO_QUOTA = ("insufficient_quota", "billing_not_active", "billing_hard_limit_reached")
ABORTED_ANSWER = "aborted_answer"
UNTOUCHED = ("refused", "model_gone", "loading")
"""Codes of an engine that is down, so that it did not process the request."""


class Kind(Enum):
    """How an outcome is handled."""

    ANSWERED = "answered"
    UNFIT = "unfit"
    RETRY = "retry"
    FAILED = "failed"
    CRASHED = "crashed"
    UNATTEMPTED = "unattempted"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an attempt's outcome means.

    Attributes:
        kind: UNFIT is an answer that does not match the schema of its request.
        code, message: the error, unless ``kind`` is ANSWERED.
        body: JSON for the journal.
        usage: the answer's token counts.
        finish_reason: of the first choice.
        model: as named in the answer; None if it names none.
        location: target of a redirect.
        empty: why the first choice has no text (``EMPTY_REASONS``); None if it has text, and for
            embeddings.
        overloaded: the engine asked for fewer requests.
        foreign: a status 2xx with something other than an OpenAI API response, such as a web
            page.
    """

    kind: Kind
    code: str = ""
    message: str = ""
    status: int | None = None
    body: bytes = b"null"
    retry_after: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None
    model: str | None = None
    location: str = ""
    empty: str | None = None
    overloaded: bool = False
    foreign: bool = False

    @property
    def generated(self) -> bool:
        """Whether the engine generated an answer, valid or not."""
        return self.kind in (Kind.ANSWERED, Kind.UNFIT)

    @property
    def reason(self) -> str:
        """The error, for a line of the log."""
        return f"{self.code}: {self.message}"

    @property
    def work(self) -> int:
        """Tokens that were generated, or read if none are generated; 1 if unknown."""
        return self.completion_tokens or self.prompt_tokens or 1

    @property
    def error(self) -> dict[str, Any]:
        """The error object of a failed result."""
        return {"code": self.code, "message": self.message, "status": self.status}


def judge_answer(
    url: str, body: Mapping[str, Any], answer: Answer, crash_code: CrashCode
) -> Outcome:
    """Judge a complete HTTP answer.

    Args:
        url, body: of the request.
        crash_code: function of the engine's kind.
    """
    if 200 <= answer.status < 300:
        return _judge_body(url, body, answer)
    text = answer.body.decode("utf-8", "replace")
    message = error_message(text)
    if answer.location and 300 <= answer.status < 400:
        message = f"redirected to {answer.location}"
    kept = _kept_body(answer.body, text)
    crash = crash_code(answer.status, message)
    if crash is not None:
        return Outcome(Kind.CRASHED, crash, message, answer.status, kept)
    retried = answer.status in RETRIED_STATUSES or answer.status >= 500
    if answer.status == 429 and any(f'"{code}"' in text for code in _NO_QUOTA):
        retried = False  # waiting does not help
    long = answer.status in _OF_THE_REQUEST and _LONG.search(message)
    return Outcome(
        Kind.RETRY if retried and answer.status != 501 else Kind.FAILED,
        TOO_LONG if long else f"http_{answer.status}",
        message,
        answer.status,
        kept,
        retry_after=answer.retry_after,
        overloaded=retried and answer.status in OVERLOADED_STATUSES,
        location=answer.location,
    )


def judge_bug(error: Exception) -> Outcome:
    """Judge an attempt that hit a bug in AI-Flux: it fails the request, not the run."""
    if isinstance(error, MemoryError):
        return Outcome(Kind.RETRY, "memory", "not enough memory for the answer")
    excerpt = f"{type(error).__name__}: {error}"[:_SHOWN]
    message = f"a bug in AI-Flux, whose trace is in the log; please report it: {excerpt}"
    return Outcome(Kind.FAILED, "internal_error", message)


def as_down(verdict: Outcome) -> Outcome:
    """Return the outcome of an answer from an engine that turned out not to be ready."""
    code = "loading" if _LOADING.search(verdict.message) else "not_ready"
    return replace(verdict, kind=Kind.CRASHED, code=code, overloaded=False)


def judge_exchange_error(error: ExchangeError) -> Outcome:
    """Judge an exchange without a complete answer; does not check whether the engine runs."""
    if error.code == "aborted":
        return Outcome(Kind.UNATTEMPTED, error.code, error.message)
    if error.code == "refused":
        return Outcome(Kind.CRASHED, error.code, error.message)
    return Outcome(Kind.RETRY, error.code, error.message)


def _judge_body(url: str, asked: Mapping[str, Any], answer: Answer) -> Outcome:
    try:
        body = parse_quickly(answer.body)
    except ValueError as error:
        # A body that begins as an object is a broken answer of an API.
        foreign = not answer.body.lstrip().startswith(b"{")
        message = _not_json(answer, error)
        return Outcome(Kind.RETRY, "not_json", message, answer.status, foreign=foreign)
    if not isinstance(body, dict):
        message = "the answer is not a JSON object"
        return Outcome(Kind.RETRY, "not_json", message, answer.status, foreign=True)
    if body.get("error"):
        message = error_message(answer.body.decode("utf-8"))
        return Outcome(Kind.RETRY, "error_in_answer", message, answer.status, answer.body)
    if _aborted(body):
        message = "the engine stopped before the end of the answer"
        return Outcome(Kind.RETRY, ABORTED_ANSWER, message, answer.status, answer.body)
    empty = _missing_results(url, asked, body) if url in WITHOUT_TEXT else _missing_text(body)
    if empty is not None:
        return Outcome(
            Kind.RETRY, "empty_answer", empty, answer.status, answer.body,
            foreign=not _CONTENT & body.keys(),
        )  # fmt: skip
    prompt, completion = token_counts(body.get("usage"))
    finish = _finish_reason(asked, body, completion)
    return Outcome(
        Kind.ANSWERED,
        status=answer.status,
        body=answer.body,
        prompt_tokens=prompt,
        completion_tokens=completion,
        finish_reason=finish,
        model=body["model"] if isinstance(body.get("model"), str) else None,
        empty=empty_reason(body),
    )


def _aborted(body: dict[str, Any]) -> bool:
    """Return whether an answer has only what an engine had when it was ended.

    vLLM and SGLang answer requests in flight with status 200 then (vLLM 0.32.0:
    v1/engine/core.py, `_send_abort_outputs`).
    """
    choices = body.get("choices")
    listed = choices if isinstance(choices, list) else []
    return body.get("status") == "cancelled" or any(
        isinstance(each, dict) and each.get("finish_reason") == "abort" for each in listed
    )


def _not_json(answer: Answer, error: ValueError) -> str:
    """Return why and where an answer cannot be parsed, with its type, title and the text there."""
    body = answer.body
    at, what = 0, str(error)
    if isinstance(error, UnicodeDecodeError):
        at, what = error.start, f"byte 0x{body[error.start]:02x} is not UTF-8"
    elif isinstance(error, json.JSONDecodeError):
        at, what = len(error.doc[: error.pos].encode()), error.msg.removesuffix(" at")
    start = max(0, at - _BEFORE)
    excerpt = body[start : start + _EXCERPT].decode("utf-8", "replace")
    return f"the answer is not valid JSON: {what} at offset {at}: {excerpt!r}{_page(answer)}"


def _page(answer: Answer) -> str:
    """Return the content type and the title of a page; empty for declared JSON."""
    if answer.content_type in ("", "application/json"):
        return ""
    title = _TITLE.search(answer.body[:_KEPT_BODY])
    text = " ".join(title[1].decode("utf-8", "replace").split())[:_EXCERPT] if title else ""
    return f" ({answer.content_type}{f', titled {text!r}' if text else ''})"


def _finish_reason(asked: Mapping[str, Any], body: dict[str, Any], tokens: int) -> str | None:
    """Return the finish reason of the first choice.

    llama.cpp calls every response completed (server-task.cpp, `to_json_oaicompat_resp`): one with
    as many tokens as it may have was cut.
    """
    finish = next(iter(choices(body)), {}).get("finish_reason")
    limit = asked.get("max_output_tokens")
    if finish == "stop" and "output" in body and "incomplete_details" not in body:
        return "length" if type(limit) is int and tokens >= limit else finish
    return finish if isinstance(finish, str) else None


def _missing_text(body: dict[str, Any]) -> str | None:
    """Return what is wrong with an answer that has no text and no reason for that, or None."""
    choice = next(iter(choices(body)), {})
    message = choice.get("message")
    content = bool(choice.get("text"))
    if isinstance(message, dict):
        content = any(value for name, value in message.items() if name != "role")
    if content or isinstance(choice.get("finish_reason"), str):
        return None
    return "an answer without content or finish_reason"


def _missing_results(url: str, asked: Mapping[str, Any], body: dict[str, Any]) -> str | None:
    """Return what is wrong with an answer without all embeddings or scores, or None."""
    wanted, data = expected_results(url, asked), body.get("data")
    positions = {each.document for each in scores(body)}
    there = expected_results(url, {**asked, "top_n": None})
    if there is not None and (wrong := sorted(positions.difference(range(there)))):
        return f"an answer with a result at position {wrong[0]}, for a request with {there}"
    found = len(positions)
    if url == EMBEDDINGS and isinstance(data, list):
        found = len(data)
    if not found and (wanted or not _CONTENT & body.keys()):
        return "an answer without results"
    if found < (wanted or 0):
        return f"an answer with {counted(found, 'result')} instead of {wanted}"
    return None


def error_message(text: str) -> str:
    """Return the server's message: ``error.message``, ``error``, or the text."""
    try:
        error = parse_json(text).get("error")
        message = error.get("message") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        message = None
    message = message if isinstance(message, str) and message else text.strip()
    return message if len(message) <= _SHOWN else message[:_SHOWN] + "..."


def _kept_body(body: bytes, text: str) -> bytes:
    """Return an error answer as JSON: unchanged if it is JSON in UTF-8, else as a string."""
    try:
        parse_json(body.decode("utf-8"))
    except ValueError:
        return json.dumps(text[:_KEPT_BODY]).encode()
    return body
