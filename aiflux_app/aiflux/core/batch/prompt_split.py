"""Split the text of a request that is too long for the context into parts that each fit.

One text of the request is split: of a conversation, that of the last message of the user. All else
is in every part. The split follows from the request, the context and the model's tokenizer alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from aiflux.core.batch.request import (
    COMPLETIONS,
    EMBEDDINGS,
    RERANK,
    RESPONSES,
    SCORE,
    WITH_CHOICES,
    answers_wanted,
)
from aiflux.core.batch.schema import format_field, requested_format
from aiflux.models.tokenizer import ModelTokenizer

Place = tuple[str | int, ...]
"""The keys that lead to a text in a body."""

# Fields with another form of answer than text: engines have names of their own.
_FORMS = (
    "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs",
    "grammar", "json_schema", "format",
)  # fmt: skip
_WHOLE_ONLY = {
    "tools": "it has tools",
    "functions": "it has functions",
    **dict.fromkeys(_FORMS, "the form of its answer is given"),
    "logprobs": "it asks for logprobs, which belong to one answer",
    "top_logprobs": "it asks for logprobs, which belong to one answer",
    "echo": "it asks for its prompt in the answer (echo)",
    "suffix": "its answer belongs before a suffix",
}
_MESSAGE_TEXTS = ("text", "input_text")
# Where the chat template is not known: tokens of what it may write, in all and for each message.
# Those of some models begin with a message of their own, of about 80 tokens in gpt-oss's.
_TEMPLATE, _OF_MESSAGE = 128, 16
# Kept free for an answer without a limit: a share of the context, up to this number of tokens.
_ANSWER_SHARE, _MOST_ANSWER = 4, 1024
# A part with fewer tokens says too little.
_FEWEST = 16
_SPARE = 1.25  # so that one look at the text of a part usually suffices
# The best place to split first.
_BOUNDARIES = [
    re.compile(pattern)
    for pattern in (
        r"\n(?:[^\S\n]*\n)+",
        r"\n",
        r"[.!?…؟۔।॥][\"'”’»)\]]*\s+|[。！？｡][”’」』）】]*",
        r"\s+",
    )
]


class NoSplitError(Exception):
    """A request cannot be split; the text says why."""


@dataclass(frozen=True)
class Split:
    """How a request is split.

    Attributes:
        at: where the text that is split is in the body.
        ends: where each part ends, in characters from the start of the text.
        tokens: of each part.
    """

    at: Place
    ends: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The start and the end of each part."""
        return [*pairwise((0, *self.ends))]

    def part(self, body: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Return the body with one part of the text in place of the whole."""
        start, end = self.spans[number]
        return dict(with_text(body, self.at, text_at(body, self.at)[start:end]))


def text_at(body: Any, place: Place) -> str:
    """Return the text at a place in a body."""
    for key in place:
        body = body[key]
    return str(body)


def with_text(body: Any, place: Place, text: str) -> Any:
    """Return a body with another text at a place."""
    if not place:
        return text
    key, *rest = place
    changed = with_text(body[key], tuple(rest), text)
    if isinstance(body, list):
        return [changed if at == key else item for at, item in enumerate(body)]
    return {**body, key: changed}


@dataclass(frozen=True)
class Fit:
    """What the parts of a request have to fit.

    Attributes:
        context: tokens of prompt and answer together.
        answer: tokens of the answer; 0 if it has no limit.
        tokenizer: of the model.
        count: returns the tokens of the prompt in a body.
        defaults: fields that the run fills into bodies.
        templated: ``count`` includes the chat template of conversations.
    """

    context: int
    answer: int
    tokenizer: ModelTokenizer
    count: Callable[[str, Mapping[str, Any]], int]
    defaults: Mapping[str, Any]
    templated: bool

    def room(self, url: str, body: Mapping[str, Any]) -> int:
        """Return the tokens that a prompt may have."""
        generates = url != EMBEDDINGS
        answer = self.answer or min(self.context // _ANSWER_SHARE, _MOST_ANSWER)
        messages = body.get("messages")
        unknown = url == RESPONSES or (messages is not None and not self.templated)
        template = _TEMPLATE + _OF_MESSAGE * len(messages or "1") if unknown else 0
        return self.context - answer * generates - template


def split_prompt(url: str, body: Mapping[str, Any], fit: Fit) -> Split:
    """Split a request whose prompt is too long.

    Raises:
        NoSplitError: it cannot be split.
    """
    place = _place(url, {**fit.defaults, **body} if url in WITH_CHOICES else body)
    text, most = text_at(body, place), fit.room(url, body)
    rest = fit.count(url, with_text(body, place, ""))
    if most - rest < _FEWEST:
        kept = fit.context - most
        also = f", and {kept:,} are kept free for the answer and the template" if kept else ""
        raise NoSplitError(
            f"without its text it has {rest:,} tokens{also}: that leaves "
            f"{max(0, most - rest):,} of {fit.context:,} for a part, which needs {_FEWEST} at least"
        )

    def excess(part: str) -> int:
        return fit.count(url, with_text(body, place, part)) - most

    parts = [*_parts(text, most - rest, fit.tokenizer, excess)]
    ends, tokens = zip(*parts, strict=True)
    return Split(place, ends, tokens)


def _place(url: str, body: Mapping[str, Any]) -> Place:
    """Return where the text is that can be split.

    Raises:
        NoSplitError: the request must stay whole.
    """
    if url in (RERANK, SCORE):
        raise NoSplitError(f"{url} compares texts")
    for name, reason in _WHOLE_ONLY.items():
        if body.get(name) not in (None, False, "", [], {}):
            raise NoSplitError(reason)
    form = requested_format(dict(body))
    if form is not None and form.get("type") not in (None, "text"):
        raise NoSplitError(f"the form of its answer is given ({format_field(dict(body))})")
    if answers_wanted(url, body) > 1:
        raise NoSplitError(f"it asks for {body['n']} answers")
    if url == EMBEDDINGS and body.get("encoding_format") not in (None, "float"):
        raise NoSplitError("its vectors are not numbers (encoding_format)")
    if isinstance(body.get("messages"), list):
        return _place_in_messages(body["messages"])
    name = "prompt" if url == COMPLETIONS else "input"
    given = body.get(name)
    if isinstance(given, str):
        return (name,)
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], str):
        return name, 0
    raise NoSplitError(f"{name} is not one text")


def _place_in_messages(messages: list[Any]) -> Place:
    for message in messages:
        if not isinstance(message, dict) or not _is_text(message.get("content")):
            raise NoSplitError("it has more than text: images, audio or files")
    users = [at for at, message in enumerate(messages) if message.get("role") == "user"]
    if not users:
        raise NoSplitError("it has no message of the user")
    content = messages[users[-1]].get("content")
    place: Place = ("messages", users[-1], "content")
    if isinstance(content, str):
        return place
    if not content:
        raise NoSplitError("the last message of the user is empty")
    longest = max(range(len(content)), key=lambda at: len(content[at]["text"]))
    return *place, longest, "text"


def _is_text(content: Any) -> bool:
    """Return whether a content is text, or consists of texts."""
    if content is None or isinstance(content, str):
        return True
    return isinstance(content, list) and all(
        isinstance(part, dict)
        and part.get("type") in _MESSAGE_TEXTS
        and isinstance(part.get("text"), str)
        for part in content
    )


def _parts(
    text: str, room: int, tokenizer: ModelTokenizer, excess: Callable[[str], int]
) -> Iterator[tuple[int, int]]:
    """Yield the end and the tokens of each part.

    The parts are about equally long, rather than full but for a short last one.

    Args:
        room: tokens that a part may have.
        excess: returns by how many tokens the prompt with a part is too long.

    Raises:
        NoSplitError: not even a short part fits.
    """
    start, left = 0, tokenizer.count(text)
    while start < len(text):
        limit = room
        while True:
            end, tokens = _end(text, start, limit, left, tokenizer)
            # A part by itself can have a few more tokens than the same text within the whole.
            over = excess(text[start:end])
            if over <= 0:
                break
            most = min(limit, tokens)
            limit = max(most - over, most // 2)  # a server's tokens are only about where they are
            if limit < 1:
                raise NoSplitError("a part of it has more tokens than the context has left")
        yield end, tokens
        start, left = end, max(0, left - tokens)


def _end(
    text: str, start: int, limit: int, left: int, tokenizer: ModelTokenizer
) -> tuple[int, int]:
    """Return the end of the part from ``start``, and its tokens.

    Args:
        limit: tokens that it may have.
        left: tokens of the text from ``start``, about.
    """
    size = 1 + int(_SPARE * limit * (len(text) - start) / max(left, 1))
    while True:
        # The whole rest can be many times longer than a part.
        ends = tokenizer.ends(text[start : start + size])
        if len(ends) > limit:
            break
        if start + size >= len(text):
            return len(text), len(ends)
        size *= 2
    parts = max(2, -(-left // limit))
    aim = min(limit, -(-left // parts))
    low, best, most = (start + ends[max(tokens, 1) - 1] for tokens in (aim // 2, aim, limit))
    end = _boundary(text, low, best, most) or _whole_character(text, start, best)
    return end, sum(each <= end - start for each in ends[:limit]) or 1


def _boundary(text: str, low: int, best: int, most: int) -> int | None:
    """Return the boundary of the best kind that is nearest to ``best``; None if there is none."""
    for pattern in _BOUNDARIES:
        found = [match.end() for match in pattern.finditer(text, low, most)]
        if found:
            return min(found, key=lambda end: abs(end - best))
    return None


def _whole_character(text: str, start: int, end: int) -> int:
    """Return the end of a part that does not separate a character from its marks."""
    at = end
    while start + 1 < at < len(text) and (
        unicodedata.category(text[at])[0] == "M" or "\u200d" in text[at - 1 : at + 1]
    ):
        at -= 1
    return at if at > start + 1 else max(end, start + 1)
