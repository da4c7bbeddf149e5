"""Keep an engine's API key out of stored and printed text."""

from __future__ import annotations

import base64
import binascii
import html
import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "(not shown)"
# Placeholders for servers without a key; hiding them would damage ordinary words.
_PLACEHOLDERS = frozenset(
    {"-", "abc", "dummy", "empty", "fake", "key", "na", "no", "no-key", "none", "null", "ollama",
     "placeholder", "test", "token", "unused", "vllm", "x", "xx", "xxx"}
)  # fmt: skip
# User and password in an address, as servers repeat it in their errors (RFC 3986, section 3.2.1).
_CREDENTIALS = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]{0,20}://)[^\s/?#@:]{0,256}:[^\s/?#@]{1,256}@")
# A shorter secret is only hidden as a separate word.
_SHORTEST = 6


@dataclass(frozen=True)
class Secrets:
    """Secrets in all forms in which a server may echo them; longest first."""

    forms: tuple[str, ...] = ()

    @classmethod
    def of(cls, key: str | None) -> Secrets:
        """Return the forms of a key; with ``Basic ``, also user and password."""
        if not key:
            return cls()
        bare = key.removeprefix("Bearer ").removeprefix("Basic ").strip()
        plain = {bare, *(_decoded(bare) if key.startswith("Basic ") else ())}
        plain -= {each for each in plain if each.lower() in _PLACEHOLDERS}
        forms = {form for each in plain if each for form in _written(each)}
        return cls(tuple(sorted(forms, key=len, reverse=True)))

    def hide(self, text: str) -> str:
        """Return a text without the secrets, and without the passwords of addresses."""
        if "@" in text:
            text = _CREDENTIALS.sub(rf"\1{HIDDEN}@", text)
        for form in self.forms:
            if len(form) >= _SHORTEST:
                text = text.replace(form, HIDDEN)
            elif form in text:
                text = re.sub(rf"(?<![^\W_]){re.escape(form)}(?![^\W_])", HIDDEN, text)
        return text

    def hide_bytes(self, content: bytes) -> bytes:
        """Return bytes without the secrets; JSON stays JSON, and clean content stays unchanged."""
        text = content.decode("utf-8", "replace")
        try:
            value = json.loads(text)
            cleaned = self._hide_in(value)
            return content if cleaned == value else json.dumps(cleaned).encode()
        except (ValueError, RecursionError):  # not JSON, or nested too deeply to be walked
            hidden = self.hide(text)
            return content if hidden == text else hidden.encode()

    def _hide_in(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, list):
            return [self._hide_in(each) for each in value]
        if isinstance(value, dict):
            return {self.hide(name): self._hide_in(each) for name, each in value.items()}
        return value


def _decoded(token: str) -> tuple[str, ...]:
    """Return ``user:password`` and the password of a Basic token."""
    try:
        pair = base64.b64decode(token, validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return ()
    return pair, pair.partition(":")[2]


def _written(secret: str) -> set[str]:
    """Return a secret's encodings: plain, base64, JSON, HTML and URL."""
    in_json = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    return {
        secret,
        base64.b64encode(secret.encode()).decode(),
        *in_json,
        *(each.replace("/", "\\/") for each in in_json),
        html.escape(secret),
        quote(secret, safe=""),
        quote_plus(secret),
    }
