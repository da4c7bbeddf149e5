"""Install or check a bundle: AI-Flux, its image and models in one tar file.

This file is part of every bundle, as ``install.py``. It needs Python 3.10 or later and nothing
else, and imports nothing from AI-Flux. To install from a bundle:

    tar -xf bundle.tar aiflux-bundle/install.py
    python3 aiflux-bundle/install.py bundle.tar --prefix DIR

The bundle is read once, sequentially, and every member is compared with its SHA-256. Files are
staged next to their destination and moved there once all of them are verified. A failed install
changes nothing, and one that was killed resumes when it is run again.
"""

import shutil
import sys

# An older Python stops here, so the whole file uses syntax of Python 3.6.
if sys.version_info < (3, 10):  # noqa: UP036
    newer = [name for name in map("python3.{}".format, range(19, 9, -1)) if shutil.which(name)]
    sys.stderr.write(
        "error: this is Python {}.{}, but AI-Flux requires 3.10 or later\n  -> {}\n".format(
            sys.version_info[0],
            sys.version_info[1],
            "run it with " + newer[0] if newer else "load a newer version: module avail python",
        )
    )
    sys.exit(2)

import argparse
import compileall
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shlex
import signal
import tarfile
import venv
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

VERSION = 1
TOP = "aiflux-bundle/"
SUMS = "SHA256SUMS"
CONTENTS = "bundle.json"
_CHUNK = 4 << 20
_SMALL = 16 << 20  # maximum size of a header and of the checksum list in bytes
_IN_MEMORY = (  # headers whose content tarfile reads at once
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_SUM = re.compile(r"([0-9a-f]{64})  (\S.*)\Z")
_IMAGE = r"image/aiflux(-[a-z]+){0,2}\.sif"
_HUB = r"hub/models--[\w.-]+"  # a model of Hugging Face, in the layout of huggingface_hub's cache
_HUB_BLOB = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_BLOB = re.compile(rf"models/(?:blobs/sha256-|{_HUB}/blobs/)([0-9a-f]{{64}})", re.ASCII)
_MEMBER = re.compile(
    rf"bundle\.json|sbom\.cdx\.json|README\.txt|install\.py|wheels/[\w.+!-]+\.whl|{_IMAGE}"
    rf"|models/blobs/sha256-[0-9a-f]{{64}}|models/manifests(/[\w.:-]+){{2,}}"
    rf"|models/{_HUB}/blobs/({_HUB_BLOB.pattern})",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REF = re.compile(r"[\w./-]{1,128}", re.ASCII)
_PATH = re.compile(r"[^\x00-\x1f\x7f\\]{1,500}")
_RELEASE = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+!_-]{0,99}")  # becomes a directory name
_PYTHON = re.compile(r"3\.[0-9]{1,2}")
_LINE = re.compile(r"[^\x00-\x1f\x7f]{1,1000}")
STOPPED = (
    "the installation was stopped",
    "run the same command again to resume it",
)
"""Message and remedy for an interrupted installation."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Say = Callable[[str], None]


class InstallError(Exception):
    """The bundle is damaged, for another machine, or cannot be installed.

    Attributes:
        remedy: what to do next.
        storage: whether writing to disk failed.
    """

    def __init__(self, message: str, remedy: str, *, storage: bool = False) -> None:
        super().__init__(message)
        self.remedy, self.storage = remedy, storage


@dataclass(frozen=True)
class Bundle:
    """A bundle's table of contents.

    Attributes:
        contents: ``bundle.json``.
        sums: SHA-256 of every member except this list, by path below the top directory.
    """

    path: Path
    contents: dict[str, Any]
    sums: dict[str, str]

    @property
    def images(self) -> list[str]:
        """The members with the images."""
        return [image["path"] for image in self.contents["images"]]

    @property
    def models(self) -> list[str]:
        """The names of the models."""
        return [model["name"] for model in self.contents["models"]]

    @property
    def manifests(self) -> list[str]:
        """The members with manifests, which Ollama's models have."""
        return [model["manifest"] for model in self.contents["models"] if "manifest" in model]

    @property
    def snapshots(self) -> list[dict[str, Any]]:
        """The snapshots of Hugging Face: ``folder``, ``commit``, ``ref`` and ``files``."""
        return [model["snapshot"] for model in self.contents["models"] if "snapshot" in model]

    @property
    def extras(self) -> tuple[str, ...]:
        """Extras of AI-Flux whose packages are in the bundle."""
        return tuple(self.contents["extras"])

    def wheels(self, python: str) -> tuple[str, ...]:
        """Return the members to install for a Python version such as 3.11."""
        return tuple(self.contents["pythons"].get(python, ()))


@dataclass(frozen=True)
class InstallPaths:
    """Where a bundle is installed. Paths are absolute.

    Attributes:
        prefix: receives ``bin/aiflux``, ``python`` (virtual environment), ``containers`` with the
            images, and ``site.yaml``.
    """

    prefix: Path
    models: Path

    @property
    def containers(self) -> Path:
        """The directory of the images."""
        return self.prefix / "containers"

    @property
    def command(self) -> Path:
        """The installed ``aiflux`` command."""
        return self.prefix / "bin" / "aiflux"

    @property
    def site(self) -> Path:
        """The settings file with the locations of image and models."""
        return self.prefix / "site.yaml"

    def final(self, member: str) -> Path | None:
        """Return the destination of a member with image or model; None for others."""
        if member.startswith("models/"):
            return self.models / member[len("models/") :]
        return self.containers / member[len("image/") :] if member.startswith("image/") else None

    def staged(self, member: str) -> Path:
        """Return where a member is staged until all members are verified."""
        root = self.models if member.startswith("models/") else self.prefix
        return root / ".staging" / "bundle" / member


def places(prefix: str | None, models: str | None) -> InstallPaths:
    """Return where to install; the default is where AI-Flux searches by itself."""
    share = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    root = Path(os.path.abspath(Path(prefix).expanduser() if prefix else share / "aiflux"))
    below = Path(os.path.abspath(Path(models).expanduser())) if models else root / "models"
    # A virtual environment's path must not contain PATH's separator.
    for path, unfit in ((root, "[:\r\n]"), (below, "[\r\n]")):
        if re.search(unfit, str(path)):
            raise InstallError(
                f"the path {str(path)!r} contains a colon or a line break",
                "choose another directory",
            )
    return InstallPaths(root, below)


def verify(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> Bundle:
    """Read a complete bundle and compare every member with its SHA-256.

    Raises:
        InstallError: the bundle is damaged; names the member.
    """
    with _opened(path) as (tar, bundle):
        for member, content in _members(tar, bundle):
            _copy(bundle, member, content, None, on_bytes)
    return bundle


def install(
    path: Path, to: InstallPaths, say: Say, on_bytes: Callable[[int], None] = lambda _: None
) -> Bundle:
    """Install a bundle. Files that already exist are not written again.

    Args:
        say: called with one line of output for the user.
        on_bytes: called with the number of bytes read since the last call.

    Raises:
        InstallError: the bundle is damaged, for another machine, or too large; nothing was
            changed.
        KeyboardInterrupt: staged files are kept for the next attempt.
    """
    with _opened(path) as (tar, bundle):
        _refuse_foreign(bundle)
        with _disk(to.prefix), _locked(to.prefix), _locked(to.models):
            try:
                _refuse_full(bundle, tar, to)
                _stage(tar, bundle, to, on_bytes)
                _put_in_place(bundle, to, say)
            except KeyboardInterrupt:
                raise  # the next attempt uses the staged files
            except BaseException:
                _remove_staged(to)
                raise
            _remove_staged(to)
    return bundle


def _remove_staged(to: InstallPaths) -> None:
    for root in (to.prefix, to.models):
        shutil.rmtree(root / ".staging" / "bundle", ignore_errors=True)


# --- reading ----------------------------------------------------------------------------------


def _damaged(path: Path, what: str) -> InstallError:
    return InstallError(
        f"{path} is not a complete bundle: {what}; nothing was installed",
        "copy it again, and compare its size and SHA-256 with the output of aiflux bundle create",
    )


class PlainMember(tarfile.TarInfo):
    """A member of an untrusted archive: it is not sparse, and its headers are small.

    A sparse member can be far larger than its archive. ``tarfile`` reads the maps of sparse members
    and long headers into memory before they can be rejected, and does not limit them.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "PlainMember":
        """Read the next member; an invalid header also raises a ``tarfile`` error."""
        try:
            return super().fromtarfile(tarfile_)
        except (ValueError, OverflowError, RecursionError) as error:
            raise tarfile.ReadError("a header is invalid") from error

    def _proc_member(self, tarfile_: tarfile.TarFile) -> Any:
        if self.type in _IN_MEMORY and not 0 <= self.size <= _SMALL:
            raise tarfile.ReadError("a header is too large")
        return super()._proc_member(tarfile_)  # type: ignore[misc] # not in the stubs

    def _refuse_sparse(self, *_: Any) -> Any:
        raise tarfile.ReadError("it has a sparse member")

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


def open_archive(file: io.FileIO) -> tarfile.TarFile:
    """Open an untrusted, uncompressed tar file.

    Raises:
        tarfile.TarError: the file is not a tar file.
    """
    return tarfile.open(fileobj=io.BufferedReader(file), mode="r:", tarinfo=PlainMember)


def plain(info: tarfile.TarInfo) -> bool:
    """Return whether a member is a regular file with its content in the archive."""
    return info.isreg() and not info.issparse()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[tarfile.TarFile, Bundle]]:
    try:
        file = open(path, "rb", 0)  # noqa: SIM115 - only errors of opening are handled here
    except OSError as error:
        raise InstallError(f"{path} cannot be read: {error.strerror}", "check the path") from error
    with file:
        try:
            with open_archive(file) as tar:
                yield tar, _head(tar, path)
        except tarfile.TarError as error:
            raise _damaged(path, str(error)) from error


def _head(tar: tarfile.TarFile, path: Path) -> Bundle:
    try:
        # splitlines() splits at more characters.
        lines = _small(tar, SUMS).decode("utf-8", "replace").split("\n")
        raw = _small(tar, CONTENTS)
        if f"{hashlib.sha256(raw).hexdigest()}  {CONTENTS}" not in lines:
            raise ValueError(f"{CONTENTS} does not match {SUMS}")
        contents = json_object(raw, CONTENTS)
        if is_newer(contents, VERSION):  # the rest may have another form
            raise _newer(path, contents["version"])
        sums = dict(map(_sum, filter(None, lines)))
        bundle = Bundle(path, _contents(contents), sums)
        named = {*bundle.manifests, *bundle.images}
        named.update(*bundle.contents["pythons"].values())
        for snapshot in bundle.snapshots:
            named.update(_blob_member(snapshot, blob) for blob in snapshot["files"].values())
        if not all(path.startswith("models/manifests/") for path in bundle.manifests):
            raise ValueError(f"{CONTENTS} names an invalid manifest")
        if not named <= set(sums):
            raise ValueError(f"{SUMS} does not list {', '.join(sorted(named - set(sums)))}")
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    return bundle


def json_object(raw: bytes, name: str) -> dict[str, Any]:
    """Parse an untrusted JSON object.

    Raises:
        ValueError: it is none; says why without Python's terms.
    """
    try:
        found = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 at offset {error.start}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{name} is not JSON: {error.msg} at {where}") from None
    except ValueError:
        raise ValueError(f"{name} has a number with too many digits") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} is not a JSON object")
    return found


def is_newer(found: dict[str, Any], known: int) -> bool:
    """Return whether the version in a table of contents is newer than the known one."""
    version = found.get("version")
    return type(version) is int and version > known


def _newer(path: Path, version: int) -> InstallError:
    return InstallError(
        f"{path} has version {version} of the bundle format ({CONTENTS}), and this installer reads "
        f"version {VERSION}; nothing was installed",
        f"use the installer in the bundle: tar -xf {shlex.quote(str(path))} {TOP}install.py; "
        f"python3 {TOP}install.py {shlex.quote(str(path))}",
    )


def _contents(found: dict[str, Any]) -> dict[str, Any]:
    """Return the content of ``bundle.json`` after checking the type and form of each field.

    Raises:
        ValueError: a field is invalid; names it.
    """
    _need(found, "version", lambda value: type(value) is int and value == VERSION)
    _need(found, "aiflux", _text(_RELEASE))
    _need(found, "arch", _text(_LINE))
    _need(found, "pythons", lambda value: isinstance(value, dict))
    for python, wheels in found["pythons"].items():
        if not _PYTHON.fullmatch(python) or not _list_of(_text(_MEMBER))(wheels):
            raise ValueError(f"{CONTENTS} has an invalid pythons: {python!r}")
    found.setdefault("extras", [])
    _need(found, "extras", _list_of(_text(_RELEASE)))
    found.setdefault("images", [])
    _need(found, "images", _list_of(lambda value: isinstance(value, dict)))
    for image in found["images"]:
        _need(image, "path", _text(re.compile(_IMAGE)))
        for name in ("engine", "arch"):
            image.setdefault(name, None)
            _need(image, name, lambda value: value is None or _text(_LINE)(value))
    _need(found, "models", _list_of(lambda value: isinstance(value, dict)))
    for model in found["models"]:
        _need(model, "name", _text(_LINE))
        _need(model, "digest", _text(_LINE))
        _need(model, "size", lambda value: type(value) is int and 0 <= value < 1 << 60)
        if "snapshot" in model:
            _check_snapshot(model["snapshot"])
        else:
            _need(model, "manifest", _text(_MEMBER))
    return found


def _check_snapshot(found: Any) -> None:
    """Raise ValueError unless a snapshot stays in its directory."""
    if not isinstance(found, dict):
        raise ValueError(f"{CONTENTS} has an invalid snapshot")
    _need(found, "folder", _text(re.compile(_HUB, re.ASCII)))
    _need(found, "commit", _text(_COMMIT))
    _need(found, "ref", lambda value: value == "" or (_text(_REF)(value) and _inside(value)))
    _need(found, "files", lambda value: isinstance(value, dict))
    paths = {*map(Path, found["files"])}
    for path, blob in found["files"].items():
        if not (_PATH.fullmatch(path) and _inside(path)) or {*Path(path).parents} & paths:
            raise ValueError(f"{CONTENTS} names the invalid path {path[:80]!r}")
        if not _text(_HUB_BLOB)(blob):
            raise ValueError(f"{CONTENTS} has an invalid blob of {path[:80]!r}")


def _inside(path: str) -> bool:
    return not {"", ".", ".."} & {*path.split("/")}


def _blob_member(snapshot: dict[str, Any], blob: str) -> str:
    return f"models/{snapshot['folder']}/blobs/{blob}"


def _need(found: dict[str, Any], name: str, is_valid: Callable[[Any], bool]) -> None:
    if not is_valid(found.get(name)):
        shown = f": {json.dumps(found[name])[:80]}" if name in found else " (it is missing)"
        raise ValueError(f"{CONTENTS} has an invalid {name}{shown}")


def _text(form: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and form.fullmatch(value) is not None


def _list_of(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_valid, value))


def _sum(line: str) -> tuple[str, str]:
    match = _SUM.match(line)
    if match is None:
        raise ValueError(f"{SUMS} has the invalid line {line[:80]!r}")
    digest, member = match.groups()
    if not (_MEMBER.fullmatch(member) and _inside(member)):
        raise ValueError(f"{SUMS} lists the invalid path {member[:80]!r}")
    blob = _BLOB.fullmatch(member)
    if blob is not None and blob[1] != digest:
        raise ValueError(f"{member} is not named after its digest")
    return member, digest


def _small(tar: tarfile.TarFile, wanted: str) -> bytes:
    member = tar.next()
    if member is None or member.name != TOP + wanted or not plain(member) or member.size > _SMALL:
        raise ValueError(f"{wanted} is not at the expected position")
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _members(tar: tarfile.TarFile, bundle: Bundle) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the remaining members, each once; all members that the bundle lists must follow."""
    left = set(bundle.sums) - {CONTENTS}
    for info in iter(tar.next, None):
        member = info.name[len(TOP) :]
        content = tar.extractfile(info) if plain(info) else None
        if not info.name.startswith(TOP) or member not in left or content is None:
            raise _damaged(bundle.path, f"{info.name!r} is unexpected")
        left.remove(member)
        yield member, content
    if left:
        raise _damaged(bundle.path, f"{min(left)} is missing ({len(left)} missing in total)")


def _copy(
    bundle: Bundle,
    member: str,
    content: IO[bytes],
    into: IO[bytes] | None,
    on_bytes: Callable[[int], None],
) -> None:
    digest = hashlib.sha256()
    while True:
        try:
            chunk = content.read(_CHUNK)
        except OSError as error:
            why = error.strerror or str(error)
            raise _damaged(bundle.path, f"{member} cannot be read: {why}") from error
        if not chunk:
            break
        digest.update(chunk)
        on_bytes(len(chunk))
        if into is not None:
            into.write(chunk)
    if digest.hexdigest() != bundle.sums[member]:
        raise _damaged(bundle.path, f"{member} was modified or truncated")


# --- writing ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _disk(prefix: Path) -> Iterator[None]:
    """Convert file system errors to an ``InstallError``."""
    try:
        yield
    except OSError as error:
        where = error.filename or prefix
        remedy = "choose a directory that you can write to: --prefix DIR, --models-dir DIR"
        if error.errno in _NO_ROOM:
            remedy = "free some space (df, quota) or choose another directory, and install again"
        raise InstallError(
            f"cannot write {where}: {error.strerror or error}",
            remedy,
            storage=True,
        ) from error


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Prevent two installations to the same directory at once."""
    path = root / ".staging" / "bundle.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A finished installation removes the file: check that ours is still the one on disk.
            ours = path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            # File systems without locks are accepted.
            ours = error.errno != errno.EWOULDBLOCK
        if not ours:
            raise InstallError(
                f"another installation to {root} is running", "wait until it has finished"
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def _refuse_foreign(bundle: Bundle) -> None:
    python = _python()
    known = ", ".join(sorted(bundle.contents["pythons"], key=_number))
    if sys.implementation.name != "cpython" or "t" in sys.abiflags:
        cpython = sys.implementation.name == "cpython"
        kind = "a free-threaded build" if cpython else sys.implementation.name
        raise InstallError(
            f"this Python {python} is {kind}, but the bundle has packages for ordinary CPython",
            f"run install.py with CPython {known} (module avail python)",
        )
    if not bundle.wheels(python):
        raise InstallError(
            f"this is Python {python}, but the bundle has packages for {known}",
            "run install.py with one of these (module avail python), or create the bundle with "
            f"--python {python}",
        )
    machine, arch = os.uname().machine, bundle.contents["arch"]
    if machine != arch:
        raise InstallError(
            f"the bundle is for {arch}, but this machine is {machine}",
            f"create a bundle with --arch {machine} from an image of that architecture",
        )


def _python() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _wanted(bundle: Bundle, member: str) -> bool:
    return member in bundle.wheels(_python()) or member.startswith(("image/", "models/"))


def _refuse_full(bundle: Bundle, tar: tarfile.TarFile, to: InstallPaths) -> None:
    """Compare the required with the free space; quotas only show when writing."""
    needed: dict[int, tuple[Path, int]] = {}
    for info in tar.getmembers():
        member = info.name[len(TOP) :]
        if not _wanted(bundle, member) or _has_size(to.final(member), info.size):
            continue
        root = to.models if member.startswith("models/") else to.prefix
        device = root.stat().st_dev
        place, size = needed.get(device, (root, 0))
        # A wheel exists packed and unpacked at the same time.
        needed[device] = (place, size + info.size * (6 if member.endswith(".whl") else 1))
    for place, size in needed.values():
        free = shutil.disk_usage(place).free
        if size > free:
            raise InstallError(
                f"the bundle needs {_size_text(size)} in {place}, but {_size_text(free)} are free; "
                "nothing was installed",
                "free some space, or choose another directory: --prefix DIR, --models-dir DIR",
                storage=True,
            )


def _size_text(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _has_size(path: Path | None, size: int) -> bool:
    try:
        return path is not None and path.stat().st_size == size
    except OSError:
        return False


def _stage(
    tar: tarfile.TarFile, bundle: Bundle, to: InstallPaths, on_bytes: Callable[[int], None]
) -> None:
    """Stage the files that do not exist yet, and verify all members."""
    # getmembers() has read to the end.
    with _opened(bundle.path) as (again, _):
        for member, content in _members(again, bundle):
            staged = to.staged(member)
            whole = any(
                _holds(place, bundle.sums[member]) for place in (to.final(member), staged) if place
            )
            if whole or not _wanted(bundle, member):
                _copy(bundle, member, content, None, on_bytes)
                continue
            staged.parent.mkdir(parents=True, exist_ok=True)
            with open(staged, "wb") as file:
                _copy(bundle, member, content, file, on_bytes)
                file.flush()
                os.fsync(file.fileno())


def _holds(path: Path, wanted: str) -> bool:
    """Return whether a file exists with exactly this content."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for chunk in iter(lambda: file.read(_CHUNK), b""):
                digest.update(chunk)
    except OSError:
        return False
    return digest.hexdigest() == wanted


def _put_in_place(bundle: Bundle, to: InstallPaths, say: Say) -> None:
    """Move staged files into place: the environment first, as it may fail; manifests last."""
    before = _extras_of(to.prefix / "python")
    environment = _make_environment(bundle, to)
    blobs_first = sorted(bundle.sums, key=lambda member: "models/manifests/" in member)
    for member in blobs_first:
        final, staged = to.final(member), to.staged(member)
        if final is not None and staged.exists():
            final.parent.mkdir(parents=True, exist_ok=True)
            image = member.startswith("image/")
            staged.chmod(staged.stat().st_mode | (0o111 if image else 0))
            staged.replace(final)
    for snapshot in bundle.snapshots:
        _link_snapshot(snapshot, to)
    _write_site(bundle, to, say)
    # The limits in this file hold for everyone who uses the packages.
    _link(environment / to.site.name, os.path.relpath(to.site, environment))
    _switch(to.prefix / "python", environment)
    _replace(to.command, _command(to), 0o777)
    say(f"aiflux {bundle.contents['aiflux']} for Python {_python()}: {to.command}")
    say(f"extras: {', '.join(bundle.extras) or 'none'}")
    gone = [extra for extra in before if extra not in bundle.extras]
    if gone:
        say(
            f"warning: the previous installation also had {', '.join(gone)}; to keep it, create "
            f"the bundle with --extra {' --extra '.join(gone)}"
        )
    for member in bundle.images:
        say(f"image: {to.final(member)}")
    for name in bundle.models:
        say(f"model: {name} in {to.models}")


def _link_snapshot(snapshot: dict[str, Any], to: InstallPaths) -> None:
    """Give a snapshot's blobs their names, and then the commit its branch or tag."""
    store, commit = to.models / snapshot["folder"], snapshot["commit"]
    final = store / "snapshots" / commit
    folder = final
    if not final.exists():  # it is complete as soon as it exists
        folder = to.staged(f"models/{snapshot['folder']}/snapshots/{commit}")
        shutil.rmtree(folder, ignore_errors=True)
    for path, blob in snapshot["files"].items():
        up = "../" * (path.count("/") + 2)
        _link(folder / path, f"{up}blobs/{blob}")
    if folder != final:
        final.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(final)
    ref = store / "refs" / snapshot["ref"]
    if snapshot["ref"] and not _holds(ref, hashlib.sha256(commit.encode()).hexdigest()):
        _replace(ref, commit, 0o666)


def _link(link: Path, target: str) -> None:
    if link.is_symlink() and os.readlink(link) == target:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)


def _make_environment(bundle: Bundle, to: InstallPaths) -> Path:
    """Return a virtual environment with the bundle's packages; it is not in use yet.

    Wheels are unpacked directly, as the specification of binary distributions permits, so neither
    pip nor ensurepip is needed.
    """
    wheels = bundle.wheels(_python())
    content = "".join(bundle.sums[wheel] for wheel in sorted(wheels)) + os.path.realpath(
        getattr(sys, "_base_executable", sys.executable)
    )
    name = f"{bundle.contents['aiflux']}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    folder = to.prefix / "environments" / name
    done = folder / ".whole"
    if done.exists():
        _note_extras(done, bundle)  # different extras can have the same wheels
        return folder
    try:
        venv.EnvBuilder(clear=True, symlinks=True, with_pip=False).create(folder)
        site = folder / "lib" / f"python{_python()}" / "site-packages"
        for wheel in wheels:
            try:
                _unpack(to.staged(wheel), site)
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
                raise _damaged(bundle.path, f"{wheel} cannot be unpacked") from error
        compileall.compile_dir(site, quiet=2)
        _note_extras(done, bundle)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _note_extras(whole: Path, bundle: Bundle) -> None:
    whole.write_text("\n".join(bundle.extras), encoding="utf-8")


def _extras_of(environment: Path) -> list[str]:
    """Return the extras of an environment; none if it does not exist."""
    whole = environment / ".whole"
    return whole.read_text(encoding="utf-8").split() if whole.exists() else []


def _unpack(wheel: Path, site: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)  # noqa: S202 - zipfile keeps names inside; the checksums match
    for kind in ("purelib", "platlib"):
        for data in site.glob(f"*.data/{kind}"):
            shutil.copytree(data, site, dirs_exist_ok=True)
    for data in site.glob("*.data"):
        shutil.rmtree(data)


def _write_site(bundle: Bundle, to: InstallPaths, say: Say) -> None:
    """Write the locations as settings with the lowest precedence; an edited file is kept."""
    paths = {"models_dir": str(to.models)}
    if bundle.images:
        paths["containers_dir"] = str(to.containers)
    lines = [f"  {name}: {_quoted(path)}" for name, path in paths.items()]
    text = "\n".join(["# Settings of this installation. Users' own settings take precedence.",
                      "paths:", *lines, ""])  # fmt: skip
    if to.site.exists() and to.site.read_text(encoding="utf-8") != text:
        new = to.site.with_name("site.yaml.new")
        _replace(new, text, 0o666)
        say(f"kept the existing {to.site}; the settings of this bundle are in {new}")
        return
    _replace(to.site, text, 0o666)


def _quoted(path: str) -> str:
    """Return a path quoted for a settings file, in which ``$`` starts a variable."""
    return json.dumps(path.replace("$", "$$"), ensure_ascii=False)


def _command(to: InstallPaths) -> str:
    python = shlex.quote(str(to.prefix / "python"))
    return (
        "#!/bin/sh\n"
        "# Created by install.py of an AI-Flux bundle.\n"
        f'[ -n "${{AIFLUX_SITE_CONFIG:-}}" ] || AIFLUX_SITE_CONFIG={shlex.quote(str(to.site))}\n'
        "export AIFLUX_SITE_CONFIG\n"
        "# Running commands keep their packages when the link is switched to newer ones.\n"
        f"python=$(readlink -f -- {python}) || exit\n"
        'exec "$python/bin/python" -I -m aiflux.cli "$@"\n'
    )


def _switch(link: Path, target: Path) -> None:
    _link(link, os.path.relpath(target, link.parent))


def _replace(path: Path, text: str, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


# --- as a program -----------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of an installation."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="the bundle, *.tar")
    parser.add_argument(
        "--prefix", metavar="DIR", help="where to install (default: ~/.local/share/aiflux)"
    )
    parser.add_argument(
        "--models-dir", metavar="DIR", help="directory for models (default: PREFIX/models)"
    )


def next_steps(to: InstallPaths) -> str:
    """Return the next command for the user."""
    command = shlex.quote(str(to.command))
    return f"next: {command} doctor    (and put {to.command.parent} on your PATH)"


def size(path: Path) -> int:
    """Return a file's size in bytes, or 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


def meter(total: int) -> Callable[[int], None]:
    """Return a callback that shows the progress of reading in a terminal."""
    read = 0

    def show(count: int) -> None:
        nonlocal read
        before, read = read, read + count
        if sys.stderr.isatty() and before * 100 // max(total, 1) != read * 100 // max(total, 1):
            sys.stderr.write(f"\r{read / 1e9:.1f} of {total / 1e9:.1f} GB \r")

    return show


def printable(text: str) -> str:
    """Return a text without terminal control characters: names in a bundle are untrusted."""
    return "".join(c if c.isprintable() or c in "\t\n" else ascii(c)[1:-1] for c in text)


def main() -> int:
    """Run the installer as a command."""
    parser = argparse.ArgumentParser(
        description="Install AI-Flux, its image and its models from a bundle, without network."
    )
    add_options(parser)
    parser.add_argument("--verify", action="store_true", help="check the bundle, install nothing")
    arguments = parser.parse_args()

    def say(line: str) -> None:
        sys.stdout.write(printable(line) + "\n")
        sys.stdout.flush()

    # Treat SIGTERM like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if arguments.verify:
            verify(arguments.bundle, meter(size(arguments.bundle)))
            say(f"{arguments.bundle} is complete")
            return 0
        to = places(arguments.prefix, arguments.models_dir)
        install(arguments.bundle, to, say, meter(size(arguments.bundle)))
        say(next_steps(to))
    except InstallError as error:
        sys.stderr.write(printable(f"error: {error}\n  -> {error.remedy}\n"))
        return 5 if error.storage else 2
    except KeyboardInterrupt:
        sys.stderr.write("error: {}\n  -> {}\n".format(*STOPPED))
        return 5
    return 0


if __name__ == "__main__":
    sys.exit(main())
