"""Convert JSON and JSON Lines: each object, text or conversation becomes a request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiflux.converters.json_stream import JsonFile, LocatedValue
from aiflux.converters.request_form import RequestDraft, make_form
from aiflux.converters.table import as_json, as_messages, as_text, names
from aiflux.converters.template import Template
from aiflux.converters.writer import EMPTY, BadRowError, Conversion, Progress, Skipped, Summary
from aiflux.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from aiflux.converters.request_form import RequestOptions

_MISSING = object()


def json_to_jsonl(
    input_path: Path | str,
    output_path: Path | str | None,
    *,
    template: str | None = None,
    field: str | None = None,
    id_field: str | None = None,
    keep: Sequence[str] = (),
    skip_bad: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
    **request: Unpack[RequestOptions],
) -> Summary:
    """Convert each entry of a JSON array, or each line of a JSON Lines file, to a request.

    An entry is one of: an object, with the prompt from ``template`` (``{field}``,
    ``{outer.inner}``, ``{list.0}``) or ``field``; an object with ``messages``, or a list of
    messages, sent unchanged; a string, used as the prompt (or as ``{text}`` in a template).

    Args:
        id_field: the field with the custom_ids; by default they are ``row-1``, ``row-2``, ...
        keep: fields to copy to the request's metadata (``*`` for all).
        progress: called with the number of bytes read and the total.

    The other arguments are the same as for ``csv_to_jsonl``.

    Raises:
        UsageError: both ``template`` and ``field`` are given.
        InputError: the file or some entries are invalid; lists their positions.
        StorageError: the output cannot be written.
    """
    if template is not None and field is not None:
        raise UsageError("--template and --field cannot be combined", "use one of them")
    form = make_form(**request)
    source = JsonFile.of(Path(input_path))
    maker = _RecordRequests(
        Template(template) if template is not None else None,
        field,
        id_field,
        names(keep),
        source.unit,
    )
    job = Conversion(
        source.path,
        None if output_path is None else Path(output_path),
        form,
        unit="entry" if source.unit == "entry" else "line",
        place=source.unit,
        skip_bad=skip_bad,
        limit=limit,
        numbered=id_field is None,
    )
    return job.run(maker.drafts(source.values(progress)))


@dataclass(frozen=True)
class _RecordRequests:
    """Creates the request for each entry."""

    template: Template | None
    field: str | None
    id_field: str | None
    keep: tuple[str, ...]
    place: str

    def drafts(self, values: Iterator[LocatedValue | Skipped]) -> Iterator[RequestDraft | Skipped]:
        for count, item in enumerate(values, start=1):
            if isinstance(item, Skipped):
                yield item
                continue
            try:
                yield self._draft(item, count)
            except BadRowError as error:
                yield Skipped(item.number, f"{self.place} {item.number}", str(error))

    def _draft(self, item: LocatedValue, count: int) -> RequestDraft:
        value = item.value
        name = f"row-{count}" if self.id_field is None else _text(value, self.id_field)
        metadata = self._metadata(value)
        content = self._content(value)
        if isinstance(content, list):
            return RequestDraft(item.number, name, content, metadata, messages=True)
        remark = EMPTY if self._blank(value, content) else ""
        return RequestDraft(item.number, name, content, metadata, remark=remark)

    def _content(self, value: Any) -> Any:
        if self.template is not None:
            fields = {"text": value} if isinstance(value, str) else value
            return self.template.render({name: _text(fields, name) for name in self.template.names})
        if self.field is not None:
            found = _find(value, self.field)
            return as_messages(found) or _text(value, self.field)
        if isinstance(value, str):
            return value
        if isinstance(value, dict) and {"custom_id", "url", "body"} <= value.keys():
            raise BadRowError("already a request: pass the file to `aiflux run` unchanged")
        messages = value
        if isinstance(value, dict):
            messages = value.get("messages", value.get("conversations"))
        if isinstance(messages, list):
            found = as_messages(messages)
            if found is None:
                raise BadRowError(
                    'not a list of messages: expected {"role": ..., "content": ...}, or '
                    'ShareGPT form {"from": "human" or "gpt", "value": ...}'
                )
            return found
        if isinstance(value, dict):
            raise BadRowError(f"no prompt: set --field or --template ({_names(value)})")
        raise BadRowError(f"{_kind(value)} instead of an object, a string or a list of messages")

    def _blank(self, value: Any, content: str) -> bool:
        """Return whether all values filled into the template were empty."""
        if self.template is None:
            return not content.strip()
        fields = {"text": value} if isinstance(value, str) else value
        return not any(_text(fields, name).strip() for name in self.template.names)

    def _metadata(self, value: Any) -> dict[str, Any]:
        if not self.keep:
            return {}
        if not isinstance(value, dict):
            return {"columns": {"text": as_json(value)}} if "*" in self.keep else {}
        wanted = list(value) if "*" in self.keep else self.keep
        return {"columns": {name: as_json(_found(value, name)) for name in wanted}}


def _find(value: Any, name: str) -> Any:
    """Return a field by its full name, else by the path that its dots separate."""
    if isinstance(value, dict) and name in value:
        return value[name]
    for step in name.split("."):
        if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        elif isinstance(value, dict) and step in value:
            value = value[step]
        else:
            return _MISSING
    return value


def _found(value: Any, name: str) -> Any:
    found = _find(value, name)
    if found is _MISSING:
        raise BadRowError(f"no field {name!r} ({_names(value)}{_inside(value, name)})")
    return found


def _text(value: Any, name: str) -> str:
    return as_text(_found(value, name))


def _names(value: Any) -> str:
    if not isinstance(value, dict):
        return f"it is {_kind(value)}"
    shown = ", ".join(repr(name) for name in list(value)[:20])
    return f"its fields are {shown}" if value else "it has no fields"


def _inside(value: Any, name: str) -> str:
    """Return a hint if the entries are a list inside the object."""
    for key, items in value.items() if isinstance(value, dict) else ():
        if isinstance(items, list) and items and _find(items[0], name) is not _MISSING:
            return f"; the entries of {key!r} have it: extract them with jq '.{key}'"
    return ""


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return kinds.get(type(value), "null" if value is None else "a number")
