"""Pull a snapshot from the hub with huggingface_hub, and check every file.

A snapshot is put together in ``hub/.staging`` and moved into place when every file has the hash
that the hub has of it, so that a run sees a complete snapshot or none. huggingface_hub resumes a
download whose connection breaks. A pull that is run again keeps the files that are complete.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

from aiflux.engines.base import FetchContext
from aiflux.engines.http import check_cert_file
from aiflux.engines.ollama.staging import changing, refuse_read_only
from aiflux.engines.vllm.hub import (
    HUB,
    HubModel,
    is_stored,
    known_name,
    store_name,
    stored_snapshot,
)
from aiflux.engines.vllm.store import (
    STAGING,
    blob_digest,
    git_digest,
    move_snapshot,
)
from aiflux.errors import AifluxError, ModelError, StorageError
from aiflux.util.extras import need
from aiflux.util.files import file_digest, storage_error
from aiflux.util.process_limits import start_thread
from aiflux.util.text import error_text, size_text

_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*",
                  "onnx/*", "consolidated*.safetensors")  # fmt: skip
"""The same weights in other formats, where the repository has ``model*.safetensors``."""
_INTERVAL = 1.0


def ensure_snapshot(models_dir: Path, model: HubModel, context: FetchContext) -> bool:
    """Pull a model unless it is stored; return whether it was pulled.

    Raises:
        ModelError: it is unknown, gated or not available, or a file differs from the hub's.
        StorageError: the models directory cannot be written.
        ConfigError: huggingface_hub is not installed.
        UsageError: the user may not write into the models directory.
    """
    if model.folder is not None:
        stored_snapshot(models_dir, model)
        return False
    if not context.again and is_stored(models_dir, model):
        return False
    hub = need("huggingface_hub", "hub", f"pulling {model.text}")
    check_cert_file(context.environ)
    refuse_read_only(models_dir)
    with changing(models_dir, f"pulling {model.text}", context.say):
        if not context.again and is_stored(models_dir, model):
            return False
        context.say(f"pulling {model.text} into {models_dir}")
        with _explained(hub, models_dir / HUB, model):
            commit = Pull(hub, models_dir / HUB, model, context).run()
    stored_snapshot(models_dir, model)
    context.say(f"{model.text} is commit {commit}")
    return True


class Pull:
    """One pull.

    Args:
        hub: the module ``huggingface_hub``.
        cache: hub cache that the snapshot is moved to.
    """

    def __init__(self, hub: Any, cache: Path, model: HubModel, context: FetchContext) -> None:
        # Else a file may be a link to a store outside of the snapshot's own.
        constants: Any = import_module("huggingface_hub.constants")
        constants.HF_HUB_DISABLE_SHARED_BLOBS = True
        import_module("huggingface_hub.utils").disable_progress_bars()
        self._hub = hub
        self._model = model
        self._progress = context.progress
        self._options = {
            "endpoint": context.environ.get("HF_ENDPOINT") or None,
            "token": context.environ.get("HF_TOKEN") or None,
        }
        self._store = cache / store_name(model.repo)
        self._staging = cache / STAGING / self._store.name
        self._staged = self._staging / self._store.name

    def run(self) -> str:
        """Pull; return the commit."""
        info = self._hub.HfApi(**self._options).model_info(
            self._model.repo, revision=self._model.revision, files_metadata=True
        )
        if info.sha is None:
            raise ModelError(f"the hub names no commit of {self._model.text}", "try again later")
        files = _wanted(info.siblings or [], self._model)
        (self._staged / "blobs").mkdir(parents=True, exist_ok=True)
        for left in self._staged.glob("blobs/*.incomplete*"):
            left.unlink()  # of a pull that was killed; the lease is held
        for file in files:
            self._reuse(file)
        self._refuse_full(files)
        for count, file in enumerate(files, 1):
            self._fetch(file, f"{count}/{len(files)} {file.rfilename}", info.sha)
        self._move(info.sha)
        return str(info.sha)

    def _reuse(self, file: Any) -> None:
        """Take over a file that another snapshot has, unless it is damaged."""
        name = _hash(file)
        stored, staged = self._store / "blobs" / name, self._staged / "blobs" / name
        if name and stored.is_file() and not staged.exists() and blob_digest(stored) == name:
            os.link(stored, staged)

    def _refuse_full(self, files: list[Any]) -> None:
        missing = sum(
            file.size or 0
            for file in files
            if not _hash(file) or not (self._staged / "blobs" / _hash(file)).exists()
        )
        free = shutil.disk_usage(self._staged).free
        if free < missing:
            raise StorageError(
                f"{self._store.parent} has {size_text(free)} free, and {self._model.text} needs "
                f"{size_text(missing)} more",
                "free space, or choose another directory: --models-dir PATH",
            )

    def _fetch(self, file: Any, label: str, commit: str) -> None:
        with self._watched(label, file.size or 0):
            path = Path(
                self._hub.hf_hub_download(
                    self._model.repo,
                    file.rfilename,
                    revision=commit,
                    cache_dir=self._staging,
                    **self._options,
                )
            )
        wanted = _hash(file)
        found = file_digest(path) if file.lfs else git_digest(path)
        if wanted and found != wanted:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise ModelError(
                f"{file.rfilename} of {self._model.text} arrived damaged: its hash is {found}, "
                f"and the hub's is {wanted}",
                "pull again: the file was removed, and complete files are kept",
            )

    @contextmanager
    def _watched(self, label: str, size: int) -> Iterator[None]:
        """Report how many bytes of a file have arrived, every second."""
        ended = threading.Event()
        before = self._arrived()

        def watch() -> None:
            while not ended.wait(_INTERVAL):
                done = min(size, self._arrived() - before)
                self._progress({"status": label, "total": size, "completed": done})

        self._progress({"status": label, "total": size, "completed": 0})
        watcher = start_thread(watch, "pull-watch")
        try:
            yield
        finally:
            ended.set()
            watcher.join()

    def _arrived(self) -> int:
        """Return the bytes in staging: a partial file may have its whole length from the start."""
        total = 0
        for entry in os.scandir(self._staged / "blobs"):
            try:
                total += entry.stat().st_blocks * 512
            except FileNotFoundError:
                continue  # renamed when it was complete
        return total

    def _move(self, commit: str) -> None:
        move_snapshot(self._staged, self._store, commit, self._model.revision or "main")
        shutil.rmtree(self._staging)


def _wanted(siblings: list[Any], model: HubModel) -> list[Any]:
    """Return the files to pull: weights in one format are enough.

    Raises:
        ModelError: none of them is in the format that is needed.
    """
    names = [each.rfilename for each in siblings]
    if not any(name.endswith(".safetensors") and "/" not in name for name in names):
        raise ModelError(
            f"{model.repo} has no weights in safetensors format",
            "choose a model that has them; for a GGUF file use --engine llamacpp",
        )
    if not any(fnmatchcase(name, "model*.safetensors") for name in names):
        return siblings
    return [
        each
        for each in siblings
        if not any(fnmatchcase(each.rfilename, pattern) for pattern in _OTHER_FORMATS)
    ]


def _hash(file: Any) -> str:
    """Return the hash that the hub has of a file, which is also the name of its blob."""
    return str(file.lfs.sha256 if file.lfs else file.blob_id or "")


@contextmanager
def _explained(hub: Any, cache: Path, model: HubModel) -> Iterator[None]:
    """Turn the exceptions of huggingface_hub into errors with a remedy."""
    errors = import_module("huggingface_hub.errors")
    try:
        yield
    except AifluxError:
        raise
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{model.repo} is gated: its owner must give your account access",
            "request access on the model's page, and set HF_TOKEN to a token of your account",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model {model.repo}, or it is private",
            "check the name; for a private model set HF_TOKEN to a token of your account"
            + known_name(model),
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"{model.repo} has no revision {model.revision!r}",
            "name a branch, a tag or a commit of the model",
        ) from error
    except OSError as error:
        if error.errno is not None and not isinstance(error, errors.HTTPError):
            raise storage_error(error, cache) from error
        raise _unavailable(model, error) from error
    # Xet is the hub's own transfer protocol; its library raises RuntimeError.
    except (errors.HTTPError, errors.XetDownloadError, RuntimeError) as error:
        raise _unavailable(model, error) from error


def _unavailable(model: HubModel, error: BaseException) -> ModelError:
    """Return the error of a hub that does not answer as it should, by the first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = next(filter(str.strip, error_text(error).splitlines()), "no reason given")
    return ModelError(
        f"{model.text} could not be pulled: {first.strip()}",
        "pull on a machine that reaches the hub (HF_ENDPOINT names a mirror), or copy the model's "
        "directory here and give its path as the model; a pull keeps the files that are complete",
    )
