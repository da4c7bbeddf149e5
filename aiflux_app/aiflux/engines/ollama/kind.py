"""The kind of Ollama: what is known without starting it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aiflux.core.batch.input_file import InputRules
from aiflux.core.batch.prompt_lengths import PromptLimit
from aiflux.core.batch.request import RESPONSES, WITHOUT_TEXT, FieldRule
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.plan import Plan
from aiflux.engines.base import (
    OF_CHAT,
    STORED,
    CommonKind,
    Engine,
    EngineKind,
    EngineSpec,
    FetchContext,
    HttpFactory,
)
from aiflux.engines.ollama.memory import estimate, has_one_slot
from aiflux.engines.ollama.store import (
    known_figures,
    missing_parts,
    model_digest,
    own_context,
    refuse_other_digest,
    stored_tokenizer,
)
from aiflux.engines.process import engine_program
from aiflux.engines.server_options import refuse_unsupported
from aiflux.errors import ConfigError
from aiflux.models.catalog import Catalog, refuse_hub_name
from aiflux.models.endpoints import missing_endpoints
from aiflux.models.figures import Figures
from aiflux.models.name import (
    accepts_model,
    is_path,
    one_of_each,
    parse_model_name,
    refuse_gguf_file,
    same_model,
)
from aiflux.models.tokenizer import ModelTokenizer

_CHAT = "use /v1/chat/completions, which obeys it"
_IGNORED_IN_RESPONSES: Mapping[str, tuple[Any, ...]] = {
    "seed": (), "stop": ([],), "frequency_penalty": (0,), "presence_penalty": (0,),
    "top_logprobs": (0,),
}  # fmt: skip
# Fields ignored by the OpenAI API of Ollama 0.33, and the effect.
IGNORED_FIELDS = {
    "best_of": FieldRule("one answer is generated for each that is asked for", (1,)),
    "tool_choice": FieldRule("the model decides whether it calls a tool", ("auto",)),
    "logit_bias": FieldRule("tokens keep their probabilities"),
    "top_k": FieldRule("the model's own value is used"),
    "user": FieldRule("it has no effect"),
    # Of /v1/responses (openai/responses.go).
    **STORED,
    **OF_CHAT,
    **{
        name: FieldRule("it has no effect", harmless, fix=_CHAT, url=RESPONSES)
        for name, harmless in _IGNORED_IN_RESPONSES.items()
    },
}


# Settings that Ollama's server does not have.
_ITSELF = "leave it out: Ollama parses tool calls and reasoning itself, by the model's template"
_INSTEAD = {
    "engine_arg": "set a variable of Ollama, such as --engine-env OLLAMA_FLASH_ATTENTION=1",
    "lora": "create a model with it (ollama create, with ADAPTER in the Modelfile), or use "
    "--engine vllm or llamacpp",
    "tool_parser": _ITSELF,
    "reasoning_parser": _ITSELF,
}
# Ollama's messages in a 500 when its runner process died during the request (llm/server.go).
_RUNNER_DIED = (
    "llama runner process has terminated",
    "llama runner process no longer running",
    "model runner has unexpectedly stopped",
    ": EOF",
    "unexpected EOF",
    "connection reset by peer",
    "connection refused",
)
# Ollama's message in a 404 when the model's manifest is gone (server/routes.go).
_MODEL_GONE = re.compile(r"model ['\"].*['\"] not found")


def _refuse_path(name: str) -> None:
    """Refuse the path of a model; Ollama would ask its registry for some of them.

    Raises:
        ConfigError: it is the path of a GGUF file or of something else.
    """
    command = f"aiflux models import --gguf {shlex.quote(name)} --name NAME:TAG"
    refuse_gguf_file(name, OllamaKind.title, f"import it: {command}")
    if is_path(name):
        raise ConfigError(
            f"{name} is a path, which Ollama does not run",
            "write a name as Ollama does: NAME:TAG; a directory of Hugging Face: --engine vllm",
        )


class OllamaKind(CommonKind):
    """Ollama."""

    name = "ollama"
    title = "Ollama"
    program = "ollama"
    program_variables: tuple[str, ...] = ("AIFLUX_OLLAMA",)
    cached_program = "ollama-cpu/bin/ollama"
    input_rules = InputRules(
        accepts_model, IGNORED_FIELDS, missing=missing_endpoints("ollama", "Ollama")
    )
    generates_n: bool | None = False

    def refuse_run(self, options: RunOptions, endpoints: Mapping[str, int]) -> None:
        """Refuse what Ollama's server and its OpenAI API do not have.

        Raises:
            ConfigError: top_k, or an option of the server, is set; or stop for /v1/responses.
        """
        refuse_unsupported(self.title, options, _INSTEAD)
        if RESPONSES in endpoints and options.stop:
            raise ConfigError(
                f"stop is set, but Ollama ignores it in requests to {RESPONSES}",
                f"remove it, or {_CHAT}",
            )
        if options.top_k is not None:
            raise ConfigError(
                "top_k is set, but Ollama's OpenAI API does not support it",
                "remove --top-k, TOP_K or top_k in aiflux.yaml (aiflux config show prints "
                "which one it is), or set it in the model (ollama create, PARAMETER top_k)",
            )

    def served_name(self, model: str) -> str:
        """Return the name under which Ollama lists a model.

        Raises:
            ConfigError: it is not a valid model name.
        """
        return parse_model_name(model).served

    def same_model(self, one: str, other: str) -> bool:
        """Return whether two names mean the same model (``m`` and ``m:latest`` do)."""
        return same_model(one, other)

    def distinct_models(self, models: Sequence[str]) -> list[str]:
        """Return one name for each model: of several, the one with the longest digest.

        Raises:
            ConfigError: a name is not valid, or one of Hugging Face.
            InputError: names of one model contain different digests.
        """
        for name in models:
            refuse_hub_name(name, self.title)
            _refuse_path(name)
        return one_of_each(models)

    def is_stored(self, models_dir: Path, model: str) -> bool:
        """Return whether a model's manifest and all its blobs are in a models directory."""
        return not missing_parts(models_dir, parse_model_name(model))

    def catalog_name(self, model: str) -> str | None:
        """Return the name under which Ollama lists a model; the catalog uses the same names."""
        return self.served_name(model)

    def refuse_model(self, models_dir: Path, model: str) -> None:
        """Refuse a stored model whose digest is not the one in its name.

        Raises:
            ModelError: the digests differ.
        """
        name = parse_model_name(model)
        found = model_digest(models_dir, name)
        if found is not None:
            refuse_other_digest(name, found, str(models_dir))

    def model_digest(self, models_dir: Path, model: str) -> str | None:
        """Return the digest of a stored model."""
        return model_digest(models_dir, parse_model_name(model))

    def fetch_model(self, models_dir: Path, model: str, context: FetchContext) -> bool:
        """Pull a model unless it is stored; return whether it was pulled.

        Raises:
            ModelError: it is unknown or not available.
            StorageError: the models directory cannot be written.
            EngineError: the program ``ollama`` is missing.
        """
        from aiflux.engines.ollama.pull import ensure_model

        return ensure_model(
            models_dir,
            model,
            engine_program(self, context.environ),
            context.log,
            say=context.say,
            progress=context.progress,
            again=context.again,
        )

    def figures(
        self, models_dir: Path | None, model: str, catalog: Catalog | None
    ) -> Figures | None:
        """Return a model's figures: from its file, or else from the catalog."""
        return known_figures(models_dir, parse_model_name(model), catalog)

    def prompt_limit(self, plan: Plan, model: str) -> PromptLimit | None:
        """Return the context of a model and the tokenizer in its file.

        Its chat templates are not Jinja2: of a conversation, only the texts are counted. A context
        that the model itself sets takes precedence over that of the server.
        """
        from aiflux.engines.sizing import prompt_limit

        name, folder = parse_model_name(model), plan.models_dir

        def open_tokenizer() -> ModelTokenizer:
            return stored_tokenizer(folder, name, templated=False)

        variable = plan.options.engine_env.get("OLLAMA_CONTEXT_LENGTH", "")
        own = own_context(folder, name) or (int(variable) if variable.isdecimal() else 0)
        figures = self.figures(folder, model, None)
        return prompt_limit(plan, model, figures, open_tokenizer, own=own)

    def one_slot(self, figures: Figures) -> bool:
        """Return whether Ollama runs a model with one slot, whatever was requested."""
        return has_one_slot(figures.architecture)

    def memory_needed(
        self, figures: Figures, context: int, slots: int, gpus: int, options: RunOptions
    ) -> int:
        """Return the minimum that recent versions of Ollama need, with flash attention."""
        cache_type = options.engine_env.get("OLLAMA_KV_CACHE_TYPE") or "f16"
        return estimate(figures, context, slots, gpus=gpus, flash=True, cache_type=cache_type).total

    def adapt_body(self, url: str, body: Mapping[str, Any], served: str) -> Mapping[str, Any]:
        """Use a model name and a token limit that Ollama supports.

        Names with AI-Flux's own ``http://`` or ``@sha256:...`` are replaced. Ollama ignores
        ``max_completion_tokens``: the value is also sent as ``max_tokens``.
        """
        edits: dict[str, Any] = {}
        named = body.get("model")
        if named is not None and ("@" in named or "://" in named):
            edits["model"] = served
        limit = body.get("max_completion_tokens")
        if limit is not None and url not in WITHOUT_TEXT and "max_tokens" not in body:
            edits["max_tokens"] = limit
        return edits

    def crash_code(self, status: int, message: str) -> str | None:
        """Return the code of an answer that shows that Ollama lost its model."""
        if status == 500 and any(words in message for words in _RUNNER_DIED):
            return "engine_crashed"
        return "model_gone" if status == 404 and _MODEL_GONE.match(message) else None

    def make_engine(self, spec: EngineSpec, make_client: HttpFactory) -> Engine:
        """Return an Ollama server on the spec's GPUs."""
        from aiflux.engines.ollama.engine import OllamaEngine

        return OllamaEngine(self, spec, make_client)


KIND: EngineKind = OllamaKind()
