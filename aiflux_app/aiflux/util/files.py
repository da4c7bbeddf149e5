"""Files: atomic replacement, errors with location and remedy, and temporary folders."""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import pwd
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import has_magic
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from shlex import quote
from typing import IO, Any, TypeVar
from zlib import crc32

from aiflux.errors import OutputExistsError, StorageError, UsageError
from aiflux.util.process_limits import exhausted
from aiflux.util.text import json_text

_BUFFER = 1 << 20
_PART = ".aiflux-part"
_LONG_NAME = 64
_ABSENT = (errno.ENOENT, errno.ENOTDIR)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_STALE_TRIES, _STALE_PAUSE = 10, 0.1
_READ_REMEDIES = {
    errno.EACCES: "check its permissions, then run the same command again",
    errno.EMFILE: "raise the limit of open files (ulimit -n), then run the same command again",
    errno.ENFILE: "close other programs' files, then run the same command again",
}
T = TypeVar("T")
_PREFIX = "aiflux-"
_LOCK = ".in-use"


def expanded(path: Path | str) -> Path:
    """Return a path with ``~`` expanded; unchanged if the user does not exist."""
    return Path(os.path.expanduser(path))


def absolute(path: Path | str) -> Path:
    """Return an absolute path without ``..``, with ``~`` expanded.

    Links stay in it as they are, unless ``..`` follows one.
    """
    path = expanded(path).absolute()
    if ".." not in path.parts:
        return path
    normal = os.path.normpath(path)
    if os.path.realpath(normal) == os.path.realpath(path):
        return Path(normal)
    return Path(os.path.realpath(path.parent), path.name)


def same_file(one: Path, other: Path) -> bool:
    """Return whether two paths are the same file; False if one is not accessible."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def fsync_directory(path: Path) -> None:
    """Make a rename in ``path`` durable, if the file system can sync directories."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(target: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """Write ``target`` completely or not at all: temporary file next to it, fsync, rename.

    ``mode`` is subject to the umask, as for any new file. If ``target`` is a link, its target is
    replaced.

    Raises:
        StorageError: the file system refused (full, quota, permission).
        UsageError: ``target`` is a device or a pipe, which the rename would replace.
    """
    _refuse_device(target)
    target = Path(os.path.realpath(target))
    # The name is chosen before creation, so that the file is removed even after an interrupt.
    temporary = target.with_name(f"{_prefix(target)}{token_hex(8)}{_PART}")
    try:
        with open(temporary, "xb", _BUFFER, opener=open_private) as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), mode & ~_umask())
            os.fsync(file.fileno())
        temporary.replace(target)
        fsync_directory(target.parent)
    except OSError as error:
        raise storage_error(error, target) from error
    finally:
        # An error here would hide the first one, and name a file that nobody knows.
        with suppress(OSError):
            temporary.unlink()


def open_private(path: str, flags: int) -> int:
    """Open a file, which only its user can read if this creates it; for ``opener=`` of `open`."""
    return os.open(path, flags, 0o600)


def read_file(path: Path) -> bytes | None:
    """Return the content of a small file; None only if it certainly does not exist.

    Raises:
        StorageError: the file cannot be read, or is a directory, a pipe or a device.
    """
    return _looked_at(path, lambda: _read_regular(path))


def _read_regular(path: Path) -> bytes:
    descriptor = open_regular(str(path), os.O_RDONLY)
    try:
        parts = []
        while part := os.read(descriptor, 1 << 16):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def open_regular(path: str, flags: int) -> int:
    """Open a regular file; for ``opener=`` of `open`.

    A file can be replaced by a pipe while a run works: opening that would wait for a writer
    forever, without O_NONBLOCK, and no signal handler written in Python would run.

    Raises:
        StorageError: the path is a directory, a pipe or a device.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_irregular(Path(path), os.fstat(descriptor))
    except StorageError:
        os.close(descriptor)
        raise
    return descriptor


def named_file(path: Path, fix: str) -> Path:
    """Return a path that the user named; refuse anything but a file that can be read.

    Args:
        fix: what to name instead of a directory or a device.

    Raises:
        UsageError: it is missing, cannot be read, or is not a file.
    """
    try:
        with open(path, "rb", opener=open_regular):
            return path
    except StorageError:
        raise UsageError(f"{path} is not a regular file", fix) from None
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}", "check the path and its permissions"
        ) from None


def is_there(path: Path) -> bool:
    """Return whether a path exists; ``Path.exists`` returns False on I/O errors.

    Raises:
        StorageError: the path cannot be checked.
    """
    return _looked_at(path, lambda: os.stat(path)) is not None


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file's content.

    Raises:
        StorageError: the file cannot be read.
    """
    crc = 0
    try:
        with open(path, "rb", buffering=0, opener=open_regular) as file:
            while block := file.read(_BUFFER):
                crc = crc32(block, crc)
    except OSError as error:
        raise read_error(error, path) from error
    return crc


def refuse_irregular(path: Path) -> None:
    """Raise StorageError if ``path`` exists and is not a regular file."""
    found = _looked_at(path, lambda: os.stat(path))
    if found is not None:
        _refuse_irregular(path, found)


def _refuse_irregular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise StorageError(
            f"{path} is {kind} instead of a file",
            f"move it (mv {quote(str(path))} ELSEWHERE) and run the same command again",
        )


def _looked_at(path: Path, look: Callable[[], T]) -> T | None:
    """Return the result of ``look``, or None if nothing exists at ``path``.

    A file that another NFS client replaced can be stale for a moment; it is looked up again. All
    other errors are raised: treating them as a missing file would silently end a run.
    """
    tries = 0
    while True:
        try:
            return look()
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            tries += 1
            if error.errno != errno.ESTALE or tries == _STALE_TRIES:
                raise read_error(error, path) from error
        time.sleep(_STALE_PAUSE)


def read_error(error: OSError, path: Path) -> StorageError:
    """Convert an OSError raised while reading ``path`` to an error with a remedy."""
    default = "check the file system, then run the same command again to resume"
    return StorageError(
        f"cannot read {path}: {error.strerror or error}",
        _READ_REMEDIES.get(error.errno or 0, default),
    )


def _prefix(target: Path) -> str:
    """Return the unique prefix of a target's temporary files."""
    encoded = os.fsencode(target.name)
    kept = target.name if len(encoded) <= _LONG_NAME else f"{target.name[:16]}~{crc32(encoded):08x}"
    return f".{kept}."


def remove_leftovers(*targets: Path) -> None:
    """Remove temporary files of ``targets`` left by killed processes.

    Call this only if no process is writing a target.

    Raises:
        StorageError: a file cannot be removed.
    """
    for target in {Path(os.path.realpath(target)) for target in targets}:
        prefix = _prefix(target)
        try:
            for name in os.listdir(target.parent):
                # The random part in the middle has no dot.
                middle = name.removeprefix(prefix).removesuffix(_PART)
                if name == f"{prefix}{middle}{_PART}" and "." not in middle:
                    (target.parent / name).unlink(missing_ok=True)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise storage_error(error, target) from error


def refuse_special(target: Path) -> None:
    """Raise UsageError if ``target`` cannot be a file.

    It can be a directory, a device, a link that leads nowhere, or have a too long name.
    """
    try:
        os.stat(target)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(
                f"the output name {target} is too long", "choose a shorter name"
            ) from error
        if error.errno == errno.ELOOP:
            raise UsageError(f"the output {target} is a link to itself", "remove it") from error
    folder = os.path.dirname(os.path.realpath(target))
    if os.path.islink(target) and not os.path.isdir(folder):
        raise UsageError(
            f"the output {target} is a link into a directory that does not exist: {folder}",
            f"create it (mkdir -p {quote(folder)}), or choose another output",
        )
    if os.path.isdir(target):
        raise UsageError(f"the output {target} is a directory", "choose a file in it")
    _refuse_device(target)


def _refuse_device(target: Path) -> None:
    try:
        mode = target.stat().st_mode
    except OSError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UsageError(f"the output {target} is a device or a pipe", "choose a regular file")


def is_pattern(path: Path) -> bool:
    """Return whether a path is not that of a file, but a pattern of several, as ``*.parquet``."""
    return has_magic(str(path)) and not path.exists()


def refuse_existing(*targets: Path) -> None:
    """Raise OutputExistsError if one of the outputs already exists."""
    for target in targets:
        if os.path.exists(target):
            raise OutputExistsError(
                f"output file already exists: {target}",
                "use --force to overwrite it, or choose another output",
            )


def may_write(folder: Path) -> bool:
    """Return whether a directory is writable, or can be created."""
    nearest = nearest_there(folder)
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def others_may_write(path: Path) -> str | None:
    """Return who else than this user and root can change a file, or None."""
    status = path.stat()
    for owner in (path.lstat().st_uid, status.st_uid):
        if owner not in (os.getuid(), 0):
            return f"it belongs to {user_name(owner)}"
    if status.st_mode & stat.S_IWOTH:
        return "everyone can write to it"
    if status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid):
        return f"the group {_group_name(status.st_gid)} can write to it"
    return None


def _is_private(gid: int) -> bool:
    """Return whether a group is the user's private group."""
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    own = (gid, group.gr_name) == (user.pw_gid, user.pw_name)
    return own and {*group.gr_mem} <= {user.pw_name}


def user_name(uid: int) -> str:
    """Return a user's name, or the number if it is unknown."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def nearest_there(path: Path) -> Path:
    """Return a path, or its nearest parent that exists and is accessible."""
    # Unlike Path.exists(), os.path.exists() never raises.
    return next(each for each in (path, *path.parents) if os.path.exists(each))


def write_json(target: Path, value: Any, mode: int = 0o600) -> None:
    """Replace ``target`` atomically with ``value`` as JSON."""
    with atomic_write(target, mode) as file:
        file.write(json_text(value, indent=2).encode() + b"\n")


def storage_error(error: OSError, path: Path) -> StorageError:
    """Convert an OSError raised while writing ``path`` to an error with a remedy."""
    limit = exhausted(error)
    fix = "make it writable" if error.errno in FORBIDDEN else "free some space"
    return StorageError(
        f"cannot write {path}: {error.strerror or error}",
        limit.remedy if limit else f"{fix} and run the same command again; it resumes a run",
    )


def _umask() -> int:
    """Return the process's umask without changing it; os.umask() can only set it."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o077


def short(path: Path) -> str:
    """Return the shortest form of a path that can be typed here."""
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if path.is_relative_to(base) and path != base:
            return prefix + str(path.relative_to(base))
    return str(path)


@contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """Make a folder and remove it at the end; remove those of processes that were killed, too.

    Args:
        parent: where to make it (default: TMPDIR).
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    _remove_abandoned(parent)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent) as name:
        folder = Path(name)
        # The lock ends with this process, however that ends. It gets its name when it is held:
        # a folder that is just being made has none, and is left alone.
        with open(folder / f"{_LOCK}.new", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / f"{_LOCK}.new").rename(folder / _LOCK)
            yield folder


def _remove_abandoned(parent: Path) -> None:
    """Remove such folders of this user that no process holds."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            _remove_if_abandoned(folder)
        except OSError:
            continue  # another process removed it, or holds it: it is none of this one's business


def _remove_if_abandoned(folder: Path) -> None:
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid():
        return
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """Return a file's SHA-256, hex."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(_BUFFER):
            digest.update(block)
    return digest.hexdigest()
