"""The server: its key, the address that it listens on, and its life."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from secrets import token_urlsafe
from shlex import quote

import uvicorn

from aiflux.errors import ConfigError, UsageError
from aiflux.gateway.app import make_app
from aiflux.gateway.service import Gateway
from aiflux.util.files import atomic_write, read_file, storage_error

LOOPBACK = "127.0.0.1"
USUAL_PORT = 8327
_KEY = re.compile(r"[!-~]{20,512}", re.ASCII)
_GRACE_SECONDS = 5


def read_key(path: Path) -> str:
    """Return the key of a file, which is created with a new key if it does not exist.

    Raises:
        ConfigError: other users can read the file, or it contains no key.
        StorageError: it cannot be read or created.
    """
    content = read_file(path)
    if content is None:
        with atomic_write(path, 0o600) as file:
            file.write(f"{token_urlsafe(32)}\n".encode())
        content = read_file(path) or b""
    found = path.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"others may know the key in {path} (mode {stat.S_IMODE(found.st_mode):04o})",
            f"remove the file, and a new key is made: rm {quote(str(path))}",
        )
    key = content.decode("ascii", "replace").strip()
    if not _KEY.fullmatch(key):
        raise ConfigError(
            f"{path} contains no key: it must be one line of 20 to 512 ASCII characters",
            f"remove the file, and a new key is made: rm {quote(str(path))}",
        )
    return key


def listen_on_port(port: int | None) -> socket.socket:
    """Return a socket that listens on a port of this machine only.

    Args:
        port: None for the usual port, or any free one if that is in use.

    Raises:
        UsageError: the port is in use, or not allowed.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, USUAL_PORT if port is None else port))
    except OSError as error:
        if port is None and error.errno == errno.EADDRINUSE:
            listener.bind((LOOPBACK, 0))
        else:
            listener.close()
            raise UsageError(
                f"cannot listen on port {port} of {LOOPBACK}: {error.strerror}",
                "choose another port: --port N; 0 for any free one",
            ) from error
    return listener


def listen_on_socket(path: Path) -> socket.socket:
    """Return a listening Unix socket of mode 0600; one that a killed gateway left is replaced.

    Raises:
        UsageError: the path exists and is no socket that was left, or is too long.
        StorageError: the socket cannot be created.
    """
    _remove_left(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        if "too long" in str(error):
            raise UsageError(
                f"the path of the socket {path} is too long", "choose a shorter one: --socket PATH"
            ) from error
        raise storage_error(error, path) from error
    finally:
        os.umask(before)
    return listener


def _remove_left(path: Path) -> None:
    try:
        found = path.lstat()
    except OSError:
        return  # bind reports what is wrong with the path
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        if not stat.S_ISSOCK(found.st_mode) or client.connect_ex(str(path)) != errno.ECONNREFUSED:
            raise UsageError(f"{path} exists, or is in use", "choose another path: --socket PATH")
    path.unlink(missing_ok=True)


def serve(gateway: Gateway, key: str, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until a signal ends this process.

    Args:
        ready: called when connections are accepted.
    """
    gateway.recover()
    listener.listen(128)
    ready()
    config = uvicorn.Config(
        make_app(gateway, key),
        http="h11",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    server = uvicorn.Server(config)
    server.run([listener])
