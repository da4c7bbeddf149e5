"""Options of ``llama-server`` that a run adds, and those that AI-Flux sets itself.

Source: ``llama-server --help`` of build 11669. It reads ``_`` in a name as ``-``.
"""

from __future__ import annotations

from collections.abc import Mapping

from aiflux.engines.server_options import NETWORK, managed_options

MANAGED = managed_options(
    (
        "use --model",
        "model m model-url mu docker-repo dr hf-repo hf hfr hf-file hff hf-token hft alias a "
        "mmproj mm mmproj-url mmu mmproj-auto no-mmproj no-mmproj-auto models-dir models-preset "
        "models-max models-autoload no-models-autoload",
    ),
    ("use --slots", "parallel np"),
    ("use --context-length", "ctx-size c"),
    ("use --gpus-per-engine", "device dev"),
    (
        "leave it out: all layers are on the GPUs; --allow-cpu lets llama.cpp choose",
        "gpu-layers ngl n-gpu-layers",
    ),
    (
        "leave it out: it follows from the endpoints of the requests",
        "embedding embeddings rerank reranking",
    ),
    (
        NETWORK,
        "host port reuse-port path api-prefix api-key api-key-file ssl-key-file ssl-cert-file "
        "metrics offline ui webui no-ui no-webui",
    ),
    ("use --lora", "lora lora-scaled lora-init-without-apply"),
    ("use --reasoning-parser", "reasoning-format"),
    (
        "leave it out: the engine's log is in the run directory; --log-level DEBUG logs more",
        "log-disable log-file log-jsonl no-log-jsonl log-verbose verbose v log-verbosity "
        "verbosity lv",
    ),
    (
        "run llama-server with it yourself: it prints something and ends",
        "help h usage version cache-list cl completion-bash list-devices",
    ),
)
"""The remedy for each option that is refused, by its name."""


def option_words(options: Mapping[str, str]) -> list[str]:
    """Return the words of the command line for the run's own options."""
    return [
        word
        for key, value in options.items()
        for word in (key if key.startswith("-") else f"--{key}", value)
        if word
    ]
