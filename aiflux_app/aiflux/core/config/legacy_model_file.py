"""A model's file in the form of earlier versions: ``FAMILY/SIZE.yaml``.

Its parameters still fill what requests leave open. What the rest was for, AI-Flux finds out by
itself, or it stands in the requests; such keys are checked and kept, and told as not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiflux.core.config.settings import BY_NAME
from aiflux.errors import ConfigError
from aiflux.models.name import parse_model_name
from aiflux.util import value_parsers
from aiflux.util.value_parsers import Parser
from aiflux.util.yaml_file import YamlFile, read_yaml


@dataclass(frozen=True)
class ModelParameters:
    """Parameters that fill what a request leaves open; None and () leave it open."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    top_k: int | None = None
    stop_sequences: tuple[str, ...] = ()

    def settings(self) -> dict[str, Any]:
        """Return those that are there, by the names of the settings."""
        values = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "top_k": self.top_k,
            "stop": self.stop_sequences or None,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class ModelConfig:
    """What is configured for a model.

    Attributes:
        name: as Ollama names it.
        parameters: what flows into a run (``SlurmRunner.run(model_config=...)``).
        resources, system, validation, requirements: what the file says there; nothing uses it
            but a check of the parameters against ``validation``.
        place: the file; None where the catalog told, or nobody.
        unused: keys of the file that have no effect, each with the reason.
    """

    name: str
    parameters: ModelParameters = ModelParameters()
    resources: Mapping[str, Any] = field(default_factory=dict)
    system: Mapping[str, Any] = field(default_factory=dict)
    validation: Mapping[str, Any] = field(default_factory=dict)
    requirements: Mapping[str, Any] = field(default_factory=dict)
    place: Path | None = None
    unused: tuple[str, ...] = ()


_COUNT = value_parsers.integer(1)
_FRACTION = value_parsers.number(0, 1)


def _range(one: Parser) -> Parser:
    def parse(value: Any) -> tuple[Any, Any]:
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError("two values: [LOWEST, HIGHEST]")
        low, high = (one(item) for item in value)
        if low > high:
            raise ValueError("two values, the lower one first")
        return low, high

    return parse


def _whole_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


_SECTIONS: Mapping[str, Mapping[str, Parser]] = {
    "parameters": {
        "temperature": BY_NAME["temperature"].parse,
        "top_p": BY_NAME["top_p"].parse,
        "max_tokens": BY_NAME["max_tokens"].parse,
        "top_k": BY_NAME["top_k"].parse,
        "stop_sequences": value_parsers.texts,
    },
    "resources": {
        "gpu_layers": _COUNT,
        "gpu_memory": value_parsers.memory,
        "batch_size": _COUNT,
        "max_concurrent": _COUNT,
    },
    "system": {"prompt": _whole_text},
    "validation": {
        "temperature_range": _range(value_parsers.number(0)),
        "max_tokens_limit": _COUNT,
        "batch_size_range": _range(_COUNT),
        "concurrent_range": _range(_COUNT),
    },
    "requirements": {
        "min_gpu_memory": value_parsers.memory,
        "recommended_gpu": value_parsers.text,
        "cuda_version": value_parsers.text,
        "cpu_cores": _COUNT,
        "cpu_threads": _COUNT,
        "ram": value_parsers.memory,
        "gpu_memory_utilization": _FRACTION,
    },
}
_FREE = (
    "name", "hf_name", "engine", "type", "size", "path", "description", "capabilities",
    "model_info",
)  # fmt: skip
_REASONS = {
    "resources": "the slots follow from the GPU's memory; --slots, --context-length and "
    "--concurrency set them",
    "system": "a system message stands in each request (aiflux convert adds it: --system)",
    "requirements": "what a model needs follows from its architecture (aiflux models show)",
    "hf_name": "models are named as Ollama names them",
    "engine": "--engine names the engine",
    "path": "models lie in models_dir",
}


def read_model_file(path: Path, name: str | None = None, among: str | None = None) -> ModelConfig:
    """Read a model's file.

    Args:
        name: the model where the file names none; None takes ``FAMILY:SIZE`` from the path. In a
            file of many models (``models:``), the key of the one that is wanted.
        among: which of many models is wanted where ``name`` is None, by its key or its name.

    Raises:
        ConfigError: the file is wrong; names line, key and what may stand there.
    """
    file = read_yaml(path)
    at = _entry(file, name or among)
    top = file.mapping(*at, known=(*_SECTIONS, *_FREE))
    sections = {section: _section(file, at, section) for section in _SECTIONS}
    _check_ranges(file, at, sections)
    named = name or (at[-1] if at else f"{path.parent.name}:{path.stem}")
    return ModelConfig(
        name=_name(file, at, top.get("name") or named),
        parameters=ModelParameters(**sections.pop("parameters")),
        **sections,
        place=path,
        unused=tuple(_unused(top)),
    )


def model_file(folders: Iterator[Path], name: str) -> Path | None:
    """Return the ``FAMILY/SIZE.yaml`` of a model in the first folder that has one."""
    model = parse_model_name(name)
    sizes = [model.tag] if model.tag != "latest" else ["latest", "default"]
    for folder in folders:
        for size in sizes:
            path = folder / model.model / f"{size}.yaml"
            if path.is_file():
                return path
    return None


def _entry(file: YamlFile, name: str | None) -> tuple[str, ...]:
    """Return the keys that lead to a model's entry; none where the whole file is one."""
    if "models" not in file.mapping():
        return ()
    models = file.mapping("models")
    if name is None and len(models) == 1:
        (name,) = models
    named = [key for key in models if name in (key, file.mapping("models", key).get("name"))]
    if name is None or not named:
        raise ConfigError(
            f"{file.path} has {'no model ' + repr(name) if name else 'several models'}",
            f"name one of them (--model): {', '.join(sorted(models))}",
        )
    return ("models", name if name in named else named[0])


def _name(file: YamlFile, at: tuple[str, ...], name: Any) -> str:
    if name == "NA":
        raise ConfigError(
            f"{file.place(*at, 'name')}: the model has no name in Ollama",
            "serve it with another engine and name that: --engine-url",
        )
    try:
        parse_model_name(str(name))
    except ConfigError as error:
        raise ConfigError(f"{file.place(*at, 'name')}: {error.message}", error.remedy) from None
    return str(name)


def _section(file: YamlFile, at: tuple[str, ...], section: str) -> dict[str, Any]:
    known = _SECTIONS[section]
    given = file.mapping(*at, section, known=known) if section in file.mapping(*at) else {}
    values = {}
    for key, value in given.items():
        if value is None:
            continue
        try:
            values[key] = known[key](value)
        except ValueError as error:
            raise ConfigError(
                f"{file.place(*at, section, key)}: {key} = {value!r} is wrong",
                f"{key} must be {error}",
            ) from None
    return values


def _check_ranges(
    file: YamlFile, at: tuple[str, ...], sections: Mapping[str, Mapping[str, Any]]
) -> None:
    limits = sections["validation"]
    highest = limits.get("max_tokens_limit")
    for section, key, bounds in (
        ("parameters", "temperature", limits.get("temperature_range")),
        ("parameters", "max_tokens", (1, highest) if highest else None),
        ("resources", "batch_size", limits.get("batch_size_range")),
        ("resources", "max_concurrent", limits.get("concurrent_range")),
    ):
        value = sections[section].get(key)
        if value is not None and bounds is not None and not bounds[0] <= value <= bounds[1]:
            raise ConfigError(
                f"{file.place(*at, section, key)}: {key} = {value} is outside of the range that "
                f"the file itself allows, {bounds[0]} to {bounds[1]}",
                "correct one of them",
            )


def _unused(top: Mapping[str, Any]) -> Iterator[str]:
    for key, reason in _REASONS.items():
        value = top.get(key)
        if value is not None:
            names = [f"{key}.{name}" for name in value] if isinstance(value, dict) else [key]
            yield f"{', '.join(names)}: {reason}"
    if "top_k" in (top.get("parameters") or {}):
        yield "parameters.top_k: Ollama's OpenAI API does not know it; used with other engines only"
