"""Ollama's environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from aiflux.engines.process import engine_environment


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
