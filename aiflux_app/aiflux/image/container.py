"""Render the container's command lines and environments, and find the image.

``slurm/job.sh`` implements the same in shell for compute nodes; a test compares both.
Flags: https://apptainer.org/docs/user/main/cli/apptainer_run.html
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiflux.core.config.config import Config
from aiflux.core.config.engine_kinds import EXTERNAL
from aiflux.core.config.sources import refuse_foreign
from aiflux.errors import ConfigError, ImageError
from aiflux.image.sif import CHECKOUT, how_to_build, image_id, own_image

IMAGE_NAME = "aiflux.sif"


def image_names(engine: str) -> tuple[str, ...]:
    """Return the names under which an image with an engine is looked for, the best first."""
    if engine in ("ollama", EXTERNAL):
        return (IMAGE_NAME,)
    return (f"aiflux-{engine}.sif", IMAGE_NAME)


_LONGEST = 100  # maximum characters of a value in a message

_PASSED = (
    "CUDA_VISIBLE_DEVICES",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_RESTART_COUNT",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURMD_NODENAME",
    "SLURM_CPUS_PER_TASK",
    "SLURM_JOB_GPUS",
    "SLURM_JOB_END_TIME",
)
_PROXIES = tuple(
    name for low in ("http_proxy", "https_proxy", "no_proxy") for name in (low, low.upper())
)
_NO_PROXIES = {"http_proxy", "https_proxy", "no_proxy", "all_proxy", "ftp_proxy"}
_OF_THE_HOST = (
    "AIFLUX_IMAGE",
    "AIFLUX_SITE_CONFIG",
    "AIFLUX_MODELS_FILE",
    "AIFLUX_ENGINE_PROGRAM",
    "AIFLUX_OLLAMA",
    "AIFLUX_IMAGE_ID",
    "AIFLUX_SEAL",
    "AIFLUX_SEALED",
    "AIFLUX_UNSEALED",
)


@dataclass(frozen=True)
class ContainerSpec:
    """A container to run. Paths are absolute, and equal inside and outside.

    Attributes:
        runtime: ``apptainer`` or ``singularity``.
        output_dir: directory of the output and the run directory; writable inside.
        models_dir: None if the engine is external.
        workdir: private directory for /tmp, /var/tmp and HOME of the container.
        nv: expose the node's NVIDIA GPUs to the container.
        unsealed: why the network stays available; "" if the container is sealed (loopback only).
    """

    runtime: Path
    image: Path
    input: Path
    output_dir: Path
    models_dir: Path | None
    workdir: Path
    nv: bool = True
    unsealed: str = ""


def probe_command(runtime: Path, image: Path) -> list[str]:
    """Return a command that succeeds if containers can be sealed.

    The container sees neither home nor the current directory nor the environment.
    """
    flags = ["--containall", "--pwd", "/", "--net", "--network", "none"]
    return [str(runtime), "exec", *flags, str(image), "true"]


def prepare_command(spec: ContainerSpec, args: Sequence[str]) -> list[str]:
    """Return the command that prepares a run: with network, models writable."""
    return _command(spec, args, sealed=False, models_read_only=False)


def work_command(spec: ContainerSpec, args: Sequence[str]) -> list[str]:
    """Return the command that processes a shard: sealed, models read-only."""
    return _command(spec, args, sealed=not spec.unsealed, models_read_only=True)


def prepare_environment(spec: ContainerSpec, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of ``prepare_command``, including proxies of ``environ``."""
    return _environment(spec, environ, {name: environ.get(name) for name in _PROXIES})


def work_environment(spec: ContainerSpec, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of ``work_command``, with AIFLUX_SEALED as 1 or 0.

    If it is 0, AIFLUX_UNSEALED has the reason.
    """
    # Apptainer passes the host's proxies even to a clean environment.
    kept = {name: value for name, value in environ.items() if name.lower() not in _NO_PROXIES}
    decided = {"AIFLUX_SEALED": "0", "AIFLUX_UNSEALED": spec.unsealed}
    return _environment(spec, kept, decided if spec.unsealed else {"AIFLUX_SEALED": "1"})


def mount_option(path: Path, read_only: bool) -> str:
    """Return the value of ``--mount`` that binds ``path`` to the same path inside.

    ``--mount`` parses CSV, so the path can contain any character except line breaks.

    Raises:
        ConfigError: the path is not absolute, or contains a line break.
    """
    text = str(path)
    if not path.is_absolute() or "\n" in text:
        raise ConfigError(
            f"the path {text!r} cannot be mounted", "it must be absolute and without line breaks"
        )
    text = text.replace('"', '""')
    return f'type=bind,"source={text}","destination={text}"' + (",ro" if read_only else "")


def _command(
    spec: ContainerSpec, args: Sequence[str], *, sealed: bool, models_read_only: bool
) -> list[str]:
    return [
        str(spec.runtime),
        "--quiet",  # still shows warnings and errors
        "run",
        "--containall",
        *(["--nv"] if spec.nv else []),
        *(["--net", "--network", "none"] if sealed else []),
        *("--workdir", str(spec.workdir)),
        *("--pwd", str(spec.output_dir)),
        *_mounts(spec, models_read_only),
        str(spec.image),
        *args,
    ]


def _mounts(spec: ContainerSpec, models_read_only: bool) -> Iterator[str]:
    folders = [(spec.output_dir, False)]
    # Apptainer warns about duplicate mounts, so each directory is mounted once, writable if needed.
    if spec.models_dir is not None and spec.models_dir != spec.output_dir:
        # Parents must be mounted before their subdirectories.
        position = 0 if spec.output_dir.is_relative_to(spec.models_dir) else 1
        folders.insert(position, (spec.models_dir, models_read_only))
    for path, read_only in [*folders, (spec.input, True)]:
        yield "--mount"
        yield mount_option(path, read_only)


def _environment(
    spec: ContainerSpec, environ: Mapping[str, str], more: Mapping[str, str | None]
) -> dict[str, str]:
    prefix = "SINGULARITY" if spec.runtime.name == "singularity" else "APPTAINER"
    inside = {name: environ.get(name) for name in _PASSED}
    inside |= {name: value for name, value in environ.items() if _is_option(name)}
    inside["AIFLUX_MODELS_DIR"] = None if spec.models_dir is None else str(spec.models_dir)
    inside["AIFLUX_IMAGE_ID"] = image_id(spec.image) or None
    inside["LANG"] = "C.UTF-8"
    inside |= more
    given = {f"{prefix}ENV_{name}": value for name, value in inside.items() if value is not None}
    # NO_EVAL passes values literally; otherwise the container's shell evaluates them.
    return {**environ, f"{prefix}_NO_EVAL": "1", **given}


def _is_option(name: str) -> bool:
    return name.startswith("AIFLUX_") and not name.endswith("_DIR") and name not in _OF_THE_HOST


def find_runtime(path: str | None = None) -> Path:
    """Return Apptainer (or Singularity) from ``path``, by default PATH.

    Raises:
        ImageError: neither is installed.
    """
    for name in ("apptainer", "singularity"):
        found = shutil.which(name, path=path)
        if found:
            return Path(found)
    raise ImageError(
        "neither apptainer nor singularity is on PATH",
        "load the site's module (module load apptainer), or ask the site to install Apptainer",
    )


def find_image(
    config: Config, cwd: Path, checkout: Path = CHECKOUT, *, engine: str | None = None
) -> Path:
    """Return the absolute path of the image, without resolving links.

    Args:
        engine: kind of the run's engine; by default the configured one.

    Candidates: the configured image; ``aiflux.sif``, or ``aiflux-KIND.sif`` for other engines, in
    ``cwd``, in ``checkout`` if that is a checkout (has a Makefile), and in the containers
    directory. Only labels are read.

    Raises:
        ConfigError: the image is only in ``cwd``, and others can write to it.
        ImageError: no image was found, or it is not an AI-Flux image.
    """
    if config.image is not None:
        if not config.image.is_file():
            raise ImageError(
                f"image not found: {config.image} ({config.values['image'].origin})",
                f"correct the path, or remove the setting and {how_to_build()}",
            )
        return own_image(config.image).path
    folders = [*dict.fromkeys([cwd, *_development(checkout), config.containers_dir])]
    engine = engine or config.engine
    names = image_names(engine)
    for image in ((folder / name).absolute() for name in names for folder in folders):
        if image.is_file():
            if not is_chosen(config, image, checkout):
                refuse_foreign(image, f"--image {shlex.quote(str(image))}")
            return own_image(image).path
    places = ", ".join(str(folder) for folder in folders)
    make = how_to_build("" if names[0] == IMAGE_NAME else f"ENGINE={engine}")
    raise ImageError(f"no image {names[0]} in {places}", f"{make}; or use --image FILE")


def is_chosen(config: Config, image: Path, checkout: Path = CHECKOUT) -> bool:
    """Return whether the user or the site chose an image that ``find_image`` returned.

    An image that was only found in the current directory, or that a file there names, was put
    there by anyone who can write to it.
    """
    if config.image is not None:
        return not config.values["image"].local
    chosen = [*_development(checkout)]
    if not any(config.values[name].local for name in ("containers_dir", "data_dir")):
        chosen.append(config.containers_dir)
    return image.parent in [folder.absolute() for folder in chosen]


def local_choices(config: Config, image: Path | None, checkout: Path = CHECKOUT) -> str | None:
    """Return one line about what the current directory decides about data flow and execution.

    Args:
        image: the image that will run, if any.

    Returns:
        None if it decides nothing.
    """
    decided = [
        f"{name} = {_shown(value.value)} ({value.origin})"
        for name, value in config.decided_here.items()
    ]
    if image is not None and config.image is None and not is_chosen(config, image, checkout):
        decided.append(f"image = {_shown(image)} (found here)")
    return f"the current directory decides: {'; '.join(decided)}" if decided else None


def _shown(value: Any) -> str:
    text = "".join(char if char.isprintable() else "?" for char in str(value))
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _development(checkout: Path) -> list[Path]:
    return [checkout] if (checkout / "Makefile").is_file() else []
