"""Pull a snapshot from the hub with huggingface_hub, and check every file.

huggingface_hub resumes downloads, and takes HF_TOKEN, HF_ENDPOINT and the proxies from the
environment. It checks sizes; the SHA-256 that the hub has of each large file is compared here.
"""

from __future__ import annotations

import shutil
from hashlib import sha1, sha256
from importlib import import_module
from pathlib import Path
from typing import Any

from aiflux.engines.base import FetchContext
from aiflux.engines.vllm.hub import HUB, HubModel, find_snapshot, problems, stored_snapshot
from aiflux.errors import ModelError, StorageError
from aiflux.util.extras import need

_UNUSED = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.onnx",
    "*.h5",
    "*.msgpack",
    "original/*",
    "onnx/*",
)
"""The same weights in other formats, where the repository has safetensors."""
_BLOCK = 1 << 20


def ensure_snapshot(models_dir: Path, model: HubModel, context: FetchContext) -> bool:
    """Pull a model unless it is stored; return whether it was pulled.

    Raises:
        ModelError: it is unknown, gated or not available, or a file differs from the hub's.
        StorageError: the models directory cannot be written.
        ConfigError: huggingface_hub is not installed.
    """
    if model.folder is not None:
        stored_snapshot(models_dir, model)
        return False
    if not context.again:
        found = find_snapshot(models_dir, model)
        if found is not None and not any(problems(found)):
            return False
    hub = need("huggingface_hub", "hub", f"pulling {model.text}")
    context.say(f"pulling {model.text}")
    snapshot = _download(hub, models_dir / HUB, model, context)
    stored_snapshot(models_dir, model)
    context.say(f"{model.text} is commit {snapshot.name}")
    return True


def _download(hub: Any, cache: Path, model: HubModel, context: FetchContext) -> Path:
    """Args: hub: the module huggingface_hub."""
    errors = import_module("huggingface_hub.errors")
    try:
        info = hub.HfApi().model_info(model.repo, revision=model.revision, files_metadata=True)
        if info.sha is None:
            raise ModelError(f"the hub names no commit of {model.text}", "try again later")
        names = [each.rfilename for each in info.siblings or []]
        skipped = [*_UNUSED] if any(name.endswith(".safetensors") for name in names) else None
        _refuse_full(cache, sum(each.size or 0 for each in info.siblings or []))
        # The branch's name is kept beside the commit, so that it is found without the hub.
        snapshot = Path(
            hub.snapshot_download(
                model.repo,
                revision=info.sha,
                cache_dir=cache,
                ignore_patterns=skipped,
                force_download=context.again,
            )
        )
        _check(snapshot, info.siblings or [], model)
        _write_ref(snapshot, model)
        return snapshot
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{model.repo} is gated: the hub asks who you are",
            "accept its terms on the model's page, and set HF_TOKEN to a token of your account",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model {model.repo}, or it is private",
            "check the name; for a private model set HF_TOKEN to a token of your account",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"{model.repo} has no revision {model.revision!r}",
            "name a branch, a tag or a commit of the model",
        ) from error
    except OSError as error:  # HTTP errors of huggingface_hub are OSErrors, too
        if error.errno is not None:
            raise StorageError(
                f"cannot write {cache}: {error.strerror}", "free space or choose --models-dir"
            ) from error
        raise _unavailable(model, error) from error
    except errors.HfHubHTTPError as error:
        raise _unavailable(model, error) from error
    except ModelError:
        raise
    except Exception as error:
        # The HTTP library's own exceptions have no common base class with those above.
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpcore", "requests"):
            raise
        raise _unavailable(model, error) from error


def _unavailable(model: HubModel, error: Exception) -> ModelError:
    first = str(error).strip().partition("\n")[0]
    return ModelError(
        f"{model.text} could not be pulled: {first or type(error).__name__}",
        "pull where the hub can be reached (HF_ENDPOINT names a mirror), or copy the model's "
        "directory to this cluster and give its path as the model; run again: it resumes",
    )


def _refuse_full(cache: Path, size: int) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < size:
        raise StorageError(
            f"{cache} has {free >> 30} GiB free, and the model needs up to {size >> 30}",
            "free space or choose --models-dir",
        )


def _check(snapshot: Path, siblings: list[Any], model: HubModel) -> None:
    """Compare files with the hashes that the hub has: SHA-256 of large ones, git's of the rest."""
    for each in siblings:
        path = snapshot / each.rfilename
        if not path.is_file():
            continue  # one of the skipped formats
        lfs = each.lfs
        wanted = lfs.sha256 if lfs else each.blob_id
        found = file_digest(path) if lfs else git_digest(path)
        if wanted and found != wanted:
            path.resolve().unlink(missing_ok=True)
            raise ModelError(
                f"{each.rfilename} of {model.text} differs from the hub's: {found} is not {wanted}",
                "pull again: the file was removed and is downloaded again",
            )


def _write_ref(snapshot: Path, model: HubModel) -> None:
    """Note which commit the revision is, where huggingface_hub was asked for the commit."""
    refs = snapshot.parents[1] / "refs"
    ref = refs / (model.revision or "main")
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(snapshot.name, encoding="ascii")


def file_digest(path: Path) -> str:
    """Return a file's SHA-256, hex."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def git_digest(path: Path) -> str:
    """Return a file's blob id as git computes it, hex."""
    content = path.read_bytes()
    return sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
