"""Count tokens as a model does, with the tokenizer in its GGUF or Hugging Face files.

A GGUF file has the vocabulary and the merges or scores of a tokenizer, and names the rules that
split a text into words (``tokenizer.ggml.pre``). The keys are described in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the names and their rules are those of
llama.cpp (``src/llama-vocab.cpp``, build 11669), which the models' own tokenizer.json files have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from aiflux.errors import ConfigError, ModelError
from aiflux.models.gguf import GgufHeader, read_gguf
from aiflux.util.extras import need, variable_set
from aiflux.util.text import error_text, whole_text

_PARALLELISM = "TOKENIZERS_PARALLELISM"
_TOKENS, _MERGES, _SCORES, _TYPES = (
    f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "scores", "token_type")
)
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_SPACE = "\u2581"

_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _modern(digits: str, letters: str = r"\p{L}", marks: str = "") -> str:
    """Return the words of tokenizers after GPT-4's, which differ in numbers and combined marks."""
    others = rf" ?[^\s{marks or letters}\p{{N}}]+[\r\n]*"
    return rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}|{others}|{_BLANKS}"


def _cased(digits: str, english: str) -> str:
    """Return the words of tokenizers that also split where upper case follows lower case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    first = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{first}{upper}*{lower}+{english}|{first}{upper}+{lower}*{english}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
    )


@dataclass(frozen=True)
class _Words:
    """How a byte-level tokenizer splits a text into words, before it merges their bytes.

    Attributes:
        patterns: regular expressions, applied one after the other.
        whole: a word in the vocabulary is one token, whatever its merges say.
        starts: every text begins with a special token, unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    starts: bool = False


_LLAMA3 = _Words((_modern(r"\p{N}{1,3}"),), whole=True, starts=True)
_GLM4 = _Words((_modern(r"\p{N}{1,3}"),))
_QWEN2 = _Words((_modern(r"\p{N}"),))
_QWEN35 = _Words((_modern(r"\p{N}", r"[\p{L}\p{M}]", r"\p{L}\p{M}"),))
_GPT_2 = _Words((_GPT2,))
_DIGITS = _Words((r"\p{N}", _GPT2))
_WORDS: Mapping[str, _Words] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _GLM4),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"), _QWEN2),
    "qwen35": _QWEN35,
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "exaone4", "mellum"), _GPT_2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "exaone"), _DIGITS),
    **dict.fromkeys(("gpt-4o", "llama4"), _Words((_cased(r"\p{N}{1,3}", f"{_ENGLISH}?"),))),
    "tekken": _Words((_cased(r"\p{N}", ""),), whole=True, starts=True),
}


class ChatTemplate:
    """A model's chat template, in Jinja2, rendered in a sandbox."""

    def __init__(self, text: str, names: Mapping[str, str]) -> None:
        sandbox = need("jinja2.sandbox", "tokens", "a chat template")
        self._text = text
        self._environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        self._environment.filters["tojson"] = _to_json
        self._environment.globals |= {"raise_exception": _refuse, **names}
        self._template: Any = None

    def render(self, messages: Sequence[Any], more: Mapping[str, Any]) -> str | None:
        """Return the prompt of a conversation; None if the template cannot make one of it."""
        values = {"add_generation_prompt": True, **more, "messages": messages}
        try:
            if self._template is None:
                self._template = self._environment.from_string(self._text)
            text = self._template.render(values)
        except Exception:  # noqa: BLE001 - any error of the template's own code
            return None
        return str(text)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise ValueError(message)


@dataclass(frozen=True)
class ModelTokenizer:
    """The tokenizer of a model.

    Attributes:
        tokenizer: of the library ``tokenizers``.
        template: of conversations; None if the engine has its own, or the model has none.
        added: special tokens that a text gets; None if ``tokenizer`` adds them itself.
        start: text of the first of them, which a template may write as well; "" for none.
        expansion: the largest factor by which it lengthens a text that is not ASCII, in bytes of
            UTF-8, before it splits it.
    """

    tokenizer: Any
    template: ChatTemplate | None = None
    added: int | None = None
    start: str = ""
    expansion: int = 1

    def count(self, text: str, *, special: bool = False) -> int:
        """Return the number of tokens of a text.

        Args:
            special: add the special tokens that the model expects around a text.
        """
        own = special and self.added is None
        (encoding,) = self.tokenizer.encode_batch_fast([whole_text(text)], add_special_tokens=own)
        return len(encoding) + (self.added or 0) * special

    def ends(self, text: str) -> list[int]:
        """Return where each token of a text ends, in characters; special tokens are not added."""
        (encoding,) = self.tokenizer.encode_batch([whole_text(text)], add_special_tokens=False)
        return [end for _, end in encoding.offsets]

    def count_chat(
        self, messages: Sequence[Any], more: Mapping[str, Any] = MappingProxyType({})
    ) -> int | None:
        """Return the number of tokens of a conversation; None if the template is not known.

        Args:
            more: other values that the template gets, such as ``tools``.
        """
        text = self.template.render(messages, more) if self.template is not None else None
        if text is None:
            return None
        if self.added is None:
            return self.count(text)
        return self.count(text.removeprefix(self.start), special=True)

    def close(self) -> None:
        """Do nothing: it holds no connection."""


def one_thread() -> AbstractContextManager[None]:
    """Keep the library ``tokenizers`` from starting threads, after which nothing may fork."""
    return variable_set(_PARALLELISM, "false")


def gguf_tokenizer(path: Path, *, templated: bool) -> ModelTokenizer:
    """Return the tokenizer in a GGUF file.

    Args:
        templated: the engine uses the file's chat template.

    Raises:
        ModelError: the file cannot be read, or its kind of tokenizer is not known.
        ConfigError: the library is not installed.
    """
    header = read_gguf(path, (_TOKENS, _MERGES, _SCORES, _TYPES))
    kind, pre = (
        str(header.metadata.get(f"tokenizer.ggml.{name}", "")) for name in ("model", "pre")
    )
    words = _WORDS.get(pre)
    if kind != "llama" and (kind != "gpt2" or words is None):
        name = f"{kind} ({pre})" if kind == "gpt2" else kind or "none"
        raise ModelError(f"its kind of tokenizer is not known here: {name}")
    with _readable(path):
        return _of_header(header, words if kind == "gpt2" else None, templated)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise ModelError for any error in the content of a file."""
    try:
        yield
    except (ConfigError, ModelError):
        raise
    except Exception as error:  # the library raises Exception itself
        reason = error_text(error)
        raise ModelError(f"the tokenizer in {path} cannot be read: {reason}") from error


def _of_header(header: GgufHeader, words: _Words | None, templated: bool) -> ModelTokenizer:
    """Return the tokenizer of a file's header.

    Args:
        words: None for sentence pieces.
    """
    metadata = header.metadata
    library = need("tokenizers", "tokens", "counting tokens")
    tokenizer = _sentence_pieces(header) if words is None else _byte_level(header, words)
    special = _of_types(header, _UNKNOWN, _CONTROL, _USER_DEFINED)
    tokenizer.add_special_tokens(
        [library.AddedToken(text, special=True, normalized=False) for text in special if text]
    )
    names = {f"{name}_token": _named(header, name) for name in ("bos", "eos")}
    starts = metadata.get("tokenizer.ggml.add_bos_token", words is None or words.starts)
    begins = bool(starts and names["bos_token"])
    ends = bool(metadata.get("tokenizer.ggml.add_eos_token") and names["eos_token"])
    text = metadata.get("tokenizer.chat_template")
    template = ChatTemplate(text, names) if templated and isinstance(text, str) else None
    return ModelTokenizer(tokenizer, template, begins + ends, names["bos_token"] if begins else "")


def _named(header: GgufHeader, name: str) -> str:
    """Return the text of a special token; "" if there is none."""
    tokens, at = header.metadata[_TOKENS], header.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return tokens[at] if isinstance(at, int) and 0 <= at < len(tokens) else ""


def _of_types(header: GgufHeader, *types: int) -> list[str]:
    """Return the tokens of these types."""
    tokens, kinds = header.metadata[_TOKENS], header.metadata.get(_TYPES) or ()
    return [token for token, kind in zip(tokens, kinds, strict=False) if kind in types]


def _byte_level(header: GgufHeader, words: _Words) -> Any:
    """Return a tokenizer that merges the bytes of each word."""
    library = need("tokenizers", "tokens", "counting tokens")
    vocabulary = {token: at for at, token in enumerate(header.metadata[_TOKENS])}
    merges = [tuple(pair.split(" ", 1)) for pair in header.metadata.get(_MERGES) or ()]
    tokenizer = library.Tokenizer(library.models.BPE(vocabulary, merges, ignore_merges=words.whole))
    splits = [
        library.pre_tokenizers.Split(library.Regex(pattern), "isolated")
        for pattern in words.patterns
    ]
    level = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([*splits, level])
    return tokenizer


def _sentence_pieces(header: GgufHeader) -> Any:
    """Return a tokenizer that merges characters of the whole text, the highest score first."""
    library = need("tokenizers", "tokens", "counting tokens")
    tokens, scores = header.metadata[_TOKENS], header.metadata.get(_SCORES) or ()
    vocabulary = {token: at for at, token in enumerate(tokens)}
    apart = {*_of_types(header, _UNKNOWN, _CONTROL, _BYTE)}
    merged = [pair for pair in zip(tokens, scores, strict=False) if pair[0] not in apart]
    merged.sort(key=lambda pair: -pair[1])
    merges = [
        (token[:cut], token[cut:])
        for token, _ in merged
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    tokenizer = library.Tokenizer(library.models.BPE(vocabulary, merges, byte_fallback=True))
    prefix = header.metadata.get("tokenizer.ggml.add_space_prefix", True)
    space = library.normalizers.Replace(" ", _SPACE)
    begin = [library.normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = library.normalizers.Sequence([*begin, space])
    return tokenizer


_TEMPLATE_FILE = "chat_template.jinja"
# The Unicode Standard, Annex 15: NFKC and NFKD lengthen a text in UTF-8 at most 11 times.
LARGEST_EXPANSION = 11


def snapshot_tokenizer(folder: Path) -> ModelTokenizer:
    """Return the tokenizer in a directory of Hugging Face.

    Raises:
        ModelError: the directory has no tokenizer.json, or it cannot be read.
        ConfigError: the library is not installed.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no tokenizer.json")
    library = need("tokenizers", "tokens", "counting tokens")
    with _readable(folder):
        content = json.loads(path.read_bytes())
        tokenizer = library.Tokenizer.from_file(str(path))
        template = _template_of(folder, _read_object(folder / "tokenizer_config.json"))
        expansion = _expansion(content.get("normalizer"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return ModelTokenizer(tokenizer, template, expansion=expansion)


def _expansion(normalizer: Any) -> int:
    """Return how many times longer a normalizer makes a text at most."""
    if not isinstance(normalizer, dict):
        return 1
    parts = normalizer.get("normalizers")
    if isinstance(parts, list):
        return max(map(_expansion, parts), default=1)
    only_spaces = normalizer.get("content") == _SPACE or normalizer.get("prepend") == _SPACE
    return 1 if only_spaces else LARGEST_EXPANSION


def _template_of(folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    names = {name: _token_text(settings.get(name)) for name in ("bos_token", "eos_token")}
    file = folder / _TEMPLATE_FILE
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), names)
    given = settings.get("chat_template")
    if isinstance(given, list):  # several, by name
        given = next((each["template"] for each in given if each["name"] == "default"), None)
    return ChatTemplate(given, names) if isinstance(given, str) else None


def _token_text(value: Any) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_bytes())
    return content if isinstance(content, dict) else {}
