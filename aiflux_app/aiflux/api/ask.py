"""``aiflux.ask``: a column of answers for a DataFrame, or for a table in a file."""

from __future__ import annotations

import filecmp
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from hashlib import blake2b
from inspect import signature
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, TypeVar, cast

from aiflux import converters
from aiflux.api.chain import answering
from aiflux.api.refusal import undone_if_refused
from aiflux.api.run import Run, run
from aiflux.converters.answer_table import (
    ANSWER,
    AnswerTable,
    AskRecord,
    Question,
    as_asked,
    refuse_column,
    schema_fields,
)
from aiflux.converters.chain.folder import changed_text
from aiflux.converters.request_form import make_form, response_format
from aiflux.converters.results import results_to_arrow
from aiflux.converters.source import kind_of
from aiflux.converters.template import PromptTemplate, as_template
from aiflux.converters.writer import Summary
from aiflux.core.config.settings import BY_NAME, RunOptions
from aiflux.core.runs.output import merge
from aiflux.core.runs.plan import read_plan
from aiflux.errors import ConfigError, EngineError, InputError, StoppedError, UsageError
from aiflux.slurm.monitor import gather, is_active
from aiflux.slurm.run_view import RunState, RunView, ended_early
from aiflux.slurm.runner import SlurmRunner
from aiflux.util.extras import need
from aiflux.util.files import absolute, expanded
from aiflux.util.text import suggestion

if TYPE_CHECKING:
    import pyarrow

_log = logging.getLogger(__name__)
Frame = TypeVar("Frame")
# Parameters of converters that are not options here.
_OURS = {
    "input_path",
    "output_path",
    "limit",
    "progress",
    "request",
    "id_column",
    "id_field",
    "keep",
}
_PURPOSE = "aiflux.ask with a DataFrame"
_HASHED_ROWS = 1 << 16
_CONVERTERS: Mapping[str, Callable[..., Summary]] = {
    "csv": converters.csv_to_jsonl,
    "dir": converters.directory_to_jsonl,
    "json": converters.json_to_jsonl,
    "parquet": converters.parquet_to_jsonl,
    "table": converters.table_to_jsonl,
}


def ask(
    source: Frame,
    output: str | Path | None = None,
    *,
    template: str | Path | PromptTemplate | None = None,
    model: str | None = None,
    system: str | None = None,
    schema: str | Path | Mapping[str, Any] | None = None,
    answer_column: str = ANSWER,
    local: bool = False,
    force: bool = False,
    progress: bool = True,
    workspace: str | Path | None = None,
    **options: Any,
) -> Frame:
    """Ask a model about each row; return the rows with a column of answers.

    It waits for the run. Called again with the same arguments, it finishes what is missing: it
    waits for a run that something works on, resumes one that stopped, and otherwise returns the
    answers that are stored. If requests failed, their answers are None, and a column ``error`` has
    the reasons.

    Args:
        source: a DataFrame of pandas or polars, or a table of pyarrow; what is returned is of the
            same kind. Or the path of a table or directory; then the path of the output is returned.
        output: the table to write, as with `aiflux ask`; its suffix names its form. Necessary for a
            path. Without it, only the files of the run are kept, in ``ask-DIGEST.parquet.aiflux``
            in the workspace.
        template: the prompt; ``{column}`` is replaced. Or the ``Path`` of a template, which is a
            Jinja2 template if its name ends in ``.j2``.
        schema: a JSON Schema for the answers, or its file; its fields become columns.
        local: start the engine on this machine.
        force: overwrite a table; ask again about rows whose requests changed, or about all if the
            model or another setting did.
        progress: show the progress in a notebook or on a terminal.
        options: settings as in ``aiflux.run``, and options of the converter (``delimiter``,
            ``system_template``, ``turns``, ``examples``: rows or the path of a table, ...).

    Raises:
        AifluxError: as ``aiflux.run`` does; StoppedError if the run ended before it was finished;
            ConfigError before it if the output needs a library that is not installed.
    """
    folder = Path.cwd() if workspace is None else absolute(workspace)
    settings = {name: options.pop(name) for name in [*options] if name in BY_NAME}
    made = {"template": template, "system": system, "schema": schema, **options}
    made = {name: _read(name, value) for name, value in made.items() if value is not None}
    asked = _as_json(made)
    table, rows = _table(source, output, folder, asked)
    path = _rows_file(table) if rows is not None else absolute(folder / expanded(cast(Any, source)))
    question = Question(path, _kind(path), asked, answer_column, schema_fields(asked.get("schema")))
    _refuse_unknown(question.kind, options)

    def convert(target: Path) -> Summary:
        refuse_column(question)
        return _CONVERTERS[question.kind](path, target, **made)

    def convert_and_warn(target: Path) -> Summary:
        summary = convert(target)
        for note in summary.notes:
            _log.warning("%s", note)
        return summary

    def start(replaced: bool) -> Run:
        return run(
            table.requests,
            table.results,
            model=model,
            local=local,
            force=replaced,
            workspace=workspace,
            **settings,
        )

    started = Run(table.run.path, table.results)
    with undone_if_refused(table.run, table.folder.path):
        active = is_active(table.run)
        if active:
            given = {**settings, "model": model}
            config, _ = SlurmRunner(workspace=workspace).configured(**given)
            refuse_other_settings(table, config.run_options())
        with nullcontext() if rows is None else _stored(rows, table):
            record, changed = table.prepare(question, convert_and_warn, force=force, active=active)
        if not active:
            table.start(start, replaced=changed, force=force)
    view = _finished(started.wait(progress=progress), table)
    record = table.confirm(record, convert)
    if output is not None:
        table.write(record, force=force)
    if isinstance(source, str | Path):
        return cast(Frame, type(source)(table.path))
    return _with_answers(source, table, record, view)


def refuse_other_settings(table: AnswerTable, options: RunOptions) -> None:
    """Refuse settings that change the answers while something works on the run.

    Raises:
        RunConflictError: the run was planned with others.
    """
    before, now = answering(read_plan(table.run).options), answering(options)
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            table.refuse_other_settings(changed_text(name, before.get(name), now.get(name)))


def _refuse_unknown(kind: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError for an option that is neither a setting nor one of the converter."""
    shared = signature(make_form).parameters
    own = {*signature(_CONVERTERS[kind]).parameters, *shared} - _OURS - {*BY_NAME}
    for name in options:
        if name not in own:
            raise ConfigError(
                f"aiflux.ask: unknown option {name!r}", suggestion(name, [*own, *BY_NAME])
            )


def _read(name: str, value: Any) -> Any:
    """Return an option, with the content of the files that prompts are made of."""
    if name in ("template", "system_template"):
        return as_template(value)
    if name == "examples" and isinstance(value, str | Path):
        return converters.read_examples(value)
    return value


def _as_json(made: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the requests depend on: the options, with the content of files."""
    asked = {name: as_asked(value) for name, value in made.items()}
    if "schema" in made:
        asked["schema"] = response_format(made["schema"])["json_schema"]["schema"]
    plain: dict[str, Any] = json.loads(json.dumps(asked))
    return plain


def _table(
    source: Any, output: str | Path | None, folder: Path, asked: Mapping[str, Any]
) -> tuple[AnswerTable, pyarrow.Table | None]:
    """Return the table to write, and the rows of a DataFrame; None for a path.

    Raises:
        UsageError: there is no output for a path.
    """
    if isinstance(source, str | Path):
        if output is None:
            raise UsageError("no output was given", 'name it, such as output="answers.csv"')
        return AnswerTable.of(str(folder / expanded(output))), None
    rows = _arrow(source)
    name = f"ask-{_digest(rows, asked)}.parquet" if output is None else output
    return AnswerTable.of(str(folder / expanded(name))), rows


def _rows_file(table: AnswerTable) -> Path:
    """Return where the rows of a DataFrame are stored."""
    return table.folder.path / "source.parquet"


def _kind(path: Path) -> str:
    kind = kind_of(path)
    if kind is None:
        raise UsageError(
            f"the kind of {str(path)!r} is unknown", "end its name with .csv, .parquet, .jsonl, ..."
        )
    return kind


def _finished(view: RunView, table: AnswerTable) -> RunView:
    """Return the view of a finished run.

    Raises:
        StoppedError: it is not finished.
    """
    if view.state is RunState.NOT_MERGED:
        merge(read_plan(table.run), table.run, lambda _: None)
        return gather(table.run)
    if not view.finished:
        name = quote(str(table.path))
        raise StoppedError(
            ended_early(view, f"the run of {name}"),
            f"{view.remedy or f'see aiflux status {name}'}; call aiflux.ask again to resume it",
        )
    return view


def _arrow(frame: Any) -> pyarrow.Table:
    """Return a DataFrame as a table.

    Raises:
        ConfigError: pyarrow is not installed.
        InputError: it is no DataFrame, or has columns or values without a form in Arrow.
    """
    arrow = need("pyarrow", "parquet", _PURPOSE)
    if isinstance(frame, arrow.Table):
        return frame
    try:
        if type(frame).__module__.partition(".")[0] == "pandas":
            table = arrow.Table.from_pandas(frame, preserve_index=False)
        else:
            table = frame.to_arrow()  # polars
    except AttributeError:
        table = None
    except (arrow.ArrowException, ValueError, TypeError) as error:
        # Two columns of one name, values of several types, half a surrogate pair, sparse columns.
        raise _cannot_be_stored(error) from error
    if not isinstance(table, arrow.Table):  # such as that of a Series
        raise InputError(
            f"{type(frame).__name__} is neither a path nor a DataFrame",
            "use a DataFrame of pandas or polars, or a table of pyarrow",
        )
    return table


def _cannot_be_stored(error: Exception) -> InputError:
    return InputError(
        f"the DataFrame cannot be stored as a table: {error}",
        "give each column one name and values of one type, for example with astype(str)",
    )


class _Hash:
    """A file that only hashes what is written to it."""

    def __init__(self) -> None:
        self.hash = blake2b(digest_size=6)
        self.closed = False

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing."""


def _digest(rows: pyarrow.Table, asked: Mapping[str, Any]) -> str:
    """Return what names the question: a hash of the rows and of what is asked.

    Equal rows have equal hashes: chunks, spare bits and the libraries' versions do not count.
    """
    arrow = need("pyarrow", "parquet", _PURPOSE)
    sink = _Hash()
    sink.write(json.dumps(asked, sort_keys=True).encode())
    plain = rows.replace_schema_metadata(None)
    with arrow.ipc.new_stream(arrow.PythonFile(sink, "w"), plain.schema) as writer:
        for at in range(0, plain.num_rows, _HASHED_ROWS):
            block = plain.slice(at, _HASHED_ROWS)
            with suppress(arrow.ArrowNotImplementedError):  # then spare bits count, as of views
                block = block.take(arrow.array(range(block.num_rows)))
            writer.write_table(block.combine_chunks())
    return sink.hash.hexdigest()


@contextmanager
def _stored(rows: pyarrow.Table, table: AnswerTable) -> Iterator[None]:
    """Write the rows next to their requests, unless they are stored already.

    Earlier rows come back if these are refused in the block.
    """
    parquet = need("pyarrow.parquet", "parquet", _PURPOSE)
    table.folder.make()
    source = _rows_file(table)
    fresh, earlier = (source.with_name(f"{name}-source.parquet") for name in ("new", "earlier"))
    try:
        parquet.write_table(rows, fresh)
    except need("pyarrow", "parquet", _PURPOSE).ArrowNotImplementedError as error:
        fresh.unlink(missing_ok=True)
        raise _cannot_be_stored(error) from error
    earlier.unlink(missing_ok=True)
    if source.exists() and filecmp.cmp(fresh, source, shallow=False):
        fresh.unlink()
    else:
        if source.exists():
            source.rename(earlier)
        fresh.replace(source)
    try:
        yield
    except (UsageError, EngineError):
        if earlier.exists():
            earlier.replace(source)
        raise
    earlier.unlink(missing_ok=True)


def _with_answers(frame: Frame, table: AnswerTable, record: AskRecord, view: RunView) -> Frame:
    """Return the DataFrame with further columns; its own stay as they are."""
    whole = results_to_arrow(table.results, table.options(record, view.without_answer))
    kept = len(_arrow(frame).column_names)
    added = whole.select(whole.column_names[kept:])
    kind = type(frame).__module__.partition(".")[0]
    if kind == "pandas":
        answered = cast(Any, frame).copy()
        for name in added.column_names:
            answered[name] = added.column(name).to_pandas().array
        return cast(Frame, answered)
    if kind == "polars":
        more = sys.modules["polars"].from_arrow(added)
        return cast(Frame, cast(Any, frame).hstack(more))
    answered = frame
    for name in added.column_names:
        answered = cast(Any, answered).append_column(name, added.column(name))
    return cast(Frame, answered)
