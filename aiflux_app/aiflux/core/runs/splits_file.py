"""The splits of a run, `splits.jsonl`: how the requests are split whose prompts are too long.

Each line is a request's split, in the order of the input::

    {"offset":1234,"at":["messages",1,"content"],"ends":[4100,8020],"tokens":[980,935]}

``offset`` is that of the request's line in the input. The plan has the file's digest, so that all
workers of the run split in the same way, with no tokenizer of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

from aiflux.core.batch.prompt_split import Split
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import Plan, Shard
from aiflux.errors import RunConflictError
from aiflux.util.files import atomic_write, open_regular, read_error
from aiflux.util.records import from_json, to_json

_DIGEST_BYTES = 16


def splits_digest(offsets: Sequence[int], splits: Sequence[Split]) -> str:
    """Return the digest of the file with these splits."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for line in _lines(offsets, splits):
        digest.update(line)
    return digest.hexdigest()


def write_splits(path: Path, offsets: Sequence[int], splits: Sequence[Split]) -> None:
    """Write the file.

    Args:
        offsets: of the requests' lines in the input.

    Raises:
        StorageError: it cannot be written.
    """
    with atomic_write(path, 0o600) as file:
        file.writelines(_lines(offsets, splits))


def _lines(offsets: Sequence[int], splits: Sequence[Split]) -> Iterator[bytes]:
    for offset, split in zip(offsets, splits, strict=True):
        content = {"offset": offset, **to_json(split)}
        yield json.dumps(content, separators=(",", ":")).encode() + b"\n"


def read_splits(plan: Plan, run: RunDirectory, shard: Shard) -> dict[int, Split]:
    """Return the splits of a shard's requests, by the offsets of their lines.

    Raises:
        RunConflictError: the file is missing, or is not the plan's.
        StorageError: it cannot be read.
    """
    if plan.long_prompts is None or not plan.long_prompts.splits:
        return {}
    digest = blake2b(digest_size=_DIGEST_BYTES)
    found = {}
    try:
        with open(run.splits, "rb", opener=open_regular) as file:
            for line in file:
                digest.update(line)
                content = json.loads(line)
                if shard.start <= content["offset"] < shard.end:
                    found[content["offset"]] = from_json(Split, content)
    except FileNotFoundError:
        raise _other(run, "is missing") from None
    except OSError as error:
        raise read_error(error, run.splits) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _other(run, f"is damaged: {error!r}") from error
    if digest.hexdigest() != plan.long_prompts.splits:
        raise _other(run, "is not that of the plan")
    return found


def _other(run: RunDirectory, what: str) -> RunConflictError:
    return RunConflictError(
        f"the file {run.splits} {what}",
        "run the same `aiflux run` command again: it writes it, and sends only what is missing",
    )
