"""The endpoints of the OpenAI API that requests can use."""

from __future__ import annotations

from typing import NamedTuple


class Endpoint(NamedTuple):
    """One endpoint.

    Attributes:
        payload: the field that every body must have.
        generates: whether its answers are generated text, which sampling parameters affect.
    """

    url: str
    payload: str
    generates: bool


ENDPOINTS = {
    "chat": Endpoint("/v1/chat/completions", "messages", True),
    "completions": Endpoint("/v1/completions", "prompt", True),
    "embeddings": Endpoint("/v1/embeddings", "input", False),
    "rerank": Endpoint("/v1/rerank", "documents", False),
}
