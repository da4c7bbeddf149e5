"""Texts that are too long are split into parts that each fit, at the best boundary."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiflux.core.batch.input_file import scan_input
from aiflux.core.batch.prompt_lengths import (
    FoundPrompts,
    PromptLimit,
    count_prompt,
    find_long_prompts,
)
from aiflux.core.batch.prompt_split import (
    Fit,
    NoSplitError,
    Split,
    split_prompt,
    text_at,
    with_text,
)
from aiflux.models.tokenizer import ChatTemplate, ModelTokenizer
from tests.tools.make_tiny_snapshot import TEMPLATE
from tests.unit.helpers import request_line
from tests.unit.models.test_tokenizer import LLAMA3, TEXTS, byte_level, sentence_pieces
from tests.unit.working import bytewise_tokenizer

CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS, RERANK, SCORE = (
    f"/v1/{name}"
    for name in ("chat/completions", "completions", "responses", "embeddings", "rerank", "score")
)
KINDS = ["bytewise", "byte level", "sentence pieces"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelTokenizer]:
    """A tokenizer with one token for each byte, and two that are trained, with a template."""
    template = ChatTemplate(TEMPLATE, {})
    return {
        "bytewise": bytewise_tokenizer(tmp_path_factory.mktemp("model")),
        "byte level": ModelTokenizer(byte_level(LLAMA3), template, added=1, start="<s>"),
        "sentence pieces": ModelTokenizer(sentence_pieces(), template, added=1, start="<s>"),
    }


def fit_of(tokenizer: ModelTokenizer, context: int, answer: int = 0, **defaults: Any) -> Fit:
    count, templated = partial(count_prompt, tokenizer), tokenizer.template is not None
    return Fit(context, answer, tokenizer, count, defaults, templated)


def chat(text: str, *others: str, **more: Any) -> dict[str, Any]:
    before = [{"role": "system", "content": each} for each in others]
    return {"messages": [*before, {"role": "user", "content": text}], **more}


def texts_of(split: Split, body: dict[str, Any]) -> list[str]:
    return [text_at(split.part(body, at), split.at) for at in range(len(split.ends))]


WORDS = st.lists(
    st.sampled_from([*TEXTS, "word ", "A sentence. ", "\n\n", "\n", "長い文。", "क्ष", "x" * 90])
    | st.text(max_size=30),
    min_size=1, max_size=60,
).map("".join).filter(bool)  # fmt: skip
BODIES = {
    CHAT: lambda text: chat(text, "Summarise."),
    COMPLETIONS: lambda text: {"prompt": text},
    EMBEDDINGS: lambda text: {"input": [text]},
    RESPONSES: lambda text: {"input": text, "instructions": "Summarise."},
}


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    url=st.sampled_from(sorted(BODIES)),
    text=WORDS,
    context=st.integers(260, 500),
    answer=st.integers(0, 40),
)
def test_the_parts_make_the_text_and_each_fits(
    made: dict[str, ModelTokenizer], kind: str, url: str, text: str, context: int, answer: int
) -> None:
    body = BODIES[url](text)
    fit = fit_of(made[kind], context, answer)
    split = split_prompt(url, body, fit)
    parts = texts_of(split, body)
    assert "".join(parts) == text_at(body, split.at) == text
    assert all(parts)
    assert len(split.tokens) == len(parts)
    reserved = 0 if url == EMBEDDINGS else answer or context // 4
    for part in parts:
        assert fit.count(url, with_text(body, split.at, part)) + reserved <= context
    assert split == split_prompt(url, body, fit), "the split is another each time"
    # All else of the request is in every part.
    for number in range(len(parts)):
        assert with_text(split.part(body, number), split.at, text) == body


SENTENCE = "It is so. "


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_a_document_end_at_its_paragraphs(
    made: dict[str, ModelTokenizer], kind: str
) -> None:
    text = "\n\n".join(f"# Part {n}\n{SENTENCE * (3 + n % 7)}" for n in range(60))
    body = chat(text, "Summarise.")
    context = count_prompt(made[kind], CHAT, body) // 4
    split = split_prompt(CHAT, body, fit_of(made[kind], context, 50))
    parts = texts_of(split, body)
    assert all(part.endswith("\n\n") for part in parts[:-1])
    # They are of about one size: none is a short rest.
    assert 4 <= len(parts) <= 6
    assert min(split.tokens) > max(split.tokens) / 2


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        (f"{SENTENCE * 9}\n\n" * 12, "\n\n"),
        (f"{SENTENCE * 9}\r\n\r\n" * 12, "\r\n\r\n"),
        (f"{SENTENCE * 9}\n" * 12, "\n"),
        (SENTENCE * 100, ". "),
        ("これは長い文です。" * 60, "。"),
        ("word " * 300, " "),
        ("x" * 900, "x"),
        ("เป็นที่รู้จัก" * 30, ""),
    ],
    ids=["paragraph", "crlf", "line", "sentence", "cjk", "blank", "token", "no blanks"],
)
def test_the_best_boundary_is_used(made: dict[str, ModelTokenizer], text: str, ending: str) -> None:
    body = {"input": text}
    split = split_prompt(EMBEDDINGS, body, fit_of(made["bytewise"], 200))
    parts = texts_of(split, body)
    assert len(parts) > 2
    assert all(part.endswith(ending) for part in parts)
    assert all(len(part.encode()) <= 200 for part in parts)


def test_a_character_stays_with_its_marks(made: dict[str, ModelTokenizer]) -> None:
    text = "e\u0301" * 200
    body = {"input": text}
    split = split_prompt(EMBEDDINGS, body, fit_of(made["bytewise"], 50))
    assert all(part[0] == "e" and part[-1] == "\u0301" for part in texts_of(split, body))


def test_of_several_texts_in_a_message_the_longest_is_split(
    made: dict[str, ModelTokenizer],
) -> None:
    ask, document = ({"type": "text", "text": text} for text in ("Summarise:", "a b c " * 100))
    body = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "?"},
                         {"role": "user", "content": [ask, document]},
                         {"role": "assistant", "content": "Well,"}]}  # fmt: skip
    split = split_prompt(CHAT, body, fit_of(made["bytewise"], 300, 20))
    assert split.at == ("messages", 2, "content", 1, "text")
    for number in range(len(split.ends)):
        assert split.part(body, number)["messages"][2]["content"][0] == ask


def test_a_template_that_is_not_known_gets_room(made: dict[str, ModelTokenizer]) -> None:
    """Ollama has templates of its own, which can write some words around a message."""
    plain = ModelTokenizer(made["bytewise"].tokenizer)
    body = chat("x" * 2000, "Summarise.")
    split = split_prompt(CHAT, body, fit_of(plain, 512, 100))
    rest = len("Summarise.")
    assert max(split.tokens) <= 512 - 100 - rest - 128 - 2 * 16


TOOL = {"type": "function", "function": {"name": "f"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
LONG = "word " * 300


@pytest.mark.parametrize(
    ("url", "body", "reason"),
    [
        (CHAT, chat(LONG, tools=[TOOL]), "it has tools"),
        (CHAT, chat(LONG, response_format={"type": "json_object"}), "answer is given (response_"),
        (CHAT, chat(LONG, response_format={"type": "json_schema", "json_schema": {}}),
         "the form of its answer is given (response_format)"),
        (RESPONSES, {"input": LONG, "text": {"format": {"type": "json_schema", "schema": {}}}},
         "the form of its answer is given (text.format)"),
        (CHAT, chat(LONG, guided_choice=["a"]), "the form of its answer is given"),
        (CHAT, chat(LONG, n=3), "it asks for 3 answers"),
        (CHAT, chat(LONG, logprobs=True), "logprobs"),
        (COMPLETIONS, {"prompt": LONG, "echo": True}, "echo"),
        (COMPLETIONS, {"prompt": LONG, "suffix": "end"}, "suffix"),
        (COMPLETIONS, {"prompt": [LONG, "b"]}, "prompt is not one text"),
        (COMPLETIONS, {"prompt": [5] * 900}, "prompt is not one text"),
        (EMBEDDINGS, {"input": [LONG, "b"]}, "input is not one text"),
        (EMBEDDINGS, {"input": LONG, "encoding_format": "base64"}, "encoding_format"),
        (RESPONSES, {"input": [{"role": "user", "content": LONG}]}, "input is not one text"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG}, IMAGE]}]},
         "it has more than text"),
        (CHAT, {"messages": [{"role": "system", "content": LONG}]}, "no message of the user"),
        (CHAT, chat("short", LONG), "without its text it has 1,"),
        (CHAT, chat(LONG), "and 900 are kept free for the answer and the template: that "
         "leaves 0 of 512 for a part, which needs 16 at least"),
        (RERANK, {"query": "a", "documents": [LONG]}, "/v1/rerank compares texts"),
        (SCORE, {"text_1": "a", "text_2": LONG}, "/v1/score compares texts"),
    ],
)  # fmt: skip
def test_a_request_that_must_stay_whole_is_not_split(
    made: dict[str, ModelTokenizer], url: str, body: dict[str, Any], reason: str
) -> None:
    answer = 900 if "900 are kept" in reason else 0
    with pytest.raises(NoSplitError) as caught:
        split_prompt(url, body, fit_of(made["bytewise"], 512, answer))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "more",
    [{"tools": []}, {"response_format": {"type": "text"}}, {"n": 1}, {"logprobs": False},
     {"stream": True}, {"seed": 5}, {"response_format": None}],
)  # fmt: skip
def test_fields_that_change_nothing_do_not_hinder(
    made: dict[str, ModelTokenizer], more: dict[str, Any]
) -> None:
    assert split_prompt(CHAT, chat(LONG, **more), fit_of(made["bytewise"], 512)).ends


def test_answers_that_the_run_asks_for_count_as_those_of_the_request(
    made: dict[str, ModelTokenizer],
) -> None:
    fit = fit_of(made["bytewise"], 512, n=2)
    with pytest.raises(NoSplitError, match="it asks for 2 answers"):
        split_prompt(CHAT, chat(LONG), fit)
    assert split_prompt(EMBEDDINGS, {"input": LONG}, fit).ends
    assert split_prompt(CHAT, chat(LONG, n=1), fit).ends


def found_in(
    path: Path, tokenizer: ModelTokenizer, *bodies: dict[str, Any], **more: Any
) -> FoundPrompts:
    lines = [
        request_line(f"r{at}", body={"model": "m:1", **body}) for at, body in enumerate(bodies)
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    limit = PromptLimit(256, 2048, 0, lambda: tokenizer)
    found = find_long_prompts(
        scan_input(path), {"m:1": limit}, lambda named: named, split_with={}, **more
    )
    assert found is not None
    return found


def test_only_prompts_that_are_too_long_are_split(
    tmp_path: Path, made: dict[str, ModelTokenizer]
) -> None:
    bodies = [chat("x" * (at % 7 * 100)) for at in range(60)]
    alone = found_in(tmp_path / "in.jsonl", made["bytewise"], *bodies, part_bytes=2000, children=0)
    shared = found_in(tmp_path / "in.jsonl", made["bytewise"], *bodies, part_bytes=2000, children=2)
    assert alone == shared
    assert alone.facts.too_long == len(alone.splits) == sum(at % 7 > 2 for at in range(60))
    assert alone.facts.parts == sum(len(split.ends) for split in alone.splits)
    assert not alone.whole


def test_the_error_names_each_request_that_must_stay_whole(
    tmp_path: Path, made: dict[str, ModelTokenizer]
) -> None:
    bodies = [chat("x" * 900), *(chat("x" * 900, n=2) for _ in range(25)), chat("x")]
    path = tmp_path / "in.jsonl"
    error = found_in(path, made["bytewise"], *bodies).unsplit_error(path, path)
    assert error.message == (
        f"25 prompts are too long for the context of 256 tokens in {str(path)!r}, and cannot be "
        "split (--too-long chunk); nothing was sent"
    )
    assert error.problems[0] == "line 2: the request 'r1' cannot be split: it asks for 2 answers"
    assert error.problems[-1] == "... and 5 more"
    assert (len(error.problems), error.count) == (21, 25)
    assert "--context-length 1024, or --too-long skip" in str(error.remedy)
