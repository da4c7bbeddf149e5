"""The endpoints that requests can use, and which engine has them.

Bodies and answers: OpenAI's API; `/v1/rerank` in the form of Jina, Cohere and llama.cpp;
`/v1/score` in vLLM's form (vllm/entrypoints/pooling/scoring/protocol.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

TEXT, EMBEDDINGS, SCORES = "text", "embeddings", "scores"
MAX_ANSWERS = 1000
"""The most answers to one request."""


class Endpoint(NamedTuple):
    """One endpoint.

    Attributes:
        payloads: the fields that a body must have: those of one of these sets.
        use: what its answers are: text, embeddings or scores. Most servers support one of these.
        result: what the ``answer`` column of a table of results has.
        engines: engines of AI-Flux that have it, each with the first version that does; "" for
            every supported version.
    """

    url: str
    payloads: tuple[frozenset[str], ...]
    use: str
    result: str
    engines: Mapping[str, str]

    @property
    def generates(self) -> bool:
        """Whether its answers are generated text, which sampling parameters affect."""
        return self.use == TEXT


def _payloads(*texts: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(text.split()) for text in texts)


_ALL = {"ollama": "", "llamacpp": "", "vllm": ""}
ENDPOINTS = {
    "chat": Endpoint("/v1/chat/completions", _payloads("messages"), TEXT, "text", _ALL),
    "completions": Endpoint("/v1/completions", _payloads("prompt"), TEXT, "text", _ALL),
    # Ollama: https://github.com/ollama/ollama/issues/13595
    "responses": Endpoint(
        "/v1/responses", _payloads("input"), TEXT, "text", {**_ALL, "ollama": "0.13.3"}
    ),
    "embeddings": Endpoint(
        "/v1/embeddings", _payloads("input"), EMBEDDINGS, "a list of numbers", _ALL
    ),
    "rerank": Endpoint(
        "/v1/rerank",
        _payloads("query documents"),
        SCORES,
        "the scores, best first; `document` has the positions of their documents, from 0",
        {"llamacpp": "", "vllm": ""},
    ),
    "score": Endpoint(
        "/v1/score",
        _payloads("text_1 text_2", "queries documents", "queries items", "data_1 data_2"),
        SCORES,
        "a number; of several pairs, a list of numbers",
        {"vllm": ""},
    ),
}
USES = {each.url: each.use for each in ENDPOINTS.values()}
_NUMBER = re.compile(r"\d+")


def missing_endpoints(engine: str, title: str) -> dict[str, str]:
    """Return the urls that an engine does not have, each with the problem and its remedy.

    Args:
        title: the engine's name in messages.
    """
    return {
        each.url: f"{title} has no {each.url}; use --engine {' or '.join(each.engines)}, or a "
        "server that has it: --engine-url URL"
        for each in ENDPOINTS.values()
        if engine not in each.engines
    }


def newer_version(engine: str, url: str, version: str) -> str | None:
    """Return the first version of an engine with an endpoint if ``version`` is an older one.

    A version without a number is not judged, nor is 0.0.0, which builds of a checkout report.
    """
    first = next(each.engines[engine] for each in ENDPOINTS.values() if each.url == url)
    numbers = [int(part) for part in _NUMBER.findall(version.partition("-")[0])]
    wanted = [int(part) for part in _NUMBER.findall(first)]
    return first if any(numbers) and numbers < wanted else None
