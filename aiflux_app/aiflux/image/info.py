"""Reads what is in an image, from its labels."""

from __future__ import annotations

from dataclasses import dataclass
from json import JSONDecodeError, loads
from pathlib import Path
from typing import Any

from spython.utils import run_command

from aiflux.core.container import find_runtime
from aiflux.errors import ImageError

_PREFIX = "aiflux."


@dataclass(frozen=True)
class ImageInfo:
    """What an image says about itself.

    Attributes:
        path: the image file.
        facts: version, commit, base, base_image, base_digest, engine, ollama, python, os, arch and
            cpu_only (``yes`` or ``no``).
        labels: the labels of others, such as Apptainer's own.
    """

    path: Path
    facts: dict[str, str]
    labels: dict[str, str]

    @property
    def cpu_only(self) -> bool:
        """Whether its Ollama cannot use a GPU."""
        return self.facts.get("cpu_only") == "yes"


def info(path: Path) -> ImageInfo:
    """Read an image's labels.

    Raises:
        ImageError: it is not there, is no image, or is not one of AI-Flux.
    """
    if not path.exists():
        raise ImageError(f"there is no image {path}", "build it: make image")
    if not path.is_file():
        raise ImageError(f"{path} is no image, which is a file", "name the image's file (*.sif)")
    labels = _labels(path)
    facts = {
        key.removeprefix(_PREFIX): value for key, value in labels.items() if key.startswith(_PREFIX)
    }
    if not facts:
        raise ImageError(f"{path} is no image of AI-Flux: it has none of its labels", "make image")
    others = {key: value for key, value in labels.items() if not key.startswith(_PREFIX)}
    return ImageInfo(path, facts, others)


def _labels(path: Path) -> dict[str, str]:
    """The labels that ``inspect`` tells, asked through spython's runner and parser.

    spython's own ``Client.inspect`` calls a program named singularity, which need not be there.
    """
    command = [str(find_runtime()), "inspect", "--json", "--labels", str(path.absolute())]
    answer: dict[str, Any] = run_command(command, quiet=True)
    message = "".join(answer["message"])
    if answer["return_code"] != 0:
        lines = message.strip().splitlines() or ["no message"]
        raise ImageError(f"{path} cannot be read as an image: {lines[-1]}", "build it: make image")
    try:
        labels = loads(answer["message"][0])["data"]["attributes"]["labels"] or {}
    except (JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise ImageError(
            f"apptainer inspect answered for {path} in a form that is not known: {error}",
            "report it with the output of `apptainer inspect --json`",
        ) from error
    return {str(key): str(value) for key, value in labels.items()}
