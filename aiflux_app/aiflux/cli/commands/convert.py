"""``aiflux convert``: tables, folders, JSON and images become a file of requests."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from aiflux.cli.commands.convert_options import add_arguments
from aiflux.cli.json_output import print_json
from aiflux.cli.pipes import destination, piped_file, refuse_both
from aiflux.converters.directory import directory_to_jsonl
from aiflux.converters.images import images_to_jsonl
from aiflux.converters.walk import parse_size
from aiflux.converters.writer import SHOWN, Summary, listed, plural, skipped_path
from aiflux.core.batch.request import parse_json
from aiflux.errors import InputError, StoppedError, UsageError
from aiflux.util.files import refuse_existing
from aiflux.util.streams import STDIN, STDOUT
from aiflux.util.unicode import json_text
from aiflux.worker.console import TerminalConsole

_TRIAL = 3

__all__ = ["add_arguments", "execute"]

Tell = Callable[[int, int], None]


def execute(arguments: argparse.Namespace) -> int:
    """Convert, or show what would come of it."""
    try:
        return _execute(arguments)
    except KeyboardInterrupt:
        raise StoppedError(
            "stopped; nothing was written", "the same command begins again"
        ) from None


def _execute(arguments: argparse.Namespace) -> int:
    options = {**_request_options(arguments), "skip_bad": arguments.skip_bad}
    convert = _converter(arguments, options)
    if arguments.dry_run:
        with _bar() as tell:
            summary = convert(None, limit=_TRIAL, progress=tell)
        if arguments.json:
            print_json(asdict(summary))
        else:
            _show_trial(summary)
        return 0
    if arguments.output is None:
        raise UsageError("no output was named", "--output prompts.jsonl, or - for stdout")
    refuse_both(arguments.output, as_json=arguments.json)
    with destination(arguments.output, force=arguments.force) as target:
        if arguments.output != STDOUT and not arguments.force:
            refuse_existing(skipped_path(target))
        with _bar() as tell:
            summary = convert(target, progress=tell)
        if arguments.json:
            print_json(asdict(summary))
            return 0
        stream = sys.stderr if arguments.output == STDOUT else sys.stdout
        for line in _told(summary, arguments.output):
            print(line, file=stream)
    return 0


def _converter(arguments: argparse.Namespace, options: dict[str, Any]) -> Callable[..., Summary]:
    """Return the function for the kind of input, with the user's options."""
    source = (
        piped_file(arguments.kind)
        if arguments.input == STDIN
        else Path(arguments.input).expanduser()
    )
    template = _template(arguments)

    def call(output: Path | None, **more: Any) -> Summary:
        return _call(arguments, source, output, template, {**options, **more})

    return call


def _call(
    arguments: argparse.Namespace,
    source: Path,
    output: Path | None,
    template: str | None,
    options: dict[str, Any],
) -> Summary:
    kind = arguments.kind
    if kind in ("dir", "images"):
        given = {} if template is None else {"template": template}
        walk = {"recursive": arguments.recursive, "patterns": arguments.pattern}
        options = {**options, **given, **walk, "exclude": arguments.exclude}
        if kind == "images":
            return images_to_jsonl(source, output, max_pixels=arguments.max_pixels, **options)
        return directory_to_jsonl(
            source,
            output,
            max_file_size=parse_size(arguments.max_file_size),
            chunk_tokens=arguments.chunk_tokens,
            overlap=arguments.overlap,
            encoding=arguments.encoding,
            **options,
        )
    options = {**options, "keep": arguments.keep}
    if kind == "json":
        from aiflux.converters import json_to_jsonl

        ids = {"id_field": arguments.id_column, "field": arguments.field}
        return json_to_jsonl(source, output, template=template, **ids, **options)
    if template is None:
        raise UsageError("no template was given", '--template "Summarize: {column}"')
    options = {**options, "template": template, "id_column": arguments.id_column}
    if kind == "parquet":
        from aiflux.converters import parquet_to_jsonl

        return parquet_to_jsonl(source, output, **options)
    from aiflux.converters import csv_to_jsonl

    dialect = {"delimiter": arguments.delimiter, "encoding": arguments.encoding}
    return csv_to_jsonl(source, output, **dialect, **options)


def _template(arguments: argparse.Namespace) -> str | None:
    if arguments.template_file is None:
        given: str | None = arguments.template
        return given
    try:
        text = Path(arguments.template_file).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the template {arguments.template_file!r} cannot be read: {error}",
            "give a file of UTF-8 text",
        ) from error
    return text.removesuffix("\n")


def _request_options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "system", "temperature", "max_tokens", "schema", "endpoint")
    params = dict(_param(text) for text in arguments.param)
    return {**{name: getattr(arguments, name) for name in names}, "params": params}


def _param(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    try:
        if not (key and equals):
            raise ValueError("there is no KEY=")
        return key, parse_json(value)
    except ValueError as error:
        raise UsageError(
            f"--param {text!r} is not KEY=JSON: {error}",
            """such as --param top_p=0.9 or --param 'stop=["END"]'; a text needs its quotes""",
        ) from None


@contextmanager
def _bar() -> Iterator[Tell | None]:
    """Show a bar on a terminal; yield what moves it."""
    console = TerminalConsole(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("converting"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)


def _show_trial(summary: Summary) -> None:
    for number, request in enumerate(summary.first, start=1):
        print(f"request {number}:")
        print(json_text(_shortened(request), indent=2), flush=True)
    for note in (*summary.notes, *listed(summary.examples, summary.skipped)):
        print(f"  {note}", file=sys.stderr)
    print("nothing was written (--dry-run)", file=sys.stderr)


def _shortened(value: Any) -> Any:
    """Return a request with its data URLs cut short."""
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    if isinstance(value, str) and value.startswith("data:") and len(value) > 100:
        return f"{value[:60]}... ({len(value)} characters)"
    return value


def _told(summary: Summary, output: str) -> Iterator[str]:
    """Yield the summary's lines."""
    rows = f"{summary.rows} {summary.unit if summary.rows == 1 else plural(summary.unit)}"
    requests = f"{summary.requests} request" + ("" if summary.requests == 1 else "s")
    yield f"{requests} from {rows} of {summary.source} -> {output}"
    for note in summary.notes:
        yield f"  {note}"
    if summary.skipped:
        yield f"  skipped {summary.skipped}:"
        for text in listed(summary.examples, summary.skipped):
            yield f"    {text}"
        if output != STDOUT and summary.skipped > SHOWN:
            yield f"  all of them: {summary.skipped_path}"
