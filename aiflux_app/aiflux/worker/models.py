"""Models on disk: look first, pull only what is missing, one pull at a time, staged and renamed.

A model is pulled into ``<models>/.staging/<name>`` by a server of its own and moved into place when
it is whole: blobs first, the manifest last, each by a rename. A run that reads the models directory
at that moment sees the model whole or not at all. A broken pull leaves its staging folder, from
which the next one goes on.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiflux.core.files import fsync_directory, storage_error
from aiflux.core.lease import acquire
from aiflux.core.modelname import ModelName, parse_model_name
from aiflux.core.modelstore import missing_parts, read_manifest, refuse_other_digest
from aiflux.errors import EngineError, ModelError
from aiflux.worker.ollama import Ollama
from aiflux.worker.server import Server, engine_environment

_STALL_TIMEOUT = 600.0
_ATTEMPTS = 3

Progress = Callable[[dict[str, Any]], None]


def ensure_model(
    models_dir: Path,
    text: str,
    program: str,
    log: Path,
    *,
    say: Callable[[str], None],
    progress: Progress,
) -> bool:
    """Make sure that a model is in the models directory; return whether it was pulled.

    Args:
        text: the model's name; ``http://`` in front asks for a registry without TLS.
        program: the ``ollama`` executable.
        log: log of the server that pulls.
        say: told one line when there is something to wait for.
        progress: given each progress object of the pull.

    Raises:
        ModelError: the model is unknown, or could not be had.
        StorageError: the models directory cannot be written.
    """
    name = parse_model_name(text)
    if not missing_parts(models_dir, name):
        _insist(models_dir, name)
        return False
    staging = models_dir / ".staging"
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, staging) from error
    with acquire(staging / "lease", f"pulling into {models_dir}", wait=True, on_wait=say):
        if not missing_parts(models_dir, name):
            _insist(models_dir, name)
            return False
        say(f"pulling {name.served} into {models_dir}")
        folder = staging / name.served.replace("/", "_").replace(":", "_")
        _pull(folder, name, program, log, progress)
        missing = missing_parts(folder, name)
        if missing:
            raise ModelError(
                f"{name.served} was pulled but is not whole: {', '.join(missing)}",
                "pull it again; the registry may be broken",
            )
        _insist(folder, name)
        _move_into_place(folder, models_dir, name)
    return True


def _insist(folder: Path, name: ModelName) -> None:
    refuse_other_digest(name, read_manifest(folder, name).digest, str(folder))


def _pull(folder: Path, name: ModelName, program: str, log: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix="aiflux-pull-") as home:
        environment = engine_environment(os.environ, folder, Path(home), {}, network=True)
        server = Server(program, environment, log)
        try:
            server.start()
            _pull_with(Ollama(server.url), name, progress)
        finally:
            server.stop()


def _pull_with(ollama: Ollama, name: ModelName, progress: Progress) -> None:
    """Pull, and go on when it breaks off, while each attempt brings it further."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            pulling = ollama.pull(name.pulled, insecure=name.insecure, stall_timeout=_STALL_TIMEOUT)
            for step in pulling:
                progress(step)
        except EngineError as error:
            if attempt == _ATTEMPTS or not _worth_retrying(error.message):
                raise _explain(name, error.message) from error
        else:
            return


def _worth_retrying(words: str) -> bool:
    return not any(
        text in words
        for text in ("does not exist", "not found", "no such host", "dial tcp", "unauthorized",
                     "no space left")
    )  # fmt: skip


def _explain(name: ModelName, words: str) -> ModelError:
    if "does not exist" in words or "not found" in words or "unauthorized" in words:
        return ModelError(
            f"the registry {name.host} has no model {name.served}: {words}",
            "check the name (https://ollama.com/library lists them)",
        )
    if "no such host" in words or "dial tcp" in words or "lookup" in words:
        return ModelError(
            f"{name.served} is not in the models directory, and this node has no network to pull "
            f"it: {words}",
            f"pull it where there is internet, e.g. on a login node: "
            f"aiflux models pull {name.served}",
        )
    return ModelError(
        f"{name.served} could not be pulled: {words}", "run it again: a pull goes on where it broke"
    )


def _move_into_place(folder: Path, models_dir: Path, name: ModelName) -> None:
    try:
        blobs = models_dir / "blobs"
        blobs.mkdir(exist_ok=True)
        for blob in sorted((folder / "blobs").iterdir()):
            if "-partial" not in blob.name:
                blob.replace(blobs / blob.name)
        fsync_directory(blobs)
        manifest = models_dir / name.manifest_path
        manifest.parent.mkdir(parents=True, exist_ok=True)
        (folder / name.manifest_path).replace(manifest)
        fsync_directory(manifest.parent)
        shutil.rmtree(folder)
    except OSError as error:
        raise storage_error(error, models_dir) from error
