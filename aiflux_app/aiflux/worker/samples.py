"""Several answers to one request (``n``): asked for one by one, and put together into one response.

Many engines ignore ``n``, or refuse it in part. The worker then sends a request for each answer,
with a seed of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from aiflux.core.batch.request import answers_wanted, parse_json
from aiflux.worker.request_parts import RequestParts

_SEEDS = 1 << 31  # what every engine accepts


class Samples:
    """The form of a request that asks for several answers; see ``Form``.

    Args:
        key: of the request.
        body: as it is sent, with ``n``.
    """

    noun = "answer"
    counted_as = "samples"
    divides = False

    def __init__(self, key: bytes, wanted: int, body: Mapping[str, Any]) -> None:
        self.wanted = wanted
        self._key = key
        self._body = {name: value for name, value in body.items() if name != "n"}
        self._prompts = _prompts(body)

    @classmethod
    def of(
        cls, key: bytes, custom_id: str, url: str, body: Mapping[str, Any]
    ) -> RequestParts | None:
        """Return the answers to a request; None if it asks for one."""
        wanted = answers_wanted(url, body)
        return RequestParts(key, custom_id, cls(key, wanted, body)) if wanted > 1 else None

    def name(self, number: int) -> str:
        """Return the number of the answer."""
        return str(number)

    def payload(self, number: int, again: int) -> bytes:
        """Return the JSON to send for one answer.

        The seed is the request's plus the number of the answer, as in vLLM. Without one, it follows
        from the request: an engine whose default is a fixed seed would repeat one answer.

        Args:
            again: earlier answers that did not fit their schema; the next needs another seed.
        """
        seed = self._body.get("seed")
        if seed is None:
            seed = int.from_bytes(self._key[:4], "big") % _SEEDS
        if type(seed) is int and seed >= 0:  # others mean a random seed, or are the engine's matter
            further = seed + number + again * self.wanted
            seed = further % _SEEDS if seed < _SEEDS else further
        return json.dumps({**self._body, "seed": seed}).encode()

    def count(self, body: bytes) -> int:
        """Return how many answers to each prompt a response has."""
        return len(parse_json(body.decode("utf-8")).get("choices") or ()) // self._prompts

    def describe(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return nothing more: the fields for an answer are those of the first."""
        return {}

    def join(self, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the first response with the choices of all.

        They are ordered as an engine orders them: all answers to one prompt, then the next.
        """
        parts = [body["choices"] for body in bodies]
        each = [max(1, len(part) // self._prompts) for part in parts]
        found = []
        for prompt in range(self._prompts):
            answers = [
                choice
                for part, count in zip(parts, each, strict=True)
                for choice in part[prompt * count : (prompt + 1) * count]
            ]
            found += answers[: self.wanted]
        listed = [
            {**choice, "index": at} if isinstance(choice, dict) else choice
            for at, choice in enumerate(found)
        ]
        return {**bodies[0], "choices": listed}


def _prompts(body: Mapping[str, Any]) -> int:
    """Return the number of prompts of a request; a list of tokens is one."""
    prompt = body.get("prompt")
    if "messages" in body or not isinstance(prompt, list):
        return 1
    return 1 if all(type(token) is int for token in prompt) else len(prompt)
