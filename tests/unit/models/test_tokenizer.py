"""The tokenizers in model files count as the libraries do that made them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from aiflux.errors import ModelError
from aiflux.models.tokenizer import (
    LARGEST_EXPANSION,
    ModelTokenizer,
    gguf_tokenizer,
    snapshot_tokenizer,
)
from tests.tools.make_tiny_gguf import (
    BOOL,
    FLOAT32,
    INT32,
    STRING,
    UINT32,
    entry,
    gguf,
    list_entry,
    tiny,
)
from tests.tools.make_tiny_snapshot import tokenizer as tiny_tokenizer

DOCS = sorted((Path(__file__).parents[3] / "docs").glob("*.md"))
# As the tokenizer.json of Llama 3 has it.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|user|>{{ message.role }}: "
    "{{ message.content }}</s>{% endfor %}{% if add_generation_prompt %}<|user|>{% endif %}"
)
TEXTS = [
    "",
    "  Two  spaces, don't WE'RE\n\n\ttabs\r\n",
    "3.14159 1234567 １２３ ⅷ ٣٤٥",
    "def f(x):\n    return x ** 2  # square\n",
    "日本語のテキスト ไทย हिन्दी العربية e\u0301 क्ष",
    "😀👩‍👩‍👧‍👦🏳️‍🌈",
    "<s>hi</s><|user|>there <unk>",
]
HALF = "half of a pair: \ud83d"


def merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(each.split(" ")) if isinstance(each, str) else tuple(each) for each in merges]


def vocabulary_of(tokenizer: Tokenizer) -> list[str]:
    return sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)


def write_gguf(
    path: Path, kind: str, tokens: Sequence[str], types: Sequence[int], *more: bytes
) -> Path:
    path.write_bytes(
        gguf(
            [
                entry("general.architecture", STRING, "llama"),
                entry("tokenizer.ggml.model", STRING, kind),
                list_entry("tokenizer.ggml.tokens", STRING, tokens),
                list_entry("tokenizer.ggml.token_type", INT32, types),
                entry("tokenizer.ggml.bos_token_id", UINT32, 1),
                entry("tokenizer.ggml.eos_token_id", UINT32, 2),
                entry("tokenizer.chat_template", STRING, TEMPLATE),
                *more,
            ],
            {},
        )
    )
    return path


def byte_level(pattern: str) -> Tokenizer:
    """Return a trained tokenizer of the kind that Llama 3 has."""
    made = Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train([str(path) for path in DOCS], trainer)
    return made


def sentence_pieces() -> Tokenizer:
    """Return a trained tokenizer of the kind that Llama 2 and Mistral have."""
    made = Tokenizer(models.BPE(byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    made.train([str(path) for path in DOCS], trainer)
    # Used without the words that it was trained with, as sentencepiece does.
    made.pre_tokenizer = None
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def llama3(folder: Path) -> tuple[Tokenizer, ModelTokenizer]:
    made = byte_level(LLAMA3)
    tokens = vocabulary_of(made)
    types = [CONTROL if token in SPECIAL else NORMAL for token in tokens]
    merges = [" ".join(pair) for pair in merges_of(made)]
    path = write_gguf(
        folder / "llama3.gguf", "gpt2", tokens, types,
        list_entry("tokenizer.ggml.merges", STRING, merges),
        entry("tokenizer.ggml.pre", STRING, "llama-bpe"),
    )  # fmt: skip
    return made, gguf_tokenizer(path, templated=True)


@pytest.fixture(scope="module")
def llama2(folder: Path) -> tuple[Tokenizer, ModelTokenizer]:
    made = sentence_pieces()
    tokens = vocabulary_of(made)
    kinds = {"<unk>": UNKNOWN, "<|user|>": USER_DEFINED, "<s>": CONTROL, "</s>": CONTROL}
    types = [kinds.get(token, BYTE if token.startswith("<0x") else NORMAL) for token in tokens]
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges_of(made)):
        ranks.setdefault("".join(pair), rank)
    scores = [-float(ranks.get(token, 10**6 + at)) for at, token in enumerate(tokens)]
    path = write_gguf(
        folder / "llama2.gguf", "llama", tokens, types,
        list_entry("tokenizer.ggml.scores", FLOAT32, scores),
        entry("tokenizer.ggml.add_eos_token", BOOL, False),
    )  # fmt: skip
    return made, gguf_tokenizer(path, templated=True)


@pytest.mark.parametrize("kind", ["llama3", "llama2"])
def test_each_token_ends_where_the_text_before_it_does(
    kind: str, request: pytest.FixtureRequest
) -> None:
    _, found = request.getfixturevalue(kind)
    for text in [*TEXTS, HALF, *(path.read_text(encoding="utf-8")[:5000] for path in DOCS[:5])]:
        ends = found.ends(text)
        assert len(ends) == found.count(text)
        assert ends == sorted(ends)
        assert not text or ends[-1] == len(text)
    assert found.ends("one two") == sorted({*found.ends("one two")}), "no token of ASCII is empty"


@pytest.mark.parametrize("kind", ["llama3", "llama2"])
def test_a_gguf_file_counts_as_the_tokenizer_that_it_was_made_from(
    kind: str, request: pytest.FixtureRequest
) -> None:
    made, found = request.getfixturevalue(kind)
    for text in [*TEXTS, *(path.read_text(encoding="utf-8")[:5000] for path in DOCS[:5])]:
        assert found.count(text) == len(made.encode(text).ids), text
        assert found.count(text, special=True) == found.count(text) + 1


@settings(max_examples=80, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_has_at_most_as_many_tokens_as_bytes(
    text: str, llama3: tuple[Tokenizer, ModelTokenizer], llama2: tuple[Tokenizer, ModelTokenizer]
) -> None:
    """A prefix adds one; only requests with more bytes than the context need to be counted."""
    for made, found in (llama3, llama2):
        assert found.count(text) == len(made.encode(text).ids)
        assert found.count(text) <= len(text.encode()) + 1


def test_half_of_a_surrogate_pair_counts_as_its_replacement(
    llama3: tuple[Tokenizer, ModelTokenizer],
) -> None:
    assert llama3[1].count(HALF) == llama3[1].count(HALF.replace("\ud83d", "\ufffd"))


def test_a_conversation_is_counted_as_its_template_writes_it(
    llama3: tuple[Tokenizer, ModelTokenizer],
) -> None:
    made, found = llama3
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi <s>"}]
    text = "<s><|user|>user: Hello</s><|user|>assistant: Hi <s></s><|user|>"
    assert found.count_chat(messages) == len(made.encode(text).ids)  # the template's own <s> counts


@pytest.mark.parametrize("source", ["{{ raise_exception('no system') }}", "{% broken", "{{ 1/0 }}"])
def test_a_template_that_cannot_be_rendered_counts_nothing(tmp_path: Path, source: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_tokenizer()), encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    found = snapshot_tokenizer(tmp_path)
    assert found.count_chat([{"role": "user", "content": "x"}]) is None
    assert found.count("four") == 4


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_tokenizer()), encoding="utf-8")
    source = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    assert snapshot_tokenizer(tmp_path).count_chat([]) is None


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"chat_template": "{% for m in messages %}{{ m.content }}!{% endfor %}"}, 6),
        ({"chat_template": [{"name": "rag", "template": "x"},
                            {"name": "default", "template": "{{ bos_token }}12"}],
          "bos_token": {"content": "<s>"}}, 3),
        ({"chat_template": "{{ messages[0] | tojson }}"}, 36),
        ({}, None),
    ],
)  # fmt: skip
def test_a_directory_has_its_template_in_its_settings(
    tmp_path: Path, config: dict[str, Any], tokens: int | None
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_tokenizer()), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    found = snapshot_tokenizer(tmp_path)
    assert found.count_chat([{"role": "user", "content": "éxyz"}]) == tokens


def test_settings_that_shorten_or_pad_texts_are_not_used(tmp_path: Path) -> None:
    content = tiny_tokenizer() | {
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst",
                       "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None,
                    "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert snapshot_tokenizer(tmp_path).count("123456") == 6


@pytest.mark.parametrize(
    ("normalizer", "expansion"),
    [
        (None, 1),
        ({"type": "NFC"}, LARGEST_EXPANSION),
        ({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}, 1),
    ],
)  # fmt: skip
def test_normalized_texts_can_be_longer(
    tmp_path: Path, normalizer: dict[str, Any] | None, expansion: int
) -> None:
    content = tiny_tokenizer() | {"normalizer": normalizer}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    found = snapshot_tokenizer(tmp_path)
    assert found.expansion == expansion
    longest = "\U0001d160"  # four bytes, of which NFC makes twelve
    assert found.count(longest) <= 4 * expansion + 3  # and a space before it


@pytest.mark.parametrize(
    ("kind", "pre", "shown"),
    [("gpt2", "of-tomorrow", r"gpt2 \(of-tomorrow\)"), ("bert", "", "bert"), ("t5", "", "t5")],
)
def test_an_unknown_kind_is_reported(tmp_path: Path, kind: str, pre: str, shown: str) -> None:
    more = entry("tokenizer.ggml.pre", STRING, pre)
    path = write_gguf(tmp_path / "m.gguf", kind, ["a"], [NORMAL], more)
    with pytest.raises(ModelError, match=f"its kind of tokenizer is not known here: {shown}"):
        gguf_tokenizer(path, templated=True)


def test_files_that_are_missing_or_damaged_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        snapshot_tokenizer(tmp_path)
    for content in ("", "{}", "[1]", "\0", json.dumps({"model": {"type": "BPE"}})):
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
        with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be read"):
            snapshot_tokenizer(tmp_path)
    whole = tiny()
    for size in (0, 10, 500, 3000):
        (tmp_path / "m.gguf").write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"not a .complete. GGUF file"):
            gguf_tokenizer(tmp_path / "m.gguf", templated=True)


@pytest.mark.parametrize(
    "more",
    [
        [],
        [list_entry("tokenizer.ggml.tokens", UINT32, [1, 2])],
        [list_entry("tokenizer.ggml.tokens", STRING, ["a", "b"]),
         list_entry("tokenizer.ggml.merges", STRING, ["a c"])],
        [list_entry("tokenizer.ggml.tokens", STRING, ["a", "b"]),
         list_entry("tokenizer.ggml.merges", STRING, ["ab"])],
        [list_entry("tokenizer.ggml.tokens", STRING, ["a"]),
         entry("tokenizer.ggml.merges", UINT32, 7)],
    ],
)  # fmt: skip
def test_a_file_with_a_damaged_tokenizer_is_reported(tmp_path: Path, more: list[bytes]) -> None:
    path = tmp_path / "m.gguf"
    named = [entry("tokenizer.ggml.model", STRING, "gpt2"),
             entry("tokenizer.ggml.pre", STRING, "gpt-2")]  # fmt: skip
    path.write_bytes(gguf([entry("general.architecture", STRING, "llama"), *named, *more], {}))
    with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be read"):
        gguf_tokenizer(path, templated=True)
