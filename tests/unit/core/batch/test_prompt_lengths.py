"""Prompts that are longer than the context: which are found, and which are not even counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiflux.core.batch.input_file import scan_input
from aiflux.core.batch.prompt_lengths import (
    FoundPrompts,
    LongPrompts,
    PromptLimit,
    count_prompt,
    find_long_prompts,
)
from aiflux.errors import ConfigError, InputError, ModelError
from aiflux.models.tokenizer import ModelTokenizer
from tests.unit.helpers import request_line
from tests.unit.working import bytewise_tokenizer

CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS, RERANK, SCORE = (
    f"/v1/{name}"
    for name in ("chat/completions", "completions", "responses", "embeddings", "rerank", "score")
)
GENERATE = (CHAT, COMPLETIONS, RESPONSES)


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    return bytewise_tokenizer(tmp_path_factory.mktemp("model"))


def limit_of(tokenizer: ModelTokenizer, context: int, answer: int = 0) -> PromptLimit:
    return PromptLimit(context, 10 * context, answer, lambda: tokenizer)


def write(path: Path, *requests: tuple[str, dict[str, Any]]) -> Path:
    lines = [
        request_line(f"r{at}", url=url, body={"model": "m:1", **body})
        for at, (url, body) in enumerate(requests)
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def found_in(path: Path, limit: PromptLimit, **more: Any) -> FoundPrompts | None:
    summary = scan_input(path)
    return find_long_prompts(summary, {"m:1": limit}, lambda named: named, **more)


def chat(text: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": [{"role": "user", "content": text}], **more}


WORDS = st.text(max_size=40)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "system"]),
        "content": WORDS | st.lists(st.builds(lambda text: {"type": "text", "text": text}, WORDS)),
    }
)
LIMIT = st.fixed_dictionaries({}, optional={"max_tokens": st.integers(1, 80)})
REQUEST = st.one_of(
    st.tuples(st.just(CHAT), st.fixed_dictionaries({"messages": st.lists(MESSAGE, min_size=1)})),
    st.tuples(
        st.just(COMPLETIONS),
        st.fixed_dictionaries(
            {
                "prompt": WORDS
                | st.lists(WORDS, min_size=1)
                | st.lists(st.integers(0, 9), min_size=1)
            }
        ),
    ),
    st.tuples(
        st.just(EMBEDDINGS), st.fixed_dictionaries({"input": WORDS | st.lists(WORDS, min_size=1)})
    ),
    st.tuples(
        st.just(RERANK),
        st.fixed_dictionaries({"query": WORDS, "documents": st.lists(WORDS, min_size=1)}),
    ),
)


@pytest.mark.parametrize(
    ("url", "body", "tokens"),
    [
        (RERANK, {"query": "12", "documents": ["a", {"text": "abc"}, ""]}, 5),
        (SCORE, {"text_1": "12", "text_2": ["a", "abc"]}, 5),
        (SCORE, {"queries": ["12", "1"], "documents": ["a", "abc"]}, 4),
        (SCORE, {"data_1": "12", "data_2": "3"}, 3),
        (EMBEDDINGS, {"input": ["12", "345"]}, 3),
        (EMBEDDINGS, {"input": [[1, 2, 3, 4], [5]]}, 4),
        (COMPLETIONS, {"prompt": [7, 8]}, 2),
        (RESPONSES, {"input": "123", "instructions": "45"}, 5),
        (RESPONSES, {"input": [{"role": "user", "content": [
            {"type": "input_text", "text": "123"}, {"type": "input_image", "image_url": "http://x"}]}]},
         3),
        (CHAT, {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "ab"}, {"type": "image_url", "image_url": {"url": "x"}}]}]},
         1 + len("user\nab") + 1 + 1 + 1 + len("assistant\n")),
    ],
)  # fmt: skip
def test_each_endpoint_has_its_prompt(
    bytewise: ModelTokenizer, url: str, body: dict[str, Any], tokens: int
) -> None:
    """Of several independent texts, the longest counts; images do not count."""
    assert count_prompt(bytewise, url, body) == tokens


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(REQUEST, LIMIT), min_size=1, max_size=12),
    context=st.integers(1, 200),
    answer=st.integers(0, 50),
    part_bytes=st.integers(1, 400),
)
def test_the_same_prompts_are_found_as_if_all_were_counted(
    tmp_path_factory: pytest.TempPathFactory,
    bytewise: ModelTokenizer,
    requests: list[tuple[tuple[str, dict[str, Any]], dict[str, Any]]],
    context: int,
    answer: int,
    part_bytes: int,
) -> None:
    """Most requests are not counted, because they have fewer bytes than the context has tokens."""
    bodies = [
        (url, {**body, **(more if url in GENERATE else {})}) for (url, body), more in requests
    ]
    path = write(tmp_path_factory.mktemp("in") / "in.jsonl", *bodies)
    tokens = [count_prompt(bytewise, url, body) for url, body in bodies]
    answers = [
        (body.get("max_tokens", 0) or answer or 1) if url in GENERATE else 0 for url, body in bodies
    ]
    long = [at for at, n in enumerate(tokens) if n + min(1, answers[at]) > context]
    tight = sum(n + answers[at] > context for at, n in enumerate(tokens)) - len(long)

    found = found_in(path, limit_of(bytewise, context, answer), part_bytes=part_bytes, children=0)

    if not long and not tight:
        assert found is None
        return
    assert found is not None
    assert (found.facts.too_long, found.facts.tight) == (len(long), tight)
    assert found.facts.lines == tuple(at + 1 for at in long)
    assert found.facts.tokens == tuple(tokens[at] for at in long) == tuple(found.tokens)
    needed = max(n + answers[at] for at, n in enumerate(tokens) if n + answers[at] > context)
    assert found.facts.needed == needed


def test_several_processes_find_the_same(tmp_path: Path, bytewise: ModelTokenizer) -> None:
    path = write(tmp_path / "in.jsonl", *(chat("x" * (at % 90)) for at in range(500)))
    limit = limit_of(bytewise, 100)
    alone = found_in(path, limit, part_bytes=3000, children=0)
    shared = found_in(path, limit, part_bytes=3000, children=2)
    assert alone is not None
    assert alone.facts.too_long > 20
    assert alone == shared


def test_the_context_must_have_room_for_one_token_of_an_answer(
    tmp_path: Path, bytewise: ModelTokenizer
) -> None:
    whole = count_prompt(bytewise, *chat("x" * 50))
    generated = write(tmp_path / "in.jsonl", chat("x" * 50), chat("x" * 51))
    found = found_in(generated, limit_of(bytewise, whole + 1))
    assert found is not None
    assert found.facts.lines == (2,)
    embedded = write(tmp_path / "in.jsonl", *((EMBEDDINGS, {"input": "x" * n}) for n in (50, 51)))
    found = found_in(embedded, limit_of(bytewise, 50))
    assert found is not None
    assert found.facts.lines == (2,)


def test_prompts_that_leave_less_than_max_tokens_are_not_too_long(
    tmp_path: Path, bytewise: ModelTokenizer
) -> None:
    path = write(tmp_path / "in.jsonl", chat("x" * 50), chat("x" * 50, max_tokens=200))
    found = found_in(path, limit_of(bytewise, 256))
    assert found is not None
    assert (found.facts.too_long, found.facts.tight) == (0, 1)
    assert found.facts.longer_context == "--context-length 512"
    with_default = found_in(path, limit_of(bytewise, 256, answer=200))
    assert with_default is not None
    assert with_default.facts.tight == 2


def test_each_model_has_its_own_context(tmp_path: Path, bytewise: ModelTokenizer) -> None:
    messages = [{"role": "user", "content": "x" * 90}]
    lines = [
        request_line(name, body={"model": name, "messages": messages})
        for name in ("small", "large", "unknown")
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    limits = {"small": limit_of(bytewise, 64), "large": limit_of(bytewise, 4096)}
    found = find_long_prompts(scan_input(path), limits, lambda named: named)
    assert found is not None
    assert found.facts.lines == (1,)
    assert found.facts.context == 64


def test_short_prompts_do_not_even_need_the_tokenizer(tmp_path: Path) -> None:
    def open_tokenizer() -> ModelTokenizer:
        raise AssertionError("it was opened")

    path = write(tmp_path / "in.jsonl", chat("short"))
    assert found_in(path, PromptLimit(8192, 8192, 0, open_tokenizer)) is None


@pytest.mark.parametrize(
    "error", [ModelError("m:1 is not stored", "pull it"), ConfigError("no library", "install it")]
)
def test_without_a_tokenizer_the_figures_are_estimates(
    tmp_path: Path, error: ModelError | ConfigError
) -> None:
    def open_tokenizer() -> ModelTokenizer:
        raise error

    path = write(tmp_path / "in.jsonl", chat("x" * 300), chat("x" * 3000))
    found = found_in(path, PromptLimit(512, 8192, 0, open_tokenizer))
    assert found is not None
    assert found.facts.lines == (2,)
    assert found.facts.tokens == (1017,)
    assert not found.facts.counted
    assert (found.facts.uncounted, found.facts.remedy) == (error.message, error.remedy)


def test_the_error_names_the_lines_and_what_helps(tmp_path: Path, bytewise: ModelTokenizer) -> None:
    path = write(tmp_path / "in.jsonl", *(chat("x" * n) for n in [9, *[700] * 25, 9]))
    found = found_in(path, limit_of(bytewise, 512))
    assert found is not None
    error = found.facts.error(path)
    assert isinstance(error, InputError)
    assert error.message == (
        f"25 prompts are too long for the context of 512 tokens in {str(path)!r}; nothing was sent"
    )
    assert error.remedy is not None
    assert "--context-length 1024, or --too-long skip" in error.remedy
    tokens = count_prompt(bytewise, *chat("x" * 700))
    assert error.problems[0] == f"line 2: {tokens} tokens"
    assert error.problems[-1] == "... and 5 more"
    assert len(error.problems) == 21
    assert error.count == 25


def test_a_context_that_the_model_does_not_have_is_not_advised() -> None:
    facts = LongPrompts(
        context=4096, maximum=8192, too_long=1, needed=8193, lines=(1,), tokens=(8192,)
    )
    assert facts.longer_context == ""
    remedy = facts.error(Path("in.jsonl")).remedy
    assert remedy is not None
    assert "a model or server with more than 8,192 tokens of context" in remedy
    whole = LongPrompts(context=4096, maximum=8000, too_long=1, needed=7990)
    assert whole.longer_context == "--context-length 8000"
