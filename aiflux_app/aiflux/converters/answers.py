"""Answers of a run: one after the other, or each by its custom_id."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiflux.core.journal import ResultIndex
from aiflux.core.outputs import Entry, entry_lines, output_files, parse_entry, read_entries
from aiflux.core.plan import read_plan
from aiflux.core.request import parse_json, request_key
from aiflux.core.results import iterate_results
from aiflux.core.rundir import RunDirectory
from aiflux.errors import InputError, RunConflictError

_FENCE = re.compile(r"\s*```[a-zA-Z]*\s*\n(.*?)\n?\s*```\s*", re.DOTALL)


def entries(output: Path) -> Iterator[Entry]:
    """Yield the entries of an output, with their requests where these can be found.

    A ``.jsonl`` output holds no requests: they are read from its run, where that is still there.
    """
    run = RunDirectory.of_output(output)
    if output.suffix == ".jsonl" and run.plan.is_file():
        try:
            plan = read_plan(run)
            path = plan.input_path
            if path.is_file() and path.stat().st_size == plan.input["size"]:
                return _entries_of_run(run)
        except RunConflictError:
            pass  # another version's plan: the output alone tells less, but enough
    return read_entries(output)


def _entries_of_run(run: RunDirectory) -> Iterator[Entry]:
    for raw, result in iterate_results(read_plan(run), run):
        request = parse_json(raw.decode("utf-8"))
        yield Entry(
            request["custom_id"],
            request,
            None if result.failed else json.loads(result.body),
            json.loads(result.error),
            {**(request.get("metadata") or {}), **json.loads(result.metadata)},
        )


class AnswersById:
    """Random access to an output's entries, with 24 bytes of memory for each."""

    def __init__(self, output: Path) -> None:
        self._paths = output_files(output)
        self._index = ResultIndex()
        for at, path in enumerate(self._paths):
            for offset, size, text in entry_lines(path):
                key = _key(parse_entry(text, path).custom_id)
                self._index.add(key, offset * len(self._paths) + at, size, failed=at > 0)
        self._index.seal()
        self._files = [open(path, "rb") for path in self._paths]  # noqa: SIM115 - see close

    @property
    def count(self) -> int:
        """Number of entries."""
        return self._index.done

    def get(self, custom_id: str) -> Entry | None:
        """Return the entry of a request, or None."""
        found = self._index.find(_key(custom_id))
        if found is None:
            return None
        offset, at = divmod(found[0], len(self._paths))
        self._files[at].seek(offset)
        return parse_entry(self._files[at].read(found[1]), self._paths[at])

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _key(custom_id: str) -> bytes:
    return request_key(custom_id.encode("utf-8", "surrogatepass"))


def kept_columns(entry: Entry) -> dict[str, Any]:
    """Return the source's columns that a converter put into the request's metadata."""
    columns = entry.metadata.get("columns")
    if columns is None and entry.request is not None:
        columns = (entry.request.get("metadata") or {}).get("columns")
    own = columns if isinstance(columns, dict) else {}
    named = ("source_file", "chunk", "chunks")
    return own or {name: entry.metadata[name] for name in named if name in entry.metadata}


def json_fields(entry: Entry) -> dict[str, Any] | None:
    """Return the answer as a JSON object (a Markdown fence around it is dropped), or None."""
    text = entry.answer
    fenced = _FENCE.fullmatch(text)
    try:
        value = parse_json(fenced[1] if fenced else text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def refuse_missing(output: Path) -> None:
    """Raise InputError where an output is not there (yet)."""
    if not output.is_file():
        raise InputError(
            f"the output {output} is not there",
            f"wait for its run (aiflux status {str(output)!r}); `aiflux merge --partial` writes "
            "what is done so far",
        )
