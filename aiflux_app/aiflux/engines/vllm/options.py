"""Options of ``vllm serve`` that a run adds, and those that AI-Flux sets itself.

Source: vllm/engine/arg_utils.py and vllm/entrypoints/launchers/cli_args.py of 0.32.0. Its parser
reads ``_`` in a name as ``-``, and accepts the beginning of a name.
"""

from __future__ import annotations

from collections.abc import Mapping

from aiflux.core.config.settings import RunOptions
from aiflux.engines.server_options import NETWORK, managed_options

_PARALLEL = "use --gpus-per-engine: AI-Flux starts one server for each group of GPUs"
MANAGED = managed_options(
    ("use --model", "model served-model-name hf-token revision"),
    ("use --slots", "max-num-seqs"),
    ("use --context-length", "max-model-len"),
    ("leave it out: it follows from the endpoints of the requests", "runner convert"),
    (
        "leave it out: requests and AI-Flux's options set the sampling parameters",
        "generation-config override-generation-config",
    ),
    (
        _PARALLEL,
        "tensor-parallel-size tp pipeline-parallel-size pp data-parallel-size dp "
        "data-parallel-size-local dpl data-parallel-rank dpn data-parallel-start-rank dpr "
        "data-parallel-address dpa data-parallel-rpc-port dpp data-parallel-backend dpb "
        "data-parallel-hybrid-lb dph data-parallel-external-lb dpe "
        "data-parallel-multi-port-external-lb dpm data-parallel-supervisor-port "
        "api-server-count asc",
    ),
    ("use --nodes-per-engine", "nnodes n node-rank r master-addr master-port headless"),
    (
        NETWORK,
        "host port uds grpc grpc-port api-key root-path ssl-keyfile ssl-certfile ssl-ca-certs "
        "enable-ssl-refresh ssl-cert-reqs ssl-ciphers",
    ),
    ("use --lora", "enable-lora lora-modules max-lora-rank max-loras max-cpu-loras"),
    ("use --tool-parser", "enable-auto-tool-choice tool-call-parser"),
    ("use --reasoning-parser", "reasoning-parser"),
    ("leave it out: the engine's log is in the run directory", "disable-uvicorn-access-log"),
    ("give its options by themselves: --engine-arg KEY=VALUE for each", "config"),
    ("run vllm serve --help=all", "help h"),
)
"""The remedy for each option that is refused, by its name."""


def parser_words(options: RunOptions) -> list[str]:
    """Return the words of the command line for the parsers of tool calls and reasoning."""
    tools = ["--enable-auto-tool-choice", f"--tool-call-parser={options.tool_parser}"]
    return [
        *(tools if options.tool_parser else []),
        *([f"--reasoning-parser={options.reasoning_parser}"] if options.reasoning_parser else []),
    ]


def option_words(options: Mapping[str, str]) -> list[str]:
    """Return the words of the command line for the run's own options."""
    return [
        f"{'' if key.startswith('-') else '--'}{key}{f'={value}' if value else ''}"
        for key, value in options.items()
    ]
