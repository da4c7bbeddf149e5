"""A model's file in the form of earlier versions: ``FAMILY/SIZE.yaml``.

Its parameters still fill in what requests leave open. AI-Flux determines the rest by itself, or the
requests have it; such keys are checked and kept, and reported as unused.
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
    """Parameters that fill in what a request leaves open; None and () leave it open."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    top_k: int | None = None
    stop_sequences: tuple[str, ...] = ()

    def settings(self) -> dict[str, Any]:
        """Return the given parameters by the names of their settings."""
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
    """The configuration of a model.

    Attributes:
        name: its name in Ollama.
        parameters: those that a run uses (``SlurmRunner.run(model_config=...)``).
        resources, system, validation, requirements: content of the file; used only to check the
            parameters against ``validation``.
        place: the file; None if the catalog has the model, or nothing does.
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
    "system": "a system message is part of each request (aiflux convert adds it: --system)",
    "requirements": "the memory of a model follows from its architecture (aiflux models show)",
    "hf_name": "models are named as Ollama names them",
    "engine": "--engine names the engine",
    "path": "models are stored in models_dir",
}


def read_model_file(path: Path, name: str | None = None, among: str | None = None) -> ModelConfig:
    """Read a model's file.

    Args:
        name: the model if the file names none; None for ``FAMILY:SIZE`` of the path. In a file of
            several models (``models:``), the key of the model.
        among: the key or the name of one of several models if ``name`` is None.

    Raises:
        ConfigError: the file is wrong; shows line, key and the accepted values.
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
    """Return the ``FAMILY/SIZE.yaml`` of a model in the first directory that has one."""
    model = parse_model_name(name)
    sizes = [model.tag] if model.tag != "latest" else ["latest", "default"]
    for folder in folders:
        for size in sizes:
            path = folder / model.model / f"{size}.yaml"
            if path.is_file():
                return path
    return None


def _entry(file: YamlFile, name: str | None) -> tuple[str, ...]:
    """Return the keys that lead to a model's entry; none if the whole file is the entry."""
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
            "use another engine for it: --engine-url",
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
                f"{file.place(*at, section, key)}: {key} = {value} is outside the range that "
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
        yield "parameters.top_k: not supported by Ollama's OpenAI API; used with other engines only"
