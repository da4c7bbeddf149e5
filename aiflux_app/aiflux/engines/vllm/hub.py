"""Names of Hugging Face models, and the location of their snapshots.

A snapshot is stored in the layout of huggingface_hub's cache, so that a site's shared cache can be
the models directory:
``models--ORG--NAME/{blobs/HASH, refs/BRANCH, snapshots/COMMIT/FILE -> ../../blobs/HASH}``.
Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path

from aiflux.engines.vllm.safetensors import problem_with, read_json, refuse_unknown_dtype
from aiflux.errors import ConfigError, ModelError
from aiflux.models.catalog import read_catalog
from aiflux.models.name import HUB_PREFIX, is_path, split_hub_name
from aiflux.models.tokenizer import ModelTokenizer, snapshot_tokenizer
from aiflux.util.files import absolute
from aiflux.util.text import error_text

HUB = "hub"
"""Subdirectory of the models directory that the snapshots are pulled to."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ABBREVIATED = re.compile(r"[0-9a-f]{7,40}")
_STORE = "models--"
_SMALL = 16 << 20
_AGAIN = "pull or copy the model again"
# Names that the tokenizers of transformers and Mistral have.
_TOKENIZERS = (
    "tokenizer*.json", "tokenizer.model*", "*.tiktoken", "tiktoken.model", "tekken*.json",
    "vocab.*", "spiece.model", "sentencepiece*.model", "*.spm", "tokenization_*.py",
)  # fmt: skip


@dataclass(frozen=True)
class HubModel:
    """A model named by a user.

    Attributes:
        repo: ``ORG/NAME``; empty for a directory.
        revision: branch, tag or commit; None for the default branch.
        folder: directory with the model's files; None for one of the hub.
    """

    repo: str = ""
    revision: str | None = None
    folder: Path | None = None

    @property
    def served(self) -> str:
        """The name in requests and results: ``ORG/NAME``, or the directory's own name.

        A snapshot's directory in a hub cache has the name of its model.
        """
        if self.folder is None:
            return self.repo
        store = self.folder.parents[1].name if len(self.folder.parts) > 2 else ""
        if self.folder.parent.name == "snapshots" and store.startswith(_STORE):
            return store.removeprefix(_STORE).replace("--", "/")
        return self.folder.name

    @property
    def text(self) -> str:
        """The name as a command takes it."""
        if self.folder is not None:
            return str(self.folder)
        return HUB_PREFIX + self.repo + (f"@{self.revision}" if self.revision else "")


def parse_hub_model(text: str) -> HubModel:
    """Read ``hf:ORG/NAME[@REVISION]``, ``ORG/NAME[@REVISION]`` or the path of a directory.

    Raises:
        ConfigError: the text is none of these.
    """
    if is_path(text):
        return HubModel(folder=_folder(text))
    split = split_hub_name(text)
    if split is None:
        raise ConfigError(
            f"{text!r} is not a model of Hugging Face",
            "write hf:ORG/NAME, hf:ORG/NAME@REVISION, or the path of a model's directory",
        )
    return HubModel(*split)


def _folder(text: str) -> Path:
    try:
        folder = absolute(Path(text).expanduser())
    except RuntimeError as error:
        raise ConfigError(f"the model {text!r}: {error}", "write the whole path") from error
    if not folder.name:
        raise ConfigError(f"the model {text!r} has no name", "name the directory of a model")
    return folder


def is_commit(text: str) -> bool:
    """Return whether a text is a whole commit."""
    return bool(_COMMIT.fullmatch(text))


def same_revision(one: str, other: str) -> bool:
    """Return whether two revisions are the same; a commit may be abbreviated to seven digits."""
    abbreviated = _ABBREVIATED.fullmatch(one) and _ABBREVIATED.fullmatch(other)
    return one == other or bool(abbreviated and (one.startswith(other) or other.startswith(one)))


def store_name(repo: str) -> str:
    """Return the name of a model's directory in a hub cache."""
    return _STORE + repo.replace("/", "--")


def find_snapshot(models_dir: Path | None, model: HubModel) -> Path | None:
    """Return the directory with a model's files, or None if it is not stored.

    The models directory may be a hub cache itself, or have one in ``hub/``. Without a revision, the
    default branch counts, or the only stored snapshot.
    """
    if model.folder is not None:
        return model.folder if os.path.isdir(model.folder) else None
    if models_dir is None:
        return None
    for root in (models_dir / HUB, models_dir):
        store = root / store_name(model.repo)
        commit = _commit(store, model.revision)
        if commit is not None and os.path.isdir(store / "snapshots" / commit):
            return store / "snapshots" / commit
    return None


def _commit(store: Path, revision: str | None) -> str | None:
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    try:
        noted = (store / "refs" / (revision or "main")).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        noted = ""
    if _COMMIT.fullmatch(noted):
        return noted
    stored = [name for name in _names(store / "snapshots") if _COMMIT.fullmatch(name)]
    if revision is None:
        return stored[0] if len(stored) == 1 else None
    matches = [name for name in stored if same_revision(name, revision)]
    return matches[0] if len(matches) == 1 else None


def _names(folder: Path) -> list[str]:
    """Raises ModelError for a folder that exists and cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ModelError(
            f"{folder} cannot be read: {error.strerror}", "ask its owner for access"
        ) from error


def model_names(snapshot: Path) -> list[str]:
    """Return the names of a stored snapshot: with each branch and tag, else with its commit."""
    store = snapshot.parents[1]
    repo = HUB_PREFIX + store.name.removeprefix(_STORE).replace("--", "/", 1)
    names = []
    for ref in sorted(store.glob("refs/**/*")):
        if ref.is_file() and ref.read_text("ascii", "replace").strip() == snapshot.name:
            branch = str(ref.relative_to(store / "refs"))
            names.append(repo if branch == "main" else f"{repo}@{branch}")
    return names or [f"{repo}@{snapshot.name}"]


def absent(models_dir: Path | None, model: HubModel) -> ModelError:
    """Return the error of a model that is not stored."""
    if model.folder is not None:
        remedy = "check the path (--model)"
        if model.folder.exists():
            return ModelError(f"the model is not a directory: {model.folder} is a file", remedy)
        return ModelError(f"model directory not found: {model.folder}", remedy)
    return ModelError(
        f"{model.text} is not stored in {models_dir}",
        f"pull it: aiflux models pull {model.text}{known_name(model)}",
    )


def known_name(model: HubModel) -> str:
    """Return a question after a name of the catalog that is similar; "" if there is none."""
    near = read_catalog().nearest(model.text)
    return "" if near is None else f"; or did you mean {near}?"


def present_snapshot(models_dir: Path | None, model: HubModel) -> Path:
    """Return the directory with a model's files, even if some are missing or damaged.

    Raises:
        ModelError: there is none.
    """
    snapshot = find_snapshot(models_dir, model)
    if snapshot is None:
        raise absent(models_dir, model)
    return snapshot


def is_stored(models_dir: Path, model: HubModel) -> bool:
    """Return whether a model's configuration and all its weights are stored."""
    snapshot = find_snapshot(models_dir, model)
    return snapshot is not None and not any(problems(snapshot))


def stored_snapshot(models_dir: Path | None, model: HubModel) -> Path:
    """Return the directory of a model that is stored completely, with a valid configuration.

    Raises:
        ModelError: the model is not; names the file.
    """
    snapshot = present_snapshot(models_dir, model)
    problem = next(problems(snapshot), None)
    if problem is not None:
        raise ModelError(
            f"the model {model.text} cannot be used: {problem}",
            "copy its files again"
            if model.folder is not None
            else f"pull it again: aiflux models pull --again {model.text}",
        )
    return snapshot


def problems(snapshot: Path) -> Iterator[str]:
    """Yield the problems of a snapshot: missing files, truncated weights, a wrong configuration."""
    if not (snapshot / "config.json").is_file():
        yield f"{snapshot / 'config.json'} is missing"
        return
    try:
        refuse_unknown_dtype(snapshot)
        files = weight_files(snapshot)
    except ModelError as error:
        yield error.message
        return
    if not files:
        yield f"no .safetensors file is in {snapshot}"
    for file in files:
        problem = problem_with(snapshot / file)
        if problem is not None:
            yield problem


def refuse_missing_tokenizer(snapshot: Path) -> None:
    """Refuse a model without any file of a tokenizer, with which vLLM does not start.

    Raises:
        ModelError: there is none.
    """
    names = _names(snapshot)
    if not any(fnmatchcase(name, pattern) for name in names for pattern in _TOKENIZERS):
        raise ModelError(
            f"no tokenizer is in {snapshot}: it has none of {', '.join(_TOKENIZERS)}",
            "copy the tokenizer's files there, or name a directory with one: --engine-arg "
            "tokenizer=DIR",
        )


def read_tokenizer(
    models_dir: Path | None, model: HubModel, options: Collection[str]
) -> ModelTokenizer:
    """Return the tokenizer of a stored model; see ``snapshot_tokenizer``.

    Args:
        options: names of the run's own options of the server.

    Raises:
        ModelError: the model is not stored, or its tokenizer cannot be read.
        ConfigError: the library is not installed.
    """
    if any(name.startswith("tokenizer") for name in options):
        raise ModelError("--engine-arg sets a tokenizer of its own")
    found = snapshot_tokenizer(present_snapshot(models_dir, model))
    return replace(found, template=None) if "chat-template" in options else found


def weight_files(snapshot: Path) -> list[str]:
    """Return the names of the files with weights: those of the index, else all .safetensors.

    Raises:
        ModelError: the index cannot be read.
    """
    index = snapshot / "model.safetensors.index.json"
    if not index.is_file():
        return [name for name in _names(snapshot) if name.endswith(".safetensors")]
    content = read_json(index, _AGAIN)
    try:
        names = {*content["weight_map"].values()}
        if not all(isinstance(name, str) for name in names):
            raise TypeError
        return sorted(names)
    except (KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is damaged: {error_text(error)}", _AGAIN) from error


def snapshot_digest(snapshot: Path) -> str:
    """Return a snapshot's identity: the commit of the hub, else a digest of the directory.

    That digest covers the names and sizes of all files and the content of those up to 16 MiB, such
    as the configuration and the tokenizer: to read all weights would take minutes at each start.
    Hidden files do not count: a download leaves some.

    Raises:
        ModelError: a file cannot be read.
    """
    if _COMMIT.fullmatch(snapshot.name):
        return snapshot.name
    digest = sha256()
    for path in sorted(snapshot.rglob("*")):
        name = path.relative_to(snapshot)
        if any(part.startswith(".") for part in name.parts) or not path.is_file():
            continue
        try:
            size = path.stat().st_size
            digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
            if size <= _SMALL:
                digest.update(path.read_bytes())
        except OSError as error:
            raise ModelError(
                f"{path} cannot be read: {error.strerror}", "ask its owner for access"
            ) from error
    return digest.hexdigest()
