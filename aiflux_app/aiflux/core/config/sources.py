"""Read settings from the environment, ``.env``, YAML files and model files of earlier versions.

Nothing is exported.
"""

from __future__ import annotations

import logging
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from aiflux.core.config.declaration import Setting, parse_setting, refuse_two_names
from aiflux.core.config.settings import (
    BY_NAME,
    LEFT_OUT,
    SECTIONS,
    SETTINGS,
    VARIABLES,
    elsewhere,
    section_settings,
)
from aiflux.errors import ConfigError
from aiflux.models.name import parse_model_name
from aiflux.util import value_parsers
from aiflux.util.files import others_may_write
from aiflux.util.text import nearest
from aiflux.util.value_parsers import written_path
from aiflux.util.yaml_file import YamlFile, is_there, read_text, read_yaml

_log = logging.getLogger(__name__)
_MISSPELT = 0.85  # similarity of a misspelt name: SLURM_ACOUNT is 0.96, SLURM_JOB_NAME 0.83 at most
_DOTENV_LINE = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*?)\s*\Z")

# Keys of ``parameters`` in a model file of earlier versions, and the settings they give.
_MODEL_PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "max_tokens": "max_tokens",
    "top_k": "top_k",
    "stop_sequences": "stop",
}


@dataclass(frozen=True)
class SourcedValue:
    """A setting's value and where it came from, such as ``aiflux.yaml, line 3``.

    Attributes:
        local: whether it is from a file of the current directory.
    """

    value: Any
    origin: str
    local: bool = False


INSTALLED = "site.yaml"
"""Name of the site's file in the directory of the installation, ``sys.prefix``."""
LIMITS = "limits"
"""The section of the site's file with the most that runs can request."""
ENGINE_SETTINGS = ("engine", "engine_url", "engine_command")
"""The settings that each name a run's engine."""


def in_layers(*layers: Mapping[str, SourcedValue]) -> dict[str, SourcedValue]:
    """Return the settings of several sources; later ones take precedence.

    A source that names the engine, by a kind, an address or a command, replaces every other way in
    which an earlier one names it.

    Raises:
        ConfigError: a source names the engine in two ways.
    """
    values: dict[str, SourcedValue] = {}
    for layer in layers:
        named = [name for name in ENGINE_SETTINGS if name in layer and layer[name].value]
        if len(named) > 1:
            raise _two_engines(layer, *named[:2])
        if named:
            for name in ENGINE_SETTINGS:
                values.pop(name, None)
        values.update(layer)
    return values


def _two_engines(layer: Mapping[str, SourcedValue], one: str, other: str) -> ConfigError:
    places = " and ".join(dict.fromkeys(layer[each].origin for each in (one, other)))
    return ConfigError(
        f"{places}: {one} and {other} are both given, but a run has one kind of engine",
        f"remove one of them: {BY_NAME[one].option} or {BY_NAME[other].option}",
    )


def site_files(environ: Mapping[str, str]) -> list[Path]:
    """Return the site's files: that of the installation, and the one in AIFLUX_SITE_CONFIG.

    Raises:
        ConfigError: the file that the variable names does not exist.
    """
    installed = Path(sys.prefix) / INSTALLED
    files = [installed] if is_there(installed) else []
    named = environ.get("AIFLUX_SITE_CONFIG")
    if named and not is_there(Path(named)):
        raise ConfigError(
            f"AIFLUX_SITE_CONFIG names {named!r}, which is not a file",
            "correct the variable or unset it",
        )
    if named and not (files and installed.samefile(named)):
        files.append(Path(named))
    return files


def user_file(environ: Mapping[str, str]) -> Path:
    """Return the path of the user's file, which may not exist."""
    home = Path(environ.get("HOME") or "/")
    return Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "aiflux" / "config.yaml"


def project_file(directory: Path) -> Path:
    """Return the path of a directory's file, which may not exist."""
    return directory / "aiflux.yaml"


def from_files(environ: Mapping[str, str], directory: Path) -> dict[str, SourcedValue]:
    """Return the settings of the YAML files: the directory's, then the user's, then the site's.

    Raises:
        ConfigError: shows the line and the accepted values; or others can write the directory's.
    """
    sites, project = site_files(environ), project_file(directory)
    layers = [from_yaml(path, environ, site=True) for path in sites]
    user = user_file(environ)
    if is_there(user):
        layers.append(from_yaml(user, environ))
    if is_there(project):
        trusted = any(site.samefile(project) for site in sites)
        if not trusted:
            refuse_foreign(project, f"AIFLUX_SITE_CONFIG={shlex.quote(str(project.absolute()))}")
        found = from_yaml(project, environ, site=trusted)
        layers.append({name: replace(each, local=not trusted) for name, each in found.items()})
    return in_layers(*layers)


def refuse_foreign(path: Path, trust: str) -> None:
    """Refuse a file of the current directory that another user owns or can write.

    Args:
        trust: option that accepts the file anyway.

    Raises:
        ConfigError: another user owns or can write it.
    """
    why = others_may_write(path)
    if why is not None:
        raise ConfigError(
            f"{path} is refused: {why}, and could send prompts elsewhere or run commands in your "
            "name",
            f"make it yours alone: chmod go-w {shlex.quote(str(path))}, or copy it; or, if you "
            f"trust it: {trust}",
        )


def from_yaml(
    path: Path, environ: Mapping[str, str], *, site: bool = False
) -> dict[str, SourcedValue]:
    """Return the settings of one YAML file.

    Args:
        environ: variables that its paths can use.
        site: it may have limits, too, which ``site_limits`` reads.

    Raises:
        ConfigError: shows the line and the accepted values.
    """
    file = read_yaml(path)
    values: dict[str, SourcedValue] = {}
    sections = (*SECTIONS, LIMITS) if site else SECTIONS
    for section in file.mapping(known=sections, noun="section", remedy=_elsewhere):
        if section == LIMITS:
            continue
        known = section_settings(section)
        given = file.mapping(section, known=known, noun="setting", remedy=elsewhere)
        refuse_two_names(given, partial(file.place, section), known)
        for name, value in given.items():
            setting, keys = known[name], (section, name)
            if value is not None:
                parsed = parse_in_file(setting, value, file.place(*keys), path.parent, environ)
                values[setting.name] = SourcedValue(parsed, file.line(*keys))
            elif setting.name in LEFT_OUT:
                values[setting.name] = SourcedValue(None, file.line(*keys))
    return values


def _elsewhere(name: str, otherwise: str) -> str:
    return "only the file of the site has limits" if name == LIMITS else elsewhere(name, otherwise)


def from_environment(environ: Mapping[str, str]) -> dict[str, SourcedValue]:
    """Return the settings of the environment; an empty variable counts as not set."""
    return _named({name: (text, "environment") for name, text in environ.items()})


def from_dotenv(path: Path, environ: Mapping[str, str]) -> dict[str, SourcedValue]:
    """Return the settings of a ``.env`` file, if it exists; its paths can use variables."""
    # A directory of this name is a virtual environment.
    if path.is_dir() or not is_there(path):
        return {}
    lines = {name: (text, f"{path}, line {line}") for name, text, line in _dotenv_lines(path)}
    found = _named(
        lines, lambda item, text, place: parse_in_file(item, text, place, path.parent, environ)
    )
    _warn_of_misspelt(lines)
    # Other programs use files of this name, too.
    if found:
        refuse_foreign(path, "set the same variables in the environment")
    return {name: replace(each, local=True) for name, each in found.items()}


def _warn_of_misspelt(lines: Mapping[str, tuple[str, str]]) -> None:
    """Warn of names that are similar to settings; other names can belong to other programs."""
    known = {item.env for item in SETTINGS if item.env}
    for name, (_, place) in lines.items():
        near = nearest(name, known, _MISSPELT)
        if near is not None and name not in known | VARIABLES and near not in lines:
            _log.warning("%s: %s is not a setting; did you mean %s?", place, name, near)


def read_dotenv(path: Path) -> dict[str, str]:
    """Read ``KEY=VALUE`` lines with ``#`` comments, ``export`` and quotes.

    Raises:
        ConfigError: a line is not of that form.
    """
    return {name: text for name, text, _ in _dotenv_lines(path)}


def parse_in_file(
    setting: Setting, value: Any, place: str, folder: Path, environ: Mapping[str, str]
) -> Any:
    """Parse a value of a file; paths are relative to the file.

    Args:
        folder: of the file.
        environ: variables that paths can use.

    Raises:
        ConfigError: the value is wrong.
    """

    def path(value: Any) -> Path:
        return value_parsers.path(written_path(value, folder.absolute(), environ))

    of_paths: dict[value_parsers.Parser, value_parsers.Parser] = {
        value_parsers.path: path,
        value_parsers.named_paths: partial(value_parsers.named_paths, one=path),
    }
    item = replace(setting, parse=of_paths.get(setting.parse, setting.parse))
    return parse_setting(item, value, place)


def _named(
    texts: Mapping[str, tuple[str, str]], parse: Callable[[Setting, str, str], Any] = parse_setting
) -> dict[str, SourcedValue]:
    values = {}
    for item in SETTINGS:
        text, where = texts.get(item.env or "", ("", ""))
        if text:
            origin = f"{where} ({item.env})"
            values[item.name] = SourcedValue(parse(item, text, origin), origin)
    return values


def _dotenv_lines(path: Path) -> Iterator[tuple[str, str, int]]:
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _DOTENV_LINE.match(line)
        if match is None:
            raise ConfigError(f"{path}, line {number}: {line!r} is not KEY=VALUE", "correct it")
        try:
            yield match[1], _unquote(match[2]), number
        except ValueError as error:
            place = f"{path}, line {number} ({match[1]})"
            raise ConfigError(f"{place}: {error}", "correct it") from None


def _unquote(text: str) -> str:
    quote = text[:1]
    if quote in ("'", '"'):
        inside, closed, after = text[1:].partition(quote)
        if not closed:
            raise ValueError(f"the quote {quote} is not closed")
        if not re.fullmatch(r"(\s*|\s+#.*)", after):
            raise ValueError(f"{after.strip()!r} follows the quotes")
        return inside
    return re.split(r"(?:^|\s+)#", text, maxsplit=1)[0]


# --- model files of earlier versions ----------------------------------------------------------


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
        values = {name: getattr(self, key) for key, name in _MODEL_PARAMETERS.items()}
        return {name: value for name, value in values.items() if value not in (None, ())}


@dataclass(frozen=True)
class ModelConfig:
    """A model and its parameters, for ``SlurmRunner.run(model_config=...)``.

    Attributes:
        name: its name in Ollama.
        place: the file; None if the catalog has the model, or nothing does.
        unused: keys of the file that have no effect.
    """

    name: str
    parameters: ModelParameters = ModelParameters()
    place: Path | None = None
    unused: tuple[str, ...] = ()


def read_model_file(path: Path, name: str | None = None, among: str | None = None) -> ModelConfig:
    """Read the name and the parameters of a model from a ``FAMILY/SIZE.yaml``.

    Args:
        name: the model if the file names none; None for ``FAMILY:SIZE`` of the path. In a file of
            several models (``models:``), the key of the model.
        among: the key or the name of one of several models if ``name`` is None.

    Raises:
        ConfigError: the file is wrong; shows line, key and the accepted values.
    """
    file = read_yaml(path)
    at = _model_entry(file, name or among)
    entry = file.mapping(*at)
    given: dict[str, Any] = {}
    if "parameters" in entry:
        given = file.mapping(*at, "parameters", known=_MODEL_PARAMETERS)
    parameters = {}
    for key, value in given.items():
        if value is not None:
            setting = BY_NAME[_MODEL_PARAMETERS[key]]
            parameters[key] = parse_setting(setting, value, file.place(*at, "parameters", key))
    unused = [key for key in entry if key not in ("name", "parameters")]
    if "top_k" in parameters:
        unused.append("parameters.top_k (with Ollama, whose OpenAI API does not support it)")
    named = name or (at[-1] if at else f"{path.parent.name}:{path.stem}")
    return ModelConfig(
        _model_name(file, at, entry.get("name") or named),
        ModelParameters(**parameters),
        path,
        tuple(unused),
    )


def find_model_file(folders: Iterable[Path], name: str) -> Path | None:
    """Return the ``FAMILY/SIZE.yaml`` of a model in the first directory that has one."""
    model = parse_model_name(name)
    sizes = [model.tag] if model.tag != "latest" else ["latest", "default"]
    paths = (folder / model.model / f"{size}.yaml" for folder in folders for size in sizes)
    return next((path for path in paths if path.is_file()), None)


def _model_entry(file: YamlFile, name: str | None) -> tuple[str, ...]:
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


def _model_name(file: YamlFile, at: tuple[str, ...], name: Any) -> str:
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
