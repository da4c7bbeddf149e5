"""Find prompts that are longer than the context, before the run, and split them.

A text of N bytes has at most N tokens: only requests that could be too long are counted, with the
model's own tokenizer.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from aiflux.core.batch.input_file import (
    NOTHING_SENT,
    InputFacts,
    answer_tokens,
    estimate_prompt,
    scored_texts,
)
from aiflux.core.batch.prompt_split import Fit, NoSplitError, Split, split_prompt
from aiflux.core.batch.request import COMPLETIONS, RESPONSES, WITHOUT_TEXT, endpoint_url, load_json
from aiflux.errors import AifluxError, ConfigError, InputError, ModelError
from aiflux.models.tokenizer import LARGEST_EXPANSION, ModelTokenizer, one_thread
from aiflux.util.lines import cut_at_lines, line_numbers, read_lines, unreadable
from aiflux.util.parallel import helpers, share_out
from aiflux.util.process_limits import THREAD_BYTES, require_thread_memory
from aiflux.util.records import OMITTED
from aiflux.util.text import joined

TOO_LONG = "too_long"
NOT_SENT = "not sent: "
"""The error of a request that was left out begins so, unlike that of a server."""
"""Code of the error of a request that was not sent because its prompt is too long, or that the
engine refused for this reason."""
_PART_BYTES = 4 << 20
AT_ONCE = 8
"""Prompts that a server counts at once, each from another part of the input."""
_ASKED_BYTES = 256 << 10
_SHOWN_LINES = 20
# A prompt has at most this many times its estimated tokens, unless its text is unusual.
_ESTIMATE_FACTOR = 2
# Templates can indent the JSON of tools.
_INDENTED = 4
_STEP = 512


@dataclass(frozen=True)
class PromptLimit:
    """The context of a model in a run, and how to count its prompts.

    Attributes:
        context: tokens of prompt and answer together, for each request.
        maximum: tokens of context that the model has at most; 0 if unknown.
        answer: tokens of an answer, for requests that do not set it; 0 if it has no limit.
        open_tokenizer: returns the model's tokenizer; raises ModelError or ConfigError.
        asks: it asks a server. Prompts whose estimate is less than half of the context are not
            counted.
    """

    context: int
    maximum: int
    answer: int
    open_tokenizer: Callable[[], ModelTokenizer]
    asks: bool = False


@dataclass(frozen=True, kw_only=True)
class LongPrompts:
    """The prompts of a run that are too long for its context, or leave little of it.

    Attributes:
        context: tokens, of the model with the smallest.
        maximum: tokens of context that the model has at most; 0 if unknown.
        too_long: number of prompts that leave no token for an answer.
        tight: number of prompts that leave fewer tokens than the answer may have.
        longest: tokens of the longest prompt that was counted.
        needed: tokens of context with which every prompt fits, and its answer.
        lines: numbers of the first lines with prompts that are too long.
        tokens: of the prompts on these lines.
        uncounted: why the figures are estimates; "" if the model's tokenizer counted them.
        remedy: how to count them.
        parts: number of parts in which the prompts that are too long are sent; 0 if they are not
            split.
        splits: digest of the file that has their boundaries.
    """

    context: int
    maximum: int = 0
    too_long: int = 0
    tight: int = 0
    longest: int = 0
    needed: int = 0
    lines: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    uncounted: str = field(default="", metadata=OMITTED)
    remedy: str = field(default="", metadata=OMITTED)
    parts: int = field(default=0, metadata=OMITTED)
    splits: str = field(default="", metadata=OMITTED)

    @property
    def counted(self) -> bool:
        """Whether the model's tokenizer counted the prompts."""
        return not self.uncounted

    @property
    def where(self) -> str:
        """The lines, for a message."""
        shown = [f"{line:,}" for line in self.lines]
        more = self.too_long - len(shown)
        listed = joined([*shown, f"{more:,} more"] if more else shown)
        return f"{'line' if self.too_long == 1 else 'lines'} {listed}"

    @property
    def longer_context(self) -> str:
        """The option with which every prompt fits; "" if the model has no such context."""
        wanted = -(-self.needed // _STEP) * _STEP
        if self.maximum:
            wanted = min(wanted, self.maximum)
        return f"--context-length {wanted}" if wanted >= self.needed else ""

    def error(self, named: Path) -> InputError:
        """Return the error for a run that must not start."""
        noun = "prompt is" if self.too_long == 1 else "prompts are"
        options = [
            "shorten them",
            *filter(None, [self.longer_context]),
            "--too-long skip (leave them out; each result has an error)",
            "--too-long chunk (send them in parts)",
        ]
        if not self.longer_context and self.maximum:
            options.append(f"a model or server with more than {self.maximum:,} tokens of context")
        shown = [
            f"line {line:,}: {tokens:,} tokens"
            for line, tokens in zip(self.lines, self.tokens, strict=True)
        ]
        rest = self.too_long - len(shown)
        return InputError(
            f"{self.too_long:,} {noun} too long for the context of {self.context:,} tokens in "
            f"{str(named)!r}{NOTHING_SENT}",
            f"{', or '.join(options)}",
            (*shown, *([f"... and {rest:,} more"] if rest else [])),
            lines=tuple(
                (line, f"the prompt has {tokens:,} tokens, and the context {self.context:,}")
                for line, tokens in zip(self.lines, self.tokens, strict=True)
            ),
            count=self.too_long,
        )

    def uncounted_error(self, named: Path) -> InputError:
        """Return the error for prompts that cannot be split, because they are only estimated."""
        noun = "prompt" if self.too_long == 1 else "prompts"
        how = f"{self.remedy}; or " if self.remedy else ""
        return InputError(
            f"about {self.too_long:,} {noun} in {str(named)!r} ({self.where}) may be too long for "
            f"the context of {self.context:,} tokens, and only the model's tokenizer can split "
            f"them (--too-long chunk): {self.uncounted}",
            f"{how}use another --too-long",
            count=self.too_long,
        )


@dataclass(frozen=True)
class Unsplit:
    """A request that is too long and cannot be split.

    Attributes:
        offset: of its line in the input.
    """

    offset: int
    custom_id: str
    reason: str


class _Counter:
    """Counts the prompts for one model, or estimates them.

    Attributes:
        expansion: upper bound of a prompt's tokens, without the template, per byte of its line.
        base: tokens of an empty conversation.
    """

    def __init__(self, limit: PromptLimit, tokenizer: ModelTokenizer | None) -> None:
        self.limit = limit
        self._tokenizer = tokenizer
        self.expansion = max(_INDENTED, tokenizer.expansion if tokenizer else 1)
        empty = tokenizer.count_chat([{"role": "user", "content": ""}]) if tokenizer else None
        self._templated = empty is not None
        self.base = empty or 0

    def most(self, raw: bytes) -> int:
        """Return an upper bound of the tokens of a request's prompt."""
        plain = self._tokenizer is None or (raw.isascii() and b"\\u" not in raw)
        if plain and b'"tools"' not in raw:
            return len(raw) + self.base
        return len(raw) * self.expansion + self.base

    def count(self, url: str, body: Mapping[str, Any]) -> int:
        """Return the tokens of a prompt."""
        estimate = estimate_prompt(body)
        if self._tokenizer is None or (self.limit.asks and self._is_short(url, body, estimate)):
            return estimate
        return count_prompt(self._tokenizer, url, body)

    def _is_short(self, url: str, body: Mapping[str, Any], estimate: int) -> bool:
        """Return whether a prompt is too short to ask a server about it."""
        most = _ESTIMATE_FACTOR * estimate + self.answer(url, body)
        return not body.get("tools") and most <= self.limit.context

    def answer(self, url: str, body: Mapping[str, Any]) -> int:
        """Return the tokens that an answer may have; 1 if it has no limit."""
        if url in WITHOUT_TEXT:
            return 0
        return self._limited_answer(body) or 1

    def _limited_answer(self, body: Mapping[str, Any]) -> int:
        return answer_tokens(body) or self.limit.answer

    def split(self, url: str, body: Mapping[str, Any], defaults: Mapping[str, Any]) -> Split:
        """Split a request that is too long.

        Raises:
            NoSplitError: it cannot be split.
        """
        if self._tokenizer is None:
            raise NoSplitError("its tokens are only estimated")
        answer = self._limited_answer(body)
        # Exactly, also what is short: from an estimate, no part of about the right size is found.
        count = partial(count_prompt, self._tokenizer)
        fit = Fit(self.limit.context, answer, self._tokenizer, count, defaults, self._templated)
        return split_prompt(url, body, fit)


ChooseModel = Callable[[str | None], str | None]
"""Returns the run's model for the model that a request names."""


@dataclass(frozen=True)
class FoundPrompts:
    """What is known about prompts that are too long.

    Attributes:
        offsets: of their lines in the input.
        tokens: of each.
        splits: of each, if they are split and all of them can be.
        unsplit: the first that cannot be split.
        whole: number of those.
    """

    facts: LongPrompts
    offsets: Sequence[int]
    tokens: Sequence[int]
    splits: Sequence[Split] = ()
    unsplit: Sequence[Unsplit] = ()
    whole: int = 0

    def unsplit_error(self, path: Path, named: Path) -> InputError:
        """Return the error for a run with requests that cannot be split.

        Args:
            path: of the input.
            named: the file that the user named.
        """
        noun = "prompt is" if self.whole == 1 else "prompts are"
        numbers = line_numbers(path, [each.offset for each in self.unsplit])
        lines = [
            (number, f"the request {each.custom_id!r} cannot be split: {each.reason}")
            for number, each in zip(numbers, self.unsplit, strict=True)
        ]
        rest = self.whole - len(lines)
        options = [
            "change them",
            *filter(None, [self.facts.longer_context]),
            "--too-long skip (leave all out that are too long)",
        ]
        return InputError(
            f"{self.whole:,} {noun} too long for the context of {self.facts.context:,} tokens in "
            f"{str(named)!r}, and cannot be split (--too-long chunk); nothing was sent",
            ", or ".join(options),
            (
                *(f"line {number:,}: {text}" for number, text in lines),
                *([f"... and {rest:,} more"] if rest else []),
            ),
            lines=tuple(lines),
            count=self.whole,
        )


def find_long_prompts(
    summary: InputFacts,
    limits: Mapping[str, PromptLimit],
    choose: ChooseModel,
    *,
    split_with: Mapping[str, Any] | None = None,
    span: tuple[int, int | None] = (0, None),
    part_bytes: int = _PART_BYTES,
    children: int | None = None,
) -> FoundPrompts | None:
    """Return the prompts that are too long or leave little of the context; None if there are none.

    Args:
        limits: of each model of the run; of a model that is not in it, nothing is known.
        split_with: split those that are too long; the fields that the run fills into bodies.
        span: offsets between which the input is read; None for its end.
        part_bytes: the input is counted in parts of about this size.
        children: processes that share the work; None for as many as is safe.

    Raises:
        InputError: the input cannot be read.
        EngineError: a server stopped counting.
    """
    answers = max([1, summary.longest_answer, *(limit.answer for limit in limits.values())])
    near = {
        model: limit
        for model, limit in limits.items()
        if LARGEST_EXPANSION * summary.longest_line + answers > limit.context // 2
    }
    with one_thread(), ExitStack() as stack:
        counters, problem = _counters(near, stack)
        if all(
            each.expansion * summary.longest_line + each.base + answers <= each.limit.context
            for each in counters.values()
        ):
            return None
        work = partial(_find_in_part, summary.path, counters, choose, answers, split_with)
        asks = any(each.limit.asks for each in counters.values())
        found = _find(summary.path, span, work, part_bytes, children, asks=asks)
    if not found.offsets and not found.tight:
        return None
    limit = min((each.limit for each in counters.values()), key=lambda limit: limit.context)
    first = found.offsets[:_SHOWN_LINES]
    facts = LongPrompts(
        context=limit.context,
        maximum=limit.maximum,
        too_long=len(found.offsets),
        tight=found.tight,
        longest=found.longest,
        needed=found.needed,
        lines=tuple(line_numbers(summary.path, first)),
        tokens=tuple(found.tokens[:_SHOWN_LINES]),
        uncounted="" if problem is None else problem.message,
        remedy="" if problem is None else problem.remedy or "",
        parts=sum(len(split.ends) for split in found.splits),
    )
    return FoundPrompts(
        facts, found.offsets, found.tokens, found.splits, found.unsplit, found.whole
    )


def _counters(
    limits: Mapping[str, PromptLimit], stack: ExitStack
) -> tuple[dict[str, _Counter], AifluxError | None]:
    """Return the counter for each model, and why one of them can only estimate.

    Args:
        stack: closes their tokenizers.
    """
    counters, problem = {}, None
    for model, limit in limits.items():
        tokenizer = None
        try:
            tokenizer = limit.open_tokenizer()
            stack.callback(tokenizer.close)
        except (ModelError, ConfigError) as error:
            problem = error
        counters[model] = _Counter(limit, tokenizer)
    return counters, problem


@dataclass
class _Found:
    """What a part of the input contains.

    Attributes:
        offsets, tokens: of the prompts that are too long.
        tight, longest, needed: see ``LongPrompts``.
        splits, unsplit, whole: see ``FoundPrompts``.
    """

    offsets: array[int] = field(default_factory=lambda: array("q"))
    tokens: array[int] = field(default_factory=lambda: array("q"))
    tight: int = 0
    longest: int = 0
    needed: int = 0
    splits: list[Split] = field(default_factory=list)
    unsplit: list[Unsplit] = field(default_factory=list)
    whole: int = 0

    def merge(self, other: _Found) -> None:
        """Add those of the part that follows."""
        self.offsets += other.offsets
        self.tokens += other.tokens
        self.tight += other.tight
        self.longest = max(self.longest, other.longest)
        self.needed = max(self.needed, other.needed)
        self.splits += other.splits
        self.unsplit = [*self.unsplit, *other.unsplit][:_SHOWN_LINES]
        self.whole += other.whole

    def add(self, offset: int, tokens: int, answer: int, context: int) -> bool:
        """Add a prompt; return whether it is too long."""
        self.longest = max(self.longest, tokens)
        if tokens + answer <= context:
            return False
        self.needed = max(self.needed, tokens + answer)
        too_long = tokens + min(answer, 1) > context
        if too_long:
            self.offsets.append(offset)
            self.tokens.append(tokens)
        else:
            self.tight += 1
        return too_long

    def add_unsplit(self, offset: int, custom_id: str, reason: str) -> None:
        """Add a request that cannot be split."""
        self.whole += 1
        if len(self.unsplit) < _SHOWN_LINES:
            self.unsplit.append(Unsplit(offset, custom_id, reason))


def _find(
    path: Path,
    span: tuple[int, int | None],
    work: Callable[[tuple[int, int]], _Found],
    part_bytes: int,
    children: int | None,
    *,
    asks: bool,
) -> _Found:
    found = _Found()
    try:
        parts = cut_at_lines(path, min(part_bytes, _ASKED_BYTES) if asks else part_bytes, *span)
        if asks:
            require_thread_memory(AT_ONCE * THREAD_BYTES)
            with ThreadPoolExecutor(AT_ONCE) as pool:
                for part in pool.map(work, parts):
                    found.merge(part)
            return found
        children = children if children is not None else helpers() if len(parts) > 1 else 0
        with closing(share_out(work, parts, children)) as results:
            for part in results:
                found.merge(part)
    except OSError as error:
        raise unreadable(path, error) from error
    return found


def _find_in_part(
    path: Path,
    counters: Mapping[str, _Counter],
    choose: ChooseModel,
    answers: int,
    split_with: Mapping[str, Any] | None,
    part: tuple[int, int],
) -> _Found:
    """Count the prompts of a part, and split them.

    Args:
        answers: tokens of the longest answer.
        split_with: see ``find_long_prompts``.
    """
    found = _Found()
    for _, offset, raw in read_lines(path, *part):
        if all(each.most(raw) + answers <= each.limit.context for each in counters.values()):
            continue
        entry = load_json(raw)
        body, url = entry["body"], endpoint_url(entry)
        counter = counters.get(choose(body.get("model")) or "")
        if counter is None:
            continue
        answer = counter.answer(url, body)
        if counter.most(raw) + answer <= counter.limit.context:
            continue
        too_long = found.add(offset, counter.count(url, body), answer, counter.limit.context)
        if too_long and split_with is not None:
            try:
                found.splits.append(counter.split(url, body, split_with))
            except NoSplitError as error:
                found.add_unsplit(offset, entry["custom_id"], str(error))
    return found


def count_prompt(tokenizer: ModelTokenizer, url: str, body: Mapping[str, Any]) -> int:
    """Return the tokens of a request's prompt; of several independent ones, of the longest.

    Images, audio and what an engine's own template adds are not counted, so the prompt has at
    least this number.
    """
    messages = body.get("messages")
    if isinstance(messages, list):
        tools = {"tools": body["tools"]} if body.get("tools") else {}
        given = body.get("chat_template_kwargs")
        more = {**(given if isinstance(given, dict) else {}), **tools}
        tokens = tokenizer.count_chat(list(map(_flat, messages)), more)
        return sum(map(tokenizer.count, _texts(messages))) if tokens is None else tokens
    if scored := scored_texts(body):
        ones, others = (each if isinstance(each, list) else [each] for each in scored)
        pairs = zip(ones * len(others) if len(ones) == 1 else ones, others, strict=False)
        return max((sum(map(tokenizer.count, _texts([*pair]))) for pair in pairs), default=0)
    if url == RESPONSES:
        texts = _texts([body.get("instructions"), body.get("input")])
        return sum(map(tokenizer.count, texts))
    payload: Any = body.get("prompt") if url == COMPLETIONS else body.get("input")
    alone = not isinstance(payload, list) or _is_tokens(payload)
    several = [payload] if alone else payload
    return max((_count_payload(tokenizer, each) for each in several), default=0)


def _count_payload(tokenizer: ModelTokenizer, payload: Any) -> int:
    """Return the tokens of a text, or of a list of tokens."""
    if isinstance(payload, str):
        return tokenizer.count(payload, special=True)
    if _is_tokens(payload):
        return len(payload)
    return sum(map(tokenizer.count, _texts(payload)))


def _is_tokens(payload: Any) -> bool:
    return isinstance(payload, list) and bool(payload) and all(type(x) is int for x in payload)


def _flat(message: Any) -> Any:
    """Return a message with a plain text instead of a list of text parts, as engines make it."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    return {**message, "content": "".join(_texts(content))}


def _texts(payload: Any) -> Iterator[str]:
    """Yield the texts in messages, parts of messages and documents."""
    if isinstance(payload, str):
        yield payload
    elif isinstance(payload, list):
        for part in payload:
            yield from _texts(part)
    elif isinstance(payload, dict):
        for name in ("content", "text", "query", "input"):
            if name in payload:
                yield from _texts(payload[name])
