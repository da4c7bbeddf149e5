"""Read the results of a run: sequentially, or by custom_id."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any

from aiflux.converters.table import COLUMN_TYPES, typed
from aiflux.converters.writer import SeenIds
from aiflux.core.batch.input_file import quick_change_of
from aiflux.core.batch.request import custom_id_of, parse_json, request_key
from aiflux.core.batch.results_file import (
    Result,
    entry_lines,
    output_files,
    parse_entry,
    read_entries,
)
from aiflux.core.runs.directory import RunDirectory, own_command, user_output
from aiflux.core.runs.journal import ResultIndex
from aiflux.core.runs.output import iterate_results
from aiflux.core.runs.plan import Plan, read_plan
from aiflux.core.runs.status_file import read_run_status, refuse_changed_output
from aiflux.errors import InputError, RunConflictError, StorageError
from aiflux.util.lines import BOM, read_lines

_FENCE = re.compile(r"```[a-zA-Z]*\s*\n(.*?)```", re.DOTALL)
_THOUGHT = "</think>"


def entries(output: Path) -> Iterator[Result]:
    """Yield the entries of an output, with their requests if these can be found.

    A ``.jsonl`` output contains no requests; they are read from its run directory if that exists.
    """
    plan = _plan_with_requests(output)
    return read_entries(output) if plan is None else run_entries(plan)


def _plan_with_requests(output: Path) -> Plan | None:
    """Return the plan of a ``.jsonl`` output whose requests can still be read."""
    run = RunDirectory.of_output(output)
    if output.suffix == ".jsonl" and os.path.isfile(run.plan):
        try:
            plan = read_plan(run)
            if quick_change_of(plan.input) is None:
                return plan
        except (RunConflictError, InputError, StorageError, OSError):
            pass  # another version's plan, or no input: the output alone is enough
    return None


def run_entries(
    plan: Plan, run: RunDirectory | None = None, *, partial: bool = False
) -> Iterator[Result]:
    """Yield the results in a run's journals, in input order.

    Args:
        run: default: that of the plan's output.
        partial: leave out requests that have no result yet.

    Raises:
        StoppedError: a request has no result yet, or the input is no longer the planned one.
        StorageError: a journal cannot be read.
    """
    run = run or RunDirectory.of_output(plan.output)
    with closing(iterate_results(plan, run, partial=partial)) as found:
        for raw, result in found:
            request = parse_json(raw.decode("utf-8"))
            yield Result(
                request["custom_id"],
                request,
                None if result.failed else json.loads(result.body),
                json.loads(result.error),
                {**(request.get("metadata") or {}), **json.loads(result.metadata)},
            )


class Answers:
    """The entries of an output, for a caller that asks for them in any order.

    While it asks in the order of the output, each entry is read when it is asked for. From the
    first other request on, there is an index, with 42 to 60 bytes of memory per entry, and 24 more
    for a ``.jsonl`` output, as its requests are in the run's input.

    Args:
        in_order: there is no entry for what is asked for out of order, so no index is needed.
    """

    def __init__(self, output: Path, *, in_order: bool) -> None:
        self._output = output
        self._in_order = in_order
        self._entries = entries(output)
        self._next = next(self._entries, None)
        self._taken = 0
        self._index: _AnswersById | None = None
        self._seen = SeenIds()

    @property
    def count(self) -> int:
        """Number of entries; reads the rest."""
        if self._index is not None:
            return self._index.count
        left = 0 if self._next is None else 1 + sum(1 for _ in self._entries)
        return self._taken + left

    def get(self, custom_id: str) -> Result | None:
        """Return the entry of a request, or None."""
        if self._index is None:
            found = self._next
            if found is not None and found.custom_id == custom_id:
                if self._in_order:
                    self._advance()
                return found
            if self._in_order:
                return None
            self._index = _AnswersById(self._output)
            for entry in islice(entries(self._output), self._taken):
                self._seen.first_use(entry.custom_id, 1)
        return self._index.get(custom_id)

    def take(self, custom_id: str) -> bool:
        """Note that the caller uses the entry that it got; return whether it is the first time."""
        if self._in_order:
            return True
        if self._index is not None:
            return self._seen.first_use(custom_id, 1) is None
        self._advance()
        return True

    def _advance(self) -> None:
        self._next = next(self._entries, None)
        self._taken += 1

    def close(self) -> None:
        """Close the files; the entries in order close theirs themselves."""
        if self._index is not None:
            self._index.close()


class _AnswersById:
    """Random access to the entries of an output, by an index of 24 bytes per entry."""

    def __init__(self, output: Path) -> None:
        self._paths = output_files(output)
        self._index = ResultIndex()
        for at, path in enumerate(self._paths):
            for offset, size, text in entry_lines(path):
                key = _key(parse_entry(text, path).custom_id)
                self._index.add(key, offset * len(self._paths) + at, size, failed=at > 0)
        self._index.seal()
        self._requests = ResultIndex()
        plan = _plan_with_requests(output)
        files = list(self._paths)
        if plan is not None:
            files.append(plan.input_path)
            for _, offset, raw in read_lines(plan.input_path):
                self._requests.add(_key(custom_id_of(raw) or ""), offset, len(raw), failed=False)
        self._requests.seal()
        self._files = [open(path, "rb") for path in files]  # noqa: SIM115 - see close

    @property
    def count(self) -> int:
        """Number of entries."""
        return self._index.done

    def get(self, custom_id: str) -> Result | None:
        """Return the entry of a request, or None."""
        found = self._index.find(_key(custom_id))
        if found is None:
            return None
        offset, at = divmod(found[0], len(self._paths))
        entry = parse_entry(self._read(at, offset), self._paths[at])
        request = self._requests.find(_key(custom_id))
        if entry.input is not None or request is None:
            return entry
        line = self._read(-1, request[0]).removeprefix(BOM)
        return replace(entry, input=parse_json(line.decode("utf-8")))

    def _read(self, file: int, offset: int) -> bytes:
        self._files[file].seek(offset)
        return self._files[file].readline()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _key(custom_id: str) -> bytes:
    return request_key(custom_id.encode("utf-8", "surrogatepass"))


def requests_metadata(entry: Result) -> dict[str, Any]:
    """Return the metadata of a request itself; {} if the request is unknown."""
    own = (entry.input or {}).get("metadata")
    return own if isinstance(own, dict) else {}


def kept_columns(entry: Result) -> dict[str, Any]:
    """Return the source columns that a converter stored in the request's metadata."""
    metadata: Mapping[str, Any] = entry.metadata
    if metadata.get("columns") is None:
        metadata = requests_metadata(entry)
    columns = metadata.get("columns")
    own = typed(columns, metadata.get(COLUMN_TYPES)) if isinstance(columns, dict) else {}
    named = ("source_file", "chunk", "chunks")
    return own or {name: entry.metadata[name] for name in named if name in entry.metadata}


def json_fields(answer: str) -> dict[str, Any] | None:
    """Return the JSON object that an answer is or contains, or None.

    Text before ``</think>`` is ignored. A Markdown fence and surrounding words are dropped if
    exactly one object remains.
    """
    text = answer.rpartition(_THOUGHT)[2]
    try:
        whole = parse_json(text)
    except ValueError:
        return _object_within(text)
    return whole if isinstance(whole, dict) else None


def _object_within(text: str) -> dict[str, Any] | None:
    fenced = [found for found in map(_object, _FENCE.findall(text)) if found is not None]
    if fenced:
        return fenced[0] if len(fenced) == 1 else None
    return _object(text[text.find("{") : text.rfind("}") + 1])


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = parse_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def prompt_text(body: dict[str, Any]) -> str:
    """Return a request's prompt: of a conversation, the last message of the user.

    Messages before it are often the same for all requests, such as examples.
    """
    return "\n".join(_contents(body, ("user",))[-1:])


def request_text(body: dict[str, Any]) -> str:
    """Return the texts of all messages of a request, or of its query and documents."""
    return "\n".join(_contents(body, ("system", "user", "assistant")))


def _contents(body: dict[str, Any], roles: tuple[str, ...]) -> list[str]:
    """Return the texts of messages; of messages with parts, also the types of other parts."""
    messages = [*_messages(body)]
    if not messages:
        return [str(body.get("prompt", body.get("input", "")))]
    return [_words(message.get("content")) for message in messages if message.get("role") in roles]


_QUERIES = ("query", "queries", "text_1", "data_1")
_DOCUMENTS = ("documents", "items", "text_2", "data_2")


def _messages(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the messages of a conversation; documents and then their query as if they were some."""
    if "instructions" in body:
        yield {"role": "system", "content": body["instructions"]}
    for name in ("messages", "input"):
        listed = body.get(name)
        items = listed if isinstance(listed, list) else ()
        yield from (item for item in items if isinstance(item, dict))
    if "instructions" in body and isinstance(body.get("input"), str):
        yield {"role": "user", "content": body["input"]}
    for role, names in (("system", _DOCUMENTS), ("user", _QUERIES)):
        for name in names:
            texts = body.get(name, ())
            for each in texts if isinstance(texts, list | tuple) else (texts,):
                yield {"role": role, "content": each}


def _words(content: Any) -> str:
    if not isinstance(content, list):
        return str(content)
    parts = (part for part in content if isinstance(part, dict))
    return " ".join(str(part.get("text") or f"[{part.get('type', 'part')}]") for part in parts)


def refuse_unfit(output: Path) -> None:
    """Reject an output that does not exist (yet), or that was modified after its run.

    Raises:
        InputError: the output does not exist.
        OutputExistsError: the output was modified.
    """
    if not output.is_file():
        named = user_output(output)
        name = quote(str(named))
        raise InputError(
            f"the output {named} does not exist"
            if named == output
            else f"the run of {named} is not finished",
            f"aiflux status {name} shows whether to wait for its run or to continue it with the "
            f"same `{own_command(output)}` command; write the results so far: "
            f"aiflux merge --partial {name}",
        )
    run = RunDirectory.of_output(output)
    with suppress(RunConflictError, StorageError):  # an unreadable run has no status
        status = read_run_status(run, read_plan(run)) if os.path.isfile(run.plan) else None
        if status is not None and status.completed:
            refuse_changed_output(output, status)
