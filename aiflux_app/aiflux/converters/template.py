"""Prompt templates: ``{name}`` is replaced by a value; ``{{`` and ``}}`` are literal braces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from aiflux.errors import InputError

_PARTS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")


class Template:
    """A parsed template.

    Args:
        text: the template.
        required: reject a template without names, as all prompts would be equal.

    Attributes:
        names: the names to fill in, in order of first appearance.

    Raises:
        InputError: the template has a single brace, an empty name or no name.
    """

    def __init__(self, text: str, *, required: bool = True) -> None:
        self.text = text
        # Literals and names alternate: texts[0] names[0] texts[1] names[1] ... texts[-1]
        self._texts: list[str] = [""]
        self._fields: list[str] = []
        for match in _PARTS.finditer(text):
            self._add(match)
        self.names = tuple(dict.fromkeys(self._fields))
        if required and not self.names:
            raise InputError(
                f"the template {_shown(text)} has nothing to fill in: all requests would be the "
                "same",
                'name a column or field in braces, for example "Summarize: {text}"',
            )

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
            f"the template {_shown(self.text)} has {problem} at line {line}, column {column}",
            remedy,
        )

    def check(self, columns: Iterable[str], where: str, kind: str = "column") -> None:
        """Raise InputError unless every name is one of ``columns``."""
        known = list(columns)
        missing = [name for name in self.names if name not in known]
        if missing:
            raise InputError(
                f"the template names {_listed(missing)}, but {where} has no such {kind}",
                f"its {kind}s are {_listed(known)}; write literal braces as {{{{ and }}}}",
            )

    @property
    def only(self) -> str | None:
        """The name, if the template consists only of it."""
        return self.names[0] if self._fields and self._texts == ["", ""] else None

    def render(self, values: Mapping[str, str]) -> str:
        """Return the text with all names replaced. Raises KeyError if a value is missing."""
        parts = [self._texts[0]]
        for name, text in zip(self._fields, self._texts[1:], strict=True):
            parts += (values[name], text)
        return "".join(parts)


def escape(text: str) -> str:
    """Return a template that renders to ``text``."""
    return text.replace("{", "{{").replace("}", "}}")


def _listed(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names]
    more = f" and {len(shown) - 50} more" if len(shown) > 50 else ""
    return ", ".join(shown[:50]) + more


def check_columns(wanted: Iterable[str], columns: Iterable[str], option: str, where: str) -> None:
    """Raise InputError unless every column that an option names exists."""
    known = list(columns)
    missing = [name for name in wanted if name not in known]
    if missing:
        raise InputError(
            f"{option} names {_listed(missing)}, but {where} has no such column",
            f"its columns are {_listed(known)}",
        )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
