"""Pull models: only missing ones, one pull at a time, staged and then moved into place.

A temporary server pulls a model into ``<models>/.staging/<name>``. The complete model is then moved
into place (see ``staging.py``). An interrupted pull leaves its staging directory, and the next pull
resumes from it. Models are created from GGUF files in the same way.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tenacity import Retrying, retry_if_exception, stop_after_attempt

from aiflux.engines.http import check_cert_file
from aiflux.engines.ollama.api import Ollama, ollama_environment
from aiflux.engines.ollama.staging import (
    begin_staging,
    changing,
    move_into_place,
    remove_if_empty,
    staged_folder,
)
from aiflux.engines.ollama.store import (
    missing_parts,
    read_manifest,
    refuse_other_digest,
    remove_damaged,
)
from aiflux.engines.process import ServerProcess
from aiflux.errors import AifluxError, EngineError, ModelError, StorageError
from aiflux.models.name import ModelName, parse_model_name
from aiflux.util.files import may_write, temporary_folder

_STALL_TIMEOUT = 600.0
_CREATE_TIMEOUT = 3600.0
_ATTEMPTS = 3
_HOPELESS = (
    "does not exist", "not found", "no such host", "dial tcp", "unauthorized", "no space left",
    "quota exceeded", "unsupported protocol scheme",
)  # fmt: skip
_TIMED_OUT = "context deadline exceeded"
_REASON = re.compile(r'level=WARN .*\berr="((?:[^"\\]|\\.)*)"')

Progress = Callable[[dict[str, Any]], None]


def ensure_model(
    models_dir: Path,
    text: str,
    program: str,
    log: Path,
    *,
    say: Callable[[str], None],
    progress: Progress,
    again: bool = False,
) -> bool:
    """Pull a model unless it is in the models directory; return whether it was pulled.

    Args:
        text: the model's name; a leading ``http://`` means a registry without TLS.
        program: the ``ollama`` executable.
        log: log of the server that pulls.
        say: called with a message before waiting.
        progress: called with each progress object of the pull.
        again: pull the model even if it exists: its tag may have moved, or a blob may be damaged.

    Raises:
        ModelError: the model is unknown, not available, or has another digest than required.
        StorageError: the models directory cannot be written.
    """
    name = parse_model_name(text)
    if not again and _is_there(models_dir, name):
        return False
    check_cert_file(os.environ)
    _refuse_read_only(models_dir, name)
    with changing(models_dir, f"pulling {name.served}", say):
        if not again and _is_there(models_dir, name):
            return False
        say(f"pulling {name.served} into {models_dir}")
        folder = begin_staging(models_dir, name, "pull")
        try:
            with _serving(folder, program, log) as ollama:
                pull_with(ollama, name, folder, progress, log)
        except AifluxError:
            # An unknown name is not an interrupted pull.
            remove_if_empty(folder)
            raise
        _refuse_partial(folder, name)
        _insist(folder, name)
        move_into_place(folder, models_dir, name)
    return True


def create_model(
    models_dir: Path,
    name: ModelName,
    digest: str,
    template: str | None,
    program: str,
    log: Path,
    *,
    progress: Progress,
) -> None:
    """Create a model from a GGUF file with Ollama, and move it into place.

    The file is already in the model's staging directory, as the blob ``digest``. The caller holds
    the lease of the models directory (``changing``).

    Raises:
        ModelError: Ollama could not create a model from the file.
        StorageError: the models directory cannot be written.
    """
    folder = staged_folder(models_dir, name)
    with _serving(folder, program, log) as ollama:
        try:
            for step in ollama.create(name.pulled, digest, template, _CREATE_TIMEOUT):
                progress(step)
        except EngineError as error:
            raise ModelError(
                f"Ollama could not create a model from the file: {error.message}",
                "check that this version of Ollama supports the GGUF file",
            ) from error
    _refuse_partial(folder, name)
    move_into_place(folder, models_dir, name)


def _refuse_read_only(models_dir: Path, name: ModelName) -> None:
    if not may_write(models_dir):
        raise ModelError(
            f"{name.served} is not (completely) in the models directory {models_dir}, which is "
            "read-only for you",
            f"ask its owner to pull it (aiflux models pull {name.written}), or use a directory of "
            "your own: --models-dir PATH",
        )


def _is_there(models_dir: Path, name: ModelName) -> bool:
    if missing_parts(models_dir, name):
        return False
    _insist(models_dir, name)
    return True


def _insist(folder: Path, name: ModelName) -> None:
    refuse_other_digest(name, read_manifest(folder, name).digest, str(folder))


def _refuse_partial(folder: Path, name: ModelName) -> None:
    missing = missing_parts(folder, name)
    if missing:
        raise ModelError(
            f"{name.served} was pulled but is incomplete: {', '.join(missing)}",
            "pull it again; the registry may be broken",
        )


@contextmanager
def _serving(folder: Path, program: str, log: Path) -> Iterator[Ollama]:
    """Run a temporary server on a staging directory, with network."""
    with temporary_folder() as home:
        environment = ollama_environment(os.environ, folder, home, {}, network=True)
        server = ServerProcess([program, "serve"], environment, log)
        try:
            server.start()
            yield Ollama(server.url)
        finally:
            server.stop()


def pull_with(ollama: Ollama, name: ModelName, folder: Path, progress: Progress, log: Path) -> None:
    """Pull a model; resume the pull if it breaks off, at most ``_ATTEMPTS`` times in all."""

    def attempt() -> None:
        # Ollama verifies the digests of what it just fetched, but not of existing blobs.
        remove_damaged(folder)
        for step in ollama.pull(name.pulled, insecure=name.insecure, stall_timeout=_STALL_TIMEOUT):
            progress(step)

    retrying = Retrying(
        stop=stop_after_attempt(_ATTEMPTS), retry=retry_if_exception(_may_succeed), reraise=True
    )
    try:
        retrying(attempt)
    except EngineError as error:
        raise _explain(name, folder, with_reason(error.message, log)) from error


def _may_succeed(error: BaseException) -> bool:
    """Return whether another attempt can help."""
    return isinstance(error, EngineError) and not any(text in error.message for text in _HOPELESS)


def with_reason(words: str, log: Path) -> str:
    """Return an error message; if it only names a time limit, add why Ollama was waiting.

    Source: ollama, server/download.go: a blob that is not available is retried for 30 s, and each
    failure is written to the log.
    """
    if _TIMED_OUT not in words:
        return words
    reasons = _REASON.findall(log.read_text(encoding="utf-8", errors="replace"))
    if not reasons:
        return words
    last = reasons[-1].replace('\\"', '"')
    return f"{words} (the last attempt failed with: {last})"


def _explain(name: ModelName, folder: Path, words: str) -> AifluxError:
    if "no space left" in words or "quota exceeded" in words:
        free = shutil.disk_usage(folder).free
        return StorageError(
            f"{name.served} could not be pulled: the disk of {folder.parent.parent} is full "
            f"({free // 10**6} MB are free): {words}",
            "free some space, or choose another directory (--models-dir PATH), and pull again to "
            "resume",
        )
    if "unsupported protocol scheme" in words:
        return ModelError(
            f"the registry {name.host} requires a login but does not name a login server: {words}",
            "use a public registry, or copy the model with aiflux models export and import",
        )
    unknown = ("does not exist", "not found", "unauthorized")
    if any(text in words for text in unknown) and _TIMED_OUT not in words:  # a blob
        return ModelError(
            f"the registry {name.host} has no model {name.served}: {words}",
            "check the name (https://ollama.com/library lists them)",
        )
    if "no such host" in words or "dial tcp" in words or "lookup" in words:
        return ModelError(
            f"{name.served} is not in the models directory, and the registry {name.host} cannot be "
            f"reached from here: {words}",
            f"pull it on a machine with internet, e.g. a login node: aiflux models pull "
            f"{name.written}; if this machine has internet, the registry may be down: pull again "
            "later to resume",
        )
    return ModelError(
        f"{name.served} could not be pulled from {name.host}: {words}",
        "pull again to resume",
    )
