"""Read `steps.yaml`: the source, the output and the steps of a chain, all checked before a run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, nodes

from aiflux.converters.answer_table import schema_fields
from aiflux.converters.examples import read_examples
from aiflux.converters.jinja_template import RESERVED, Expression, JinjaTemplate
from aiflux.converters.prompt import Prompt, prompt_and_form
from aiflux.converters.request_form import ANSWER, RequestForm, make_form, response_format
from aiflux.converters.source import (
    DIRECTORY,
    READER_OPTIONS,
    SUFFIXES,
    kind_of,
    open_source,
    readable_again,
)
from aiflux.converters.template import PromptTemplate, Template, as_template
from aiflux.core.config.declaration import refuse_two_names
from aiflux.core.config.settings import BY_NAME
from aiflux.core.config.sources import ENGINE_SETTINGS, parse_in_file, refuse_foreign
from aiflux.errors import ConfigError, InputError, UsageError
from aiflux.util import value_parsers
from aiflux.util.files import absolute
from aiflux.util.yaml_file import YamlFile, read_yaml

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_TAKEN = {"choice", "error"}
KEPT, DROPPED = FILTERED = ("keep", "drop")
"""What becomes of rows that a filter stops: rows of the table without answers, or none."""
_READER = ("kind", "delimiter", "encoding", "table", "query")
_CHAIN_KEYS = ("source", "output", *_READER, "skip_bad", "filtered", "steps")
_STEP_KEYS = (
    "template",
    "template_file",
    "system",
    "system_template",
    "system_file",
    "examples",
    "example_answer",
    "schema",
    "compare",
    "filter",
    "best",
    "majority",
)


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: of its column; also the name of its answer in later templates and expressions.
        place: in the file, for errors.
        system, system_template, examples, example_answer: see ``RequestOptions``.
        schema: JSON Schema of its answers, whose fields become columns.
        compare: the steps whose answers it sees as lists, of all samples of a row; () if it asks
            about each sample.
        filter: stops rows for which it is false.
        best: keeps, of the samples of a row, the one with the largest value; after ``compare``, the
            one that it names or scores highest.
        majority: keeps the first sample with the value that most samples of a row have.
        settings: of `aiflux run`, by name.
    """

    name: str
    place: str
    template: PromptTemplate
    system: str | None = None
    system_template: PromptTemplate | None = None
    examples: tuple[Mapping[str, Any], ...] = ()
    example_answer: str = ANSWER
    schema: Mapping[str, Any] | None = None
    compare: tuple[str, ...] = ()
    filter: Expression | None = None
    best: Expression | None = None
    majority: Expression | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The fields of its answers; none if these are texts."""
        return schema_fields(self.schema)

    @property
    def columns(self) -> tuple[str, ...]:
        """Its columns in the final table."""
        return tuple(f"{self.name}.{each}" for each in self.fields) or (self.name,)

    @property
    def chosen_by(self) -> tuple[str | None, str | None]:
        """The texts of ``best`` and ``majority``."""
        best, majority = self.best, self.majority
        return (None if best is None else best.text, None if majority is None else majority.text)

    @property
    def asked(self) -> dict[str, Any]:
        """What its requests depend on, in addition to the rows; see ``recorded_step``."""
        system = self.system_template
        return {
            "template": self.template.content,
            "system": self.system,
            "system_template": None if system is None else system.content,
            "examples": [dict(each) for each in self.examples],
            "example_answer": self.example_answer,
            "schema": None if self.schema is None else dict(self.schema),
            "compare": list(self.compare) or None,
            "filter": None if self.filter is None else self.filter.text,
        }

    @cached_property
    def prompt_and_form(self) -> tuple[Prompt, RequestForm]:
        """What it asks about a row, and what its requests share.

        Raises:
            UsageError, InputError: they do not fit each other.
        """
        form = make_form(
            system=self.system,
            system_template=self.system_template,
            examples=self.examples,
            example_answer=self.example_answer,
            schema=self.schema,
        )
        return prompt_and_form(self.template, form)


def recorded_step(
    name: str, place: str, asked: Mapping[str, Any], best: str | None, majority: str | None
) -> Step:
    """Return a step from what it ``asked``, without its settings."""
    given = dict(asked)
    for key in ("template", "system_template"):
        content = given[key]
        if content is not None:
            plain = isinstance(content, str)
            given[key] = Template(content) if plain else JinjaTemplate(content["jinja2"])
    stop = given["filter"]
    given["filter"] = None if stop is None else Expression(stop)
    given["examples"] = tuple(given["examples"])
    given["compare"] = tuple(given.get("compare") or ())
    chosen_by = [None if text is None else Expression(text) for text in (best, majority)]
    return Step(name, place, best=chosen_by[0], majority=chosen_by[1], **given)


@dataclass(frozen=True)
class Chain:
    """The content of a `steps.yaml`.

    Attributes:
        path: of the file.
        source, output: absolute paths.
        kind: of the source; see ``aiflux.converters.source``.
        reader: options of the source's reader.
        filtered: one of ``FILTERED``.
        skip_bad: skip rows of the source that cannot become a request.
        only: the names of the rows that are asked about; () for all.
    """

    path: Path
    source: Path
    kind: str
    output: Path
    steps: tuple[Step, ...]
    reader: Mapping[str, Any] = field(default_factory=dict)
    filtered: str = KEPT
    skip_bad: bool = False
    only: tuple[str, ...] = ()


def read_chain(path: Path, output: Path | None = None) -> Chain:
    """Read and check a file of steps, and the names of the source's columns.

    Args:
        output: the table to write, instead of the file's.

    Raises:
        ConfigError: the file is wrong; shows its line.
        InputError: a template, a schema or the source is wrong.
    """
    path = absolute(path)
    file = _StepsFile(read_yaml(path))
    chain = file.chain(output)
    _check_names(chain)
    return chain


def chain_output(path: Path) -> Path | None:
    """Return the output that a file of steps names, if it is one; nothing else is checked.

    Raises:
        ConfigError: the file cannot be read.
    """
    file = _StepsFile(read_yaml(path))
    given = file.file.content
    return file.path(given, "output") if isinstance(given, dict) and "steps" in given else None


@dataclass(frozen=True)
class _StepsFile:
    """A file of steps that is being read."""

    file: YamlFile

    def chain(self, output: Path | None) -> Chain:
        given = self.file.mapping(known=(*_CHAIN_KEYS, *BY_NAME), noun="key")
        source = self.path(given, "source")
        target = output or self.path(given, "output")
        if source is None:
            raise self._missing("source", "the table to read, such as source: reviews.csv")
        if target is None:
            raise self._missing("output", "the table to write, such as output: answers.csv")
        reader = {name: self._text(given, name) for name in _READER if given.get(name) is not None}
        kind = self._kind(reader.pop("kind", None), source)
        self._refuse_unused(reader, kind)
        filtered = self._text(given, "filtered") or KEPT
        if filtered not in FILTERED:
            raise ConfigError(
                f"{self.file.place('filtered')}: {filtered!r} is unknown",
                f"use one of: {', '.join(FILTERED)}",
            )
        common = self._settings(given)
        names = [*self._step_names()]
        steps = tuple(self._step(name, common, names[:at]) for at, name in enumerate(names))
        self._refuse_foreign(common, *(step.settings for step in steps))
        skip_bad = self._parsed(value_parsers.boolean, given, "skip_bad") or False
        return Chain(self.file.path, source, kind, target, steps, reader, filtered, skip_bad)

    def _refuse_unused(self, reader: Mapping[str, Any], kind: str) -> None:
        for name in reader:
            if name not in READER_OPTIONS.get(kind, ()):
                raise ConfigError(
                    f"{self.file.place(name)}: {name} cannot be used with a source of the kind "
                    f"{kind}",
                    "remove it",
                )

    def _refuse_foreign(self, *settings: Mapping[str, Any]) -> None:
        """Refuse a file that others can write, if it decides where prompts go or what runs."""
        names = dict.fromkeys(name for each in settings for name in each if BY_NAME[name].decisive)
        if names:
            options = ", ".join(BY_NAME[name].option for name in names)
            refuse_foreign(self.file.path, f"remove what it decides, and use {options}")

    def _missing(self, key: str, remedy: str) -> ConfigError:
        return ConfigError(f"{self.file.path} has no {key!r}", f"add {remedy}")

    def _step_names(self) -> Iterator[str]:
        names = self.file.mapping("steps") if self.file.mapping().get("steps") else {}
        if not names:
            raise self._missing("steps", "at least one step: a name, and a template below it")
        for name in names:
            if not _NAME.fullmatch(name) or name in _TAKEN | RESERVED:
                why = f"; {name} has another meaning in expressions" if name in RESERVED else ""
                raise ConfigError(
                    f"{self.file.line('steps', name)}: {name!r} cannot be the name of a step",
                    "use letters, digits and _, at most 64 of them, such as summary"
                    + (f"; {name} is a column of every chain" if name in _TAKEN else why),
                )
            yield name

    def _step(self, name: str, common: Mapping[str, Any], earlier: Sequence[str]) -> Step:
        at = ("steps", name)
        given = self.file.mapping(*at, known=(*_STEP_KEYS, *BY_NAME), noun="key")
        schema, examples = self.path(given, "schema", *at), self.path(given, "examples", *at)
        with self._blamed(*at, "schema"):
            content = None if schema is None else response_format(schema)["json_schema"]["schema"]
        with self._blamed(*at, "examples"):
            rows = () if examples is None else tuple(read_examples(examples))
        template = self._template(given, "template", "template_file", *at)
        if template is None:
            raise ConfigError(f"{self.file.place(*at)} has no template", "give it one")
        step = Step(
            name,
            self.file.place(*at),
            template,
            self._text(given, "system", *at),
            self._template(given, "system_template", "system_file", *at),
            rows,
            self._text(given, "example_answer", *at) or ANSWER,
            content,
            self._compared(given, earlier, *at),
            self._expression(given, "filter", *at),
            self._expression(given, "best", *at),
            self._expression(given, "majority", *at),
            layered(common, self._settings(given, *at)),
        )
        if step.best is not None and step.majority is not None:
            raise ConfigError(f"{step.place} has both best and majority", "remove one")
        with self._blamed(*at):
            _ = step.prompt_and_form
        return step

    def _compared(
        self, given: Mapping[str, Any], earlier: Sequence[str], *at: str
    ) -> tuple[str, ...]:
        """Return the steps from the one that ``compare`` names on."""
        name = self._text(given, "compare", *at)
        if name is None:
            return ()
        if name not in earlier:
            listed = ", ".join(earlier) or "none"
            raise ConfigError(
                f"{self.file.place(*at, 'compare')}: {name!r} is no earlier step",
                f"name the step whose samples are compared; the earlier steps are: {listed}",
            )
        return tuple(earlier[earlier.index(name) :])

    def _template(
        self, given: Mapping[str, Any], key: str, file: str, *at: str
    ) -> PromptTemplate | None:
        text, path = self._text(given, key, *at), self.path(given, file, *at)
        if text is not None and path is not None:
            raise ConfigError(f"{self.file.place(*at)} has both {key} and {file}", "remove one")
        found = text if path is None else path
        if found is None:
            return None
        with self._blamed(*at, key if path is None else file):
            return as_template(found)

    def _expression(self, given: Mapping[str, Any], key: str, *at: str) -> Expression | None:
        text = self._text(given, key, *at)
        with self._blamed(*at, key):
            return None if text is None else Expression(text)

    def _settings(self, given: Mapping[str, Any], *at: str) -> dict[str, Any]:
        """Return the settings of `aiflux run` among the keys."""
        own = {name: value for name, value in given.items() if name in BY_NAME}
        refuse_two_names(own, lambda name: self.file.place(*at, name), BY_NAME)
        return {
            BY_NAME[name].name: parse_in_file(
                BY_NAME[name],
                value,
                self.file.place(*at, name),
                self.file.path.parent,
                os.environ,
            )
            for name, value in own.items()
            if value is not None
        }

    def _kind(self, named: str | None, source: Path) -> str:
        kind = named or kind_of(source)
        if kind == DIRECTORY and named is None and not source.is_dir():
            kind = None
        if kind is None or not readable_again(kind):
            listed = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
            what = "is not a table" if kind is not None else "has no known kind"
            raise ConfigError(
                f"{self.file.place('source')}: {str(source)!r} {what}",
                f"use a file that ends in {listed}; or name the kind: {', '.join(SUFFIXES)}",
            )
        return kind

    def _text(self, given: Mapping[str, Any], key: str, *at: str) -> str | None:
        found: str | None = self._parsed(_text, given, key, *at)
        return found

    def path(self, given: Mapping[str, Any], key: str, *at: str) -> Path | None:
        """Return a path, which starts from the folder of the file."""

        def path(value: Any) -> Path:
            folder = self.file.path.parent
            return value_parsers.path(value_parsers.written_path(value, folder, os.environ))

        found: Path | None = self._parsed(path, given, key, *at)
        return found

    def _parsed(self, parse: Any, given: Mapping[str, Any], key: str, *at: str) -> Any:
        value = given.get(key)
        if value is None:
            return None
        try:
            return parse(value)
        except ValueError as error:
            raise ConfigError(
                f"{self.file.place(*at, key)}: {value!r} is wrong", f"{key} must be {error}"
            ) from None

    @contextmanager
    def _blamed(self, *keys: str) -> Iterator[None]:
        """Name the place in the file in the error of a value."""
        try:
            yield
        except UsageError as error:
            place = self.file.place(*keys)
            raise InputError(f"{place}: {error.message}", error.remedy, error.problems) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings; later layers take precedence, and each names the engine in its own way."""
    found: dict[str, Any] = {}
    for layer in layers:
        given = {name: value for name, value in layer.items() if value is not None}
        if not given.keys().isdisjoint(ENGINE_SETTINGS):
            found = {name: each for name, each in found.items() if name not in ENGINE_SETTINGS}
        found |= given
    return found


def _check_names(chain: Chain) -> None:
    """Refuse templates and expressions that name what no row has.

    Raises:
        ConfigError, InputError: names the step.
    """
    with ExitStack() as stack:
        columns = open_source(chain.source, chain.kind, chain.reader, stack).columns
    known: dict[str, Sequence[str] | None] = dict.fromkeys(columns)
    single: list[Step] = []  # steps of whose answers each row has several samples, or one
    for step in chain.steps:
        _refuse_one_sample(step, single)
        own = {name: known[name] for name in step.compare}
        known |= dict.fromkeys(step.compare, LISTED)
        if step.name in known or not known.keys().isdisjoint(step.columns):
            raise ConfigError(
                f"{step.place}: {str(chain.source)!r} already has a column {step.name!r}",
                "give the step another name",
            )
        prompt, _ = step.prompt_and_form
        for template in prompt.templates:
            key = "system" if template is prompt.system else "template"
            _refuse_unknown(step, key, template, known)
        if step.filter is not None:
            _refuse_unknown(step, "filter", step.filter, known)
        known[step.name] = step.fields
        for key, chosen_by in (("best", step.best), ("majority", step.majority)):
            if chosen_by is not None:
                _refuse_unknown(step, key, chosen_by, known)
        if step.best is not None:
            known |= own
        ends = step.best is not None or step.majority is not None
        single = [] if ends else [step] if step.compare else [*single, step]


def _refuse_one_sample(step: Step, single: Sequence[Step]) -> None:
    """Refuse ``compare`` of a step with one sample, or of a later one than that with several.

    Args:
        single: the steps since samples were chosen or compared.

    Raises:
        ConfigError: names the step.
    """
    names = [each.name for each in single]
    if not step.compare:
        return
    if step.compare[0] not in names:
        raise ConfigError(
            f"{step.place}: a row has one sample of the step {step.compare[0]!r} by then: a step "
            "in between has best, majority or compare",
            "remove it there, or compare a later step",
        )
    for each in single[: names.index(step.compare[0])]:
        if (each.settings.get("samples") or 1) > 1:
            raise ConfigError(
                f"{step.place}: a row has several samples of the step {each.name!r}, too",
                f"use compare: {each.name}",
            )


LISTED: Sequence[str] = []  # compared by identity: a text has no fields either
"""The fields of an answer that a step sees as a list of those of all samples."""


def _refuse_unknown(
    step: Step,
    key: str,
    used: PromptTemplate | Expression,
    known: Mapping[str, Sequence[str] | None],
) -> None:
    """Raise InputError for a name that is no column, no step and no field of one.

    Args:
        known: the fields of each step, none for a text; None for a column of the source.
    """
    names = used.names
    if not isinstance(used, Template):
        text = used.text if isinstance(used, JinjaTemplate) else f"{{{{ ({used.text}) }}}}"
        names = _fields_in(text)
    for name in names:
        outer, dot, inner = name.partition(".")
        fields = known.get(outer)
        if fields is LISTED and inner.split(".")[0].isdecimal():
            continue
        if name not in known and dot and fields is not None and inner.split(".")[0] not in fields:
            without = "it is a list of all samples" if fields is LISTED else "it has no schema"
            listed = ", ".join(fields) or f"none, because {without}"
            raise InputError(
                f"{step.place}: the {key} names {name!r}, but the step {outer!r} has no such field",
                f"its fields are: {listed}",
            )
    inside = [name for name in names if name.partition(".")[0] in known]
    try:
        used.check([*known, *inside], "the row", "column or earlier step")
    except InputError as error:
        raise InputError(f"{step.place}: {key}: {error.message}", error.remedy) from None


def _fields_in(text: str) -> tuple[str, ...]:
    """Return the fields in a Jinja2 template, such as ``judge.score``."""
    found = Environment().parse(text).find_all(nodes.Getattr)  # noqa: S701 - nothing is rendered
    return tuple(
        f"{each.node.name}.{each.attr}" for each in found if isinstance(each.node, nodes.Name)
    )
