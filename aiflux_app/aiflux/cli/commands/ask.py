"""``aiflux ask``: from a table to a table with answers, in one command."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from aiflux.api.ask import refuse_other_settings
from aiflux.api.refusal import undone_if_refused
from aiflux.cli.commands.convert import EXCLUSIVE, convert, read_param, read_prompt
from aiflux.cli.commands.results import summary_lines
from aiflux.cli.commands.status import follow
from aiflux.cli.json_output import json_option, print_json
from aiflux.cli.parser import (
    FILE,
    Choice,
    Decorator,
    Function,
    command,
    input_parameters,
    option,
    settings_options,
    the_input,
)
from aiflux.cli.render.answers import AnswersReporter, FirstAnswers
from aiflux.cli.render.run import overview, typed
from aiflux.cli.run_argument import frame_of, make_console, show
from aiflux.cli.start import (
    RunArguments,
    open_here,
    refuse_local_at_url,
    run_here,
    run_local,
    show_unused_settings,
    submit,
    write_output,
)
from aiflux.converters.answer_table import (
    ANSWER,
    AnswerTable,
    AskRecord,
    Question,
    as_asked,
    refuse_column,
    schema_fields,
)
from aiflux.converters.request_form import response_format
from aiflux.converters.source import SUFFIXES, kind_of, readable_again
from aiflux.converters.writer import Summary, plural
from aiflux.core.config.config import Config
from aiflux.core.config.settings import BY_NAME, given_settings
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import read_run_status, refuse_failures
from aiflux.engines.kinds import kind_named
from aiflux.errors import ExitCode, TooManyFailuresError, UsageError
from aiflux.slurm.monitor import RunState, gather, is_active, outcome
from aiflux.util.files import absolute, short
from aiflux.util.streams import STDIN
from aiflux.util.text import counted, joined

_EXAMPLE = 'aiflux ask in.csv --template "Sum up: {text}" -m llama3.2:3b -o answers.csv'
_PANEL = "Prompt and input"
_COMMON = ("system", "schema")
# Options of `aiflux convert` that `ask` does not have, or has in another form.
_LEFT_OUT = {
    "input_argument", "input_option", "output", "dry_run", "force", "as_json", "model",
    "temperature", "max_tokens", "template", "id_column", "keep",
}  # fmt: skip
_RARE_SETTINGS = ("validate", "mem", "retry_failed")


def _converter_options(function: Function) -> Function:
    """Add the options of all kinds of input, each of them once."""
    known: dict[str, click.Option] = {}
    for kind in convert.commands.values():
        for param in kind.params:
            if isinstance(param, click.Option) and param.name not in _LEFT_OUT:
                known.setdefault(str(param.name), param)
    for name, param in reversed(known.items()):
        function = _option_like(name, param)(function)
    return function


def _own_name(name: str) -> str:
    """Return the name that a converter's parameter has here, where a setting may have its name."""
    return f"input_{name}" if name in BY_NAME else name


def _renamed(kind: str) -> dict[str, str]:
    """Return the options of a kind of input that have another name here, by their own."""
    names = (str(param.name) for param in convert.commands[kind].params)
    own = {name: _own_name(name) for name in names if name not in _LEFT_OUT}
    return {name: f"--{new.replace('_', '-')}" for name, new in own.items() if new != name}


def _option_like(name: str, param: click.Option) -> Decorator:
    own = _own_name(name)
    options = param.opts if own == name else [f"--{own.replace('_', '-')}"]
    # A kind's own default applies if the option is not given.
    more: dict[str, Any] = {"multiple": param.multiple, "type": param.type, "default": None}
    if param.is_flag:
        more = {"is_flag": True}
    return option(
        *options,
        own,
        metavar=param.metavar,
        help=param.help,
        panel=_PANEL,
        rare=name not in _COMMON,
        **more,
    )


@command(
    "ask",
    examples=[_EXAMPLE],
    exclusive=[*EXCLUSIVE, ("local", "no_wait"), ("dry_run", "no_wait")],
    note="Run the same command again to resume, to wait for a submitted run, or to write the "
    "table when it has ended. Exit status: as for aiflux run.",
)
@input_parameters("Table, directory or JSON", rare=True)
@option("-o", "--output", metavar="FILE", type=FILE, help="Table with the answers")
@option("--local", is_flag=True, help="Run on this machine, in the foreground")
@option("--no-wait", is_flag=True, help="Submit the job and return")
@option("--dry-run", is_flag=True, help="Show the first three requests, write nothing")
@option("--force", is_flag=True, help="Overwrite a table; ask again what changed")
@option(
    "--answer-column",
    metavar="NAME",
    default=ANSWER,
    help=f"Column for the answers (default: {ANSWER})",
)
@option(
    "--kind",
    metavar="NAME",
    type=Choice(list(convert.commands)),
    rare=True,
    help=f"Kind of input: {', '.join(convert.commands)} (default: by its name)",
)
@option(
    "--no-preflight",
    is_flag=True,
    rare=True,
    help="Skip the checks of Slurm, image and disk space",
)
@json_option("Print the summary as JSON")
@option("--template", metavar="TEXT", panel=_PANEL, help="The prompt, with {column}; {{ is a brace")
@_converter_options
@settings_options("run", "slurm", "paths", rare=_RARE_SETTINGS)
def ask(
    input_argument: str | None, input_option: str | None, output: str | None, **given: Any
) -> int:
    """Ask a model about each row of a table, and add a column with the answers."""
    source = _source(the_input(input_argument, input_option))
    kind = given["kind"] or _kind(source)
    converter = _Converter.of(source, kind, given)
    config = Config(arguments=given_settings(given))
    refuse_local_at_url(config, local=given["local"])
    show_unused_settings(
        kind_named(config.engine),
        given_settings(given),
        local=given["local"],
        instead=_renamed(kind),
    )
    if given["dry_run"]:
        return converter.preview(as_json=given["as_json"])
    if output is None:
        raise UsageError("no output was given", "--output answers.csv")
    if config.get("model") is None:  # the requests name none
        raise UsageError("no model was named", "--model llama3.2:3b")
    work = _Ask(AnswerTable.of(output), converter, config, given)
    with redirect_stdout(sys.stderr) if given["as_json"] else nullcontext():
        code, failure = work.run()
    if given["as_json"]:
        print_json(work.summary)
    if failure is not None:
        raise failure
    return code


def _source(text: str) -> Path:
    if text == STDIN:
        raise UsageError(
            "aiflux ask cannot read stdin: the table is read again for the answers",
            "name a file",
        )
    return absolute(text)


def _kind(source: Path) -> str:
    """Return the kind of an input by its name.

    Raises:
        UsageError: the name shows none.
    """
    kind = kind_of(source)
    if kind is None:
        listed = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
        raise UsageError(
            f"the kind of {str(source)!r} is unknown",
            f"use a directory or a file that ends in {listed}; or name it with --kind",
        )
    return kind


@dataclass(frozen=True)
class _Converter:
    """A command of `aiflux convert`, with the options that it gets.

    Attributes:
        options: the values of its parameters by name, as on a command line.
    """

    kind: str
    source: Path
    options: Mapping[str, Any]
    question: Question

    @classmethod
    def of(cls, source: Path, kind: str, given: Mapping[str, Any]) -> _Converter:
        """Choose the options of a kind.

        Raises:
            UsageError: another option of the input is given, or no template.
        """
        params = {str(param.name): param for param in convert.commands[kind].params}
        asked = {name: given.get(_own_name(name)) for name in params if name not in _LEFT_OUT}
        asked["template"] = given["template"]
        asked = {name: value for name, value in asked.items() if _is_given(value)}
        _refuse_others(kind, params, given)
        prompt = read_prompt(asked)
        values = {**_defaults(kind), **asked, **prompt}
        asked |= {name: as_asked(value) for name, value in prompt.items()}
        if not readable_again(kind) and "keep" in params:
            values["keep"] = ("*",)
        if "params" in asked:
            asked["params"] = dict(map(read_param, asked["params"] or ()))
        schema = asked.get("schema")
        if schema is not None:
            asked["schema"] = response_format(schema)["json_schema"]["schema"]
        question = Question(
            source,
            kind,
            json.loads(json.dumps(asked)),
            given["answer_column"],
            schema_fields(asked.get("schema")),
        )
        return cls(kind, source, values, question)

    def _run(self, **how: Any) -> int:
        more = {"input_argument": None, "input_option": str(self.source), "force": True, **how}
        make = convert.commands[self.kind].callback
        assert make is not None  # noqa: S101 - a command has one
        code: int = make(**{**self.options, "output": None, "dry_run": False, **more})
        return code

    def preview(self, *, as_json: bool) -> int:
        """Show the first requests."""
        return self._run(dry_run=True, as_json=as_json)

    def convert(self, target: Path) -> Summary:
        """Make the requests."""
        refuse_column(self.question)
        taken: list[Summary] = []
        self._run(output=str(target), as_json=False, take=taken.append)
        return taken[0]


def _is_given(value: Any) -> bool:
    return value is not None and value is not False and value != ()


def _defaults(kind: str) -> dict[str, Any]:
    """Return the values of the parameters of a command of `aiflux convert` without options."""
    return convert.commands[kind].make_context(kind, ["INPUT"]).params


def _refuse_others(
    kind: str, params: Mapping[str, click.Parameter], given: Mapping[str, Any]
) -> None:
    names = {
        str(param.name): max(param.opts, key=len)
        for each in convert.commands.values()
        for param in each.params
        if param.name not in _LEFT_OUT and param.name not in params
    }
    wrong = [option for name, option in names.items() if _is_given(given.get(_own_name(name)))]
    if wrong:
        raise UsageError(
            f"{joined(wrong)} cannot be used with an input of the kind {kind}",
            f"see aiflux convert {kind} --help",
        )


class _Ask:
    """One command line: convert, run, and write the table; whatever of it is missing.

    Attributes:
        summary: what `--json` prints.
    """

    def __init__(
        self, table: AnswerTable, converter: _Converter, config: Config, given: Mapping[str, Any]
    ) -> None:
        self.table = table
        self.converter = converter
        self.config = config
        self.given = given
        self.summary: dict[str, Any] = {"output": str(table.path), "state": None}
        self.name = typed(short(table.path))

    def run(self) -> tuple[int, TooManyFailuresError | None]:
        """Do the work; return the exit code, or the error to report after the summary."""
        failure = None
        code = 0
        with undone_if_refused(self.table.run, self.table.folder.path):
            active = is_active(self.table.run)
            if active:
                refuse_other_settings(self.table, self.config.run_options())
            record, changed = self.table.prepare(
                self.converter.question, self._convert, force=self.given["force"], active=active
            )
            try:
                code = self._wait() if active else self._begin(changed)
            except TooManyFailuresError as error:
                failure = error
        if self._finished():
            record = self.table.confirm(record, self.converter.convert)
            self._write(record)
        self._summarize(record)
        return code, failure

    def _convert(self, target: Path) -> Summary:
        summary = self.converter.convert(target)
        source = short(self.converter.source)
        print(f"{counted(summary.requests, 'request')} from {source}")
        for note in summary.notes:
            print(f"  {note}")
        if summary.skipped:
            unit = summary.unit if summary.skipped == 1 else plural(summary.unit)
            some = ", such as" if summary.skipped > len(summary.examples[:3]) else ""
            print(f"  skipped {summary.skipped} {unit}{some}:")
            for each in summary.examples[:3]:
                print(f"    {each}")
        return summary

    def _begin(self, replaced: bool) -> int:
        return self.table.start(self._start, replaced=replaced, force=self.given["force"])

    def _start(self, replaced: bool) -> int:
        """Start the run, or resume it; follow a job until it ends."""
        asked = RunArguments(
            self.config,
            self.table.requests,
            self.table.results,
            force=replaced,
            force_resume=False,
            preflight=not self.given["no_preflight"],
            as_json=False,
        )
        if self.given["local"] or not asked.managed:
            opened = open_here(asked)
            reporter = self._reporter()
            if asked.managed:
                return run_local(opened, self.config, reporter)
            return run_here(opened, reporter=reporter)
        submit(asked)
        if self._finished():
            return 0
        return self._wait()

    @cached_property
    def _answers(self) -> FirstAnswers:
        template = self.converter.options.get("template")
        beginning = "" if template is None else template.text.partition("{")[0]
        return FirstAnswers(self.table.run, self.table.requests, beginning)

    def _reporter(self) -> AnswersReporter | None:
        terminal = sys.stderr.isatty() and sys.stdout.isatty()
        return AnswersReporter(sys.stderr, self._answers) if terminal else None

    def _wait(self) -> int:
        """Follow the run until it ends, unless the user does not want to; return its exit code."""
        if self.given["no_wait"]:
            print(f"  {self.name}: run the same command again to wait for it and to write it")
            return 0
        console = make_console()
        live = not self.given["as_json"]
        try:
            view = follow(self.table.run, console, live=live, below=self._answers.lines)
        except KeyboardInterrupt:
            print(
                f"the run continues; to wait for it and write {self.name}, run the same command "
                f"again; to stop it: aiflux cancel {self.name}",
                file=sys.stderr,
            )
            return int(ExitCode.STOPPED)
        if live and console.is_terminal:
            show(console, self._answers.lines(console.width))
        if view.state is RunState.NOT_MERGED:
            return write_output(read_plan(self.table.run), self.table.run)
        if view.finished:
            refuse_failures(read_plan(self.table.run), view.without_answer)
            return 0
        show(console, overview(view, frame_of(console)))
        return int(outcome(view))

    def _finished(self) -> bool:
        status = read_run_status(self.table.run, read_plan(self.table.run))
        return status is not None and status.completed and self.table.results.is_file()

    def _write(self, record: AskRecord) -> None:
        summary = self.table.write(record, force=self.given["force"])
        if summary is None:
            print(f"{self.name} is up to date")
            return
        for line in summary_lines(summary, short(self.table.path)):
            print(line)
        if summary.failed:
            print(f"  why: aiflux results show {self.name} --failed")

    def _summarize(self, record: AskRecord) -> None:
        view = gather(self.table.run)
        self.summary |= {
            "state": view.state.value,
            "rows": record.rows,
            "requests": record.requests,
            "skipped": record.skipped,
            "answered": view.completed,
            "failed": view.failed,
            "left_out": view.left_out,
        }
