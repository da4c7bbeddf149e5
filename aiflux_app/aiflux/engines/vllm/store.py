"""The snapshots in a models directory: list, check and remove them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from aiflux.engines.base import ListedModel
from aiflux.engines.ollama.staging import making_room
from aiflux.engines.vllm.hub import (
    HUB,
    HubModel,
    absent,
    find_snapshot,
    model_names,
    parse_hub_model,
    problems,
)
from aiflux.engines.vllm.snapshot import STAGING, blob_digest
from aiflux.errors import ModelError
from aiflux.util.files import storage_error


def stored_models(models_dir: Path) -> list[ListedModel]:
    """Return the snapshots in a models directory, each under all names that it has."""
    found = []
    for root in (models_dir / HUB, models_dir):
        for snapshot in sorted(root.glob("models--*/snapshots/*")):
            found += [_describe(name, snapshot) for name in model_names(snapshot)]
    return found


def stored_model(models_dir: Path, name: str) -> ListedModel:
    """Return one of them.

    Raises:
        ModelError: it is not stored.
    """
    model = parse_hub_model(name)
    return _describe(model.text, _snapshot(models_dir, model))


def _snapshot(models_dir: Path, model: HubModel) -> Path:
    snapshot = find_snapshot(models_dir, model)
    if snapshot is None:
        raise absent(models_dir, model)
    return snapshot


def _describe(name: str, snapshot: Path) -> ListedModel:
    size = sum(path.stat().st_size for path in _files(snapshot) if path.is_file())
    return ListedModel(name, snapshot.name, size, next(problems(snapshot), ""))


def _files(snapshot: Path) -> Iterator[Path]:
    return (path for path in sorted(snapshot.rglob("*")) if path.is_symlink() or path.is_file())


def damaged_files(models_dir: Path, name: str, on_bytes: Callable[[int], None]) -> list[str]:
    """Read every file of a snapshot, and return what is wrong with which.

    A blob's name is the hash that the hub had of it when it was pulled.

    Raises:
        ModelError: the snapshot is not stored, or its files have no hashes.
    """
    snapshot = _snapshot(models_dir, parse_hub_model(name))
    wrong = [*problems(snapshot)]
    for path in _files(snapshot):
        blob = Path(os.path.realpath(path))
        if not path.is_symlink():
            raise ModelError(
                f"{path} has no hash to compare with", "pull the model to have its files checked"
            )
        if not blob.exists():
            wrong.append(f"{path.name} is missing")
            continue
        if blob_digest(blob) != blob.name:
            wrong.append(f"{path.name} is damaged")
        on_bytes(blob.stat().st_size)
    return wrong


def remove_model(models_dir: Path, name: str, say: Callable[[str], None]) -> int:
    """Remove a snapshot, and what a pull of it left; return the bytes that are free now.

    Files that other snapshots of the model use stay.

    Raises:
        ModelError: it is not stored.
        StorageError: the directory cannot be written.
    """
    model = parse_hub_model(name)
    snapshot = find_snapshot(models_dir, model)
    with making_room(models_dir, f"removing {model.text}", say):
        staged = [*(models_dir / HUB / STAGING).glob(f"models--{model.repo.replace('/', '--')}")]
        if snapshot is None and not staged:
            raise absent(models_dir, model)
        try:
            freed = sum(_tree_size(folder) for folder in staged)
            for folder in staged:
                shutil.rmtree(folder)
            return freed + (0 if snapshot is None else _remove(snapshot))
        except OSError as error:
            raise storage_error(error, models_dir) from error


def _remove(snapshot: Path) -> int:
    store = snapshot.parents[1]
    before = _tree_size(store)
    for ref in (path for path in store.glob("refs/**/*") if path.is_file()):
        if ref.read_text(encoding="ascii", errors="replace").strip() == snapshot.name:
            ref.unlink()
    shutil.rmtree(snapshot)
    others = [*store.glob("snapshots/*")]
    if not others:
        shutil.rmtree(store)
        return before
    used = {os.path.realpath(path) for other in others for path in _files(other)}
    for blob in store.glob("blobs/*"):
        if os.path.realpath(blob) not in used:
            blob.unlink()
    return before - _tree_size(store)


def _tree_size(folder: Path) -> int:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files)
