"""The prompt of a row: its text or its conversation, its system message, and the examples."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from aiflux.converters.cells import BadRowError, as_json, as_messages, as_text, cell
from aiflux.converters.request_form import RequestDraft, RequestForm
from aiflux.converters.template import (
    PromptTemplate,
    as_template,
    check_columns,
    literal_note,
    refuse_without_names,
    value_text,
)
from aiflux.converters.writer import EMPTY
from aiflux.core.batch.request import parse_json
from aiflux.errors import InputError, UsageError
from aiflux.util.text import joined


class Filled(NamedTuple):
    """What a prompt becomes for a row; see ``RequestDraft``."""

    content: Any
    messages: bool = False
    remark: str = ""


@dataclass(frozen=True)
class Prompt:
    """What is asked about each row.

    Attributes:
        turns: the role and the template of each turn. One turn is the text of a prompt.
        system: template of the system message; None if all rows have the same, or none.
        documents: columns with the texts that the prompt is compared with.
    """

    turns: tuple[tuple[str, PromptTemplate], ...]
    system: PromptTemplate | None = None
    documents: tuple[str, ...] = ()

    @property
    def templates(self) -> Iterator[PromptTemplate]:
        """The templates of all turns and of the system message."""
        yield from (template for _, template in self.turns)
        if self.system is not None:
            yield self.system

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all templates, and those of the documents."""
        named = (name for each in self.templates for name in each.names)
        return tuple(dict.fromkeys((*named, *self.documents)))

    @cached_property
    def whole(self) -> bool:
        """Whether a template may use any value of a row."""
        return any(each.whole for each in self.templates)

    @cached_property
    def _dotted(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if "." in name)

    def check(self, columns: Iterable[str], where: str, kind: str = "column") -> None:
        """Raise InputError if a template needs a value that is not one of ``columns``."""
        known = list(columns)
        for template in self.templates:
            template.check(known, where, kind)
        check_columns(self.documents, known, "--documents", where)

    def literal_notes(self, columns: Container[str]) -> tuple[str, ...]:
        """Return warnings of columns whose names are sent in braces instead of their values."""
        return literal_notes(self.templates, columns)

    def used(self, cells: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of the values of a row that the prompt may contain."""
        if self.whole:
            return tuple(dict.fromkeys((*cells, *self.names)))
        return self.names

    def with_fields(self, cells: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the cells, and the fields inside them that are named (``meta.source``)."""
        missing = [name for name in self._dotted if name not in cells] if self._dotted else None
        if not missing:
            return cells
        found = dict(cells)
        for name in missing:
            try:
                found[name] = cell(cells, name)
            except KeyError:
                column, _, field = name.partition(".")
                raise BadRowError(f"column {column!r} has no field {field!r}") from None
        return found

    def filled(self, cells: Mapping[str, Any]) -> Filled:
        """Return the text or the conversation of a row.

        Raises:
            KeyError: a value is missing.
            BadRowError: a value cannot be used, or a template fails.
        """
        role, template = self.turns[0]
        if len(self.turns) > 1 or role != "user":
            return self._conversation(cells)
        if template.only is not None:
            messages = as_messages(cells[template.only])
            if messages:
                return Filled(as_json(messages), messages=True)
        text = template.render(cells)
        return Filled(text, remark=EMPTY if _is_empty(template, cells, text) else "")

    def _conversation(self, cells: Mapping[str, Any]) -> Filled:
        texts = [(role, template, template.render(cells)) for role, template in self.turns]
        empty = [_is_empty(template, cells, text) for _, template, text in texts]
        end = len(texts)
        while end and empty[end - 1]:  # a conversation may have fewer turns than others
            end -= 1
        if any(empty[:end]):
            number = empty.index(True) + 1
            raise BadRowError(
                f"turn {number} ({texts[number - 1][0]}) is empty, but turn {end} is not"
            )
        messages = [{"role": role, "content": text} for role, _, text in texts[: end or 1]]
        return Filled(messages, messages=True, remark="" if end else EMPTY)

    def draft(
        self,
        number: int,
        custom_id: str,
        cells: Mapping[str, Any],
        metadata: dict[str, Any],
        part: int = 0,
    ) -> RequestDraft:
        """Return the request of a row; see ``filled``."""
        content, messages, remark = self.filled(cells)
        system = None if self.system is None else own_system(self.system, cells)
        documents = documents_of(cells, self.documents) if self.documents else ()
        return RequestDraft(
            number, custom_id, content, metadata, messages, part, remark, system, documents
        )


def literal_notes(templates: Iterable[PromptTemplate], columns: Container[str]) -> tuple[str, ...]:
    """Return what ``literal_note`` warns of, for several templates."""
    notes = (literal_note(template, columns) for template in templates)
    return tuple(note for note in notes if note is not None)


def documents_of(cells: Mapping[str, Any], columns: Sequence[str]) -> list[Any]:
    """Return the documents of a row: the items of lists, in place, and other values as text.

    A text that is the only one, and is JSON, may be a list too: CSV has no other.

    Raises:
        KeyError: a column is missing.
        BadRowError: all documents are empty.
    """
    found: list[Any] = []
    for column in columns:
        value = as_json(cells[column])
        if isinstance(value, str) and len(columns) == 1 and value.lstrip().startswith("["):
            value = _json_list(value)
        found += value if isinstance(value, list) else [value]
    documents = [each if isinstance(each, dict) else as_text(each) for each in found]
    if columns and not any(documents):
        raise BadRowError(f"no documents in {joined([repr(name) for name in columns])}")
    return documents


def _json_list(text: str) -> Any:
    try:
        value = parse_json(text)
    except ValueError:
        return text
    return value if isinstance(value, list) else text


def own_system(template: PromptTemplate, cells: Mapping[str, Any]) -> str | None:
    """Return the system message of a row; None if it would be blank."""
    text = template.render(cells)
    return text if text.strip() else None


def _is_empty(template: PromptTemplate, cells: Mapping[str, Any], text: str) -> bool:
    """Return whether nothing was filled in."""
    if template.whole or not template.names:
        return not text.strip()
    for name in template.names:
        value = cells.get(name)
        if value is not None and not (isinstance(value, str | bytes) and not value.strip()):
            return False
    return True


def prompt_of(
    template: str | Path | PromptTemplate | None, form: RequestForm, *, required: bool = True
) -> Prompt:
    """Return the prompt of a conversion.

    Args:
        required: reject a template without names, unless each row has documents.

    Raises:
        UsageError: there is no template, or there are turns, too.
        InputError: the template is invalid.
    """
    if form.turns and template is not None:
        raise UsageError("--turn and a template cannot be combined", "use one of them")
    if form.turns:
        prompt = Prompt(form.turns, form.system_template, form.documents)
        if required and not prompt.names:
            raise UsageError("the turns have nothing to fill in", "--turn 'user={question}'")
        return prompt
    if template is None:
        raise UsageError("no template was given", '--template "Summarize: {column}"')
    parsed = as_template(template)
    if required and not form.documents:
        refuse_without_names(parsed)
    return Prompt((("user", parsed),), form.system_template, form.documents)


def prompt_and_form(
    template: str | Path | PromptTemplate | None, form: RequestForm, *, required: bool = True
) -> tuple[Prompt, RequestForm]:
    """Return the prompt, and the form with the turns of its examples; see ``prompt_of``."""
    prompt = prompt_of(template, form, required=required)
    return prompt, with_shots(form, lambda row: prompt.filled(prompt.with_fields(row)))


def with_shots(form: RequestForm, fill: Callable[[Mapping[str, Any]], Filled]) -> RequestForm:
    """Return a form with the turns of its examples.

    Args:
        fill: makes the prompt of an example, as of any row.

    Raises:
        InputError: an example cannot be used.
    """
    turns: list[dict[str, Any]] = []
    for number, row in enumerate(form.examples, start=1):
        try:
            turns += _shot(row, fill, form.example_answer)
        except KeyError as error:
            raise _unusable(number, f"it has no column {error}", row) from None
        except BadRowError as error:
            raise _unusable(number, str(error), row) from None
    return replace(form, shots=tuple(turns))


def _unusable(number: int, reason: str, row: Mapping[str, Any]) -> InputError:
    columns = ", ".join(map(repr, row))
    return InputError(
        f"example {number} cannot be used: {reason}",
        f"each example needs the columns of the template, and its answer in --example-answer; it "
        f"has {columns}",
    )


def _shot(
    row: Mapping[str, Any], fill: Callable[[Mapping[str, Any]], Filled], answer: str
) -> list[dict[str, Any]]:
    """Return the turns of an example."""
    made = fill(row)
    if made.remark:
        raise BadRowError("its prompt is empty")
    turns = made.content if made.messages else [{"role": "user", "content": made.content}]
    if turns[0].get("role") == "system":
        raise BadRowError("its conversation has a system message: use --system instead")
    if turns[-1].get("role") == "assistant":
        return list(turns)
    text = value_text(row, answer)
    if not text.strip():
        raise BadRowError(f"its answer, in column {answer!r}, is empty")
    return [*turns, {"role": "assistant", "content": text}]
