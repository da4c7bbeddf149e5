"""Disk quotas, where the site has a command that tells them."""

from __future__ import annotations

import getpass
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from aiflux.doctor.host import file_system
from aiflux.util.diagnosis import Diagnosis, ok, warn

_TIMEOUT = 20.0
_FIX = "remove what you no longer need, or point AIFLUX_DATA_DIR at another file system"


def quotas(folders: list[Path]) -> Iterator[Diagnosis]:
    """Tell the user's quotas; nothing where no command tells them."""
    if shutil.which("quota"):
        over, told = _ask(["quota", "-q"]), _ask(["quota", "-s"])
        if over:
            yield warn("quota", f"exceeded: {over}", _FIX)
        elif told:
            yield ok("quota", told)
    if shutil.which("lfs"):
        lustre = {folder for folder in folders if file_system(folder) == "lustre"}
        for folder in sorted(lustre):
            told = _ask(["lfs", "quota", "-q", "-h", "-u", getpass.getuser(), str(folder)])
            if told:
                # A star marks what is over its limit.
                exceeded = "*" in told
                yield warn("quota", f"exceeded: {told}", _FIX) if exceeded else ok("quota", told)


def _ask(command: list[str]) -> str:
    """Return what a command prints, without its headings, in one line; "" where it fails."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=_TIMEOUT, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    return "; ".join(
        line
        for line in lines
        if line and not line.startswith(("Disk quotas", "Filesystem")) and ": none" not in line
    )
