"""What an engine is sent for a request: the body as it came, with the few edits DESIGN names."""

from __future__ import annotations

import json
from typing import Any

from aiflux.core.batch.request import Request

EMBEDDINGS = "/v1/embeddings"


def build_payload(
    request: Request, model: str | None, parameters: dict[str, Any], *, bundled: bool
) -> bytes:
    """Return the JSON to send.

    Args:
        model: as the engine serves it; filled in where the body names none, and put in the place of
            a name with AI-Flux's own ``http://`` or ``@sha256:...``, which Ollama does not know.
        parameters: filled in where the body lacks them; not for embeddings, which have none.
        bundled: the engine is Ollama, which ignores ``max_completion_tokens``; the value is then
            also sent as ``max_tokens``.
    """
    body = request.body
    edits: dict[str, Any] = {}
    named = body.get("model")
    if named is None or (bundled and ("@" in named or "://" in named)):
        edits["model"] = model
    if body.get("stream"):
        edits["stream"] = False
    if request.url != EMBEDDINGS:
        edits.update({name: value for name, value in parameters.items() if name not in body})
        limit = body.get("max_completion_tokens")
        if limit is not None:
            edits.pop("max_tokens", None)
            if bundled and "max_tokens" not in body:
                edits["max_tokens"] = limit
    if edits:
        body = {**body, **edits}
        if "stream" in edits:
            body.pop("stream_options", None)
    return json.dumps(body).encode()
