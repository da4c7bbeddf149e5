"""The table of all settings, shared by the command line, the environment and YAML files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from aiflux.core.config.declaration import Setting, by_every_name, declared_settings
from aiflux.core.config.run_options import RunOptions
from aiflux.core.config.slurm_config import SlurmConfig
from aiflux.util import value_parsers


def _path(name: str, section: str, help: str, **more: Any) -> Setting:
    return Setting(name, section, value_parsers.path, None, help, metavar="PATH", **more)


SETTINGS: tuple[Setting, ...] = (
    *declared_settings(RunOptions, "run"),
    _path(
        "model_config", "run", "Model parameters, in a FAMILY/SIZE.yaml file of earlier versions"
    ),
    *declared_settings(SlurmConfig, "slurm"),
    _path("data_dir", "paths", "Directory of AI-Flux's data", env="AIFLUX_DATA_DIR", decisive=True),
    _path(
        "models_dir",
        "paths",
        "Directory of the models (default: DATA_DIR/models)",
        env="AIFLUX_MODELS_DIR",
        decisive=True,
    ),
    _path(
        "logs_dir",
        "paths",
        "Directory of the job logs (default: the run directory)",
        env="AIFLUX_LOGS_DIR",
    ),
    _path(
        "containers_dir",
        "paths",
        "Directory of the images (default: DATA_DIR/containers)",
        env="AIFLUX_CONTAINERS_DIR",
        decisive=True,
    ),
    _path("image", "paths", "Image to run", env="AIFLUX_IMAGE", decisive=True),
    _path(
        "models_file",
        "paths",
        "Catalog of models that adds to AI-Flux's own",
        env="AIFLUX_MODELS_FILE",
    ),
)
# Variables of AI-Flux that are not settings: they have no option and no YAML key.
VARIABLES = frozenset(
    {
        "AIFLUX_SITE_CONFIG",
        "AIFLUX_API_KEY",
        "AIFLUX_ENGINE_PROGRAM",
        "AIFLUX_OLLAMA",
        "AIFLUX_CACHE_DIR",
        "AIFLUX_SEALED",
        "AIFLUX_UNSEALED",
        "AIFLUX_IMAGE_CPU_ONLY",
        "AIFLUX_IMAGE_GPU_VENDORS",
    }
)
BY_NAME: Mapping[str, Setting] = by_every_name(SETTINGS)
TITLES: Mapping[str, str] = {
    "run": "Requests",
    "slurm": "Slurm",
    "paths": "Files and directories",
}
"""The sections, with their titles in help texts and pages."""
SECTIONS = tuple(TITLES)


@cache
def section_settings(section: str) -> Mapping[str, Setting]:
    """Return the settings of a section by every name that they have."""
    return {name: item for name, item in BY_NAME.items() if item.section == section}


def elsewhere(name: str, otherwise: str) -> str:
    """Return the remedy for a setting in the wrong section of a YAML file, or another one."""
    if name not in BY_NAME:
        return otherwise
    section = BY_NAME[name].section
    return f"{name} belongs to the section {section}: write it below '{section}:', indented"


def given_settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings among the parameters of a command line; an empty list is not given."""
    return {name: value for name, value in params.items() if name in BY_NAME and value != ()}
