"""Read outputs: the entries of a ``.json`` array, or of a ``.jsonl`` and its errors file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from aiflux.errors import InputError
from aiflux.util.text import error_text

_BUFFER = 1 << 20
_MOST_TOKENS = 2**40  # a larger count in an answer is nonsense


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one request.

    Attributes:
        input: the request; None if it is not known.
        output: the engine's response; None for a failed request.
        error: None, or an object with ``code`` and ``message``.
        metadata: model, times and the request's own metadata; empty if it is not known.
    """

    custom_id: str
    input: dict[str, Any] | None
    output: Any
    error: dict[str, Any] | None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The answer's text; "" for a failed request."""
        return "" if self.error is not None else answer_text(self.output)

    @property
    def choice(self) -> ChoiceText:
        """The first choice of the answer, with its reasoning; empty for embeddings and scores."""
        texts = choice_texts(self.output) if self.error is None else []
        return texts[0] if texts else ChoiceText("")

    @property
    def failure(self) -> str:
        """The error as ``code: message``; "" without an error."""
        return "" if self.error is None else f"{self.error['code']}: {self.error['message']}"


TOOL_CALL = "tool_call"
"""Reason of an answer that has no text because it calls a tool: it does not count as empty."""
EMPTY_REASONS = {
    "reasoning": "ended in reasoning: raise max_tokens",
    "length": "cut before the first word: raise max_tokens",
    "only_reasoning": "with reasoning only",
    TOOL_CALL: "with a tool call",
    "refusal": "refused",
    "content_filter": "stopped by a content filter",
    "no_text": "without any text",
}


@dataclass(frozen=True, slots=True)
class ChoiceText:
    """The text of one choice of an answer.

    Attributes:
        reasoning: the reasoning before the answer, if the engine separates it.
        empty: why there is no text, one of ``EMPTY_REASONS``; None if there is text.
    """

    text: str
    reasoning: str = ""
    empty: str | None = None


def choices(body: Any) -> list[dict[str, Any]]:
    """Return the choices of an answer in the form of chat; nothing for embeddings and scores.

    An answer of ``/v1/responses`` is one choice.
    """
    if not isinstance(body, dict):
        return []
    found = body.get("choices")
    if found is None and isinstance(body.get("output"), list):
        return [_response_choice(body, [each for each in body["output"] if isinstance(each, dict)])]
    listed = found if isinstance(found, list) else []
    return [choice for choice in listed if isinstance(choice, dict)]


# States of a response that is not finished.
_UNFINISHED = ("queued", "in_progress")


def _response_choice(body: dict[str, Any], items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the items of a response as a choice of chat.

    Source: https://platform.openai.com/docs/api-reference/responses/object. vLLM and llama.cpp have
    the reasoning in ``content``, Ollama in ``summary``.
    """
    content, reasoning, calls = [], [], []
    for item in items:
        kind = item.get("type")
        if kind == "message":
            content += _item_parts(item)
        elif kind == "reasoning":
            reasoning += _item_parts(item)
        elif str(kind).endswith("_call"):
            calls.append(_tool_call(item))
    logprobs = [part["logprobs"] for part in content if isinstance(part.get("logprobs"), list)]
    return {
        "message": {
            "content": content,
            "reasoning_content": reasoning,
            "tool_calls": calls,
        },
        "logprobs": {"content": [*chain(*logprobs)]} if any(logprobs) else None,
        "finish_reason": _finish_reason(body, bool(calls)),
    }


def _item_parts(item: dict[str, Any]) -> list[dict[str, Any]]:
    parts = item.get("content") or item.get("summary")
    if isinstance(parts, str):
        return [{"text": parts}]
    return [each for each in parts if isinstance(each, dict)] if isinstance(parts, list) else []


def _tool_call(item: dict[str, Any]) -> dict[str, Any]:
    """Return a call of a function in the form of chat; calls of other tools as they are."""
    if item["type"] != "function_call":
        return item
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    return {"id": item.get("call_id"), "type": "function", "function": function}


def _finish_reason(body: dict[str, Any], calls: bool) -> str | None:
    status = body.get("status")
    if status == "completed":
        return "tool_calls" if calls else "stop"
    details = body.get("incomplete_details")
    reason = details.get("reason") if isinstance(details, dict) else None
    if reason is not None:
        return "length" if reason == "max_output_tokens" else str(reason)
    return status if isinstance(status, str) and status not in _UNFINISHED else None


def choice_texts(body: Any) -> list[ChoiceText]:
    """Return the text of each choice of an answer; nothing for embeddings and scores."""
    return [_choice_text(choice) for choice in choices(body)]


def empty_reason(body: dict[str, Any]) -> str | None:
    """Return why the first choice of an answer is empty; None if it is not, or without choices."""
    listed = body.get("choices")
    first = listed[0] if isinstance(listed, list) and listed else None
    message = first.get("message") if isinstance(first, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str) and content and not content.isspace():
        return None  # as most answers
    texts = choice_texts(body)
    return texts[0].empty if texts else None


def _choice_text(choice: dict[str, Any]) -> ChoiceText:
    message = choice.get("message")
    if not isinstance(message, dict):
        message = {"content": choice.get("text")}
    content = message.get("content")
    text = _parts_text(content, "text")
    # vLLM and llama.cpp have reasoning_content, Ollama and OpenRouter reasoning; Mistral has parts.
    named = (message.get(name) for name in ("reasoning_content", "reasoning"))
    thoughts = (*(_parts_text(each, "text") for each in named), _parts_text(content, "thinking"))
    reasoning = next((thought for thought in thoughts if thought.strip()), "")
    empty = None if text.strip() else _empty_reason(message, choice.get("finish_reason"), reasoning)
    return ChoiceText(text, reasoning, empty)


def _parts_text(content: Any, key: str) -> str:
    """Return the text of a content; of a list of parts, the joined text of those with ``key``."""
    if not content:
        return ""
    if isinstance(content, str):
        return content if key == "text" else ""
    parts = content if isinstance(content, list) else ()
    inside = (part.get(key) for part in parts if isinstance(part, dict))
    return "".join(
        each if isinstance(each, str) else _parts_text(each, "text")
        for each in inside
        if isinstance(each, str | list)
    )


def _empty_reason(message: dict[str, Any], finish: Any, reasoning: str) -> str:
    if message.get("tool_calls") or message.get("function_call"):
        return TOOL_CALL
    if message.get("refusal") or _parts_text(message.get("content"), "refusal"):
        return "refusal"
    if finish == "content_filter":
        return "content_filter"
    if finish == "length":
        return "reasoning" if reasoning else "length"
    return "only_reasoning" if reasoning else "no_text"


def answered_words(answered: int, empty: Mapping[str, int]) -> str:
    """Return the number of answers, of empty ones, and their reasons, as text."""
    reasons = [name for name in EMPTY_REASONS if empty.get(name) and name != TOOL_CALL]
    words = [f"{answered:,} answered"]
    if reasons:
        listed = "; ".join(f"{empty[name]:,} {EMPTY_REASONS[name]}" for name in reasons)
        words.append(f"{sum(empty[name] for name in reasons):,} of them empty ({listed})")
    if empty.get(TOOL_CALL):
        words.append(f"{empty[TOOL_CALL]:,} {EMPTY_REASONS[TOOL_CALL]}")
    return ", ".join(words)


def answer_texts(body: Any) -> list[str]:
    """Return the text of each choice of an answer; nothing for embeddings and scores."""
    return [choice.text for choice in choice_texts(body)]


def vectors(body: Any) -> list[Any]:
    """Return the vectors of an embeddings answer, in order; nothing for other answers."""
    data = body.get("data") if isinstance(body, dict) and body.get("object") == "list" else None
    items = data if isinstance(data, list) else []
    found = (item for item in items if isinstance(item, dict) and "score" not in item)
    return [item.get("embedding") for item in found]


class Score(NamedTuple):
    """A score, and the position of its document (rerank) or its pair (score), from 0."""

    document: int
    score: float


def scores(body: Any) -> list[Score]:
    """Return the scores of an answer, in its order; nothing for other answers.

    ``/v1/rerank`` returns the best first.
    """
    if not isinstance(body, dict):
        return []
    found = body.get("results")
    listed = found if isinstance(found, list) else body.get("data")
    name = "relevance_score" if isinstance(found, list) else "score"
    return [
        Score(item["index"], item[name])
        for item in (listed if isinstance(listed, list) else ())
        if isinstance(item, dict)
        and type(item.get("index")) is int
        and type(item.get(name)) in (int, float)
    ]


def score_value(body: dict[str, Any], found: Sequence[Score]) -> float | list[float]:
    """Return the value for the column of answers: all scores of a rerank, the score of a pair."""
    if len(found) == 1 and "results" not in body:
        return found[0].score
    return [each.score for each in found]


def token_counts(usage: Any) -> tuple[int, int]:
    """Return the numbers of prompt and answer tokens in an answer's ``usage``; 0 if unknown.

    ``/v1/responses`` has other names for them than the other endpoints.
    """
    counts = usage if isinstance(usage, dict) else {}
    found = [
        next((counts[name] for name in names if type(counts.get(name)) is int), 0)
        for names in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))
    ]
    prompt, answer = (count if 0 <= count <= _MOST_TOKENS else 0 for count in found)
    return prompt, answer


def answer_text(body: Any) -> str:
    """Return the text of the first choice; of embeddings and scores, the numbers as JSON."""
    found = vectors(body)
    if found:
        return json.dumps(found[0] if len(found) == 1 else found)
    scored = scores(body)
    if scored:
        return json.dumps(score_value(body, scored))
    texts = answer_texts(body)
    return texts[0] if texts else ""


def output_files(path: Path) -> list[Path]:
    """Return the files of an output."""
    errors = errors_path(path)
    return [path, errors] if path.suffix == ".jsonl" and errors.exists() else [path]


def entry_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield ``(offset, size, line)`` of every entry of one file; both forms have one per line.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with open(path, "rb", buffering=_BUFFER) as file:
            offset = 0
            for line in file:
                text = line.strip().removesuffix(b",")
                if text not in (b"", b"[", b"]", b"[]"):
                    yield offset, len(line), text
                offset += len(line)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "check the path") from error


def parse_entry(text: bytes, path: Path) -> Result:
    """Parse one entry of an output.

    Raises:
        InputError: it is not an entry.
    """
    try:
        line = text.strip().removesuffix(b",")
        return _entry(json.loads(line.decode("utf-8", "surrogatepass")))  # as it decodes bytes
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is not an output of AI-Flux: {error_text(error)}, at {text[:60]!r}",
            "name an output of `aiflux run`, its run directory or its job",
        ) from error


def read_entries(path: Path) -> Iterator[Result]:
    """Yield every entry of an output; those of a ``.jsonl`` output's errors file come last.

    Raises:
        InputError: a file cannot be read, or is not an output.
    """
    for file in output_files(path):
        for _, _, text in entry_lines(file):
            yield parse_entry(text, file)


def _entry(content: dict[str, Any]) -> Result:
    if "output" not in content and "response" not in content:
        raise TypeError("it has neither an output nor a response")
    if "input" in content:
        request = content["input"]
        entry = Result(
            request["custom_id"],
            request,
            content["output"],
            content.get("error"),
            content["metadata"],
        )
    else:
        response = content["response"] or {}
        body = response.get("body")
        error = content["error"] or _refusal(response.get("status_code"), body)
        entry = Result(content["custom_id"], None, None if error else body, error)
    _check(entry)
    return entry


def _refusal(status: Any, body: Any) -> dict[str, Any] | None:
    """Return the error of a response with an HTTP error status, as in OpenAI's batches."""
    if not isinstance(status, int) or status < 400:
        return None
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return {"code": f"http_{status}", "message": str(message or json.dumps(body)), "status": status}


def _check(entry: Result) -> None:
    """Raise TypeError if a part has a type that no output has."""
    if not isinstance(entry.custom_id, str) or not isinstance(entry.metadata, dict):
        raise TypeError("custom_id is not a string, or metadata is not an object")
    if entry.input is not None and not isinstance(entry.input.get("body", {}), dict):
        raise TypeError("the request's body is not an object")
    if entry.error is not None and not {"code", "message"} <= entry.error.keys():
        raise TypeError("the error has no code or no message")


def output_paths(output: Path) -> tuple[Path, ...]:
    """Return every file that writing an output can create."""
    return (output, errors_path(output)) if output.suffix == ".jsonl" else (output,)


def errors_path(output: Path) -> Path:
    """Return the file for the failed requests of a ``.jsonl`` output."""
    return output.with_name(output.stem + ".errors.jsonl")
