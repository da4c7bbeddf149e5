"""Check this machine: Python, settings, models, namespaces, FUSE and disk quotas."""

from __future__ import annotations

import getpass
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from aiflux import __version__
from aiflux.core.config.config import Config
from aiflux.core.config.settings import SETTINGS, VARIABLES
from aiflux.core.config.sources import read_dotenv
from aiflux.engines.ollama.store import listed_models, missing_parts
from aiflux.errors import ConfigError
from aiflux.util.diagnosis import Diagnosis, fail, ok, warn
from aiflux.util.files import may_write, nearest_there
from aiflux.util.text import hidden_url, nearest, size_text

_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_ROOM = 20e9  # bytes: a few medium-sized models


def versions() -> Iterator[Diagnosis]:
    """Report the versions of AI-Flux and Python."""
    yield ok("aiflux", __version__)
    yield ok("python", f"{platform.python_version()}, on {platform.machine()}")


def load_config(environ: Mapping[str, str]) -> tuple[Config, list[Diagnosis]]:
    """Return the configuration and its diagnoses; the defaults if it is invalid."""
    found = [*unknown_settings(environ, "is set but", "unset")]
    try:
        dotenv = read_dotenv(Path(".env")) if Path(".env").is_file() else {}
        found += unknown_settings(dotenv, "in ./.env is", "remove")
        found += [
            warn("settings", f"{name} in ./.env is not read from there", f"export {name} instead")
            for name in sorted(VARIABLES & dotenv.keys())
        ]
        return Config(environ=environ), [*found, ok("settings", _sources(environ))]
    except ConfigError as error:
        home = {name: environ[name] for name in ("HOME", "XDG_DATA_HOME") if name in environ}
        config = Config(environ=home, directory=Path(os.devnull))  # reads no settings file
        return config, [*found, fail("settings", error.message, error.remedy or "correct it")]


def unknown_settings(environ: Mapping[str, str], where: str, undo: str) -> Iterator[Diagnosis]:
    """Warn about unknown AIFLUX_ variables: most are misspelt."""
    known = VARIABLES | {item.env for item in SETTINGS if item.env}
    for name in sorted(set(environ) - known):
        if name.startswith("AIFLUX_"):
            near = nearest(name, known)
            meant = "" if near is None else f"did you mean {near}? "
            yield warn("settings", f"{name} {where} unknown", f"{meant}{undo} {name}")


def _sources(environ: Mapping[str, str]) -> str:
    origins = {value.origin for value in Config(environ=environ).values.values()}
    files = sorted(
        re.sub(r"(, line \d+)?( \([^)]*\))?\Z", "", origin) for origin in origins - {"default"}
    )
    return "from " + ", ".join(dict.fromkeys(files)) if files else "all defaults"


def models(config: Config) -> Iterator[Diagnosis]:
    """Report the models in the models directory, and whether more can be added."""
    folder = config.models_dir
    nearest = nearest_there(folder)
    if not os.access(nearest, os.R_OK | os.X_OK) or not nearest.is_dir():
        yield fail(
            "models",
            f"{folder} cannot be read",
            "fix its permissions, or set AIFLUX_MODELS_DIR to another directory",
        )
        return
    found = listed_models(folder)
    incomplete = [name.served for name in found if missing_parts(folder, name)]
    complete = [name.served for name in found if name.served not in incomplete]
    summary = f"{folder}: {_listed(complete)}"
    if complete:
        yield ok("models", summary)
    else:
        yield warn(
            "models", f"{summary}; jobs pull models if their nodes have internet access",
            "aiflux models pull NAME:TAG, on a machine with internet",
        )  # fmt: skip
    if incomplete:
        yield warn(
            "models",
            f"parts of {', '.join(incomplete)} are missing",
            f"aiflux models pull {incomplete[0]}",
        )
    yield _room(folder, nearest)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    plural = "" if len(names) == 1 else "s"
    return f"{len(names)} model{plural} ({shown})" if names else "no models yet"


def _room(folder: Path, nearest: Path) -> Diagnosis:
    free = shutil.disk_usage(nearest).free
    if not may_write(folder):
        return warn(
            "models",
            f"{folder} is read-only for you: you can use its models, but not add any",
            "ask its owner to pull models, or set AIFLUX_MODELS_DIR to your own directory",
        )
    if free < _ROOM:
        return warn(
            "models",
            f"{size_text(free)} free: a model of 8 billion parameters takes about 5 GB",
            "free some space, or set AIFLUX_MODELS_DIR to another file system",
        )
    return ok("models", f"{size_text(free)} free, writable")


def proxies(environ: Mapping[str, str]) -> Iterator[Diagnosis]:
    """Report proxy settings without passwords."""
    found = {
        name: hidden_url(environ[name])
        for low in _PROXIES
        for name in (low, low.upper())
        if environ.get(name)
    }
    if found:
        listed = ", ".join(f"{name}={value}" for name, value in found.items())
        yield ok("proxy", f"{listed}; used to pull models, not for requests")
    else:
        yield ok("proxy", "not set")


def user_namespaces(proc: Path = Path("/proc/sys")) -> str | None:
    """Return why unprivileged user namespaces are not available, or None if they are.

    Sources: user_namespaces(7); the sysctls of Debian and of Ubuntu's AppArmor.
    """
    forbidding = {
        "user/max_user_namespaces": "0",
        "kernel/unprivileged_userns_clone": "0",
        "kernel/apparmor_restrict_unprivileged_userns": "1",
    }
    for name, bad in forbidding.items():
        try:
            value = (proc / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if value == bad:
            return f"{name.replace('/', '.')} is {bad}"
    return None


def subordinate_ids(user: str, uid: int, etc: Path = Path("/etc")) -> list[str]:
    """Return those of /etc/subuid and /etc/subgid that have no range for a user."""
    return [
        str(etc / name)
        for name in ("subuid", "subgid")
        if not _has_range(etc / name, {user, str(uid)})
    ]


def _has_range(file: Path, owners: set[str]) -> bool:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.partition(":")[0] in owners for line in lines)


def fuse_usable(device: Path = Path("/dev/fuse")) -> bool:
    """Return whether this user can mount FUSE file systems."""
    return os.access(device, os.R_OK | os.W_OK)


def file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """Return the file system type of a path, or "" if unknown."""
    best, kind = Path("/"), ""
    resolved = path.resolve()
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        point, this = [*line.split(), "", "", ""][1:3]
        folder = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point))
        if resolved.is_relative_to(folder) and len(folder.parts) >= len(best.parts):
            best, kind = folder, this
    return kind


_TIMEOUT = 20.0
_FIX = "delete files, or set AIFLUX_DATA_DIR to another file system"


def quotas(folders: list[Path]) -> Iterator[Diagnosis]:
    """Report the user's disk quotas if a command shows them."""
    if shutil.which("quota"):
        exceeded, limits = _ask(["quota", "-q"]), _ask(["quota", "-s"])
        if exceeded:
            yield warn("quota", f"exceeded: {exceeded}", _FIX)
        elif limits:
            yield ok("quota", limits)
    if shutil.which("lfs"):
        lustre = {folder for folder in folders if file_system(folder) == "lustre"}
        for folder in sorted(lustre):
            found = _ask(["lfs", "quota", "-q", "-h", "-u", getpass.getuser(), str(folder)])
            if found:
                # A star marks an exceeded limit.
                over = "*" in found
                yield warn("quota", f"exceeded: {found}", _FIX) if over else ok("quota", found)


def _ask(command: list[str]) -> str:
    """Return a command's output without headings in one line, or "" if it fails."""
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
