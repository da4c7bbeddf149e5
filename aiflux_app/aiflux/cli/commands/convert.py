"""``aiflux convert``: turn tables, directories, JSON and images into requests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click

from aiflux.cli.json_output import json_option, print_json
from aiflux.cli.parser import (
    FILE,
    MODEL,
    Choice,
    Decorator,
    Function,
    Number,
    WholeNumber,
    group,
    input_parameters,
    option,
    the_input,
)
from aiflux.cli.pipes import destination, piped_file, refuse_both
from aiflux.cli.render.progress import count_bar
from aiflux.converters.directory import MAX_FILE_SIZE, directory_to_jsonl, parse_size
from aiflux.converters.images import MAX_PIXELS, TEMPLATE, images_to_jsonl
from aiflux.converters.request_form import CONVERTED_TO
from aiflux.converters.writer import SHOWN, Summary, listed, plural, skipped_path
from aiflux.core.batch.request import parse_json
from aiflux.errors import InputError, StoppedError, UsageError
from aiflux.util.files import expanded, refuse_existing
from aiflux.util.streams import STDIN, STDOUT
from aiflux.util.text import error_text, json_text

_TRIAL = 3
_CSV = 'aiflux convert csv in.csv --template "Sum up: {text}" --output q.jsonl'
_DIR = 'aiflux convert dir papers --template "Sum up: {text}" --output q.jsonl'
_JSON = "aiflux convert json in.json --field question --output q.jsonl"
_IMAGES = 'aiflux convert images photos --template "Which bird?" --output q.jsonl'
_PARQUET = 'aiflux convert parquet in.parquet --template "{text}" --output q.jsonl'


@group("convert", examples=[_CSV])
def convert() -> None:
    """Turn a table, a directory, JSON or images into a file of requests."""


@dataclass(frozen=True)
class _Target:
    """What becomes of the requests."""

    output: str | None
    dry_run: bool
    force: bool
    as_json: bool


def _converted(make: Callable[..., Summary], target: _Target) -> int:
    """Convert, or show the first requests."""
    try:
        return _convert(make, target)
    except KeyboardInterrupt:
        raise StoppedError("stopped; nothing was written", "run the same command again") from None


def _convert(make: Callable[..., Summary], target: _Target) -> int:
    if target.dry_run:
        with count_bar("converting") as progress:
            summary = make(None, limit=_TRIAL, progress=progress)
        if target.as_json:
            print_json(asdict(summary))
        else:
            _show_trial(summary)
        return 0
    if target.output is None:
        raise UsageError("no output was given", "--output prompts.jsonl, or - for stdout")
    refuse_both(target.output, as_json=target.as_json)
    with destination(target.output, force=target.force) as path:
        if target.output != STDOUT and not target.force:
            refuse_existing(skipped_path(path))
        with count_bar("converting") as progress:
            summary = make(path, progress=progress)
        if target.as_json:
            print_json(asdict(summary))
            return 0
        stream = sys.stderr if target.output == STDOUT else sys.stdout
        for line in _summary(summary, target.output):
            print(line, file=stream)
    return 0


def _template(template: str | None, file: str | None) -> str | None:
    if file is None:
        return template
    try:
        text = expanded(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the template {file!r} cannot be read: {error_text(error)}", "give a UTF-8 text file"
        ) from error
    return text.removesuffix("\n")


def _param(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    try:
        if not (key and equals):
            raise ValueError("KEY= is missing")
        return key, parse_json(value)
    except ValueError as error:
        raise UsageError(
            f"--param {text!r} is not KEY=JSON: {error}",
            """such as --param top_p=0.9 or --param 'stop=["END"]'; a text needs quotes""",
        ) from None


def _show_trial(summary: Summary) -> None:
    for number, request in enumerate(summary.first, start=1):
        print(f"request {number}:")
        print(json_text(_shortened(request), indent=2), flush=True)
    for note in (*summary.notes, *listed(summary.examples, summary.skipped)):
        print(f"  {note}", file=sys.stderr)
    print("dry run: nothing was written", file=sys.stderr)


def _shortened(value: Any) -> Any:
    """Return a request with its data URLs cut short."""
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    if isinstance(value, str) and value.startswith("data:") and len(value) > 100:
        return f"{value[:60]}... ({len(value)} characters)"
    return value


def _summary(summary: Summary, output: str) -> Iterator[str]:
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


# --- options ----------------------------------------------------------------------------------


def _all(*options: Decorator) -> Decorator:
    """Add options in their order."""

    def decorate(function: Function) -> Function:
        for add in reversed(options):
            function = add(function)
        return function

    return decorate


def _kind(
    name: str,
    example: str,
    source: str,
    *options: Decorator,
) -> Callable[[Callable[..., int]], click.Command]:
    """Make a command for a kind of input, with the options that every kind has."""

    def decorate(function: Callable[..., int]) -> click.Command:
        function = _all(
            input_parameters(f"{source}; - for stdin", metavar="PATH", rare=True),
            option(
                "-o", "--output", metavar="FILE", type=FILE, help="Requests, *.jsonl; - for stdout"
            ),
            option("--dry-run", is_flag=True, help="Show the first three requests, write nothing"),
            option("--force", is_flag=True, help="Overwrite an existing output"),
            option("--skip-bad", is_flag=True, help="Skip unusable rows or files, and list them"),
            json_option("Print the summary as JSON"),
            *options,
            *_REQUEST,
        )(function)
        return convert.command(name, examples=[example], exclusive=[("template", "template_file")])(
            function
        )

    return decorate


_PANEL = "Fields of every request"
_REQUEST: Sequence[Decorator] = (
    option(
        "-m", "--model", metavar="NAME:TAG", type=MODEL, panel=_PANEL,
        help="Model (or give it to aiflux run)",
    ),
    option("--system", metavar="TEXT", panel=_PANEL, help="System message"),
    option("--temperature", type=Number(), metavar="T", panel=_PANEL, help="Temperature"),
    option("--max-tokens", type=WholeNumber(), metavar="N", panel=_PANEL, help="Tokens per answer"),
    option(
        "--schema", metavar="FILE", type=FILE, panel=_PANEL,
        help="JSON Schema for the answers (response_format)",
    ),
    option(
        "--param", "params", multiple=True, metavar="KEY=JSON", panel=_PANEL, rare=True,
        help="Any other field of the body (repeatable)",
    ),
    option(
        "--endpoint", type=Choice(CONVERTED_TO), default="chat", metavar="NAME", panel=_PANEL,
        rare=True,
        help=f"API: {', '.join(CONVERTED_TO)} (default: chat)",
    ),
)  # fmt: skip


def _prompt(names: str, default: str = "") -> Decorator:
    ends = f" (default: {default})" if default else ""
    return _all(
        option(
            "--template", metavar="TEXT", panel="Prompt",
            help=f"The prompt, with {names}; {{{{ is a brace{ends}",
        ),
        option(
            "--template-file", metavar="FILE", type=FILE, panel="Prompt",
            help="File with the template",
        ),
    )  # fmt: skip


def _rows(unit: str = "column") -> Decorator:
    return _all(
        option(
            f"--id-{unit}", "id_column", metavar="NAME", panel="Rows",
            help=f"The {unit} with the custom_ids (default: row-1, ...)",
        ),
        option(
            "--keep", multiple=True, metavar="NAME", panel="Rows",
            help=f"A {unit} for the metadata (repeatable; '*' for all)",
        ),
    )  # fmt: skip


_FILES = (
    option("--recursive", is_flag=True, panel="Files", help="Include subdirectories"),
    option(
        "--pattern", "patterns", multiple=True, metavar="GLOB", panel="Files",
        help="Only these files, such as '*.md' (repeatable)",
    ),
    option(
        "--exclude", multiple=True, metavar="GLOB", panel="Files",
        help="Skip these, such as '*.tmp' (repeatable)",
    ),
)  # fmt: skip
_DELIMITER = option("--delimiter", metavar="CHAR", help="Between cells (default: detected)")
_ENCODING = option("--encoding", metavar="NAME", help="Of the file (default: detected)")


class _Given:
    """The parameters that every kind of input has, and the rest."""

    def __init__(self, kind: str, given: dict[str, Any]) -> None:
        source = the_input(given.pop("input_argument"), given.pop("input_option"))
        self.source = piped_file(kind) if source == STDIN else expanded(source)
        self.target = _Target(
            *(given.pop(name) for name in ("output", "dry_run", "force", "as_json"))
        )
        self.template = _template(given.pop("template"), given.pop("template_file"))
        self.options = {**given, "params": dict(_param(text) for text in given.pop("params"))}

    def made_with(self, function: Callable[..., Summary], **more: Any) -> int:
        """Convert with a function of `aiflux.converters`."""
        options = {**self.options, **more}
        return _converted(
            lambda output, **how: function(self.source, output, **options, **how), self.target
        )

    @property
    def needed_template(self) -> str:
        """The template.

        Raises:
            UsageError: none was given.
        """
        if self.template is None:
            raise UsageError("no template was given", '--template "Summarize: {column}"')
        return self.template

    @property
    def given_template(self) -> dict[str, str]:
        """The template, where one was given."""
        return {} if self.template is None else {"template": self.template}


@_kind("csv", _CSV, "CSV or TSV file", _prompt("{column}"), _rows(), _DELIMITER, _ENCODING)
def csv(**given: Any) -> int:
    """Turn a CSV or TSV file into requests, one for each row."""
    from aiflux.converters import csv_to_jsonl

    asked = _Given("csv", given)
    return asked.made_with(csv_to_jsonl, template=asked.needed_template)


@_kind(
    "dir",
    _DIR,
    "Directory",
    _prompt("{text}, {source_file}, {chunk}, {chunks}", "{text}"),
    *_FILES,
    option(
        "--max-file-size", default=f"{MAX_FILE_SIZE >> 20}M", metavar="SIZE", panel="Files",
        rare=True,
        help=f"Skip larger files (default: {MAX_FILE_SIZE >> 20}M)",
    ),
    option("--chunk-tokens", type=WholeNumber(), metavar="N", help="Split texts into such chunks"),
    option(
        "--overlap", type=WholeNumber(), default=0, metavar="N",
        help="Tokens that a chunk repeats of the one before",
    ),
    option("--encoding", metavar="NAME", help="Encoding of texts that are not UTF-8"),
)  # fmt: skip
def dir(**given: Any) -> int:
    """Turn a directory into requests, one for each file or chunk."""
    asked = _Given("dir", given)
    size = parse_size(asked.options["max_file_size"])
    return asked.made_with(directory_to_jsonl, max_file_size=size, **asked.given_template)


@_kind(
    "json",
    _JSON,
    "JSON or JSON Lines file",
    _prompt("{field} or {outer.inner}"),
    option("--field", metavar="NAME", panel="Prompt", help="Field that is the prompt"),
    _rows("field"),
)
def json(**given: Any) -> int:
    """Turn a JSON array or JSON Lines into requests, one for each entry."""
    from aiflux.converters import json_to_jsonl

    asked = _Given("json", given)
    id_field = asked.options.pop("id_column")
    return asked.made_with(json_to_jsonl, template=asked.template, id_field=id_field)


@_kind(
    "images",
    _IMAGES,
    "Directory, or a list of images",
    _prompt("{source_file}, {name}", TEMPLATE),
    *_FILES,
    option(
        "--max-pixels", type=WholeNumber(), default=MAX_PIXELS, metavar="N",
        help=f"Scale larger images down to N pixels (default: {MAX_PIXELS})",
    ),
)  # fmt: skip
def images(**given: Any) -> int:
    """Turn a directory or a list of images into requests, one for each image."""
    asked = _Given("images", given)
    return asked.made_with(images_to_jsonl, **asked.given_template)


@_kind("parquet", _PARQUET, "Parquet file", _prompt("{column}"), _rows())
def parquet(**given: Any) -> int:
    """Turn a Parquet file into requests, one for each row."""
    from aiflux.converters import parquet_to_jsonl

    asked = _Given("parquet", given)
    return asked.made_with(parquet_to_jsonl, template=asked.needed_template)
