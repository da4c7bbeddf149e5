"""The options of `aiflux convert`, for each kind of input."""

from __future__ import annotations

import argparse
from typing import Any

from aiflux.cli.json_output import add_json
from aiflux.converters.directory import MAX_FILE_SIZE
from aiflux.converters.images import MAX_PIXELS, TEMPLATE
from aiflux.converters.request_form import ENDPOINTS


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
