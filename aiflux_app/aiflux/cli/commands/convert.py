"""``aiflux convert``: turn tables, directories, JSON and images into requests."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiflux.cli.json_output import add_json, print_json
from aiflux.cli.pipes import destination, piped_file, refuse_both
from aiflux.cli.render.progress import count_bar
from aiflux.converters.directory import MAX_FILE_SIZE, directory_to_jsonl, parse_size
from aiflux.converters.images import MAX_PIXELS, TEMPLATE, images_to_jsonl
from aiflux.converters.request_form import ENDPOINTS
from aiflux.converters.writer import SHOWN, Summary, listed, plural, skipped_path
from aiflux.core.batch.request import parse_json
from aiflux.errors import InputError, StoppedError, UsageError
from aiflux.util.files import expanded, refuse_existing
from aiflux.util.streams import STDIN, STDOUT
from aiflux.util.unicode import json_text

_TRIAL = 3

__all__ = ["add_arguments", "execute"]


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
        with count_bar("converting") as move:
            summary = convert(None, limit=_TRIAL, progress=move)
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
        with count_bar("converting") as move:
            summary = convert(target, progress=move)
        if arguments.json:
            print_json(asdict(summary))
            return 0
        stream = sys.stderr if arguments.output == STDOUT else sys.stdout
        for line in _told(summary, arguments.output):
            print(line, file=stream)
    return 0


def _converter(arguments: argparse.Namespace, options: dict[str, Any]) -> Callable[..., Summary]:
    """Return the function for the kind of input, with the user's options."""
    source = piped_file(arguments.kind) if arguments.input == STDIN else expanded(arguments.input)
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
        text = expanded(arguments.template_file).read_text(encoding="utf-8-sig")
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's kinds of input and their options."""
    parser.description = "Turn a table, a folder, JSON or images into a file of requests."
    parser.epilog = f"example:\n  {_CSV}"
    kinds = parser.add_subparsers(
        title="kinds of input", metavar="KIND", dest="kind", required=True
    )
    _add_csv(_kind(kinds, "csv", "a CSV or TSV file: a request for each row", _CSV))
    _add_dir(_kind(kinds, "dir", "a directory: a request for each file or chunk", _DIR))
    _add_json(_kind(kinds, "json", "a JSON array, or JSON Lines: one for each entry", _JSON))
    _add_images(_kind(kinds, "images", "a directory or a list of images", _IMAGES))
    _add_parquet(_kind(kinds, "parquet", "a Parquet file: a request for each row", _PARQUET))


_CSV = 'aiflux convert csv --input in.csv --template "Sum up: {text}" --output q.jsonl'
_DIR = 'aiflux convert dir --input papers --template "Sum up: {text}" --output q.jsonl'
_JSON = "aiflux convert json --input in.json --field question --output q.jsonl"
_IMAGES = 'aiflux convert images --input photos --template "Which bird?" --output q.jsonl'
_PARQUET = 'aiflux convert parquet --input in.parquet --template "{text}" --output q.jsonl'


def _kind(kinds: Any, name: str, help_text: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(
        name,
        help=help_text,
        usage=f"aiflux convert {name} --input PATH --output FILE [options]",
        description=f"Convert {help_text}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input", required=True, metavar="PATH", help="what to convert; - for stdin"
    )
    parser.add_argument("--output", metavar="FILE", help="requests, *.jsonl; - for stdout")
    parser.add_argument(
        "--dry-run", action="store_true", help="show the first three requests, write nothing"
    )
    parser.add_argument("--force", action="store_true", help="replace an output that is there")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out what cannot be used, and list it"
    )
    add_json(parser, "print the summary as one JSON object")
    return parser


def _add_request(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what every request has")
    group.add_argument("--model", metavar="NAME:TAG", help="model (or name it to aiflux run)")
    group.add_argument("--system", metavar="TEXT", help="system message")
    group.add_argument("--temperature", type=float, metavar="T", help="temperature")
    group.add_argument("--max-tokens", type=int, metavar="N", help="tokens per answer")
    group.add_argument(
        "--schema", metavar="FILE", help="JSON Schema that answers are to fit (response_format)"
    )
    group.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="KEY=JSON",
        help="any other field of the body (repeatable)",
    )
    group.add_argument(
        "--endpoint", choices=tuple(ENDPOINTS), default="chat", help="API (default: chat)"
    )


def _add_template(parser: argparse.ArgumentParser, names: str, default: str = "") -> None:
    group = parser.add_argument_group("the prompt").add_mutually_exclusive_group()
    ends = f" (default: {default})" if default else ""
    group.add_argument(
        "--template", metavar="TEXT", help=f"the prompt, with {names}; {{{{ is a brace{ends}"
    )
    group.add_argument("--template-file", metavar="FILE", help="a file with the template")


def _add_table(parser: argparse.ArgumentParser, unit: str = "column") -> None:
    group = parser.add_argument_group("the rows")
    group.add_argument(
        f"--id-{unit}",
        dest="id_column",
        metavar="NAME",
        help=f"{unit} of the custom_ids (default: row-1, row-2, ...)",
    )
    group.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="NAME",
        help=f"{unit} to keep in the metadata (repeatable; '*' for all)",
    )


def _add_csv(parser: argparse.ArgumentParser) -> None:
    _add_template(parser, "{column}")
    _add_table(parser)
    parser.add_argument("--delimiter", metavar="CHAR", help="between cells (default: detected)")
    parser.add_argument("--encoding", metavar="NAME", help="of the file (default: detected)")
    _add_request(parser)


def _add_parquet(parser: argparse.ArgumentParser) -> None:
    _add_template(parser, "{column}")
    _add_table(parser)
    _add_request(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    _add_template(parser, "{field} or {outer.inner}")
    parser.add_argument("--field", metavar="NAME", help="field that is the prompt")
    _add_table(parser, "field")
    _add_request(parser)


def _add_walk(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which files")
    group.add_argument("--recursive", action="store_true", help="folders in it, too")
    for name, what in (("pattern", "only such files"), ("exclude", "no such files or folders")):
        group.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="GLOB",
            help=f"{what}, such as '*.md' (repeatable)",
        )


def _add_dir(parser: argparse.ArgumentParser) -> None:
    names = "{text}, {source_file}, {chunk}, {chunks}"
    _add_template(parser, names, "{text}")
    _add_walk(parser)
    parser.add_argument(
        "--max-file-size",
        default=f"{MAX_FILE_SIZE >> 20}M",
        metavar="SIZE",
        help="leave out larger files (default: %(default)s)",
    )
    parser.add_argument("--chunk-tokens", type=int, metavar="N", help="cut texts into such chunks")
    parser.add_argument(
        "--overlap", type=int, default=0, metavar="N", help="tokens that a chunk repeats"
    )
    parser.add_argument("--encoding", metavar="NAME", help="of texts that are not UTF-8")
    _add_request(parser)


def _add_images(parser: argparse.ArgumentParser) -> None:
    _add_template(parser, "{source_file}, {name}", TEMPLATE)
    _add_walk(parser)
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help="reduce larger images to N pixels (default: %(default)s)",
    )
    _add_request(parser)
