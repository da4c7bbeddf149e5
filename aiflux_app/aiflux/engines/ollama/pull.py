"""Models on disk: look first, pull only what is missing, one pull at a time, staged and renamed.

A model is pulled into ``<models>/.staging/<name>`` by a server of its own and moved into place when
it is whole (see ``core/staging.py``). A broken pull leaves its staging folder, from which the next
one goes on. Models are made of GGUF files in the same way.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tenacity import Retrying, retry_if_exception, stop_after_attempt

from aiflux.engines.ollama.api import Ollama
from aiflux.engines.ollama.environment import ollama_environment
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
from aiflux.util.files import may_write

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
    """Make sure that a model is in the models directory; return whether it was pulled.

    Args:
        text: the model's name; ``http://`` in front asks for a registry without TLS.
        program: the ``ollama`` executable.
        log: log of the server that pulls.
        say: told one line when there is something to wait for.
        progress: given each progress object of the pull.
        again: pull it although it is there, for its tag may have moved, or a blob be damaged.

    Raises:
        ModelError: the model is unknown, could not be had, or is not the one insisted on.
        StorageError: the models directory cannot be written.
    """
    name = parse_model_name(text)
    if not again and _is_there(models_dir, name):
        return False
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
            # A name that no registry knows is no pull that broke off.
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
    """Have Ollama make a model of a GGUF file, and move it into place.

    The file lies in the model's staging folder already, as the blob ``digest``; whoever calls holds
    the models directory's lease (``changing``).

    Raises:
        ModelError: Ollama could not make a model of it.
        StorageError: the models directory cannot be written.
    """
    folder = staged_folder(models_dir, name)
    with _serving(folder, program, log) as ollama:
        try:
            for step in ollama.create(name.pulled, digest, template, _CREATE_TIMEOUT):
                progress(step)
        except EngineError as error:
            raise ModelError(
                f"Ollama could make no model of the file: {error.message}",
                "check that it is a GGUF of a kind that this Ollama knows",
            ) from error
    _refuse_partial(folder, name)
    move_into_place(folder, models_dir, name)


def _refuse_read_only(models_dir: Path, name: ModelName) -> None:
    if not may_write(models_dir):
        raise ModelError(
            f"{name.served} is not (whole) in the models directory {models_dir}, and you may not "
            "write there to pull it",
            f"ask its owner for it (aiflux models pull {name.written}), or name one of your own: "
            "--models-dir PATH",
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
            f"{name.served} was pulled but is not whole: {', '.join(missing)}",
            "pull it again; the registry may be broken",
        )


@contextmanager
def _serving(folder: Path, program: str, log: Path) -> Iterator[Ollama]:
    """A server of its own on a staging folder, with the network."""
    with tempfile.TemporaryDirectory(prefix="aiflux-pull-") as home:
        environment = ollama_environment(os.environ, folder, Path(home), {}, network=True)
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
    """Return an error's words; where they tell of a time limit only, with why Ollama was waiting.

    Source: ollama, server/download.go: a blob that cannot be had is tried again for 30 s, and each
    failure is a line of the log.
    """
    if _TIMED_OUT not in words:
        return words
    reasons = _REASON.findall(log.read_text(encoding="utf-8", errors="replace"))
    if not reasons:
        return words
    last = reasons[-1].replace('\\"', '"')
    return f"{words} (what was tried last gave: {last})"


def _explain(name: ModelName, folder: Path, words: str) -> AifluxError:
    if "no space left" in words or "quota exceeded" in words:
        free = shutil.disk_usage(folder).free
        return StorageError(
            f"{name.served} could not be pulled: the disk of {folder.parent.parent} is full "
            f"({free // 10**6} MB are free): {words}",
            "make room, or name another folder (--models-dir PATH), and pull again: it goes on "
            "where it broke off",
        )
    if "unsupported protocol scheme" in words:
        return ModelError(
            f"the registry {name.host} asks for a login and does not say where: {words}",
            "pull from one that is open, or carry the model: aiflux models export and import",
        )
    unknown = ("does not exist", "not found", "unauthorized")
    if any(text in words for text in unknown) and _TIMED_OUT not in words:  # then it is a blob
        return ModelError(
            f"the registry {name.host} has no model {name.served}: {words}",
            "check the name (https://ollama.com/library lists them)",
        )
    if "no such host" in words or "dial tcp" in words or "lookup" in words:
        return ModelError(
            f"{name.served} is not in the models directory, and the registry {name.host} cannot be "
            f"reached from here: {words}",
            f"pull it where there is internet, e.g. on a login node: aiflux models pull "
            f"{name.written}; where there is, the registry may be down: a pull goes on where it "
            "broke",
        )
    return ModelError(
        f"{name.served} could not be pulled from {name.host}: {words}",
        "run it again: a pull goes on where it broke",
    )
