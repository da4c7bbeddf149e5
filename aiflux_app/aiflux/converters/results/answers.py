"""Read the results of a run: sequentially, or by custom_id."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from aiflux.core.batch.input_file import change_of, looks_unchanged
from aiflux.core.batch.request import custom_id_of, parse_json, request_key
from aiflux.core.batch.results_file import (
    ResultEntry,
    entry_lines,
    output_files,
    parse_entry,
    read_entries,
)
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.journal import ResultIndex
from aiflux.core.runs.output import iterate_results
from aiflux.core.runs.plan import Plan, read_plan
from aiflux.core.runs.status_file import read_run_status, refuse_changed_output
from aiflux.errors import InputError, RunConflictError, StorageError
from aiflux.util.lines import BOM, read_lines

_FENCE = re.compile(r"```[a-zA-Z]*\s*\n(.*?)```", re.DOTALL)
_THOUGHT = "</think>"


def entries(output: Path) -> Iterator[ResultEntry]:
    """Yield the entries of an output, with their requests if these can be found.

    A ``.jsonl`` output contains no requests; they are read from its run directory if that exists.
    """
    plan = _plan_with_requests(output)
    return read_entries(output) if plan is None else _entries_of_run(plan)


def _plan_with_requests(output: Path) -> Plan | None:
    """Return the plan of a ``.jsonl`` output whose requests can still be read."""
    run = RunDirectory.of_output(output)
    if output.suffix == ".jsonl" and os.path.isfile(run.plan):
        try:
            plan = read_plan(run)
            if looks_unchanged(plan.input) or change_of(plan.input) is None:
                return plan
        except (RunConflictError, InputError, StorageError, OSError):
            pass  # another version's plan, or no input: the output alone is enough
    return None


def _entries_of_run(plan: Plan) -> Iterator[ResultEntry]:
    for raw, result in iterate_results(plan, RunDirectory.of_output(plan.output)):
        request = parse_json(raw.decode("utf-8"))
        yield ResultEntry(
            request["custom_id"],
            request,
            None if result.failed else json.loads(result.body),
            json.loads(result.error),
            {**(request.get("metadata") or {}), **json.loads(result.metadata)},
        )


class AnswersById:
    """Random access to the entries of an output, with 24 bytes of memory per entry.

    A ``.jsonl`` output needs twice as much, as its requests are in the run's input.
    """

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

    def get(self, custom_id: str) -> ResultEntry | None:
        """Return the entry of a request, or None."""
        found = self._index.find(_key(custom_id))
        if found is None:
            return None
        offset, at = divmod(found[0], len(self._paths))
        entry = parse_entry(self._read(at, offset), self._paths[at])
        request = self._requests.find(_key(custom_id))
        if entry.request is not None or request is None:
            return entry
        line = self._read(-1, request[0]).removeprefix(BOM)
        return replace(entry, request=parse_json(line.decode("utf-8")))

    def _read(self, file: int, offset: int) -> bytes:
        self._files[file].seek(offset)
        return self._files[file].readline()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _key(custom_id: str) -> bytes:
    return request_key(custom_id.encode("utf-8", "surrogatepass"))


def requests_metadata(entry: ResultEntry) -> dict[str, Any]:
    """Return the metadata of a request itself; {} if the request is unknown."""
    own = (entry.request or {}).get("metadata")
    return own if isinstance(own, dict) else {}


def kept_columns(entry: ResultEntry) -> dict[str, Any]:
    """Return the source columns that a converter stored in the request's metadata."""
    columns = entry.metadata.get("columns")
    if columns is None:
        columns = requests_metadata(entry).get("columns")
    own = columns if isinstance(columns, dict) else {}
    named = ("source_file", "chunk", "chunks")
    return own or {name: entry.metadata[name] for name in named if name in entry.metadata}


def json_fields(entry: ResultEntry) -> dict[str, Any] | None:
    """Return the JSON object that an answer is or contains, or None.

    Text before ``</think>`` is ignored. A Markdown fence and surrounding words are dropped if
    exactly one object remains.
    """
    text = entry.answer.rpartition(_THOUGHT)[2]
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


def choices(entry: ResultEntry) -> list[dict[str, Any]]:
    """Return the choices of an answer; empty for embeddings and failures."""
    found = entry.body.get("choices") if isinstance(entry.body, dict) else None
    listed = found if isinstance(found, list) else []
    return [choice for choice in listed if isinstance(choice, dict)]


def prompt_text(body: dict[str, Any], roles: tuple[str, ...] = ("user",)) -> str:
    """Return a request's prompt; for messages with parts, their texts and the types of others."""
    messages = body.get("messages")
    if isinstance(messages, list):
        asked = (message for message in messages if isinstance(message, dict))
        contents = (message.get("content") for message in asked if message.get("role") in roles)
        return "\n".join(map(_words, contents))
    return str(body.get("prompt", body.get("input", "")))


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
        raise InputError(
            f"the output {output} does not exist",
            f"wait for its run (aiflux status {quote(str(output))}), or write the results so far "
            "with `aiflux merge --partial`",
        )
    run = RunDirectory.of_output(output)
    with suppress(RunConflictError, StorageError):  # an unreadable run has no status
        status = read_run_status(run, read_plan(run)) if os.path.isfile(run.plan) else None
        if status is not None and status.completed:
            refuse_changed_output(output, status)
