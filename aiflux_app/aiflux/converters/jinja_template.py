"""Jinja2 templates and expressions over the values of a row, in a sandbox.

A template has a column's value under its name, and the whole row as ``row``: the column
``First name`` is ``row["First name"]``. Values keep their types. What is printed becomes text as
in a plain template: texts unchanged, null as "", the rest as JSON. A value is never read as a
template.

The sandbox has no access to files, other templates and Python's internals, and nothing in it can
change a value. Its limits stop a mistake such as a range of 10**9 numbers; a template that wants to
waste memory still can, for example with filters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any, NoReturn

from jinja2 import (
    StrictUndefined,
    TemplateSyntaxError,
    Undefined,
    UndefinedError,
    nodes,
)
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from aiflux.converters.cells import BadRowError, as_json, as_text
from aiflux.converters.template import check_names, shown
from aiflux.errors import InputError
from aiflux.util.text import nearest

ROW = "row"
_FUNCTIONS = DEFAULT_NAMESPACE.keys() - {"lipsum"}
_WORDS = "and or not in is if else true false none True False None"
RESERVED = frozenset((ROW, "self", *_WORDS.split(), *_FUNCTIONS))
"""Names with a meaning of their own in templates and expressions, such as ``not`` and ``range``."""
MAX_STEPS = 100_000
MAX_LENGTH = 64 << 20
_MAX_BITS = 4096
_COMPILED = "<template>"  # Jinja2's file name for a template from a text
_SINGLE = re.compile(r"(?<!\{)\{([^{}]+)\}(?!\})")
_MAY_BE_MISSING = ("defined", "undefined", "default", "d")  # tests and filters


class _Sandbox(ImmutableSandboxedEnvironment):
    """Limits one rendering; see the module."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(
            # A line with only a block leaves no blank line, as in the chat templates of models.
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=StrictUndefined,
            finalize=_printed,
        )
        self.steps = 0
        del self.globals["lipsum"]
        self.globals["range"] = self._range
        self.filters["tojson"] = _to_json

    def _range(self, *arguments: int) -> range:
        numbers = range(*arguments)
        self.steps += len(numbers)
        if self.steps > MAX_STEPS:
            raise OverflowError(f"its ranges have more than {MAX_STEPS} numbers in all")
        return numbers

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiply, or raise to a power, unless the result is huge."""
        huge = _huge_power(left, right) if operator == "**" else _huge_text(left, right)
        if huge:
            raise OverflowError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _huge_power(base: Any, exponent: Any) -> bool:
    whole = isinstance(base, int) and isinstance(exponent, int)
    return whole and base.bit_length() * exponent > _MAX_BITS


def _huge_text(one: Any, other: Any) -> bool:
    return any(
        isinstance(text, str | list | tuple)
        and isinstance(times, int)
        and len(text) * times > MAX_LENGTH
        for text, times in ((one, other), (other, one))
    )


def _printed(value: Any) -> str:
    if callable(value) and not isinstance(value, Undefined):
        name = getattr(value, "__name__", "it")
        raise TypeError(
            f"{name} is a function: call it with (), or name a field of that name as [{name!r}]"
        )
    # Filters such as `map` make iterators.
    return as_text(list(value) if isinstance(value, Iterator) else value)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON. Jinja2's own filter writes ``'`` and ``<`` as escapes, for HTML."""
    plain = as_json(list(value) if isinstance(value, Iterator) else value)
    return json.dumps(plain, ensure_ascii=False, indent=indent)


_NO_FUNCTIONS = _Sandbox()
_NO_FUNCTIONS.globals.clear()


class _Names:
    """The values that a template uses.

    Attributes:
        used: names of columns, in order of first appearance.
        needed: those of them that must exist.
        row: it uses ``row``.
        whole: it uses ``row`` in another way than ``row["name"]``.
    """

    def __init__(self, tree: nodes.Template) -> None:
        # Without functions, so that `range` is free, too: a column can have that name.
        tree.set_environment(_NO_FUNCTIONS)
        free = find_undeclared_variables(tree) - _only_called(tree)
        found: dict[str, None] = {}
        subscripts = 0
        for node in tree.find_all((nodes.Name, nodes.Getitem, nodes.Getattr)):
            name = _column(node, free)
            subscripts += name is not None and not isinstance(node, nodes.Name)
            if name is not None:
                found[name] = None
        missing = {
            _column(node.node, free)
            for node in tree.find_all((nodes.Filter, nodes.Test))
            if node.name in _MAY_BE_MISSING and node.node is not None
        }
        self.used = tuple(found)
        self.needed = tuple(name for name in found if name not in missing)
        self.row = ROW in free
        rows = sum(node.name == ROW for node in tree.find_all(nodes.Name))
        self.whole = self.row and rows > subscripts


def _only_called(tree: nodes.Template) -> set[str]:
    """Return the functions that a template only calls, such as ``range(3)``."""
    loaded = [node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"]
    called = [node.node.name for node in tree.find_all(nodes.Call)
              if isinstance(node.node, nodes.Name)]  # fmt: skip
    return {name for name in _FUNCTIONS if loaded.count(name) == called.count(name)}


def _column(node: nodes.Node, free: set[str]) -> str | None:
    """Return the column that a node is: ``name``, ``row["name"]`` or ``row.name``."""
    if isinstance(node, nodes.Name):
        return node.name if node.name in free and node.name != ROW else None
    if not isinstance(node, nodes.Getitem | nodes.Getattr) or ROW not in free:
        return None
    if not (isinstance(node.node, nodes.Name) and node.node.name == ROW):
        return None
    if isinstance(node, nodes.Getattr):
        return None if hasattr(dict, node.attr) else node.attr
    name = node.arg.value if isinstance(node.arg, nodes.Const) else None
    return name if isinstance(name, str) else None


class _Compiled:
    """What templates and expressions have in common: a sandbox, their names and their errors.

    Attributes:
        text: as written.
        names: the values that it uses, in order of first appearance.
        whole: it may use any value of the row, through ``row``.
    """

    _noun = "template"

    def __init__(self, text: str, title: str) -> None:
        self.text = text
        self._title = title
        self._sandbox = _Sandbox()

    def _learn(self, source: str) -> None:
        """Find the names; refuse what the sandbox does not have.

        Raises:
            TemplateSyntaxError: it is not valid Jinja2.
            InputError: it needs something outside the sandbox.
        """
        tree = self._sandbox.parse(source)
        for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            raise self._invalid("another file cannot be included", node.lineno)
        for access in tree.find_all(nodes.Getattr):
            if access.attr.startswith("__"):
                raise self._invalid(f"{access.attr} is not accessible", access.lineno)
        found = _Names(tree)
        self.names, self.whole = found.used, found.whole
        self._needed, self._row = found.needed, found.row

    def _invalid(self, problem: str, line: int) -> InputError:
        return InputError(f"{self._title} is invalid at line {line}: {problem}", "correct it")

    @contextmanager
    def _read(self) -> Iterator[None]:
        """Raise InputError for what Jinja2 and Python raise when they compile a template."""
        try:
            yield
        except TemplateSyntaxError as error:
            raise self._misspelled(error) from None
        except (RecursionError, SyntaxError, MemoryError) as error:  # Python's own limits
            raise InputError(
                f"{self._title} cannot be compiled: it is nested too deeply ({error})",
                "make it simpler",
            ) from None

    def _misspelled(self, error: TemplateSyntaxError) -> InputError:
        return self._invalid(str(error.message).removesuffix("."), error.lineno)

    def check(self, columns: Iterable[str], where: str, kind: str = "column") -> None:
        """Raise InputError unless every name that it needs is one of ``columns``.

        A name with a default, or tested with ``is defined``, may be missing.
        """
        hint = f'a name that is not a single word is {ROW}["First name"]'
        known = list(columns)
        if self.whole and ROW in known:
            raise InputError(
                f"{self._title} uses {ROW}, which is the whole row, but {where} also has a {kind} "
                f"{ROW!r}",
                f'write {ROW}["{ROW}"] for the {kind}, or rename it',
            )
        check_names(self._needed, known, where, kind, hint, self._noun)

    def _context(self, values: Mapping[str, Any]) -> dict[str, Any]:
        self._sandbox.steps = 0
        context = {name: values[name] for name in self.names if name in values}
        if self._row:
            context[ROW] = dict(values)
        return context

    def _failed(self, error: Exception, values: Mapping[str, Any]) -> NoReturn:
        """Raise BadRowError with the line of the template and the cause."""
        lines = [
            line
            for frame, line in walk_tb(error.__traceback__)
            if frame.f_code.co_filename == _COMPILED
        ]
        place = f", line {lines[-1]}" if lines and "\n" in self.text else ""
        raise BadRowError(f"{self._title}{place}: {self._reason(error, values)}") from None

    def _reason(self, error: Exception, values: Mapping[str, Any]) -> str:
        missing = [name for name in self._needed if name not in values]
        if isinstance(error, UndefinedError) and missing:
            near = nearest(missing[0], values)
            meant = "" if near is None else f"; did you mean {near!r}?"
            return f"no column or field {missing[0]!r}{meant}"
        text = str(error).replace("'dict object'", "the object") or type(error).__name__
        if isinstance(error, TypeError) and "str" in text and "int" in text:
            text += "; a text becomes a number with | int or | float"
        return text


class JinjaTemplate(_Compiled):
    """A Jinja2 template: a ``PromptTemplate``.

    Args:
        text: the template.
        name: what messages call it, such as the name of its file.

    Raises:
        InputError: the template is invalid.
    """

    only = None
    filled_form = "{{ name }}"

    def __init__(self, text: str, name: str = "") -> None:
        super().__init__(text, f"the template {repr(name) if name else shown(text)}")
        with self._read():
            self._learn(text)
            self._template = self._sandbox.from_string(text)

    @property
    def content(self) -> dict[str, str]:
        """The template as JSON; equal for equal templates."""
        return {"jinja2": self.text}

    @property
    def literals(self) -> tuple[str, ...]:
        """What the template has in single braces, as a plain template has its names."""
        texts = self._sandbox.parse(self.text).find_all(nodes.TemplateData)
        return tuple(name.strip() for text in texts for name in _SINGLE.findall(text.data))

    def render(self, values: Mapping[str, Any]) -> str:
        """Return the text.

        Raises:
            BadRowError: a value is missing, or the template fails for these values.
        """
        parts, length = [], 0
        try:
            for part in self._template.generate(self._context(values)):
                parts.append(part)
                length += len(part)
                if length > MAX_LENGTH:
                    raise OverflowError(f"the text is longer than {MAX_LENGTH >> 20} MiB")
        except Exception as error:  # noqa: BLE001 - expressions over any data raise any error
            self._failed(error, values)
        return "".join(parts)


class Expression(_Compiled):
    """A Jinja2 expression such as ``score > 3 and label == "yes"``.

    Raises:
        InputError: the expression is invalid.
    """

    _noun = "expression"

    def __init__(self, text: str) -> None:
        super().__init__(text, f"the expression {shown(text)}")
        with self._read():
            self._compiled = self._sandbox.compile_expression(text, undefined_to_none=False)
            self._learn(f"{{{{ {text} }}}}")

    def value(self, values: Mapping[str, Any]) -> Any:
        """Return the value of the expression for a row.

        Raises:
            BadRowError: a value is missing, or the expression fails for these values.
        """
        try:
            result = self._compiled(self._context(values))
            if isinstance(result, Undefined):
                str(result)  # raises the error of a missing value; not if `x if y` has no `else`
                result = None
        except Exception as error:  # noqa: BLE001 - expressions over any data raise any error
            self._failed(error, values)
        return result
