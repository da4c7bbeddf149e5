"""``aiflux results``: the answers of a run, on the screen or as a table in a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Column, Table

from aiflux.cli.json_output import json_option, print_json
from aiflux.cli.parser import (
    FILE,
    RUN,
    Choice,
    Decorator,
    WholeNumber,
    argument,
    group,
    option,
    parameters,
)
from aiflux.cli.pipes import destination, refuse_both
from aiflux.converters.results import (
    BackOptions,
    BackSummary,
    results_to_csv,
    results_to_duckdb,
    results_to_jsonl,
    results_to_npy,
    results_to_parquet,
    results_to_xlsx,
)
from aiflux.converters.results.answers import entries, prompt_text, refuse_unfit
from aiflux.converters.results.table import CHOICES, FIRST
from aiflux.core.batch.results_file import (
    EMPTY_REASONS,
    TOOL_CALL,
    Result,
    answered_words,
    scores,
    vectors,
)
from aiflux.core.runs.directory import OUTPUT_SUFFIXES, TABLE_RESULTS, RunDirectory, user_output
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import failed_text
from aiflux.errors import AifluxError
from aiflux.slurm.commands import located
from aiflux.util.files import absolute
from aiflux.util.streams import STDOUT
from aiflux.util.text import counted, json_text, terminal_line
from aiflux.worker.console import TerminalConsole

_SHOWN = 400
_ROWS = 50
_SHOWN_SCORES = 5
Make = Callable[[Path, Path, BackOptions], BackSummary]
_EXAMPLE = "aiflux results {} out.json --source reviews.csv --json-fields"


@group("results", examples=["aiflux results to-csv results.json --source reviews.csv"])
def results() -> None:
    """Show the answers of a run, or write them as a table."""


_result_argument = argument(
    "run", metavar="RUN", type=RUN, help="Output file, Slurm job id or run directory"
)


@results.command("show", examples=["aiflux results show results.json --failed"])
@_result_argument
@option("--failed", is_flag=True, help="Only failed requests")
@option(
    "--limit",
    type=WholeNumber(1),
    metavar="N",
    help=f"Maximum number of rows (default: {_ROWS}; with --json: all)",
)
@json_option("Print a JSON array with the full texts")
def show(run: str, failed: bool, limit: int | None, as_json: bool) -> int:
    """Show prompts and answers as a table."""
    output = output_of(run)
    refuse_unfit(output)
    wanted = (entry for entry in entries(output) if entry.error or not failed)
    if as_json:
        _print_json(islice(wanted, limit))
        return 0
    shown = list(islice(wanted, limit or _ROWS))
    if not shown:
        print("no request failed" if failed else "no request has a result")
        return 0
    columns = (Column(name, overflow="fold") for name in ("custom_id", "prompt", "answer"))
    table = Table(*columns, show_lines=True, expand=True)
    for entry in shown:
        answer = escape(_short(entry.failure or _answer(entry)))
        text = f"[red]{answer}[/red]" if entry.error else answer
        table.add_row(escape(_short(entry.custom_id)), escape(_short(_prompt(entry))), text)
    TerminalConsole().print(table)
    more = sum(1 for _ in wanted)
    if more:
        print(f"{more} more are not shown; --limit N shows N", file=sys.stderr)
    return 0


_TABLE_OPTIONS: Sequence[Decorator] = (
    _result_argument,
    option(
        "-o",
        "--output",
        metavar="FILE",
        type=FILE,
        help="File to write (default: the output's name with another suffix); - for stdout",
    ),
    option("--force", is_flag=True, help="Overwrite an existing file"),
    option(
        "--source",
        metavar="FILE",
        type=FILE,
        help="Table that was converted: CSV, Parquet, JSON (default: columns of --keep)",
    ),
    option("--id-column", metavar="NAME", help="The source's column of custom_ids"),
    option("--delimiter", metavar="CHAR", help="Delimiter of a CSV source"),
    option("--encoding", metavar="NAME", help="Encoding of a CSV source"),
)
_COLUMN_OPTIONS: Sequence[Decorator] = (
    option(
        "--reasoning",
        is_flag=True,
        help="Add a column with the reasoning of a reasoning model",
    ),
    option("--tool-calls", is_flag=True, help="Add a column with the calls of tools, as JSON"),
    option("--logprobs", is_flag=True, help="Add a column with the log probabilities, as JSON"),
    option(
        "--choices",
        type=Choice(CHOICES),
        default=FIRST,
        metavar="NAME",
        help="Of answers with several choices: first (default), or all as rows or columns",
    ),
    option(
        "--json-fields",
        is_flag=False,
        flag_value="",
        metavar="[NAME,NAME]",
        help="Make columns of the fields of JSON answers: the named ones, or all; after RUN",
    ),
    json_option("Print the summary as JSON"),
)
_EXCEL = option(
    "--excel",
    is_flag=True,
    help="For Excel: UTF-8 with a byte order mark, and ' before apparent formulas",
)


def _table_command(
    name: str, suffix: str, make: Make, text: str, *more: Decorator, example: str = _EXAMPLE
) -> None:
    """Add a command that writes a table.

    Args:
        suffix: of the file, if it is not named.
        make: writes it.
        text: what the command's help says.
    """

    def write(**options: Any) -> int:
        return _write(make, suffix, **options)

    write.__doc__ = text
    add = parameters(*_TABLE_OPTIONS, *more, *_COLUMN_OPTIONS)
    results.command(name, examples=[example.format(name)])(add(write))


_COLUMNS = "custom_id, the source's columns, answer, error"
_table_command("to-csv", ".csv", results_to_csv, f"Write answers as CSV: {_COLUMNS}.", _EXCEL)
_table_command(
    "to-parquet", ".parquet", results_to_parquet, f"Write answers as Parquet: {_COLUMNS}."
)
_table_command(
    "to-jsonl", ".table.jsonl", results_to_jsonl, f"Write answers as JSON Lines: {_COLUMNS}."
)
_table_command(
    "to-xlsx", ".xlsx", results_to_xlsx, f"Write answers as an Excel workbook: {_COLUMNS}."
)
_table_command(
    "to-duckdb",
    ".duckdb",
    results_to_duckdb,
    "Write answers as a DuckDB database with the table answers, like to-parquet.",
)
_table_command(
    "to-npy",
    ".npy",
    results_to_npy,
    "Write embeddings as a NumPy array, one row for each row of the table.",
    example="aiflux results {} out.json --output vectors.npy",
)


def output_of(text: str) -> Path:
    """Return the output that a path, a run directory or a job id names.

    Raises:
        UsageError: it names none.
    """
    path = absolute(text)
    inside = any(parent.suffix == ".aiflux" for parent in path.parents)
    table = RunDirectory.of_output(path).path / TABLE_RESULTS  # a table can be JSON, too
    if os.path.isfile(table):  # Path.is_file raises if a directory cannot be entered
        return table
    if path.is_file() and path.suffix in OUTPUT_SUFFIXES and not inside:
        return path
    return read_plan(located(text)).output


def _write(
    make: Make,
    suffix: str,
    run: str,
    output: str | None,
    force: bool,
    as_json: bool,
    json_fields: str | None,
    **options: Any,
) -> int:
    source = output_of(run)
    refuse_unfit(source)
    name = output or str(user_output(source).with_suffix(suffix))
    refuse_both(name, as_json=as_json)
    with destination(name, force=force, inputs=_inputs(source)) as target:
        summary = make(source, target, BackOptions(json_fields=_fields(json_fields), **options))
        if as_json:
            print_json({**asdict(summary), "output": name})
            return 0
        stream = sys.stderr if name == STDOUT else sys.stdout
        for line in summary_lines(summary, name):
            print(line, file=stream)
    return 0


def _inputs(output: Path) -> tuple[Path, ...]:
    """Return the input of the run that wrote an output; none if its plan cannot be read."""
    try:
        given = read_plan(RunDirectory.of_output(output)).input
    except AifluxError:  # only the output is needed
        return ()
    return given.path, given.named


def _fields(given: str | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    return tuple(name.strip() for name in given.split(",") if name.strip())


def summary_lines(summary: BackSummary, name: str) -> Iterator[str]:
    """Yield what was written, and what is worth knowing of it."""
    rows = f"{summary.rows} row" + ("" if summary.rows == 1 else "s")
    answered = answered_words(summary.answered, summary.empty)
    failed = failed_text(summary.failed + summary.left_out, summary.left_out)
    yield f"{rows} -> {name}: {answered}, {failed}"
    for count, words in (
        (summary.unasked - summary.repeated, "of the source without a result: not asked"),
        (
            summary.repeated,
            "of the source with the custom_id of an earlier row: not asked",
        ),
        (summary.unread, "of the rows of the source left out: they cannot be read"),
        (summary.unused, "of the results without a row of the source: left out"),
        (
            summary.changed,
            "of the source with nothing of what was asked under their custom_id: was it changed "
            f"since? ({_named(summary, 'changed')})",
        ),
        (summary.cut, "of the answers cut at the token limit (--max-tokens)"),
        (summary.filtered, "of the answers stopped by a content filter"),
        (summary.several, "of the answers with several choices: the first is in the table"),
        (
            summary.unfit,
            "of the answers without a JSON object: their fields are empty "
            f"({_named(summary, 'unfit')})",
        ),
    ):
        if count:
            yield f"  {count} {words}"
    yield from (f"  {note}" for note in summary.notes)
    if summary.absent:
        yield f"  no answer has the field {', '.join(map(repr, summary.absent))}"


def _named(summary: BackSummary, what: str) -> str:
    names = summary.examples.get(what, [])
    more = ", ..." if getattr(summary, what) > len(names) else ""
    return terminal_line(", ".join(names)) + more


def _print_json(shown: Iterator[Result]) -> None:
    """Print an array, an entry a line; it may be larger than memory."""
    start = "["
    for entry in shown:
        fields = {
            "custom_id": entry.custom_id,
            "prompt": _prompt(entry),
            "answer": None if entry.error else entry.text,
            "error": entry.error,
        }
        print(start, json_text(fields, only_ascii=True), sep="\n" if start == "[" else "")
        start = ","
    print("]" if start == "," else "[]")


def _prompt(entry: Result) -> str:
    return "" if entry.input is None else prompt_text(entry.input.get("body") or {})


def _answer(entry: Result) -> str:
    sizes = [len(vector) for vector in vectors(entry.output) if isinstance(vector, list)]
    if sizes:
        return f"{counted(len(sizes), 'embedding')} of {counted(sizes[0], 'number')}"
    scored = [] if entry.error is not None else scores(entry.output)
    if scored:
        shown = ", ".join(f"{each.document}: {each.score:.4g}" for each in scored[:_SHOWN_SCORES])
        return f"{counted(len(scored), 'score')}, {shown}{', ...' * (len(scored) > _SHOWN_SCORES)}"
    empty = entry.choice.empty
    if empty is None:
        return entry.text
    return f"({'' if empty == TOOL_CALL else 'empty: '}{EMPTY_REASONS[empty]})"


def _short(text: str) -> str:
    text = "\n".join(terminal_line(line) for line in text.strip()[: _SHOWN + 1].split("\n"))
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."
