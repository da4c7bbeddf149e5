"""Prompt templates: text with names to fill in.

In a plain template, ``{name}`` is replaced by a value; ``{{`` and ``}}`` are literal braces. A file
whose name ends in ``.j2`` is a Jinja2 template (``jinja_template``).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from aiflux.converters.cells import BadRowError, as_text
from aiflux.errors import InputError
from aiflux.util.files import expanded
from aiflux.util.text import error_text, joined, nearest

JINJA = ".j2"
_PARTS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")


@runtime_checkable
class PromptTemplate(Protocol):
    """A template of either kind: ``Template`` or ``JinjaTemplate``; ``as_template`` reads one."""

    @property
    def text(self) -> str:
        """The template."""

    @property
    def names(self) -> tuple[str, ...]:
        """The values that it uses, in order of first appearance."""

    @property
    def whole(self) -> bool:
        """Whether it may use any value of a row, not only those in ``names``."""

    @property
    def only(self) -> str | None:
        """The name, if the template consists only of it."""

    @property
    def content(self) -> Any:
        """The template as JSON; equal for equal templates."""

    @property
    def literals(self) -> tuple[str, ...]:
        """What it has in literal braces."""

    @property
    def filled_form(self) -> str:
        """How a column ``name`` is filled in."""

    def check(self, columns: Iterable[str], where: str, kind: str = "column") -> None:
        """Raise InputError if it needs a value that is not one of ``columns``."""

    def render(self, values: Mapping[str, Any]) -> str:
        """Return the text with all names replaced.

        Raises:
            KeyError: a plain template needs a value that is missing.
            BadRowError: a value cannot be filled in, or a Jinja2 template fails.
        """


class Template:
    """A plain template; see ``PromptTemplate``.

    Raises:
        InputError: the template has a single brace or an empty name.
    """

    whole = False
    filled_form = "{name}"

    def __init__(self, text: str) -> None:
        self.text = text
        # Literals and names alternate: texts[0] names[0] texts[1] names[1] ... texts[-1]
        self._texts: list[str] = [""]
        self._fields: list[str] = []
        for match in _PARTS.finditer(text):
            self._add(match)
        self._rest = tuple(zip(self._fields, self._texts[1:], strict=True))
        self.names = tuple(dict.fromkeys(self._fields))
        whole = self._fields and self._texts == ["", ""]
        self.only = self.names[0] if whole else None

    @property
    def literals(self) -> tuple[str, ...]:
        """What the template has in literal braces: ``name`` of ``{{name}}``."""
        parts = [match[0] for match in _PARTS.finditer(self.text)]
        triples = zip(parts, parts[1:], parts[2:], strict=False)
        return tuple(text.strip() for left, text, right in triples if (left, right) == ("{{", "}}"))

    def _add(self, match: re.Match[str]) -> None:
        part = match[0]
        if match[1] is not None:
            if not match[1].strip():
                raise self._wrong(match.start(), "{} without a name", "write a name in the braces")
            self._fields.append(match[1])
            self._texts.append("")
        elif part in ("{", "}"):
            raise self._wrong(
                match.start(), f"a single {part}", f"write a literal {part} as {part * 2}"
            )
        else:
            self._texts[-1] += part[0] if part in ("{{", "}}") else part

    def _wrong(self, position: int, problem: str, remedy: str) -> InputError:
        line = self.text.count("\n", 0, position) + 1
        column = position - self.text.rfind("\n", 0, position)
        return InputError(
            f"the template {shown(self.text)} has {problem} at line {line}, column {column}",
            remedy,
        )

    def check(self, columns: Iterable[str], where: str, kind: str = "column") -> None:
        """Raise InputError unless every name is one of ``columns``."""
        check_names(self.names, columns, where, kind, "write literal braces as {{ and }}")

    @property
    def content(self) -> str:
        """The template."""
        return self.text

    def render(self, values: Mapping[str, Any]) -> str:
        """Return the text with all names replaced.

        Raises:
            KeyError: a value is missing.
            BadRowError: a value is binary.
        """
        parts = [self._texts[0]]
        for name, text in self._rest:
            value = values[name]
            parts += (value if isinstance(value, str) else value_text(values, name), text)
        return "".join(parts)


def value_text(values: Mapping[str, Any], name: str) -> str:
    """Return the text of a value.

    Raises:
        KeyError: it is missing.
        BadRowError: it is binary.
    """
    value = values[name]
    if isinstance(value, str):
        return value
    try:
        return as_text(value)
    except ValueError as error:
        raise BadRowError(f"column {name!r} {error}") from None


def escape(text: str) -> str:
    """Return a plain template that renders to ``text``."""
    return text.replace("{", "{{").replace("}", "}}")


def as_template(given: str | Path | PromptTemplate) -> PromptTemplate:
    """Return a template.

    Args:
        given: a plain template, or a file: a Jinja2 template if its name ends in ``.j2``.

    Raises:
        InputError: the file cannot be read, or the template is invalid.
    """
    if isinstance(given, str):
        return Template(given)
    if not isinstance(given, Path):
        return given
    try:
        text = expanded(given).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the template {str(given)!r} cannot be read: {error_text(error)}",
            "give a UTF-8 text file",
        ) from error
    if given.suffix.lower() != JINJA:
        return Template(text.removesuffix("\n"))
    # Imported for such files only: Jinja2 takes 50 ms.
    jinja = import_module("aiflux.converters.jinja_template")
    template: PromptTemplate = jinja.JinjaTemplate(text, given.name)
    return template


def refuse_without_names(template: PromptTemplate) -> None:
    """Raise InputError if a template gives all rows the same prompt."""
    if template.names or template.whole:
        return
    text = template.text
    file = f"; for a file: --template-file {text}" if text.endswith((JINJA, ".txt")) else ""
    raise InputError(
        f"the template {shown(text)} has nothing to fill in: all requests would be the same",
        'name a column or field in braces, for example "Summarize: {text}", or {{ text }} in a '
        f"Jinja2 template{file}",
    )


def literal_note(template: PromptTemplate, columns: Container[str]) -> str | None:
    """Return a warning if a template sends the name of a column in braces instead of its value."""
    named = [name for name in dict.fromkeys(template.literals) if name in columns]
    if not named:
        return None
    sent = joined([f"{{{name}}}" for name in named])
    form = template.filled_form.replace("name", named[0])
    return (
        f"the template {shown(template.text)} sends {sent} as text, not the value of that name: "
        f"to fill it in, write {form}"
    )


def check_names(
    names: Iterable[str],
    columns: Iterable[str],
    where: str,
    kind: str,
    hint: str,
    noun: str = "template",
) -> None:
    """Raise InputError unless every name that a template needs is one of ``columns``."""
    known = list(columns)
    missing = [name for name in names if name not in known]
    if missing:
        near = nearest(missing[0], known)
        meant = "" if near is None else f"did you mean {near!r}? "
        raise InputError(
            f"the {noun} names {_listed(missing)}, but {where} has no such {kind}",
            f"{meant}its {kind}s are {_listed(known)}; {hint}",
        )


def check_columns(wanted: Iterable[str], columns: Iterable[str], option: str, where: str) -> None:
    """Raise InputError unless every column that an option names exists."""
    known = list(columns)
    missing = [name for name in wanted if name not in known]
    if missing:
        raise InputError(
            f"{option} names {_listed(missing)}, but {where} has no such column",
            f"its columns are {_listed(known)}",
        )


def _listed(names: Iterable[str]) -> str:
    named = [repr(name) for name in names]
    more = f" and {len(named) - 50} more" if len(named) > 50 else ""
    return ", ".join(named[:50]) + more


def shown(text: str) -> str:
    """Return the beginning of a template for a message."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
