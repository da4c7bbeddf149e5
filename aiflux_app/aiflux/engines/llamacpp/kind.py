"""What is known of llama.cpp's server without starting it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aiflux.core.batch.input_file import InputRules
from aiflux.core.config.run_options import RunOptions
from aiflux.engines.base import (
    Engine,
    EngineKind,
    EngineSpec,
    FetchContext,
    HttpFactory,
    SlotLimits,
    refuse_mixed_uses,
)
from aiflux.engines.llamacpp import model_file
from aiflux.engines.ollama.memory import estimate
from aiflux.errors import ModelError
from aiflux.models.catalog import Catalog
from aiflux.models.figures import Figures
from aiflux.models.name import accepts_model, one_of_each, parse_model_name, same_model


def _accepts_model(model: str, named: str) -> bool:
    if model_file.is_path(model):
        return named in model_file.model_names(model_file.absolute_name(model))
    return accepts_model(model, named)


class LlamaCppKind:
    """llama.cpp's server, ``llama-server``. It obeys the whole body of a request."""

    name = "llamacpp"
    title = "llama.cpp"
    managed = True
    program = "llama-server"
    program_variables: tuple[str, ...] = ()
    cached_program = ""
    slot_limits = SlotLimits()
    input_rules = InputRules(_accepts_model)

    def refuse_run(self, options: RunOptions, endpoints: Mapping[str, int]) -> None:
        """Refuse text, embeddings and reranking in one input: a server does one of the three.

        Raises:
            InputError: there are several.
        """
        refuse_mixed_uses(self.title, endpoints)

    def served_name(self, model: str) -> str:
        """Return the name that the server gets: Ollama's, or the path of the file.

        Raises:
            ConfigError: it is not a name of a model.
        """
        return model if model_file.is_path(model) else parse_model_name(model).served

    def same_model(self, one: str, other: str) -> bool:
        """Tell whether two names mean the same model."""
        return _accepts_model(other, one) or same_model(one, other)

    def distinct_models(self, models: Sequence[str]) -> list[str]:
        """Return one name for each model, paths made absolute.

        Raises:
            ConfigError: a name is wrong.
            InputError: names of one model insist on two digests.
        """
        paths = [model_file.absolute_name(name) for name in models if model_file.is_path(name)]
        names = [name for name in models if not model_file.is_path(name)]
        return [*dict.fromkeys(paths), *one_of_each(names)]

    def catalog_name(self, model: str) -> str | None:
        """Return Ollama's name of a model; None for a file."""
        return None if model_file.is_path(model) else self.served_name(model)

    def model_path(self, model: str) -> Path | None:
        """Return the file that a path names."""
        return Path(model) if model_file.is_path(model) else None

    def is_stored(self, models_dir: Path, model: str) -> bool:
        """Tell whether the file is there, or all that Ollama pulled of a model."""
        return model_file.is_stored(models_dir, model)

    def refuse_model(self, models_dir: Path, model: str) -> None:
        """Refuse a stored model that llama.cpp cannot read, or with another digest.

        Raises:
            ModelError: it is one.
        """
        model_file.refuse_model(models_dir, model)

    def absent_model(self, models_dir: Path, model: str) -> ModelError:
        """Return the error of a model that is not stored."""
        if model_file.is_path(model):
            return ModelError(f"model file not found: {model}", "check the path (--model)")
        return ModelError(
            f"{self.served_name(model)} is not (completely) stored in {models_dir}, and llama.cpp "
            "does not pull models",
            f"pull it with Ollama first: aiflux models pull {model}; or name a GGUF file: --model "
            "FILE.gguf",
        )

    def fetch_model(self, models_dir: Path, model: str, context: FetchContext) -> bool:
        """Fetch nothing: models come from Ollama's registry, by Ollama.

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
        """Return a model's figures: from its own file, or else from the catalog."""
        return model_file.figures_of_model(models_dir, model, catalog)

    def one_slot(self, figures: Figures) -> bool:
        """No: the server has as many slots as it is told, with every model."""
        return False

    def memory_needed(
        self, figures: Figures, context: int, slots: int, gpus: int, options: RunOptions
    ) -> int:
        """Return the least that it needs, by the account of Ollama, which runs the same code."""
        cache_type = options.engine_env.get("LLAMA_ARG_CACHE_TYPE_K") or "f16"
        return estimate(
            figures, context, slots, gpus=gpus, flash=True, cache_type=cache_type, one_slot=False
        ).total

    def divides(self, figures: Figures, gpus: int) -> bool:
        """Yes: it puts layers on each."""
        return True

    def adapt_body(self, url: str, body: Mapping[str, Any], served: str) -> Mapping[str, Any]:
        """Change nothing: the server answers for any model's name, and obeys both limits."""
        return {}

    def crash_code(self, status: int, message: str) -> str | None:
        """The generic rule holds: a server that died answers nothing."""
        return None

    def make_engine(self, spec: EngineSpec, make_client: HttpFactory) -> Engine:
        """Return a server on the spec's GPUs."""
        from aiflux.engines.llamacpp.engine import LlamaCppEngine

        return LlamaCppEngine(self, spec, make_client)


KIND: EngineKind = LlamaCppKind()
