"""Executables that replace Slurm's commands and Apptainer and record their calls."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

# Each call has a numbered directory; behaviour/NAME is a shell script that the call runs.
_RECORDER = """\
#!/bin/bash
here=$(dirname -- "$0")
name=$(basename -- "$0")
number=0
until mkdir "$here/calls/$name-$number" 2>/dev/null; do number=$((number + 1)); done
call=$here/calls/$name-$number
printf '%s\\0' "$@" >"$call/argv"
env -0 >"$call/env"
: >"$call/whole"
[[ ! -e $here/behaviour/$name ]] || . "$here/behaviour/$name"
"""


@dataclass(frozen=True)
class Call:
    """One call of a fake, with its arguments and environment."""

    argv: list[str]
    environ: dict[str, str]


class FakeCommands:
    """A directory of recording executables for PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("calls", "behaviour"):
            (folder / name).mkdir(parents=True)

    @property
    def path(self) -> str:
        """PATH with the fakes before the real commands."""
        return f"{self.folder}{os.pathsep}{os.defpath}"

    def add(self, name: str, behaviour: str = "") -> Path:
        """Create an executable; ``behaviour`` is shell code that can use ``$call``."""
        file = self.folder / name
        file.write_text(_RECORDER, encoding="utf-8")
        file.chmod(0o755)
        (self.folder / "behaviour" / name).write_text(behaviour, encoding="utf-8")
        return file

    def say(self, name: str, stdout: str = "", stderr: str = "", status: int = 0) -> Path:
        """Create an executable that prints text and exits."""
        out, err = shlex.quote(stdout), shlex.quote(stderr)
        return self.add(name, f"printf %s {out}\nprintf %s {err} >&2\nexit {status}\n")

    def calls(self, name: str) -> list[Call]:
        """Return the calls of an executable, in order."""
        calls = []
        while ((call := self.folder / "calls" / f"{name}-{len(calls)}") / "whole").exists():
            calls.append(Call(_split(call / "argv"), dict(_pairs(call / "env"))))
        return calls


def waiting_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    """Return a fake Slurm on PATH that accepts every job as job 100 and keeps it pending."""
    fakes = FakeCommands(folder)
    fakes.say("sbatch", "100\n")
    fakes.say("scancel")
    fakes.say("squeue", "100|N/A|PENDING|N/A|0:00||Priority\n")
    for name in ("sacct", "scontrol"):
        fakes.say(name, status=1)
    monkeypatch.setenv("PATH", fakes.path)
    return fakes


def _split(file: Path) -> list[str]:
    parts = file.read_bytes().decode("utf-8", "surrogateescape").split("\0")
    return parts[:-1]


def _pairs(file: Path) -> list[tuple[str, str]]:
    entries = (text.partition("=") for text in _split(file))
    return [(name, value) for name, _, value in entries]
