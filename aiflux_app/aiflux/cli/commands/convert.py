"""``aiflux convert``: turn tables, directories, JSON and images into requests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from aiflux.cli.json_output import json_option, print_json
from aiflux.cli.parser import (
    FILE,
    MODEL,
    Choice,
    Decorator,
    Number,
    WholeNumber,
    group,
    input_parameters,
    option,
    parameters,
    the_input,
)
from aiflux.cli.pipes import destination, piped_file, refuse_both
from aiflux.cli.render.progress import count_bar
from aiflux.converters.directory import MAX_FILE_SIZE, directory_to_jsonl, parse_size
from aiflux.converters.images import TEMPLATE, images_to_jsonl
from aiflux.converters.pdf_pages import IMAGES, MAX_PIXELS, TEXT
from aiflux.converters.request_form import ANSWER, CONVERTED_TO
from aiflux.converters.template import as_template
from aiflux.converters.writer import SHOWN, Summary, listed, plural, skipped_path
from aiflux.core.batch.request import parse_json
from aiflux.errors import StoppedError, UsageError
from aiflux.util.files import expanded, refuse_existing
from aiflux.util.streams import STDIN, STDOUT
from aiflux.util.text import json_text

_TRIAL = 3
_CSV = 'aiflux convert csv in.csv --template "Sum up: {text}" --output q.jsonl'
_DIR = 'aiflux convert dir papers --template "Sum up: {text}" --output q.jsonl'
_JSON = "aiflux convert json in.json --field question --output q.jsonl"
_IMAGES = 'aiflux convert images photos --template "Which bird?" --output q.jsonl'
_TABLE = 'aiflux convert table in.xlsx --template "Sum up: {text}" --output q.jsonl'
_PARQUET = 'aiflux convert parquet in.parquet --template "{text}" --output q.jsonl'


@group("convert", examples=[_CSV])
def convert() -> None:
    """Turn a table, a directory, JSON or images into a file of requests."""


@dataclass(frozen=True)
class _Target:
    """What becomes of the requests; ``take`` gets the summary instead of printing it."""

    output: str | None
    dry_run: bool
    force: bool
    as_json: bool
    take: Callable[[Summary], None] | None = None


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
            show_trial(summary)
        return 0
    if target.output is None:
        raise UsageError("no output was given", "--output prompts.jsonl, or - for stdout")
    refuse_both(target.output, as_json=target.as_json)
    of_run = target.take is not None
    with destination(target.output, force=target.force, of_run=of_run) as path:
        if target.output != STDOUT and not target.force:
            refuse_existing(skipped_path(path))
        with count_bar("converting") as progress:
            summary = make(path, progress=progress)
        if target.take is not None:
            target.take(summary)
            return 0
        if target.as_json:
            print_json(asdict(summary))
            return 0
        stream = sys.stderr if target.output == STDOUT else sys.stdout
        for line in _summary(summary, target.output):
            print(line, file=stream)
    return 0


def read_prompt(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the prompt, with the content of files; remove them from ``given``.

    Raises:
        InputError: a file cannot be read, or a template is invalid.
        UsageError: a turn is no pair.
    """
    read: dict[str, Any] = {}
    for name, file in (("template", "template_file"), ("system_template", "system_file")):
        text, path = given.pop(name, None), given.pop(file, None)
        if (text, path) != (None, None):
            read[name] = as_template(text if path is None else Path(path))
    turns, examples = given.pop("turns", ()), given.pop("examples", None)
    if turns:
        read["turns"] = [_turn(turn) for turn in turns]
    if examples is not None:
        from aiflux.converters import read_examples

        read["examples"] = read_examples(examples) if isinstance(examples, str) else examples
    return read


def _turn(turn: str | tuple[str, str]) -> tuple[str, str]:
    if not isinstance(turn, str):
        return turn
    role, equals, text = turn.partition("=")
    if not equals:
        raise UsageError(f"--turn {turn!r} is not ROLE=TEMPLATE", "--turn 'user={question}'")
    return role.strip(), text


def read_param(text: str) -> tuple[str, Any]:
    """Return the field and the value of ``--param KEY=JSON``.

    Raises:
        UsageError: it has another form.
    """
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


def show_trial(summary: Summary) -> None:
    """Print the requests of a preview."""
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

EXCLUSIVE = (
    ("template", "template_file", "turns"),
    ("system", "system_template", "system_file"),
)


def _kind(
    name: str,
    example: str,
    source: str,
    *options: Decorator,
) -> Callable[[Callable[..., int]], click.Command]:
    """Make a command for a kind of input, with the options that every kind has."""

    def decorate(function: Callable[..., int]) -> click.Command:
        function = parameters(
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
        return convert.command(name, examples=[example], exclusive=EXCLUSIVE)(function)

    return decorate


_PANEL = "Fields of every request"
_REQUEST: Sequence[Decorator] = (
    option(
        "-m", "--model", metavar="NAME:TAG", type=MODEL, panel=_PANEL,
        help="Model (or give it to aiflux run)",
    ),
    option("--system", metavar="TEXT", panel=_PANEL, help="System message"),
    option(
        "--system-template", metavar="TEXT", panel=_PANEL, rare=True,
        help="System message of each row, with {column}",
    ),
    option(
        "--system-file", metavar="FILE", type=FILE, panel=_PANEL, rare=True,
        help="File with the template of the system message; *.j2: Jinja2",
    ),
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
    option(
        "--documents", multiple=True, metavar="COLUMN", panel=_PANEL, rare=True,
        help="Documents for rerank and score; --template is the query (repeatable)",
    ),
    option(
        "--drop-last-assistant", is_flag=True, panel=_PANEL, rare=True,
        help="Remove the assistant's turns at the end of conversations",
    ),
)  # fmt: skip


def _prompt(names: str, default: str = "") -> Decorator:
    ends = f" (default: {default})" if default else ""
    return parameters(
        option(
            "--template", metavar="TEXT", panel="Prompt",
            help=f"The prompt, with {names}; {{{{ is a brace{ends}",
        ),
        option(
            "--template-file", metavar="FILE", type=FILE, panel="Prompt",
            help="File with the template; *.j2: Jinja2",
        ),
    )  # fmt: skip


def _examples(*, rare: bool = False) -> Decorator:
    return parameters(
        option(
            "--examples", metavar="FILE", type=FILE, panel="Prompt", rare=rare,
            help="Table with examples, sent before each prompt (few-shot)",
        ),
        option(
            "--example-answer", default=ANSWER, metavar="NAME", panel="Prompt", rare=True,
            help=f"Column of the examples with their answers (default: {ANSWER})",
        ),
    )  # fmt: skip


_TURNS = option(
    "--turn", "turns", multiple=True, metavar="ROLE=TEXT", panel="Prompt", rare=True,
    help="Turn of a conversation, such as 'user={question}' (repeatable)",
)  # fmt: skip


def _rows(unit: str = "column") -> Decorator:
    return parameters(
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
_DELIMITER = option(
    "--delimiter", metavar="CHAR", help="Between cells, or 'blanks' (default: detected)"
)
_ENCODING = option("--encoding", metavar="NAME", help="Of the file (default: detected)")


class _Given:
    """The parameters that every kind of input has, and the rest."""

    def __init__(self, kind: str, given: dict[str, Any]) -> None:
        source = the_input(given.pop("input_argument"), given.pop("input_option"))
        self.source = piped_file(kind) if source == STDIN else expanded(source)
        output, dry_run, force, as_json, take = (
            given.pop(name, None) for name in ("output", "dry_run", "force", "as_json", "take")
        )
        self.target = _Target(output, dry_run, force, as_json, take)
        prompt = read_prompt(given)
        params = dict(read_param(text) for text in given.pop("params"))
        self.options = {**given, **prompt, "params": params}

    def made_with(self, function: Callable[..., Summary], **more: Any) -> int:
        """Convert with a function of `aiflux.converters`."""
        options = {**self.options, **more}
        return _converted(
            lambda output, **how: function(self.source, output, **options, **how), self.target
        )


@_kind(
    "csv",
    _CSV,
    "CSV or TSV file",
    _prompt("{column}"),
    _TURNS,
    _examples(),
    _rows(),
    _DELIMITER,
    _ENCODING,
    option("--no-header", is_flag=True, help="The first row is data: {column_1} to {column_N}"),
    option("--skip-lines", type=WholeNumber(), default=0, metavar="N", rare=True,
           help="Skip N lines before the table"),
    option("--comment", metavar="TEXT", rare=True, help="Skip lines that start with TEXT"),
)  # fmt: skip
def csv(**given: Any) -> int:
    """Turn a CSV or TSV file into requests, one for each row."""
    from aiflux.converters import csv_to_jsonl

    asked = _Given("csv", given)
    header = not asked.options.pop("no_header")
    return asked.made_with(csv_to_jsonl, header=header)


@_kind(
    "dir",
    _DIR,
    "Directory",
    _prompt("{text}, {source_file}, {chunk}, {chunks}", "{text}"),
    _examples(rare=True),
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
    option(
        "--pdf-pages", type=Choice((TEXT, IMAGES)), default=TEXT, metavar="HOW", rare=True,
        help="Send PDF pages as text or images (default: text)",
    ),
)  # fmt: skip
def dir(**given: Any) -> int:
    """Turn a directory into requests, one for each file or chunk."""
    asked = _Given("dir", given)
    size = parse_size(asked.options["max_file_size"])
    return asked.made_with(directory_to_jsonl, max_file_size=size)


@_kind(
    "json",
    _JSON,
    "JSON or JSON Lines file",
    _prompt("{field} or {outer.inner}"),
    option("--field", metavar="NAME", panel="Prompt", help="Field that is the prompt"),
    _TURNS,
    _examples(),
    _rows("field"),
)
def json(**given: Any) -> int:
    """Turn a JSON array or JSON Lines into requests, one for each entry."""
    from aiflux.converters import json_to_jsonl

    asked = _Given("json", given)
    id_field = asked.options.pop("id_column")
    return asked.made_with(json_to_jsonl, id_field=id_field)


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
    return asked.made_with(images_to_jsonl)


@_kind(
    "table",
    _TABLE,
    "Workbook, database or other table",
    _prompt("{column}"),
    _TURNS,
    _examples(),
    _rows(),
    option("--table", metavar="NAME", help="Sheet of a workbook, or table of a database"),
    option("--query", metavar="SQL", help="SELECT statement for a database; it cannot write"),
)
def table(**given: Any) -> int:
    """Turn a table into requests: Excel, ODS, SQLite, DuckDB, Parquet, Arrow or CSV."""
    from aiflux.converters import table_to_jsonl

    asked = _Given("table", given)
    return asked.made_with(table_to_jsonl)


@_kind(
    "parquet",
    _PARQUET,
    "Parquet or Arrow file, directory, or pattern",
    _prompt("{column}"),
    _TURNS,
    _examples(),
    _rows(),
)
def parquet(**given: Any) -> int:
    """Turn Parquet or Arrow files into requests, one for each row."""
    from aiflux.converters import parquet_to_jsonl

    asked = _Given("parquet", given)
    return asked.made_with(parquet_to_jsonl)
