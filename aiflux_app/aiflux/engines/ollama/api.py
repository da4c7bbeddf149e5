"""Ollama's server: its environment, and its own HTTP API in addition to the OpenAI endpoints.

Source: https://github.com/ollama/ollama/blob/main/docs/api.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from aiflux.engines.http import innermost
from aiflux.engines.process import engine_environment
from aiflux.errors import EngineError

_TIMEOUT = 30.0


@dataclass(frozen=True)
class Loaded:
    """A model in memory, from ``/api/ps``.

    Attributes:
        size: bytes in use, on GPU and CPU together.
        size_vram: bytes in use on GPUs.
        context_length: tokens of context of each slot; None if unknown.
    """

    name: str
    size: int
    size_vram: int
    context_length: int | None


class Ollama:
    """A client of one server. Loopback only: the environment's proxies are not used."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._session = requests.Session()
        self._session.trust_env = False

    def version(self) -> str:
        """Return the server's version."""
        return str(self._get("/api/version").get("version", "unknown"))

    def tags(self) -> dict[str, str]:
        """Return the digests of all stored models by name."""
        models = self._get("/api/tags").get("models") or []
        return {model["name"]: model.get("digest", "") for model in models}

    def capabilities(self, model: str) -> tuple[str, ...]:
        """Return what a model can do, e.g. ``completion`` or ``embedding``."""
        shown = self._post("/api/show", {"model": model}, _TIMEOUT)
        return tuple(shown.get("capabilities") or ())

    def loaded(self) -> list[Loaded]:
        """Return the models in memory."""
        return [
            Loaded(
                item["name"],
                int(item.get("size") or 0),
                int(item.get("size_vram") or 0),
                item.get("context_length"),
            )
            for item in self._get("/api/ps").get("models") or []
        ]

    def load(self, model: str, timeout: float) -> None:
        """Load a model into memory and keep it there.

        Raises:
            EngineError: the model could not be loaded in time.
        """
        if "embedding" in self.capabilities(model):
            body = {"model": model, "input": "warm up", "keep_alive": -1}
            self._post("/api/embed", body, timeout)
        else:
            self._post(
                "/api/generate", {"model": model, "keep_alive": -1, "stream": False}, timeout
            )

    def pull(self, model: str, *, insecure: bool, stall_timeout: float) -> Iterator[dict[str, Any]]:
        """Pull a model; yield each progress object of the stream.

        The stream has status 200 in any case: an object with ``error`` means failure, and only a
        final ``{"status": "success"}`` means success.

        Raises:
            EngineError: with the server's own message.
        """
        body = {"model": model, "insecure": insecure, "stream": True}
        yield from self._stream("/api/pull", "pull", body, stall_timeout)

    def create(
        self, model: str, digest: str, template: str | None, stall_timeout: float
    ) -> Iterator[dict[str, Any]]:
        """Create a model from a GGUF file that is already a blob; yield each progress object.

        Raises:
            EngineError: with the server's own message.
        """
        body = {"model": model, "files": {"model.gguf": digest}, "stream": True}
        if template is not None:
            body["template"] = template
        yield from self._stream("/api/create", "creation", body, stall_timeout)

    def _stream(
        self, path: str, what: str, body: dict[str, Any], stall_timeout: float
    ) -> Iterator[dict[str, Any]]:
        last: dict[str, Any] = {}
        try:
            with self._session.post(
                self.url + path, json=body, stream=True, timeout=(_TIMEOUT, stall_timeout)
            ) as response:
                for line in response.iter_lines():
                    last = json.loads(line) if line else last
                    if "error" in last:
                        raise EngineError(str(last["error"]))
                    yield last
        except (requests.RequestException, ValueError) as error:
            raise EngineError(f"the {what} was interrupted: {innermost(error)}") from error
        if last.get("status") != "success":
            raise EngineError(f"the {what} ended without success (last: {last.get('status')!r})")

    def _get(self, path: str) -> dict[str, Any]:
        return self._call("GET", path, None, _TIMEOUT)

    def _post(self, path: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        return self._call("POST", path, body, timeout)

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None, timeout: float
    ) -> dict[str, Any]:
        try:
            answer = self._session.request(
                method, self.url + path, json=body, timeout=(_TIMEOUT, timeout)
            )
            content = answer.json()
        except requests.RequestException as error:
            raise EngineError(f"Ollama did not respond to {path}: {innermost(error)}") from error
        if answer.status_code != 200:
            words = content.get("error") if isinstance(content, dict) else answer.text[:500]
            raise EngineError(f"Ollama rejected {path} ({answer.status_code}): {words}")
        if not isinstance(content, dict):
            raise EngineError(f"Ollama's answer to {path} is not an object")
        return content


def ollama_environment(
    environ: Mapping[str, str],
    models_dir: Path,
    home: Path,
    settings: Mapping[str, str],
    *,
    network: bool = False,
) -> dict[str, str]:
    """Return the environment of an Ollama server on a loopback port chosen by the kernel.

    Args:
        settings: additional variables, which take precedence.
        network: pass the site's proxies on.
    """
    own = {
        "OLLAMA_HOST": "127.0.0.1:0",
        "OLLAMA_MODELS": str(models_dir),
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_MAX_LOADED_MODELS": "1",
        "OLLAMA_NOPRUNE": "1",
        "OLLAMA_NO_CLOUD": "1",
    }
    return engine_environment(environ, home, {**own, **settings}, network=network)
