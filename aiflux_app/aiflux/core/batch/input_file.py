"""Validate a whole input file in one pass: every bad line, the digest, tokens and models."""

from __future__ import annotations

import csv
import os
import shlex
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from hashlib import blake2b
from operator import eq
from pathlib import Path
from typing import Any

from aiflux.core.batch.request import (
    WITH_CHOICES,
    AcceptsModel,
    FieldRules,
    IgnoredField,
    IgnoredFields,
    LineError,
    adaptation,
    answers_wanted,
    custom_id_of,
    endpoint_url,
    request_entry,
)
from aiflux.core.batch.schema import schema_problem
from aiflux.errors import InputError, StoppedError
from aiflux.util.compression import PlainFile, plain_name
from aiflux.util.files import absolute, open_regular
from aiflux.util.lines import (
    MAX_LINE_BYTES,
    cut_at_lines,
    ends_line,
    line_numbers,
    read_lines,
    unreadable,
)
from aiflux.util.parallel import helpers, share_out
from aiflux.util.process_limits import require_thread_memory
from aiflux.util.records import OMITTED
from aiflux.util.text import counted, joined, ranges

SHOWN_PROBLEMS = 20
_SHOWN_ADAPTATIONS = 5
_SHOWN_LINES = 20
# Files with data instead of requests, and the converter that reads them.
NOTHING_SENT = "; nothing was sent"
"""End of an error's message about an input; `aiflux check`, which never sends, leaves it out."""
_CONVERTED = {
    ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "parquet", ".json": "json",
    ".xlsx": "table", ".xls": "table", ".ods": "table", ".db": "table", ".sqlite": "table",
    ".duckdb": "table",
}  # fmt: skip


@dataclass
class Group:
    """The lines with the same problem.

    Attributes:
        count: number of lines.
        offsets: byte offsets of the first ``_SHOWN_LINES`` of them.
    """

    count: int = 0
    offsets: list[int] = field(default_factory=list)

    def add(self, count: int, offsets: list[int]) -> None:
        """Add further lines with the same problem."""
        self.count += count
        self.offsets = sorted([*self.offsets, *offsets])[:_SHOWN_LINES]


@dataclass
class Problems:
    """Bad lines: the first ``SHOWN_PROBLEMS`` different problems in full, the rest as a count.

    Memory stays bounded even if all lines are bad: late problems are only counted.
    """

    lines: int = 0
    _groups: dict[str, Group] = field(default_factory=dict)
    _problems: int = 0  # more than lines if some have two

    def add(self, offset: int, problem: str, *, another: bool = False) -> None:
        """Record a problem of the line that starts at byte ``offset``.

        Args:
            another: the line has a recorded problem already.
        """
        self._add(problem, 1, [offset])
        self.lines += not another

    def merge(self, other: Problems) -> None:
        """Add the bad lines of another part of the same input."""
        for problem, group in other._groups.items():
            self._add(problem, group.count, group.offsets)
        self._problems += other._problems - sum(group.count for group in other._groups.values())
        self.lines += other.lines

    def error(self, path: Path, named: Path) -> InputError:
        """Return the error that lists the lines.

        Args:
            named: the file that the user named, if ``path`` is a plain copy of it.

        Raises:
            OSError: the input cannot be read.
        """
        self._trim()
        offsets = sorted({offset for group in self._groups.values() for offset in group.offsets})
        numbers = dict(zip(offsets, line_numbers(path, offsets), strict=True))
        texts = [f"{_where(group, numbers)}: {text}" for text, group in self._groups.items()]
        rest = self._problems - sum(group.count for group in self._groups.values())
        if rest:
            texts.append(f"... and {rest} more")
        noun = "line is" if self.lines == 1 else "lines are"
        return InputError(
            f"{self.lines} {noun} wrong in {str(named)!r}{NOTHING_SENT}",
            _remedy(named),
            tuple(texts),
            lines=tuple(
                sorted(
                    (numbers[offset], text)
                    for text, group in self._groups.items()
                    for offset in group.offsets
                )
            ),
            count=self.lines,
        )

    def _add(self, problem: str, count: int, offsets: list[int]) -> None:
        self._problems += count
        self._groups.setdefault(problem, Group()).add(count, offsets)
        if len(self._groups) > 8 * SHOWN_PROBLEMS:
            self._trim()

    def _trim(self) -> None:
        ranked = sorted(self._groups.items(), key=lambda item: item[1].offsets)
        self._groups = dict(ranked[:SHOWN_PROBLEMS])


def _remedy(path: Path) -> str:
    kind = _CONVERTED.get(plain_name(path).suffix.lower())
    if kind is None:
        return "correct the input"
    output = plain_name(path).with_suffix(".jsonl").name
    column = _column(path) if kind == "csv" else "text"
    prompt = "" if kind == "json" else f" --template {shlex.quote(f'{{{column}}}')}"
    convert = f"aiflux convert {kind} --input {shlex.quote(str(path))}{prompt}"
    ask = "" if kind == "json" else "; `aiflux ask` does all in one command"
    return f"turn it into requests first: {convert} --output {shlex.quote(output)}{ask}"


def _column(path: Path) -> str:
    """Return the column of a table that is most likely the prompt, for an example."""
    with suppress(OSError, UnicodeError, StopIteration, csv.Error), PlainFile(path) as file:
        header = file.readline(_BLOCK).decode("utf-8-sig").strip()
        delimiter = max(",;\t|", key=header.count)
        names = next(csv.reader([header], delimiter=delimiter))
        plain = [name for name in names if name.isprintable() and not set(name) & set("{}")]
        return "text" if "text" in plain or not plain else plain[-1]
    return "text"


def _where(group: Group, numbers: dict[int, int]) -> str:
    """Return the lines of a group: ``line 3``, ``lines 1 and 4``, ``lines 2-21 and 98 more``."""
    shown = ranges(numbers[offset] for offset in group.offsets)
    more = group.count - len(group.offsets)
    listed = joined([*shown, f"{more:,} more"] if more else shown)
    return f"{'line' if group.count == 1 else 'lines'} {listed}"


_BLOCK = 1 << 20
_SIZE = 16


class InputDigest:
    """Computes the digest of a file, part by part, in order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash = blake2b(digest_size=_SIZE)

    def add(self, start: int, end: int, plain: bool) -> None:
        """Add the lines from byte ``start`` to byte ``end``.

        Args:
            plain: the part has only lines in the form that is digested, so it is not parsed.

        Raises:
            OSError: the file cannot be read.
            InputError: a line cannot be read.
        """
        if not plain:
            for _, _, raw in read_lines(self._path, start, end):
                self._hash.update(raw + b"\n")
            return
        with open(self._path, "rb", buffering=0, opener=open_regular) as file:
            file.seek(start)
            while start < end and (block := file.read(min(_BLOCK, end - start))):
                self._hash.update(block)
                start += len(block)

    def hexdigest(self) -> str:
        """Return the digest of the lines so far."""
        return self._hash.hexdigest()


class LineDigest:
    """Computes the same digest of lines that are read one by one, and counts them."""

    def __init__(self) -> None:
        self.lines = 0
        self._hash = blake2b(digest_size=_SIZE)

    def add(self, raw: bytes) -> None:
        """Add the next line, without its line ending."""
        self.lines += 1
        self._hash.update(raw + b"\n")

    def hexdigest(self) -> str:
        """Return the digest of the lines so far."""
        return self._hash.hexdigest()


def digest_of_lines(path: Path) -> LineDigest:
    """Read a file, and return the digest of its lines.

    Raises:
        InputError: it cannot be read.
    """
    digest = LineDigest()
    for _, _, raw in read_lines(path):
        digest.add(raw)
    return digest


Add = Callable[[int, int, bool], None]


@contextmanager
def in_thread(add: Add) -> Iterator[Add]:
    """Yield a function that calls ``add`` in a thread; each call waits for the one before.

    Hashing releases the interpreter lock, so other threads run at the same time.
    """
    with ThreadPoolExecutor(1, "digest") as executor:
        pending: list[Future[None]] = []
        alone = False
        try:
            require_thread_memory()
        except StoppedError:
            alone = True

        def submit(start: int, end: int, plain: bool) -> None:
            nonlocal alone
            if pending:
                pending.pop().result()
            if not alone:
                try:
                    pending.append(executor.submit(add, start, end, plain))
                except RuntimeError:  # no thread can be started
                    alone = True
            if alone:
                add(start, end, plain)

        yield submit
        if pending:
            pending.pop().result()


# English text has about 4 bytes a token, code 3, CJK text 3 bytes a character and token:
# 3 errs on the side of a context that is large enough.
_BYTES_PER_TOKEN = 3
_TOKENS_PER_MESSAGE = 16
_TOKENS_PER_IMAGE = 1024
_UNLIMITED_ANSWER = 1024
# Fields of requests for scores (see `aiflux.models.endpoints`).
_PAIRS = (
    ("query", "documents"),
    ("text_1", "text_2"),
    ("queries", "documents"),
    ("queries", "items"),
    ("data_1", "data_2"),
)


def estimate_tokens(body: Mapping[str, Any]) -> int:
    """Estimate the tokens of a request, prompt and answer together."""
    prompt = estimate_prompt(body)
    return prompt if scored_texts(body) else prompt + (answer_tokens(body) or _UNLIMITED_ANSWER)


def estimate_prompt(body: Mapping[str, Any]) -> int:
    """Estimate the tokens of a request's prompt."""
    if scored := scored_texts(body):  # each document by itself, with its query
        return sum(map(_longest_tokens, scored))
    payload = body.get("messages") or body.get("prompt") or body.get("input")
    return _prompt_tokens(body.get("instructions")) + _prompt_tokens(payload)


def scored_texts(body: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Return the queries and the documents of a request for scores; None for other requests."""
    for one, other in () if "messages" in body else _PAIRS:
        if one in body and other in body:
            return body[one], body[other]
    return None


def answer_tokens(body: Mapping[str, Any]) -> int:
    """Return the most tokens that a request wants in its answer; 0 if it sets no limit."""
    limits = map(body.get, ("max_tokens", "max_completion_tokens", "max_output_tokens"))
    answer = next(filter(None, limits), None)
    return answer if isinstance(answer, int) and answer > 0 else 0


def _longest_tokens(payload: Any) -> int:
    parts = payload if type(payload) is list else [payload]
    return max(map(_part_tokens, parts), default=0)


def _prompt_tokens(payload: Any) -> int:
    if type(payload) is str:
        size = len(payload) if payload.isascii() else len(payload.encode("utf-8", "surrogatepass"))
        return size // _BYTES_PER_TOKEN + 1
    tokens = 0
    if type(payload) is list:
        for part in payload:
            tokens += _part_tokens(part)
    return tokens


def _part_tokens(part: Any) -> int:
    if type(part) is dict:
        if "image_url" in part:
            return _TOKENS_PER_IMAGE
        text = part["content"] if "content" in part else part.get("text")
        return _TOKENS_PER_MESSAGE + _prompt_tokens(text)
    return 1 if isinstance(part, int) else _prompt_tokens(part)


PART_BYTES = 32 << 20


@dataclass(frozen=True)
class InputRules:
    """The properties of the engine that the check of an input needs.

    Attributes:
        accepts_model: compares names of models.
        ignored_fields: fields that the engine ignores or rejects.
        adapters: names of adapters, which requests may name instead of the model.
        replaces_model: requests may name any model, and are sent to the run's model.
        defaults: fields that the run fills into bodies with choices if they lack them.
        missing: endpoints that the engine does not have, each with the problem and its remedy.
    """

    accepts_model: AcceptsModel = eq
    ignored_fields: FieldRules = field(default_factory=dict)
    adapters: frozenset[str] = frozenset()
    replaces_model: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    def accepts(self, model: str, named: str) -> bool:
        """Return whether a request that names a model may be sent to the run's model."""
        return self.replaces_model or self._fits(model, named)

    def replaces(self, model: str | None, named: str | None) -> bool:
        """Return whether a request names another model, which the run's model replaces."""
        if not self.replaces_model or model is None or named in (None, model):
            return False
        return not self._fits(model, str(named))

    def _fits(self, model: str, named: str) -> bool:
        return named in self.adapters or self.accepts_model(model, named)


@dataclass(frozen=True, kw_only=True)
class InputFacts:
    """The facts about its input that a plan stores.

    Attributes:
        path: absolute path.
        source: the file that the user named, if ``path`` is a plain copy of it.
        size: bytes.
        modified: when it was last written, in nanoseconds; None in plans that do not have it.
        requests: number of requests.
        digest: BLAKE2b-128 of the request lines, hex; it ignores blank lines and line endings.
        endpoints: number of requests for each url.
        context_tokens: estimated tokens (prompt + answer) that 99 % of the requests stay under.
        longest_tokens: the same for the longest request.
        mean_tokens: the same on average, for every answer that the request asks for (``n``).
        ignored: by name, the fields that the engine ignores.
        adapted: how requests differ from OpenAI's form or the run's model, and their numbers.
        longest_line: bytes of the longest request; 0 in plans that do not have it.
        longest_answer: tokens of the longest answer that a request sets; 0 if none does.
    """

    path: Path
    size: int
    modified: int | None = None
    requests: int
    digest: str
    endpoints: dict[str, int]
    context_tokens: int = 0
    longest_tokens: int = 0
    mean_tokens: int = 0
    ignored: dict[str, IgnoredField] = field(default_factory=dict, metadata=OMITTED)
    adapted: dict[str, int] = field(default_factory=dict, metadata=OMITTED)
    source: Path | None = field(default=None, metadata=OMITTED)
    longest_line: int = 0
    longest_answer: int = 0

    @property
    def named(self) -> Path:
        """The file that the user named."""
        return self.source or self.path


@dataclass(frozen=True, kw_only=True)
class InputSummary(InputFacts):
    """The result of one pass over the input.

    Attributes:
        models: models that bodies name, in order of first appearance.
        unnamed: number of requests whose body names no model.
        marks: possible boundaries of shards, fewer in large inputs.
    """

    models: tuple[str, ...]
    unnamed: int
    marks: tuple[Mark, ...]

    @property
    def facts(self) -> InputFacts:
        """The part of the summary that the plan keeps."""
        return InputFacts(**{item.name: getattr(self, item.name) for item in fields(InputFacts)})

    def of_engine(
        self, model: str | None, rules: InputRules, scanned: FieldRules
    ) -> InputSummary | None:
        """Return what a scan for another engine would find; None if only a scan can tell.

        Args:
            model, rules: see `scan_input`.
            scanned: the fields that this scan looked for.
        """
        if model is None and self.unnamed:
            return None
        if model is not None:
            named = (name for name in self.models if name != model)
            if not all(rules.accepts(model, name) for name in named):
                return None
        if rules.missing.keys() & self.endpoints.keys():
            return None
        wanted = rules.ignored_fields
        if any(scanned.get(name) != rule for name, rule in wanted.items()):
            return None
        ignored = {name: found for name, found in self.ignored.items() if name in wanted}
        return replace(self, ignored=ignored)


def scan_input(
    path: Path,
    model: str | None = None,
    *,
    rules: InputRules | None = None,
    schemas: bool = False,
    source: Path | None = None,
    part_bytes: int = PART_BYTES,
    children: int | None = None,
) -> InputSummary:
    """Check the whole input in bounded memory; use several cores if it is large.

    Args:
        path: the input file.
        model: the run's model, if it is named outside the input.
        rules: of the engine's kind; without them, names must be equal and no field is ignored.
        schemas: also check the JSON Schemas of the requests.
        source: the file that the user named, if ``path`` is a plain copy of it; errors name it.
        part_bytes: the input is checked in parts of about this size.
        children: processes that share an input of several parts; None for as many as is safe.

    Raises:
        InputError: the file cannot be read, is empty, or has bad lines; ``problems`` lists them.
    """
    path = absolute(path)
    check_readable(path)
    named = source or path
    try:
        before = path.stat()
        parts = cut_at_lines(path, part_bytes)
        children = children if children is not None else helpers() if len(parts) > 1 else 0
        work = partial(_scan_part, path, model, schemas, rules or InputRules())
        whole, digest = _scan(path, parts, work, children)
        _check_names(path, whole)
        if whole.found.problems.lines:
            raise whole.found.problems.error(path, named)
        if _moment(path.stat()) != _moment(before):
            raise InputError(
                f"the input {str(named)!r} changed while it was checked",
                "run the same command again when the file is complete",
            )
        if not whole.requests:
            raise InputError(
                f"the input {str(named)!r} contains no request", "write one JSON object per line"
            )
        return replace(_summary(path, whole, digest, before), source=source)
    except OSError as error:
        raise unreadable(path, error) from error


def _moment(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _scan(
    path: Path,
    parts: Sequence[tuple[int, int]],
    work: Callable[[tuple[int, int]], Part],
    children: int,
) -> tuple[Whole, str]:
    """Scan all parts; return what they contain together, and the digest."""
    whole, digest = Whole(), InputDigest(path)
    with ExitStack() as stack:
        # A process must not fork while it has threads; with children it needs no thread.
        add = digest.add if children else stack.enter_context(in_thread(digest.add))
        for part in stack.enter_context(closing(share_out(work, parts, children))):
            whole.add(part)
            add(part.start, part.end, part.plain)
    return whole, digest.hexdigest()


def _scan_part(
    path: Path, model: str | None, schemas: bool, rules: InputRules, part: tuple[int, int]
) -> Part:
    return scan_part(path, *part, model, rules, schemas=schemas)


def _summary(path: Path, whole: Whole, digest: str, stat: os.stat_result) -> InputSummary:
    found = whole.found
    return InputSummary(
        path=path,
        size=stat.st_size,
        modified=stat.st_mtime_ns,
        requests=whole.requests,
        digest=digest,
        models=tuple(found.models),
        unnamed=found.unnamed,
        endpoints=dict(found.endpoints),
        context_tokens=whole.percentile(0.99),
        longest_tokens=max(found.lengths) * LENGTH_STEP,
        mean_tokens=whole.mean_tokens,
        ignored={
            name: IgnoredField(
                found.ignored.counts[name],
                tuple(line_numbers(path, found.ignored.offsets[name])),
            )
            for name in sorted(found.ignored.counts)
        },
        adapted=dict(found.adapted),
        marks=whole.marks,
        longest_line=found.longest_line,
        longest_answer=found.longest_answer,
    )


def _check_names(path: Path, whole: Whole) -> None:
    """Find the lines of repeated custom_ids in a second pass, if there are any."""
    repeated = whole.found.names.repeated()
    if not repeated:
        return
    first: dict[str, int] = {}
    bad = set(whole.found.bad)
    for number, offset, raw in read_lines(path):
        custom_id = custom_id_of(raw)
        if custom_id is None or hash(custom_id) not in repeated:
            continue
        if custom_id in first:
            whole.found.problems.add(
                offset,
                f"custom_id {custom_id!r} is already used on line {first[custom_id]}; "
                "use a unique custom_id for every request",
                another=offset in bad,
            )
        else:
            first[custom_id] = number


def check_readable(path: Path) -> None:
    """Raise InputError unless ``path`` is a file that can be read more than once."""
    if not path.exists():
        raise InputError(f"the input {str(path)!r} does not exist", "check the path")
    if path.is_dir():
        raise InputError(
            f"the input {str(path)!r} is a directory",
            "give a .jsonl file; `aiflux convert dir` makes one from a directory",
        )
    if not path.is_file():
        raise InputError(
            f"the input {str(path)!r} is not a regular file",
            "save it to a file: it is read more than once",
        )
    if not os.access(path, os.R_OK):
        raise InputError(
            f"the input {str(path)!r} cannot be read: permission denied",
            f"chmod u+r {shlex.quote(str(path))}",
        )


def looks_unchanged(planned: InputFacts) -> bool:
    """Return whether an input still has the planned size and modification time.

    Raises:
        OSError: the file cannot be examined.
    """
    return _moment(os.stat(planned.path)) == (planned.size, planned.modified)


def change_of(planned: InputFacts) -> str | None:
    """Read an input again; return how it differs from the planned one, None if it does not.

    The text continues a sentence that begins with the input's name.

    Raises:
        InputError: the file exists and cannot be read.
    """
    try:
        size = planned.path.stat().st_size
    except FileNotFoundError:
        return "no longer exists"
    except OSError as error:
        raise unreadable(planned.path, error) from error
    seen = digest_of_lines(planned.path)
    if seen.lines != planned.requests:
        word = "shorter" if seen.lines < planned.requests else "longer"
        return (
            f"is {word} than when the run was planned: "
            f"{counted(seen.lines, 'request')} instead of {planned.requests}"
        )
    if seen.hexdigest() != planned.digest:
        return "was edited or reordered after the run was planned"
    if size != planned.size:
        return "has other line endings or blank lines than when the run was planned"
    return None


def quick_change_of(planned: InputFacts) -> str | None:
    """Return the same as ``change_of``; read the input only if its size or time differs."""
    with suppress(OSError):  # reading it reports what is wrong
        if looks_unchanged(planned):
            return None
    return change_of(planned)


# Lengths are rounded up to a multiple of this number of tokens.
LENGTH_STEP = 64
_BUCKETS = 256
_MAX_MARKS = 65536


@dataclass(frozen=True, slots=True)
class Mark:
    """A possible boundary of shards: ``index`` requests are before byte ``offset``."""

    index: int
    offset: int


class Names:
    """The custom_ids seen, as 64-bit hashes in 8 bytes each.

    The hashes are valid in this process and its forked children.
    """

    def __init__(self) -> None:
        self._buckets: list[array[int]] = [array("q") for _ in range(_BUCKETS)]

    def add(self, hashes: Iterable[int]) -> None:
        """Add names by their hashes."""
        buckets = self._buckets
        for name in hashes:
            buckets[name % _BUCKETS].append(name)

    def merge(self, other: Names) -> None:
        """Add the names of another part."""
        for mine, more in zip(self._buckets, other._buckets, strict=True):
            mine.extend(more)

    def repeated(self) -> set[int]:
        """Return the hashes that were added more than once."""
        repeated: set[int] = set()
        for bucket in self._buckets:
            if len(set(bucket)) < len(bucket):
                repeated.update(name for name, count in Counter(bucket).items() if count > 1)
        return repeated


@dataclass
class Findings:
    """Facts about requests that add up over the parts of an input.

    Attributes:
        models: in order of first appearance.
        unnamed: number of requests whose body names no model.
        endpoints: number of requests for each url.
        lengths: number of requests for each length in steps of ``LENGTH_STEP`` tokens.
        repeated: the lengths of further answers (``n``), in such steps.
        bad: the offsets of invalid lines that have a custom_id.
        ignored: fields that the engine ignores.
        adapted: number of requests that differ from OpenAI's form or the run's model, by how.
        longest_line: bytes of the longest request.
        longest_answer: tokens of the longest answer that a request sets.
    """

    models: dict[str, None] = field(default_factory=dict)
    unnamed: int = 0
    endpoints: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    repeated: int = 0
    names: Names = field(default_factory=Names)
    problems: Problems = field(default_factory=Problems)
    bad: array[int] = field(default_factory=lambda: array("q"))
    ignored: IgnoredFields = field(default_factory=IgnoredFields)
    adapted: Counter[str] = field(default_factory=Counter)
    longest_line: int = 0
    longest_answer: int = 0

    def add(
        self,
        entry: Mapping[str, Any],
        offset: int,
        size: int,
        rules: InputRules,
        model: str | None,
    ) -> None:
        """Add the request whose line starts at byte ``offset`` and has ``size`` bytes."""
        body, url = entry["body"], endpoint_url(entry)
        self.longest_line = max(self.longest_line, size)
        if (answer := answer_tokens(body)) > self.longest_answer:
            self.longest_answer = answer
        asked = {**rules.defaults, **body} if rules.defaults and url in WITH_CHOICES else body
        self.ignored.add(url, asked, offset, rules.ignored_fields)
        length = -(-estimate_tokens(body) // LENGTH_STEP)
        self.lengths[length] += 1
        self.repeated += length * (answers_wanted(url, asked) - 1)
        self.endpoints[url] += 1
        named = body.get("model")
        if how := adaptation(entry):
            self._add_adapted(how, 1)
        if rules.replaces(model, named):
            self._add_adapted(f"model {named!r} (replaced by {model!r})", 1)
        if named is None:
            self.unnamed += 1
        elif named not in self.models:
            self.models[named] = None

    def merge(self, other: Findings) -> None:
        """Add those of the part that follows."""
        self.models.update(other.models)
        self.unnamed += other.unnamed
        self.endpoints.update(other.endpoints)
        self.lengths.update(other.lengths)
        self.repeated += other.repeated
        self.names.merge(other.names)
        self.problems.merge(other.problems)
        self.bad.extend(other.bad)
        self.ignored.merge(other.ignored)
        self.longest_line = max(self.longest_line, other.longest_line)
        self.longest_answer = max(self.longest_answer, other.longest_answer)
        for how, count in other.adapted.items():
            self._add_adapted(how, count)

    def _add_adapted(self, how: str, count: int) -> None:
        known = how in self.adapted or len(self.adapted) < _SHOWN_ADAPTATIONS
        self.adapted[how if known else "other urls or models"] += count


@dataclass
class Part:
    """The result of one pass over a part of the input.

    Attributes:
        start, end: of the part, in bytes.
        plain: every line in it is a request that ends with one line feed; none is blank.
        offsets: of every request.
    """

    start: int
    end: int
    plain: bool = True
    offsets: array[int] = field(default_factory=lambda: array("q"))
    found: Findings = field(default_factory=Findings)


def scan_part(
    path: Path,
    start: int,
    end: int,
    model: str | None,
    rules: InputRules,
    *,
    schemas: bool = False,
) -> Part:
    """Check the lines from byte ``start``, the start of a line, to byte ``end``.

    Args:
        model: the run's model, if it is named outside the input.
        schemas: also check the JSON Schemas of the requests.

    Raises:
        InputError: the file cannot be read.
    """
    part = Part(start, end)
    found = part.found
    names = array("q")
    following = start
    for _, offset, raw in read_lines(path, start, end):
        if offset != following:
            part.plain = False
        following = offset + len(raw) + 1
        try:
            if len(raw) > MAX_LINE_BYTES:
                raise LineError(f"longer than {MAX_LINE_BYTES >> 20} MiB; split the request")
            entry = request_entry(raw, model, rules.accepts, exact=False)
            if rules.missing and (problem := rules.missing.get(endpoint_url(entry))):
                raise LineError(problem)
            if schemas and (problem := schema_problem(entry["body"])):
                raise LineError(problem)
        except LineError as error:
            found.problems.add(offset, str(error))
            custom_id = custom_id_of(raw) if len(raw) <= MAX_LINE_BYTES else None
            if custom_id is not None:  # it may be repeated, too
                found.bad.append(offset)
                names.append(hash(custom_id))
            continue
        part.offsets.append(offset)
        names.append(hash(entry["custom_id"]))
        found.add(entry, offset, len(raw), rules, model)
    part.plain = part.plain and following == end and ends_line(path, end)
    found.names.add(names)
    return part


@dataclass
class Whole:
    """The results of all parts together; they are added in the order of the input."""

    requests: int = 0
    found: Findings = field(default_factory=Findings)
    _cuts: array[int] = field(default_factory=lambda: array("q"))
    _stride: int = 1

    def add(self, part: Part) -> None:
        """Add the part that follows."""
        self._add_cuts(part.offsets)
        self.found.merge(part.found)

    def percentile(self, share: float) -> int:
        """Return the quantile of the tokens per request for ``share``."""
        rest = share * self.requests
        for length in sorted(self.found.lengths):
            rest -= self.found.lengths[length]
            if rest <= 0:
                return length * LENGTH_STEP
        return 0

    @property
    def mean_tokens(self) -> int:
        """Mean tokens of a request, with all its answers."""
        total = sum(length * count for length, count in self.found.lengths.items())
        total += self.found.repeated
        return total // max(1, self.requests) * LENGTH_STEP

    @property
    def marks(self) -> tuple[Mark, ...]:
        """Possible boundaries of shards: the starts of requests, or of every n-th request."""
        return tuple(Mark(at * self._stride, offset) for at, offset in enumerate(self._cuts))

    def _add_cuts(self, offsets: array[int]) -> None:
        first, self.requests = self.requests, self.requests + len(offsets)
        while self.requests > self._stride * _MAX_MARKS:
            self._stride *= 2
            self._cuts = self._cuts[::2]
        self._cuts.extend(offsets[-first % self._stride :: self._stride])
