"""``aiflux check``: read an input once and report every bad line."""

from __future__ import annotations

import argparse
from pathlib import Path

from aiflux.core.input import scan_input


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = "Read the whole input once and report every bad line."
    parser.epilog = "example: aiflux check prompts.jsonl --model llama3.2:3b"
    parser.add_argument("file", metavar="FILE", help="requests, *.jsonl")
    parser.add_argument("--model", metavar="NAME:TAG", help="the run's model")


def execute(arguments: argparse.Namespace) -> int:
    """Check a file; InputError lists what is wrong."""
    summary = scan_input(Path(arguments.file), arguments.model)
    endpoints = ", ".join(f"{url} ({count})" for url, count in summary.endpoints.items())
    models = ", ".join(summary.models) or "none named (give --model to the run)"
    print(f"{summary.path}: {summary.requests} requests, {summary.size} bytes, no problems")
    print(f"  endpoints: {endpoints}")
    print(f"  models:    {models}")
    print(
        f"  context:   about {summary.context_tokens} tokens cover 99 % of the requests, "
        f"{summary.longest_tokens} the longest"
    )
    return 0
