"""Middleware for vLLM: every request needs the key, on every path."""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_BODY = b'{"error": {"message": "Invalid API key", "type": "authentication_error", "code": 401}}'


class RequireKey:
    """An ASGI application that answers 401 without the key in the file AIFLUX_KEY_FILE."""

    def __init__(self, app: App) -> None:
        self._app = app
        key = Path(os.environ["AIFLUX_KEY_FILE"]).read_bytes().strip()
        if not key:
            raise ValueError("the file AIFLUX_KEY_FILE is empty")
        self._wanted = b"Bearer " + key

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on if it has the key."""
        if scope["type"] == "lifespan" or self._allows(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _BODY})

    def _allows(self, scope: Message) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._wanted)
