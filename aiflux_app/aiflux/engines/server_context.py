"""The context and the tokenizer of a server that AI-Flux does not configure, as it reports them.

No setting of the run decides on its context. Servers report it in different places: vLLM, SGLang
and hosted services with each model of ``/v1/models``, llama-server in ``/props`` (for each slot),
and Ollama in ``/api/ps`` (of models that are loaded).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from aiflux.core.batch.prompt_lengths import PromptLimit
from aiflux.core.runs.plan import Plan
from aiflux.engines.http import Client, ExchangeError
from aiflux.engines.outcome import RETRIED_STATUSES
from aiflux.engines.served_models import MODELS_PATH
from aiflux.engines.server_load import Get, get, json_object, reported
from aiflux.errors import EngineError, ModelError
from aiflux.models.name import same_model
from aiflux.models.tokenizer import ModelTokenizer
from aiflux.util.text import public_url, whole_text

# vLLM and SGLang, OpenRouter and Together, Groq, Mistral.
_OF_MODEL = ("max_model_len", "context_length", "context_window", "max_context_length")
_TOKENIZE = "/tokenize"
_TEMPLATE = "/apply-template"


def server_limit(
    plan: Plan, model: str, client: Client, connect: Callable[[], Client] | None = None
) -> PromptLimit | None:
    """Return the context of a server and its tokenizer; None if the context is unknown.

    The context is what the server reports, or what the run says about it if that is less, or if
    the server reports nothing.

    Args:
        client: of the server.
        connect: returns another client, which the tokenizer uses and closes; None to use
            ``client``, and leave it open.
    """
    served, options = plan.served(model), plan.options
    found = reported_context(partial(get, client), served)
    context = min(filter(None, (found, options.context_length)), default=0)
    if not context:
        return None
    answer = options.parameters_of(served).get("max_tokens")

    def open_tokenizer() -> ModelTokenizer:
        return _tokenizer(connect() if connect else client, served, closes=connect is not None)

    return PromptLimit(context, context, answer or 0, open_tokenizer, asks=True)


def reported_context(fetch: Get, model: str) -> int | None:
    """Return the tokens that a prompt and its answer may have; None if a server reports none."""
    return next(_reported(fetch, model), None)


def _reported(fetch: Get, model: str) -> Iterator[int]:
    listed = _objects(reported(fetch, MODELS_PATH).get("data"))
    named = [each for each in listed if same_model(str(each.get("id")), model)]
    for each in named or (listed if len(listed) == 1 else []):
        yield from _numbers(each, _OF_MODEL)
    yield from _numbers(reported(fetch, "/props").get("default_generation_settings"), ("n_ctx",))
    for each in _objects(reported(fetch, "/api/ps").get("models")):
        if same_model(str(each.get("name")), model):
            yield from _numbers(each, ("context_length",))


def _objects(content: Any) -> list[dict[str, Any]]:
    return [each for each in content if isinstance(each, dict)] if isinstance(content, list) else []


def _numbers(content: Any, names: Sequence[str]) -> Iterator[int]:
    found = map(content.get, names) if isinstance(content, dict) else ()
    return (number for number in found if type(number) is int and number > 0)


def _tokenizer(client: Client, model: str, *, closes: bool) -> ModelTokenizer:
    """Return the tokenizer of a server.

    Raises:
        ModelError: it offers none.
    """
    forms = [
        ServerTokenizer(client, model=model, counts=counts, closes=closes)
        for counts in (True, False)
    ]
    reason = f"the server at {public_url(client.base_url)} does not count tokens ({_TOKENIZE})"
    try:
        for each in forms:
            if each.asked_tokens("a", special=False):
                return each
    except EngineError as error:
        reason = error.message
    forms[0].close()
    raise ModelError(reason)


@dataclass(frozen=True)
class ServerTokenizer(ModelTokenizer):
    """The tokenizer of a server. Thread-safe; every text is a request.

    Attributes:
        tokenizer: client of the server.
        model: name of the model at the server.
        counts: its ``/tokenize`` is that of vLLM, which SGLang has, too; else that of llama-server.
        closes: the client is its own.
    """

    model: str = ""
    counts: bool = False
    closes: bool = False

    def count(self, text: str, *, special: bool = False) -> int:
        """Return the number of tokens of a text.

        Raises:
            EngineError: the server does not answer, or refuses the text.
        """
        found = self.asked_tokens(text, special=special)
        if found is None:
            raise EngineError(f"{self._where} does not count the tokens of a text")
        return found

    def ends(self, text: str) -> list[int]:
        """Return about where each token ends: servers report only how many there are."""
        tokens = self.count(text)
        return [-(-len(text) * number // tokens) for number in range(1, tokens + 1)]

    def count_chat(
        self, messages: Sequence[Any], more: Mapping[str, Any] = MappingProxyType({})
    ) -> int | None:
        """Return the number of tokens of a conversation, with the server's template.

        Returns:
            None if the server has no template, or does not apply it to these messages.
        """
        tools = {"tools": more["tools"]} if "tools" in more else {}
        settings = {name: value for name, value in more.items() if name != "tools"}
        extra = {"chat_template_kwargs": settings} if settings else {}
        asked = {"messages": messages, **tools, **extra}
        if self.counts:
            return _number(self._ask(_TOKENIZE, {**self._named, **asked}).get("count"))
        prompt = self._ask(_TEMPLATE, asked).get("prompt")
        return self.count(prompt, special=True) if isinstance(prompt, str) else None

    def close(self) -> None:
        """Close the connections, if they are its own."""
        if self.closes:
            self.tokenizer.close()

    def asked_tokens(self, text: str, *, special: bool) -> int | None:
        """Return the number of tokens of a text; None if the server does not count them.

        Raises:
            EngineError: the server does not answer.
        """
        text = whole_text(text)
        if self.counts:
            asked = {**self._named, "prompt": text, "add_special_tokens": special}
            return _number(self._ask(_TOKENIZE, asked).get("count"))
        asked = {"content": text, "add_special": special, "parse_special": True}
        tokens = self._ask(_TOKENIZE, asked).get("tokens")
        return len(tokens) if isinstance(tokens, list) else None

    @property
    def _where(self) -> str:
        return f"the server at {public_url(self.tokenizer.base_url)}"

    @property
    def _named(self) -> dict[str, str]:
        return {"model": self.model}

    def _ask(self, path: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return the server's answer; {} if it does not support the question.

        Raises:
            EngineError: it does not answer, or only later.
        """
        try:
            answer = self.tokenizer.post(path, json.dumps(asked).encode())
        except ExchangeError as error:
            raise EngineError(f"the tokens of prompts are not counted: {error.message}") from error
        if answer.status in RETRIED_STATUSES:
            raise EngineError(f"{self._where} does not count tokens now ({path}: {answer.status})")
        return json_object(answer.body) if answer.status == 200 else {}


def _number(value: Any) -> int | None:
    return value if type(value) is int else None
