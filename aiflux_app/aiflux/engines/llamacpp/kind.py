"""The kind of llama.cpp's server: what is known without starting it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from aiflux.core.batch.input_file import InputRules
from aiflux.core.batch.prompt_lengths import PromptLimit
from aiflux.core.batch.request import RESPONSES, WITHOUT_TEXT, FieldRule
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.plan import Adapter, Plan
from aiflux.engines.base import (
    STORED,
    CommonKind,
    Engine,
    EngineKind,
    EngineSpec,
    FetchContext,
    HttpFactory,
    SlotLimits,
    refuse_mixed_uses,
)
from aiflux.engines.llamacpp import model_file
from aiflux.engines.llamacpp.adapter import read_adapter
from aiflux.engines.llamacpp.benchmark import BatchedBench
from aiflux.engines.llamacpp.options import MANAGED
from aiflux.engines.ollama.memory import estimate
from aiflux.engines.ollama.store import model_digest
from aiflux.engines.own_benchmark import OwnBenchmark
from aiflux.engines.server_options import refuse_managed, refuse_unsupported
from aiflux.errors import ConfigError, InputError, ModelError
from aiflux.models.catalog import Catalog, refuse_hub_name
from aiflux.models.endpoints import missing_endpoints
from aiflux.models.figures import Figures
from aiflux.models.name import accepts_model, one_of_each, parse_model_name, same_model


def _accepts_model(model: str, named: str) -> bool:
    if model_file.is_path(model):
        return named in model_file.model_names(model_file.absolute_name(model))
    return accepts_model(model, named)


_INSTEAD = {
    "tool_parser": "leave it out: llama.cpp parses tool calls itself, by the model's template",
}

# Source: llama.cpp, tools/server/server-chat.cpp, server_chat_convert_responses_to_chatcmpl.
_OF_RESPONSES = {
    **STORED,
    "text": FieldRule(
        "answers are not bound to its format",
        ({"format": {"type": "text"}},),
        fix="name the schema in response_format, or use /v1/chat/completions",
        url=RESPONSES,
    ),
}


class LlamaCppKind(CommonKind):
    """llama.cpp's server, ``llama-server``. It supports the whole body of most requests."""

    name = "llamacpp"
    title = "llama.cpp"
    program = "llama-server"
    cached_program = "llamacpp-cpu/bin/llama-server"
    own_benchmark: OwnBenchmark | None = BatchedBench()
    can_be_served = True
    slot_limits = SlotLimits(most=256)  # LLAMA_MAX_SEQ (llama-cparams.h), which is compiled in
    # It refuses more answers than it has slots, and counts the tokens of one only (build 11669).
    generates_n: bool | None = False
    input_rules = InputRules(
        _accepts_model, _OF_RESPONSES, missing=missing_endpoints("llamacpp", "llama.cpp")
    )

    def refuse_run(self, options: RunOptions, endpoints: Mapping[str, int]) -> None:
        """Refuse options that AI-Flux sets, and a mix of text, embeddings and scores.

        Raises:
            ConfigError: an option is one of these.
            InputError: the input mixes them, and a server supports only one.
        """
        most = self.slot_limits.most
        if options.slots is not None and options.slots > most:
            raise ConfigError(
                f"{self.title} has at most {most} slots, but slots = {options.slots}",
                f"set fewer: --slots {most}",
            )
        refuse_managed(self.title, options.engine_arg, MANAGED)
        refuse_unsupported(self.title, options, _INSTEAD)
        refuse_mixed_uses(self.title, endpoints)
        if options.lora and {*endpoints} & WITHOUT_TEXT:
            raise InputError(
                "llama.cpp applies adapters (--lora) to text only, not to embeddings and reranking",
                "merge the adapter into the model, or use --engine vllm",
            )

    def served_name(self, model: str) -> str:
        """Return the name for the server: Ollama's, or the path of the file.

        Raises:
            ConfigError: it is not a valid model name.
        """
        return model if model_file.is_path(model) else parse_model_name(model).served

    def same_model(self, one: str, other: str) -> bool:
        """Return whether two names mean the same model."""
        return _accepts_model(other, one) or same_model(one, other)

    def distinct_models(self, models: Sequence[str]) -> list[str]:
        """Return one name for each model, paths made absolute.

        Raises:
            ConfigError: a name is not valid, or one of Hugging Face.
            InputError: names of one model contain different digests.
        """
        for name in models:
            refuse_hub_name(name, self.title, "name a GGUF file of it: --model FILE.gguf")
        paths = [model_file.absolute_name(name) for name in models if model_file.is_path(name)]
        names = [name for name in models if not model_file.is_path(name)]
        for name in names:
            model_file.refuse_other_name(name)
        return [*dict.fromkeys(paths), *one_of_each(names)]

    def catalog_name(self, model: str) -> str | None:
        """Return Ollama's name for a model; None for a file."""
        return None if model_file.is_path(model) else self.served_name(model)

    def model_path(self, model: str) -> Path | None:
        """Return the file that a path names."""
        return Path(model) if model_file.is_path(model) else None

    def is_stored(self, models_dir: Path, model: str) -> bool:
        """Return whether the file exists, or a model pulled by Ollama is complete."""
        return model_file.is_stored(models_dir, model)

    def refuse_model(self, models_dir: Path, model: str) -> None:
        """Refuse a stored model that llama.cpp cannot read, or with another digest.

        Raises:
            ModelError: the model is one of these.
        """
        model_file.refuse_model(models_dir, model)

    def model_digest(self, models_dir: Path, model: str) -> str | None:
        """Return the digest of a model that Ollama pulled; a GGUF file has none."""
        if model_file.is_path(model):
            return None
        return model_digest(models_dir, parse_model_name(model))

    def absent_model(self, models_dir: Path, model: str) -> ModelError:
        """Return the error for a model that is not stored."""
        if model_file.is_path(model):
            return model_file.absent_file(Path(model))
        return ModelError(
            f"{self.served_name(model)} is not (completely) stored in {models_dir}, and llama.cpp "
            "does not pull models",
            f"pull it with Ollama first: aiflux models pull {model}; or name a GGUF file: --model "
            "FILE.gguf",
        )

    def fetch_model(self, models_dir: Path, model: str, context: FetchContext) -> bool:
        """Fetch nothing: Ollama pulls the models from its registry.

        Raises:
            ModelError: the model is not stored, or cannot be used.
        """
        self.refuse_model(models_dir, model)
        if not self.is_stored(models_dir, model):
            raise self.absent_model(models_dir, model)
        return False

    def figures(
        self, models_dir: Path | None, model: str, catalog: Catalog | None
    ) -> Figures | None:
        """Return a model's figures: from its file, or else from the catalog."""
        return model_file.figures_of_model(models_dir, model, catalog)

    def prompt_limit(self, plan: Plan, model: str) -> PromptLimit | None:
        """Return the context of a model, and the tokenizer and chat template in its file."""
        from aiflux.engines.sizing import prompt_limit

        names = {name.lstrip("-").replace("_", "-") for name in plan.options.engine_arg}
        templated = not names & {"chat-template", "chat-template-file", "no-jinja"}
        open_tokenizer = partial(
            model_file.read_tokenizer, plan.models_dir, model, templated=templated
        )
        figures = self.figures(plan.models_dir, model, None)
        return prompt_limit(plan, model, figures, open_tokenizer)

    def memory_needed(
        self, figures: Figures, context: int, slots: int, gpus: int, options: RunOptions
    ) -> int:
        """Return the memory that Ollama needs at least, which runs the same code."""
        cache_type = options.engine_env.get("LLAMA_ARG_CACHE_TYPE_K") or "f16"
        return estimate(
            figures, context, slots, gpus=gpus, flash=True, cache_type=cache_type, one_slot=False
        ).total

    def read_adapter(self, models_dir: Path | None, model: str, name: str, path: str) -> Adapter:
        """Return an adapter in a GGUF file.

        Raises:
            ModelError: it cannot be read, or is for another architecture than the model's.
        """
        figures = self.figures(models_dir, model, None)
        return read_adapter(name, path, figures.architecture.name if figures else None)

    def select_adapter(self, index: int | None, count: int) -> Mapping[str, Any]:
        """Return the scale of each adapter: without them, llama-server applies all of them."""
        return {"lora": [{"id": at, "scale": float(at == index)} for at in range(count)]}

    def make_engine(self, spec: EngineSpec, make_client: HttpFactory) -> Engine:
        """Return a server on the spec's GPUs."""
        from aiflux.engines.llamacpp.engine import LlamaCppEngine

        return LlamaCppEngine(self, spec, make_client)


KIND: EngineKind = LlamaCppKind()
