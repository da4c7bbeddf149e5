"""The configuration: all settings, and where they come from.

In order of precedence: argument > environment > ``.env`` > ``./aiflux.yaml`` >
``~/.config/aiflux/config.yaml`` > site file (``AIFLUX_SITE_CONFIG``) > default. ``.env`` is read,
never exported.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from aiflux.core.config.declaration import known_setting, parse_setting, refuse_two_names
from aiflux.core.config.engine_kinds import WITHOUT_TOP_K, kind_name
from aiflux.core.config.settings import BY_NAME, SETTINGS, RunOptions, SlurmConfig, section_settings
from aiflux.core.config.sources import (
    ENGINE_SETTINGS,
    ModelConfig,
    ModelParameters,
    SourcedValue,
    find_model_file,
    from_dotenv,
    from_environment,
    from_files,
    in_layers,
    read_model_file,
)
from aiflux.errors import ConfigError
from aiflux.models.catalog import Catalog, catalog_files, read_catalog
from aiflux.models.name import parse_model_name, same_model
from aiflux.util.files import expanded
from aiflux.util.text import public_url

__all__ = ["Config", "SlurmConfig", "SourcedValue"]

_log = logging.getLogger(__name__)


class Config:
    """All settings of this process, resolved once.

    Args:
        data_dir, models_dir, logs_dir, containers_dir: directories; they take precedence.
        arguments: settings given on the command line; None means not given.
        model_config: a model, whose parameters apply if nothing else sets them.
        environ: the environment (default: the process's).
        directory: of ``.env`` and ``aiflux.yaml`` (default: the current one).

    Attributes:
        values: every setting's value and where it came from.

    Raises:
        ConfigError: a value is wrong or a key unknown; shows its place.
    """

    def __init__(
        self,
        data_dir: str | Path | None = None,
        models_dir: str | Path | None = None,
        logs_dir: str | Path | None = None,
        containers_dir: str | Path | None = None,
        *,
        arguments: Mapping[str, Any] | None = None,
        model_config: ModelConfig | None = None,
        environ: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        self._environ = os.environ if environ is None else environ
        self._directory = Path.cwd() if directory is None else directory
        given = {
            "data_dir": data_dir,
            "models_dir": models_dir,
            "logs_dir": logs_dir,
            "containers_dir": containers_dir,
        }
        self._arguments = {**(arguments or {}), **{k: v for k, v in given.items() if v is not None}}
        values = self._resolve(self._arguments)
        path = values["model_config"].value
        if model_config is None and path is not None:
            model_config = self._read_model_file(path, among=values["model"].value)
        self._model_config = model_config
        if model_config is not None:
            values.update(_of_model(model_config, values))
        self.values: Mapping[str, SourcedValue] = MappingProxyType(values)

    def get(self, name: str) -> Any:
        """Return a setting's value."""
        return self.values[name].value

    def changed(
        self, arguments: Mapping[str, Any], model_config: ModelConfig | None = None
    ) -> Config:
        """Return this configuration with more arguments; None means not given."""
        given = {name: value for name, value in arguments.items() if value is not None}
        return Config(
            arguments={**self._arguments, **given},
            model_config=model_config or (None if "model_config" in given else self._model_config),
            environ=self._environ,
            directory=self._directory,
        )

    def _resolve(self, arguments: Mapping[str, Any]) -> dict[str, SourcedValue]:
        given = {}
        for name, value in arguments.items():
            if value is not None:
                setting = known_setting(name, "the arguments: ", BY_NAME)
                parsed = parse_setting(setting, value, f"the argument {setting.option}")
                given[setting.name] = SourcedValue(parsed, "argument")
        found = in_layers(
            from_files(self._environ, self._directory),
            from_dotenv(self._directory / ".env", self._environ),
            from_environment(self._environ),
            given,
        )
        return {item.name: SourcedValue(item.default, "default") for item in SETTINGS} | found

    @property
    def engine(self) -> str:
        """Name of the engine kind of a run."""
        return kind_name(*(self.get(name) for name in ENGINE_SETTINGS))

    @property
    def data_dir(self) -> Path:
        """Where AI-Flux stores models and images by default."""
        home = Path(self._environ.get("HOME") or "/")
        base = Path(self._environ.get("XDG_DATA_HOME") or home / ".local" / "share")
        return Path(self.get("data_dir") or base / "aiflux")

    @property
    def models_dir(self) -> Path:
        """Directory of the models."""
        return Path(self.get("models_dir") or self.data_dir / "models")

    @property
    def containers_dir(self) -> Path:
        """Directory of the images."""
        return Path(self.get("containers_dir") or self.data_dir / "containers")

    @property
    def logs_dir(self) -> Path | None:
        """Directory of the job logs; None for the run directory."""
        value: Path | None = self.get("logs_dir")
        return value

    @property
    def image(self) -> Path | None:
        """The configured image, if any."""
        value: Path | None = self.get("image")
        return value

    def catalog(self) -> Catalog:
        """Return the model catalog: AI-Flux's, with additions of the site and the user.

        Raises:
            ConfigError: a ``models.yaml`` is wrong; shows its place.
        """
        return read_catalog(catalog_files(self.get("models_file"), self._environ))

    def get_slurm_config(self, overrides: Mapping[str, Any] | None = None) -> SlurmConfig:
        """Return the Slurm resources.

        Args:
            overrides: take precedence over every other source; None means not given.
        """
        values = {item.name: self.get(item.name) for item in fields(SlurmConfig)}
        return SlurmConfig(**{**values, **_parsed("slurm", overrides or {}, "the overrides")})

    @property
    def decided_here(self) -> dict[str, SourcedValue]:
        """Settings of the current directory's files that decide where prompts go or what runs."""
        return {
            name: value
            for name, value in self.values.items()
            if value.local and BY_NAME[name].decisive and value.value != BY_NAME[name].default
        }

    def _refuse_key(self, confirmed: Mapping[str, Any]) -> None:
        """Refuse to send the API key where only a file of this directory decides.

        Args:
            confirmed: settings that the caller gives itself.
        """
        if not self._environ.get("AIFLUX_API_KEY"):
            return
        for name in ("engine_url", "engine_command", "engine_ca"):
            option = BY_NAME[name].option
            found = self.values[name]
            if confirmed.get(name) is not None or not (found.local and found.value):
                continue
            if name == "engine_url":
                where = f"to {public_url(found.value)}, an address that only {found.origin} names"
            elif name == "engine_command":
                where = f"to a server that only {found.origin} starts: {found.value}"
            else:
                where = (
                    f"to a server that is only trusted because {found.origin} names the "
                    f"certificates {found.value}"
                )
            raise ConfigError(
                f"AIFLUX_API_KEY would go {where}",
                f"confirm it with {option} or {BY_NAME[name].env}, or write it into "
                "~/.config/aiflux/config.yaml; or unset AIFLUX_API_KEY",
            )

    def run_options(self, **overrides: Any) -> RunOptions:
        """Return the options of a run; ``overrides`` that are not None take precedence.

        Raises:
            ConfigError: a value is wrong or contradicts another, or the API key would go to an
                address of a file of the current directory.
        """
        self._refuse_key(overrides)
        if overrides.get("tune") is None and overrides.get("concurrency") is None:
            _refuse_tuned_concurrency(self.values)
        names = [item.name for item in fields(RunOptions) if item.name in BY_NAME]
        values = {name: self.get(name) for name in names}
        values["model_defaults"] = self.catalog().all_defaults
        return RunOptions(**{**values, **_parsed("run", overrides, "the arguments")})

    def load_model_config(
        self,
        model_type: str,
        model_size: str | None = None,
        custom_config_path: str | Path | None = None,
    ) -> ModelConfig:
        """Return the configuration of a model for ``SlurmRunner.run(model_config=)``.

        The source is ``custom_config_path``, or else ``FAMILY/SIZE.yaml`` in ``models`` or
        ``config/models`` of this directory or in the models directory, or else the catalog. An
        unknown model has no parameters.

        Args:
            model_type: ``"llama3.2:3b"``, or ``"llama3.2"`` with ``model_size="3b"``.

        Raises:
            ConfigError: the name or the file is wrong; shows its place.
        """
        name = model_type if model_size is None else f"{model_type}:{model_size}"
        parse_model_name(name)
        folders = (
            self._directory / "models",
            self._directory / "config" / "models",
            self.models_dir,
        )
        path = (
            find_model_file(folders, name)
            if custom_config_path is None
            else self._directory / expanded(custom_config_path)
        )
        if path is not None:
            return self._read_model_file(path, name)
        return ModelConfig(name, _known_parameters(self.catalog(), name))

    def _read_model_file(
        self, path: Path, name: str | None = None, among: str | None = None
    ) -> ModelConfig:
        found = read_model_file(path, name, among)
        if found.unused:
            _log.warning("%s: these keys have no effect: %s", path, ", ".join(found.unused))
        return found


def _known_parameters(catalog: Catalog, name: str) -> ModelParameters:
    """Return the catalog's parameters of a model."""
    known = catalog.defaults(name)
    stop = known.get("stop") or ()
    return ModelParameters(
        temperature=known.get("temperature"),
        top_p=known.get("top_p"),
        max_tokens=known.get("max_tokens"),
        stop_sequences=(stop,) if isinstance(stop, str) else tuple(stop),
    )


def _of_model(
    model: ModelConfig, values: Mapping[str, SourcedValue]
) -> Iterator[tuple[str, SourcedValue]]:
    """Yield the settings that a model's configuration gives and nothing else sets."""
    origin = str(model.place or f"the configuration of {model.name}")
    named = values["model"]
    if named.value is not None and not same_model(named.value, model.name):
        raise ConfigError(
            f"{origin} is for the model {model.name}, but the run's model is {named.value} "
            f"({named.origin})",
            f"model {model.name}, or another model_config, or none",
        )
    given = {"model": model.name, **model.parameters.settings()}
    if kind_name(*(values[name].value for name in ENGINE_SETTINGS)) in WITHOUT_TOP_K:
        given.pop("top_k", None)
    for name, value in given.items():
        if values[name].origin == "default":
            yield name, SourcedValue(value, origin)


def _refuse_tuned_concurrency(values: Mapping[str, SourcedValue]) -> None:
    """Refuse ``tune`` with ``concurrency``; show where each is from, and what to change there."""
    tune, count = values["tune"], values["concurrency"]
    if not tune.value or count.value is None:
        return
    no_count = "omit --concurrency"
    if count.origin != "argument":
        no_count = f"remove concurrency from {count.origin}"
    raise ConfigError(
        f"tune ({tune.origin}) and concurrency = {count.value} ({count.origin}) cannot be "
        "combined: one looks for the number of requests in flight, the other sets it",
        f"to tune, {no_count}; to keep {count.value}, "
        f"{'omit --tune' if tune.origin == 'argument' else 'give --no-tune'}",
    )


def _parsed(section: str, given: Mapping[str, Any], place: str) -> dict[str, Any]:
    known = section_settings(section)
    values = {}
    refuse_two_names(given, lambda _: place, known)
    for name, value in given.items():
        setting = known_setting(name, f"{place}: ", known)
        if value is not None:
            values[setting.name] = parse_setting(setting, value, place)
    return values
