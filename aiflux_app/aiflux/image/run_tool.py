"""Run external programs for image builds: apptainer, git, tar and our own scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from spython.utils import run_command

from aiflux.errors import ImageError
from aiflux.image.container import find_runtime
from aiflux.util.text import error_text


def run(
    command: Sequence[str | Path],
    what: str,
    remedy: str,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run a program with its output shown to the user.

    Raises:
        ImageError: the program could not be started or failed; ``what`` starts the message.
    """
    _start(command, what, remedy, cwd=cwd, env=env)


def capture(command: Sequence[str | Path], what: str, remedy: str) -> str:
    """Run a program with its errors shown to the user, and return its output.

    Raises:
        ImageError: as for run().
    """
    return _start(command, what, remedy, stdout=subprocess.PIPE).stdout


def _start(
    command: Sequence[str | Path],
    what: str,
    remedy: str,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdout: int | None = None,
) -> subprocess.CompletedProcess[str]:
    # Our scripts call pip through PYTHON, the interpreter of the virtual environment.
    environment = {"PYTHON": sys.executable, **(os.environ if env is None else env)}
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            text=True,
            check=False,
        )
    except OSError as error:
        raise ImageError(f"{what}: {error_text(error)}", remedy) from error
    if done.returncode:
        raise ImageError(f"{what}: {Path(words[0]).name} ended with {done.returncode}", remedy)
    return done


def ask(command: Sequence[str | Path]) -> str | None:
    """Return a program's output without the final newline, or None if it failed."""
    try:
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.removesuffix("\n") if done.returncode == 0 else None


def is_singularity_ce(runtime: Path) -> bool:
    """Return whether the program is SingularityCE; Apptainer can have the name singularity too."""
    if runtime.name == "apptainer":
        return False
    return (ask([runtime, "--version"]) or "").startswith("singularity")


def apptainer(words: Sequence[str], typed: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run Apptainer, capturing output and errors.

    If it wrote only one of them, both are set to that text.

    Args:
        typed: text for its standard input.

    Raises:
        ImageError: Apptainer cannot be started, or its output is not text.
    """
    command = [str(find_runtime()), *words]
    try:
        if typed is None:
            # spython's Client would start "singularity", which may not exist, and exits this
            # process if a bind is missing. Its runner does neither.
            answer = run_command(command, quiet=True)
            texts = answer["message"] or [""]
            return subprocess.CompletedProcess(command, answer["return_code"], texts[0], texts[-1])
        # The runner cannot pass standard input.
        return subprocess.run(
            command, input=typed, capture_output=True, text=True, errors="replace", check=False
        )
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(
            f"apptainer {words[0]} failed: {error_text(error)}",
            f"try it by hand: apptainer {words[0]}",
        ) from error
