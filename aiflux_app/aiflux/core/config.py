"""Configuration: what was set where, and what holds.

Order: argument > environment > ``.env`` > ``./aiflux.yaml`` > ``~/.config/aiflux/config.yaml`` >
site file (``AIFLUX_SITE_CONFIG``) > default. ``.env`` is read, never exported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from aiflux.core.catalogue import Catalogue, catalogue_files, read_catalogue
from aiflux.core.options import RunOptions
from aiflux.core.settings import BY_NAME, SETTINGS, Setting, parse_setting
from aiflux.errors import ConfigError

# null in a YAML file leaves their directive out; for the others it means "not said here".
LEFT_OUT = ("time", "mem", "cpus_per_task")
_DOTENV_LINE = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*?)\s*\Z")


@dataclass(frozen=True)
class Value:
    """A setting's value and where it came from."""

    value: Any
    origin: str


@dataclass
class SlurmConfig:
    """What is asked of Slurm. None leaves the directive out.

    The fields may be assigned; they are checked when the job is rendered.
    """

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    nodes: int = 1
    gpus_per_node: str = "1"
    gres: str | None = None
    constraint: str | None = None
    time: str | None = "04:00:00"
    mem: str | None = "32G"
    cpus_per_task: int | None = 4
    mail_user: str | None = None
    mail_type: str | None = None
    exclude: str | None = None
    reservation: str | None = None
    shards: int | str = 1
    max_running: int | None = None
    seal: bool = True
    sbatch_arg: dict[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()

    @property
    def memory(self) -> str | None:
        """Another name for ``mem``."""
        return self.mem

    @memory.setter
    def memory(self, value: str | None) -> None:
        self.mem = value

    def checked(self) -> SlurmConfig:
        """Return a copy whose values are checked and in their own types.

        Raises:
            ConfigError: naming the field, its value and what it must be.
        """
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        parsed: dict[str, Any] = {
            name: None if value is None else parse_setting(BY_NAME[name], value, "SlurmConfig")
            for name, value in values.items()
        }
        checked = SlurmConfig(**parsed)
        if checked.nodes != 1:
            raise ConfigError(
                f"nodes = {checked.nodes}: one job uses one node",
                "leave --nodes at 1; more GPUs of one node are used with --gpus-per-node",
            )
        if checked.gres is not None and self.gpus_per_node == SlurmConfig.gpus_per_node:
            checked.gpus_per_node = "0"
        return checked


class Config:
    """All settings of this process, resolved once.

    Args:
        data_dir, models_dir, logs_dir, containers_dir: folders; win over every other source.
        arguments: settings given on the command line; None means not given.
        environ: the environment (default: the process's).
        directory: where ``.env`` and ``aiflux.yaml`` are looked for (default: the current one).

    Raises:
        ConfigError: a value is wrong or a key unknown; names its place.
    """

    def __init__(
        self,
        data_dir: str | Path | None = None,
        models_dir: str | Path | None = None,
        logs_dir: str | Path | None = None,
        containers_dir: str | Path | None = None,
        *,
        arguments: Mapping[str, Any] | None = None,
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
        merged = {**(arguments or {}), **{k: v for k, v in given.items() if v is not None}}
        self.values: dict[str, Value] = self._resolve(merged)

    def get(self, name: str) -> Any:
        """Return a setting's value."""
        return self.values[name].value

    def _resolve(self, arguments: Mapping[str, Any]) -> dict[str, Value]:
        values = {item.name: Value(item.default, "default") for item in SETTINGS}
        for path in self._files():
            values.update(_read_yaml(path))
        values.update(self._from_dotenv())
        values.update(_from_environment(self._environ, "environment"))
        for name, value in arguments.items():
            if value is not None:
                setting = _known(name, "the arguments", BY_NAME)
                parsed = parse_setting(setting, value, f"the argument {setting.option}")
                values[setting.name] = Value(parsed, "argument")
        return values

    def _files(self) -> Iterator[Path]:
        """Yield the YAML files that exist, the weakest first."""
        site = self._environ.get("AIFLUX_SITE_CONFIG")
        if site:
            if not Path(site).is_file():
                raise ConfigError(
                    f"AIFLUX_SITE_CONFIG names {site!r}, which is not a file",
                    "correct the variable or unset it",
                )
            yield Path(site)
        home = Path(self._environ.get("HOME") or "/")
        base = Path(self._environ.get("XDG_CONFIG_HOME") or home / ".config")
        for path in (base / "aiflux" / "config.yaml", self._directory / "aiflux.yaml"):
            if path.is_file():
                yield path

    def _from_dotenv(self) -> dict[str, Value]:
        path = self._directory / ".env"
        return _from_environment(read_dotenv(path), str(path)) if path.is_file() else {}

    @property
    def data_dir(self) -> Path:
        """Where AI-Flux keeps models and images unless told otherwise."""
        home = Path(self._environ.get("HOME") or "/")
        base = Path(self._environ.get("XDG_DATA_HOME") or home / ".local" / "share")
        return Path(self.get("data_dir") or base / "aiflux")

    @property
    def models_dir(self) -> Path:
        """Where models lie."""
        return Path(self.get("models_dir") or self.data_dir / "models")

    @property
    def containers_dir(self) -> Path:
        """Where images lie."""
        return Path(self.get("containers_dir") or self.data_dir / "containers")

    @property
    def logs_dir(self) -> Path | None:
        """Where job logs go; None means the run directory."""
        value: Path | None = self.get("logs_dir")
        return value

    @property
    def image(self) -> Path | None:
        """The image that was named, if one was."""
        value: Path | None = self.get("image")
        return value

    def catalogue(self) -> Catalogue:
        """Return what is known of models: AI-Flux's own figures, the site's and the user's.

        Raises:
            ConfigError: a ``models.yaml`` is wrong; names its place.
        """
        return read_catalogue(catalogue_files(self.get("models_file"), self._environ))

    def get_slurm_config(self, overrides: Mapping[str, Any] | None = None) -> SlurmConfig:
        """Return what to ask of Slurm; ``overrides`` win over every other source."""
        names = {item.name for item in fields(SlurmConfig)}
        values = {name: self.get(name) for name in names}
        for name, value in (overrides or {}).items():
            known = {key: item for key, item in BY_NAME.items() if item.section == "slurm"}
            setting = _known(name, "the overrides", known)
            values[setting.name] = parse_setting(setting, value, "the overrides")
        return SlurmConfig(**values)

    def run_options(self, **overrides: Any) -> RunOptions:
        """Return the options of a run; ``overrides`` that are not None win."""
        names = {item.name for item in fields(RunOptions)}
        values = {name: self.get(name) for name in names}
        for name, value in overrides.items():
            if value is not None:
                known = {key: item for key, item in BY_NAME.items() if item.section == "run"}
                setting = _known(name, "the arguments", known)
                values[setting.name] = parse_setting(setting, value, f"the argument {name}")
        return RunOptions(**values)


def _known(name: str, place: str, known: Mapping[str, Setting]) -> Setting:
    if name not in known:
        raise ConfigError(
            f"{place} name an unknown setting {name!r}", f"known are: {', '.join(sorted(known))}"
        )
    return known[name]


def _from_environment(environ: Mapping[str, str], origin: str) -> dict[str, Value]:
    values = {}
    for item in SETTINGS:
        text = environ.get(item.env) if item.env else None
        if text:
            place = f"{origin} ({item.env})"
            values[item.name] = Value(parse_setting(item, text, place), place)
    return values


def read_dotenv(path: Path) -> dict[str, str]:
    """Read ``KEY=VALUE`` lines; ``#`` comments, ``export`` and quotes are understood.

    Raises:
        ConfigError: a line is not of that form.
    """
    values = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _DOTENV_LINE.match(line)
        if match is None:
            raise ConfigError(f"{path}, line {number}: {line!r} is not KEY=VALUE", "correct it")
        values[match[1]] = _unquote(match[2])
    return values


def _unquote(text: str) -> str:
    for quote in ("'", '"'):
        if text.startswith(quote) and text.find(quote, 1) > 0:
            return text[1 : text.index(quote, 1)]
    return re.split(r"\s+#", text, maxsplit=1)[0]


def _read_yaml(path: Path) -> dict[str, Value]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}", "correct it") from None
    if content is None:
        return {}
    sections = sorted({item.section for item in SETTINGS})
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold sections", f"known are: {', '.join(sections)}")
    values: dict[str, Value] = {}
    for section, entries in content.items():
        if section not in sections:
            raise ConfigError(
                f"{path}: unknown section {section!r}", f"known are: {', '.join(sections)}"
            )
        values.update(_read_section(path, section, entries or {}))
    return values


def _read_section(path: Path, section: str, entries: Any) -> dict[str, Value]:
    if not isinstance(entries, dict):
        raise ConfigError(f"{path}: section {section} must hold KEY: VALUE lines", "correct it")
    known = {key: item for key, item in BY_NAME.items() if item.section == section}
    values = {}
    for name, value in entries.items():
        setting = _known(str(name), f"{path}, section {section}:", known)
        place = f"{path} ({section}.{name})"
        if value is not None:
            values[setting.name] = Value(parse_setting(setting, value, place), place)
        elif setting.name in LEFT_OUT:
            values[setting.name] = Value(None, place)
    return values
