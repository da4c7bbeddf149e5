"""Templates: a prompt's text with ``{name}`` where a value goes; ``{{`` and ``}}`` are braces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from aiflux.errors import InputError

_PARTS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")


class Template:
    """A parsed template.

    Args:
        text: the template.
        required: a template that names nothing is an error: it would ask the same every time.

    Attributes:
        names: what is filled in, in order of first appearance.

    Raises:
        InputError: a brace stands alone, a name is empty, or nothing is named.
    """

    def __init__(self, text: str, *, required: bool = True) -> None:
        self.text = text
        # Literal text and names by turns: texts[0] names[0] texts[1] names[1] ... texts[-1]
        self._texts: list[str] = [""]
        self._fields: list[str] = []
        for match in _PARTS.finditer(text):
            self._add(match)
        self.names = tuple(dict.fromkeys(self._fields))
        if required and not self.names:
            raise InputError(
                f"the template {_shown(text)} names nothing to fill in: every request would be the "
                "same",
                'name a column (or field) in braces, such as "Summarize: {text}"',
            )

    def _add(self, match: re.Match[str]) -> None:
        part = match[0]
        if match[1] is not None:
            if not match[1].strip():
                raise self._wrong(match.start(), "{} without a name", "write the name between them")
            self._fields.append(match[1])
            self._texts.append("")
        elif part in ("{", "}"):
            raise self._wrong(match.start(), f"a lone {part}", f"a literal {part} is {part * 2}")
        else:
            self._texts[-1] += part[0] if part in ("{{", "}}") else part

    def _wrong(self, position: int, seen: str, remedy: str) -> InputError:
        line = self.text.count("\n", 0, position) + 1
        column = position - self.text.rfind("\n", 0, position)
        return InputError(
            f"the template {_shown(self.text)} has {seen} at line {line}, column {column}", remedy
        )

    def check(self, columns: Iterable[str], where: str, kind: str = "column") -> None:
        """Raise InputError unless every name is one of ``columns`` of ``where``."""
        known = list(columns)
        missing = [name for name in self.names if name not in known]
        if missing:
            raise InputError(
                f"the template names {_listed(missing)}, but {where} has no such {kind}",
                f"its {kind}s are {_listed(known)}; a literal brace is {{{{ or }}}}",
            )

    @property
    def only(self) -> str | None:
        """The name, where the template is that and nothing else."""
        return self.names[0] if self._fields and self._texts == ["", ""] else None

    def render(self, values: Mapping[str, str]) -> str:
        """Return the text with every name replaced. Raises KeyError for one that is missing."""
        parts = [self._texts[0]]
        for name, text in zip(self._fields, self._texts[1:], strict=True):
            parts += (values[name], text)
        return "".join(parts)


def escape(text: str) -> str:
    """Return the template that stands for ``text`` itself."""
    return text.replace("{", "{{").replace("}", "}}")


def _listed(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names]
    more = f" and {len(shown) - 50} more" if len(shown) > 50 else ""
    return ", ".join(shown[:50]) + more


def check_columns(wanted: Iterable[str], columns: Iterable[str], option: str, where: str) -> None:
    """Raise InputError unless every column that an option names is there."""
    known = list(columns)
    missing = [name for name in wanted if name not in known]
    if missing:
        raise InputError(
            f"{option} names {_listed(missing)}, but {where} has no such column",
            f"its columns are {_listed(known)}",
        )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
