"""A request whose prompt is too long (``--too-long chunk``): its parts, and what they become."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from operator import mul
from typing import Any

from aiflux.core.batch.prompt_split import Split
from aiflux.core.batch.request import EMBEDDINGS, RESPONSES
from aiflux.core.batch.results_file import answer_texts, choices, vectors
from aiflux.core.runs.journal import CUT, EMPTY
from aiflux.worker.request_parts import RequestParts, UnjoinableError

_BETWEEN = "\n\n"
_STOP = "stop"
_REASONING = ("reasoning_content", "reasoning")
_UNIT = 1e-3  # how far a length of 1 may be off, with vectors of 16-bit floats


class Chunks:
    """The form of a request whose prompt is split; see ``Form``.

    Args:
        body: as it would be sent, with the whole text.
    """

    noun = "part"
    counted_as = "chunks"
    divides = True

    def __init__(self, url: str, body: Mapping[str, Any], split: Split) -> None:
        self.wanted = len(split.ends)
        self._url = url
        self._body = body
        self._split = split

    @classmethod
    def of(
        cls, key: bytes, custom_id: str, url: str, body: Mapping[str, Any], split: Split | None
    ) -> RequestParts | None:
        """Return the parts of a request; None if it is not split."""
        return None if split is None else RequestParts(key, custom_id, cls(url, body, split))

    def name(self, number: int) -> str:
        """Return where the part is in the text: of another split, only equal parts are kept."""
        start, end = self._split.spans[number]
        return f"{start}-{end}"

    def payload(self, number: int, again: int) -> bytes:
        """Return the JSON to send for a part."""
        return json.dumps(self._split.part(self._body, number)).encode()

    def count(self, body: bytes) -> int:
        """Return 1: a response is the answer to one part."""
        return 1

    def describe(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the number of parts, and whether one was cut, or all are empty."""
        found = {name: True for name in CUT.values() if any(name in each for each in parts)}
        reasons = [each.get(EMPTY) for each in parts]
        return {**found, EMPTY: reasons[0] if all(reasons) else None}

    def join(self, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return one response.

        Raises:
            UnjoinableError: the parts are not of one form.
        """
        if self._url == EMBEDDINGS:
            return _joined_vectors(bodies, self._split.tokens)
        if self._url == RESPONSES:
            return _joined_responses(bodies)
        return _joined_choices(bodies)


def _joined(texts: Iterable[Any]) -> str:
    """Return the texts with a blank line between them; those without words are left out."""
    whole = [text for text in texts if isinstance(text, str) and text.strip()]
    return _BETWEEN.join(text.strip("\n") for text in whole)


def _deciding(bodies: Sequence[dict[str, Any]]) -> int:
    """Return the first part whose answer did not end by itself; 0 if all did."""
    reasons = [next(iter(choices(body)), {}).get("finish_reason") for body in bodies]
    return next((at for at, reason in enumerate(reasons) if reason != _STOP), 0)


def _joined_choices(bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the answers in order, with the reason of the first that did not end by itself."""
    parts = [next(iter(choices(body)), None) for body in bodies]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        raise UnjoinableError("the answer to a part has no choices")
    text = _joined(text for body in bodies for text in answer_texts(body)[:1])
    choice = {**found[_deciding(bodies)], "index": 0}
    message = choice.get("message")
    if isinstance(message, dict):
        thoughts = {
            name: _joined(part["message"].get(name) for part in found if "message" in part)
            for name in _REASONING
            if any(name in part.get("message", {}) for part in found)
        }
        choice["message"] = {**message, "content": text, **thoughts}
    else:
        choice["text"] = text
    return {**bodies[0], "choices": [choice]}


def _joined_responses(bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a response with one message; what else the parts have comes before it."""
    items = [item for body in bodies for item in body.get("output") or ()]
    messages = [item for item in items if isinstance(item, dict) and item.get("type") == "message"]
    others = [item for item in items if item not in messages]
    deciding = bodies[_deciding(bodies)]
    whole = {**bodies[0], "output": others}
    whole |= {name: deciding[name] for name in ("status", "incomplete_details") if name in deciding}
    text = _joined(text for body in bodies for text in answer_texts(body))
    if messages:
        contents = [part for part in messages[0].get("content") or () if isinstance(part, dict)]
        first = contents[0] if contents else {"type": "output_text", "annotations": []}
        whole["output"] = [*others, {**messages[0], "content": [{**first, "text": text}]}]
    if "output_text" in whole:
        whole["output_text"] = text
    return whole


def _joined_vectors(bodies: Sequence[dict[str, Any]], weights: Sequence[int]) -> dict[str, Any]:
    """Return the mean of the vectors, weighted by the tokens of the parts.

    It has length 1 if the vectors have. This is what OpenAI's cookbook does with long texts
    (https://cookbook.openai.com/examples/embedding_long_inputs, ``len_safe_get_embedding``).
    """
    found = [vector for body in bodies for vector in vectors(body)[:1]]
    if len(found) < len(bodies) or not all(map(_is_vector, found)):
        raise UnjoinableError("the answer to a part has no vector of numbers")
    if len({len(vector) for vector in found}) > 1:
        raise UnjoinableError("the vectors of the parts differ in length")
    total = sum(weights)
    mean = [sum(map(mul, weights, numbers)) / total for numbers in zip(*found, strict=True)]
    if all(abs(math.hypot(*vector) - 1) < _UNIT for vector in found):
        length = math.hypot(*mean)
        mean = [number / length for number in mean] if length else mean
    first = bodies[0]["data"][0]
    return {**bodies[0], "data": [{**first, "index": 0, "embedding": mean}]}


def _is_vector(vector: Any) -> bool:
    return isinstance(vector, list) and all(type(number) in (int, float) for number in vector)
