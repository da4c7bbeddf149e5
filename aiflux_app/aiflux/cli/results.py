"""``aiflux results``: prompts and answers of an output as a table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aiflux.core.rundir import errors_path
from aiflux.errors import InputError

_SHOWN = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    show = actions.add_parser("show", help="show prompts and answers as a table")
    show.add_argument("output", metavar="FILE", help="an output, *.json or *.jsonl")
    show.add_argument("--failed", action="store_true", help="only what failed")
    show.add_argument("--limit", type=int, default=50, help="rows at most (default: 50)")


def execute(arguments: argparse.Namespace) -> int:
    """Show an output."""
    rows = _rows(Path(arguments.output))
    wanted = (row for row in rows if row[3] or not arguments.failed)
    table = Table("custom_id", "prompt", "answer", show_lines=True, expand=True)
    for name, prompt, answer, failed in islice(wanted, arguments.limit):
        shown = f"[red]{escape(answer)}[/red]" if failed else escape(answer)
        table.add_row(escape(name), escape(prompt), shown)
    Console().print(table)
    return 0


def _rows(path: Path) -> Iterator[tuple[str, str, str, bool]]:
    """Yield ``(custom_id, prompt, answer, failed)``."""
    for entry in _entries(path):
        if "input" in entry:
            request = entry["input"]
            body, error = entry["output"], entry.get("error")
            prompt = _prompt(request["body"])
            name = request["custom_id"]
        else:
            name, prompt, error = entry["custom_id"], "", entry["error"]
            body = (entry["response"] or {}).get("body")
        answer = _answer(body) if error is None else f"{error['code']}: {error['message']}"
        yield name, _short(prompt), _short(answer), error is not None


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """Yield an output's entries; both forms hold one entry a line."""
    paths = [path, errors_path(path)] if path.suffix == ".jsonl" else [path]
    for each in paths:
        if each is not path and not each.exists():
            continue
        try:
            with open(each, encoding="utf-8") as file:
                for line in file:
                    text = line.rstrip().rstrip(",")
                    if text not in ("", "[", "]"):
                        yield json.loads(text)
        except (OSError, ValueError) as error:
            raise InputError(f"{each} is not an output: {error}", "check the path") from error


def _prompt(body: dict[str, Any]) -> str:
    messages = body.get("messages")
    if isinstance(messages, list):
        texts = [m.get("content") for m in messages if m.get("role") == "user"]
        return "\n".join(text if isinstance(text, str) else "[parts]" for text in texts)
    return str(body.get("prompt", body.get("input", "")))


def _answer(body: Any) -> str:
    if not isinstance(body, dict):
        return ""
    if body.get("object") == "list":
        vectors = body.get("data") or [{}]
        size = len(vectors[0].get("embedding") or [])
        return f"{len(vectors)} embedding(s) of {size} numbers"
    choice = (body.get("choices") or [{}])[0]
    return str((choice.get("message") or {}).get("content") or choice.get("text") or "")


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."
