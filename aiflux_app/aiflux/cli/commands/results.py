"""``aiflux results``: the answers of a run, on the screen or as a table in a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Column, Table

from aiflux.cli.json_output import add_json, print_json
from aiflux.cli.run_argument import located
from aiflux.converters.results import BackOptions, BackSummary
from aiflux.converters.results.answers import entries, prompt_text, refuse_unfit
from aiflux.core.batch.results_file import EMPTY_REASONS, ResultEntry, answered_words, vectors
from aiflux.core.runs.directory import OUTPUT_SUFFIXES
from aiflux.core.runs.plan import read_plan
from aiflux.util.files import expanded
from aiflux.util.streams import STDOUT
from aiflux.util.unicode import json_text, terminal_line
from aiflux.worker.console import TerminalConsole

_SHOWN = 400
_ROWS = 50
_RUN_HELP = "output, run directory or job id"
_TABLES = {
    "to-csv": ("CSV", ".csv"),
    "to-parquet": ("Parquet", ".parquet"),
    "to-jsonl": ("JSON Lines", ".table.jsonl"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = "Look at the answers of a run, or write them as a table."
    parser.epilog = "example: aiflux results to-csv results.json --source reviews.csv"
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    show = actions.add_parser("show", help="show prompts and answers as a table")
    show.add_argument("output", metavar="R", help=_RUN_HELP)
    show.add_argument("--failed", action="store_true", help="only what failed")
    show.add_argument(
        "--limit", type=_count, metavar="N", help=f"rows at most (default: {_ROWS}; JSON: all)"
    )
    add_json(show, "print them as a JSON array, in full")
    for name, (form, _) in _TABLES.items():
        _add_table(actions, name, form)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _add_table(actions: Any, name: str, form: str) -> None:
    parser = actions.add_parser(
        name,
        help=f"write answers as {form}, beside the columns that they were asked from",
        description=f"Write answers as {form}: custom_id, the source's columns, answer, error.",
        usage=f"aiflux results {name} R [options]",
        epilog=f"example:\n  aiflux results {name} out.json --source reviews.csv --json-fields",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", metavar="R", help=_RUN_HELP)
    parser.add_argument(
        "--output",
        dest="target",
        metavar="FILE",
        help="what to write (default: named after the run's output); - for stdout",
    )
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    add_json(parser, "print the summary as one JSON object")
    parser.add_argument(
        "--source",
        metavar="FILE",
        help="CSV, TSV or Parquet file that was converted (default: columns kept with --keep)",
    )
    parser.add_argument(
        "--id-column", metavar="NAME", help="column of the source that was --id-column"
    )
    parser.add_argument("--delimiter", metavar="CHAR", help="of a source that is CSV")
    parser.add_argument("--encoding", metavar="NAME", help="of a source that is CSV")
    if name == "to-csv":
        parser.add_argument(
            "--excel",
            action="store_true",
            help="as Excel reads it: UTF-8 with a mark, ' before what it takes for a formula",
        )
    parser.add_argument(
        "--reasoning",
        action="store_true",
        help="add a column with what a reasoning model thought before it answered",
    )
    parser.add_argument(
        "--json-fields",
        nargs="?",
        const="",
        metavar="NAME,NAME",
        help="make columns of the fields of JSON answers: of those named, or of all; after R",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Show or write answers."""
    output = output_of(arguments.output)
    refuse_unfit(output)
    if arguments.action == "show":
        return _show(output, arguments)
    return _write(output, arguments)


def output_of(text: str) -> Path:
    """Return the output that a path, a run directory or a job id names.

    Raises:
        UsageError: it names none.
    """
    path = expanded(text).absolute()
    inside = any(parent.suffix == ".aiflux" for parent in path.parents)
    if path.is_file() and path.suffix in OUTPUT_SUFFIXES and not inside:
        return path
    return read_plan(located(text)).output


def _write(output: Path, arguments: argparse.Namespace) -> int:
    from aiflux import converters
    from aiflux.cli.pipes import destination, refuse_both

    writers = {
        "to-csv": converters.results_to_csv,
        "to-parquet": converters.results_to_parquet,
        "to-jsonl": converters.results_to_jsonl,
    }
    options = BackOptions(
        source=arguments.source,
        id_column=arguments.id_column,
        json_fields=_fields(arguments.json_fields),
        delimiter=arguments.delimiter,
        encoding=arguments.encoding,
        excel=getattr(arguments, "excel", False),
        reasoning=arguments.reasoning,
    )
    suffix = _TABLES[arguments.action][1]
    name = arguments.target or str(output.with_suffix(suffix))
    refuse_both(name, as_json=arguments.json)
    with destination(name, force=arguments.force) as target:
        summary = writers[arguments.action](output, target, options)
        if arguments.json:
            print_json({**asdict(summary), "output": name})
            return 0
        stream = sys.stderr if name == STDOUT else sys.stdout
        for line in _told(summary, name):
            print(line, file=stream)
    return 0


def _fields(given: str | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    return tuple(name.strip() for name in given.split(",") if name.strip())


def _told(summary: BackSummary, name: str) -> Iterator[str]:
    """Yield what was written, and what is worth knowing of it."""
    rows = f"{summary.rows} row" + ("" if summary.rows == 1 else "s")
    answered = answered_words(summary.answered, summary.empty)
    yield f"{rows} -> {name}: {answered}, {summary.failed} failed"
    for count, words in (
        (summary.unasked - summary.repeated, "of the source without a result: not asked"),
        (
            summary.repeated,
            "of the source with the custom_id of an earlier row: not asked",
        ),
        (summary.unread, "of the source that cannot be read: left out"),
        (summary.unused, "of the results without a row of the source: left out"),
        (
            summary.changed,
            "of the source with nothing of what was asked under their custom_id: was it changed "
            f"since? ({_named(summary, 'changed')})",
        ),
        (summary.cut, "of the answers cut at the token limit (--max-tokens)"),
        (summary.several, "of the answers with several choices: the first is in the table"),
        (
            summary.unfit,
            "of the answers without a JSON object: their fields are empty "
            f"({_named(summary, 'unfit')})",
        ),
    ):
        if count:
            yield f"  {count} {words}"
    if summary.absent:
        yield f"  no answer has the field {', '.join(map(repr, summary.absent))}"


def _named(summary: BackSummary, what: str) -> str:
    names = summary.examples.get(what, [])
    more = ", ..." if getattr(summary, what) > len(names) else ""
    return terminal_line(", ".join(names)) + more


def _show(output: Path, arguments: argparse.Namespace) -> int:
    wanted = (entry for entry in entries(output) if entry.error or not arguments.failed)
    if arguments.json:
        _print_json(islice(wanted, arguments.limit))
        return 0
    limit = arguments.limit or _ROWS
    shown = list(islice(wanted, limit))
    if not shown:
        print("nothing failed" if arguments.failed else "no request has a result")
        return 0
    columns = (Column(name, overflow="fold") for name in ("custom_id", "prompt", "answer"))
    table = Table(*columns, show_lines=True, expand=True)
    for entry in shown:
        answer = escape(_short(entry.failure or _answer(entry)))
        told = f"[red]{answer}[/red]" if entry.error else answer
        table.add_row(escape(_short(entry.custom_id)), escape(_short(_prompt(entry))), told)
    TerminalConsole().print(table)
    more = sum(1 for _ in wanted)
    if more:
        print(f"{more} more are not shown: --limit N shows N", file=sys.stderr)
    return 0


def _print_json(shown: Iterator[ResultEntry]) -> None:
    """Print an array, an entry a line; it may be larger than memory."""
    start = "["
    for entry in shown:
        fields = {
            "custom_id": entry.custom_id,
            "prompt": _prompt(entry),
            "answer": None if entry.error else entry.answer,
            "error": entry.error,
        }
        print(start, json_text(fields, only_ascii=True), sep="\n" if start == "[" else "")
        start = ","
    print("]" if start == "," else "[]")


def _prompt(entry: ResultEntry) -> str:
    return "" if entry.request is None else prompt_text(entry.request.get("body") or {})


def _answer(entry: ResultEntry) -> str:
    sizes = [len(vector) for vector in vectors(entry.body) if isinstance(vector, list)]
    if sizes:
        return f"{len(sizes)} embedding(s) of {sizes[0]} numbers"
    empty = entry.choice.empty
    return entry.answer if empty is None else f"(empty: {EMPTY_REASONS[empty]})"


def _short(text: str) -> str:
    text = "\n".join(terminal_line(line) for line in text.strip()[: _SHOWN + 1].split("\n"))
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."
