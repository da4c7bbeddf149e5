"""Find the container runtime and the image; ``slurm/job.sh`` has the container's command lines.

Flags: https://apptainer.org/docs/user/main/cli/apptainer_run.html
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

from aiflux.core.config.config import Config
from aiflux.core.config.settings import AMD
from aiflux.core.config.sources import refuse_foreign
from aiflux.errors import ConfigError, ImageError
from aiflux.image.sif import CHECKOUT, how_to_build, make_options, own_image, uses_default_image

IMAGE_NAME = "aiflux.sif"


def image_names(engine: str, vendor: str = "auto") -> tuple[str, ...]:
    """Return the names under which an image with an engine is looked for, the best first.

    Args:
        vendor: that of the GPUs, ``auto`` if it is not chosen.
    """
    stem = "aiflux" if uses_default_image(engine) else f"aiflux-{engine}"
    own = [f"{stem}-{AMD}.sif"] if vendor == AMD else []
    return tuple(dict.fromkeys([*own, f"{stem}.sif", IMAGE_NAME]))


_LONGEST = 100  # maximum characters of a value in a message


def probe_command(runtime: Path, image: Path) -> list[str]:
    """Return a command that succeeds if containers can be sealed.

    The container sees neither home nor the current directory nor the environment.
    """
    flags = ["--containall", "--pwd", "/", "--net", "--network", "none"]
    return [str(runtime), "exec", *flags, str(image), "true"]


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

    Candidates: the configured image; one of ``image_names``, such as ``aiflux.sif``, in
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
    vendor = config.get("gpu_vendor")
    names = image_names(engine, vendor)
    for image in ((folder / name).absolute() for name in names for folder in folders):
        if image.is_file():
            if not is_chosen(config, image, checkout):
                refuse_foreign(image, f"--image {shlex.quote(str(image))}")
            return own_image(image).path
    places = ", ".join(str(folder) for folder in folders)
    make = how_to_build(make_options(engine, vendor))
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


def refuse_container(config: Config) -> None:
    """Refuse a seal and an image that somebody asked for, for a run without a container.

    Raises:
        ConfigError: the image is given as an argument, or the seal is set and not by default.
    """
    refuse_seal(
        config,
        "a run with --engine-command cannot be sealed: there is no container, and the command's "
        "programs have the node's network",
        ", or use an engine with an image (--engine)",
    )
    image = config.values["image"]
    if image.origin == "argument":
        raise no_image_used(image.value)


def refuse_seal(config: Config, why: str, otherwise: str = "") -> None:
    """Refuse a seal that somebody asked for, for a run that cannot be sealed.

    Raises:
        ConfigError: the seal is set, and not by default.
    """
    seal = config.values["seal"]
    if seal.value and seal.origin != "default":
        raise ConfigError(
            f"seal = true ({seal.origin}), but {why}", f"accept that with --no-seal{otherwise}"
        )


def no_image_used(image: Path) -> ConfigError:
    """Return the error for an image that a run with --engine-command would not use."""
    return ConfigError(
        f"the image {image} would not be used: a run with --engine-command has no container",
        "omit --image; the command can start a container itself",
    )


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
