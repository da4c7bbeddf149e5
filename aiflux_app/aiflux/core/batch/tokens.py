"""How many tokens of context a request needs, estimated from its bytes. Pure."""

from __future__ import annotations

from typing import Any

# English text has about 4 bytes a token, code 3, CJK text 3 bytes a character and token:
# 3 errs on the side of a context that is large enough.
_BYTES_PER_TOKEN = 3
_TOKENS_PER_MESSAGE = 16
_TOKENS_PER_IMAGE = 1024
_UNLIMITED_ANSWER = 1024


def estimate_tokens(body: dict[str, Any]) -> int:
    """Estimate the tokens of a request, prompt and answer together."""
    answer = body.get("max_tokens") or body.get("max_completion_tokens")
    payload = body.get("messages") or body.get("prompt") or body.get("input")
    return _prompt_tokens(payload) + (answer if isinstance(answer, int) else _UNLIMITED_ANSWER)


def _prompt_tokens(payload: Any) -> int:
    if type(payload) is str:
        size = len(payload) if payload.isascii() else len(payload.encode("utf-8", "surrogatepass"))
        return size // _BYTES_PER_TOKEN + 1
    tokens = 0
    if type(payload) is list:
        for part in payload:
            tokens += _part_tokens(part)
    return tokens


def _part_tokens(part: Any) -> int:
    if type(part) is dict:
        if "image_url" in part:
            return _TOKENS_PER_IMAGE
        text = part["content"] if "content" in part else part.get("text")
        return _TOKENS_PER_MESSAGE + _prompt_tokens(text)
    return 1 if isinstance(part, int) else _prompt_tokens(part)
