"""The input as a whole, checked before anything is queued."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from aiflux.core.batch.digest import InputDigest, LineDigest, beside
from aiflux.core.batch.request import custom_id_of
from aiflux.core.batch.scan import LENGTH_STEP, Mark, Part, Whole, scan_part
from aiflux.errors import InputError
from aiflux.util.lines import cut_at_lines, line_numbers, read_lines, unreadable
from aiflux.util.parallel import helpers, share_out

PART_BYTES = 32 << 20


@dataclass(frozen=True)
class InputSummary:
    """What one pass over the input tells.

    Attributes:
        path: absolute path.
        size: bytes.
        modified: when it was last written, in nanoseconds.
        requests: number of requests.
        digest: BLAKE2b-128 of the request lines, hex; it ignores blank lines and line endings.
        models: models that bodies name, in order of first appearance.
        unnamed: number of requests whose body names no model.
        endpoints: number of requests for each url.
        context_tokens: estimated tokens (prompt + answer) that 99 % of the requests stay under.
        longest_tokens: the same for the longest request.
        mean_tokens: the same on average.
        ignored: fields that Ollama ignores: for each the number of ``requests`` that set it, and
            the ``lines`` of the first ones.
        marks: places to cut at, thinned out in large inputs.
    """

    path: Path
    size: int
    modified: int
    requests: int
    digest: str
    models: tuple[str, ...]
    unnamed: int
    endpoints: dict[str, int]
    context_tokens: int
    longest_tokens: int
    mean_tokens: int
    ignored: dict[str, dict[str, Any]]
    marks: tuple[Mark, ...]


def scan_input(
    path: Path,
    model: str | None = None,
    *,
    schemas: bool = False,
    part_bytes: int = PART_BYTES,
    children: int | None = None,
) -> InputSummary:
    """Check the whole input in bounded memory, on several cores where it is large.

    Args:
        path: the input file.
        model: the run's model, if it is named outside the input.
        schemas: check the JSON Schemas that requests ask for, too.
        part_bytes: the input is checked in parts of about this size.
        children: processes that share an input of several parts; None takes as many as is safe.

    Raises:
        InputError: the file cannot be read, is empty, or has bad lines; ``problems`` lists them.
    """
    path = path.expanduser().absolute()
    check_readable(path)
    try:
        before = path.stat()
        parts = cut_at_lines(path, part_bytes)
        children = children if children is not None else helpers() if len(parts) > 1 else 0
        work = partial(_scan_part, path, model, schemas)
        whole, digest = _scan(path, parts, work, children)
        _check_names(path, whole)
        if whole.problems.lines:
            raise whole.problems.error(path)
        if _moment(path.stat()) != _moment(before):
            raise InputError(
                f"the input {str(path)!r} was written to while it was checked",
                "run the same command again when the file is complete",
            )
        if not whole.requests:
            raise InputError(
                f"the input {str(path)!r} holds no request", "give it one JSON object per line"
            )
        return _summary(path, whole, digest, before)
    except OSError as error:
        raise unreadable(path, error) from error


def _moment(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _scan(
    path: Path,
    parts: Sequence[tuple[int, int]],
    work: Callable[[tuple[int, int]], Part],
    children: int,
) -> tuple[Whole, str]:
    """Return what the parts tell together, and the digest."""
    whole, digest = Whole(), InputDigest(path)
    with ExitStack() as stack:
        # A process that forks has no threads; with children at work it needs none.
        add = digest.add if children else stack.enter_context(beside(digest.add))
        for part in stack.enter_context(closing(share_out(work, parts, children))):
            whole.add(part)
            add(part.start, part.end, part.plain)
    return whole, digest.hexdigest()


def _scan_part(path: Path, model: str | None, schemas: bool, part: tuple[int, int]) -> Part:
    return scan_part(path, *part, model, schemas=schemas)


def _summary(path: Path, whole: Whole, digest: str, stat: os.stat_result) -> InputSummary:
    return InputSummary(
        path=path,
        size=stat.st_size,
        modified=stat.st_mtime_ns,
        requests=whole.requests,
        digest=digest,
        models=tuple(whole.models),
        unnamed=whole.unnamed,
        endpoints=dict(whole.endpoints),
        context_tokens=whole.percentile(0.99),
        longest_tokens=max(whole.lengths) * LENGTH_STEP,
        mean_tokens=whole.mean_tokens,
        ignored={
            name: {
                "requests": whole.ignored.counts[name],
                "lines": line_numbers(path, whole.ignored.offsets[name]),
            }
            for name in sorted(whole.ignored.counts)
        },
        marks=whole.marks,
    )


def _check_names(path: Path, whole: Whole) -> None:
    """Find the lines of repeated custom_ids in a second pass, only where there are any."""
    repeated = whole.names.repeated()
    if not repeated:
        return
    first: dict[str, int] = {}
    for number, offset, raw in read_lines(path):
        custom_id = custom_id_of(raw)
        if custom_id is None or hash(custom_id) not in repeated:
            continue
        if custom_id in first:
            whole.problems.add(
                offset,
                f"custom_id {custom_id!r} was used on line {first[custom_id]} already; "
                "give every request a unique name",
            )
        else:
            first[custom_id] = number


def check_readable(path: Path) -> None:
    """Raise InputError unless ``path`` is a file that can be read more than once."""
    if not path.exists():
        raise InputError(f"the input {str(path)!r} is not there", "check the path")
    if path.is_dir():
        raise InputError(
            f"the input {str(path)!r} is a directory",
            "give a .jsonl file; `aiflux convert dir` makes one from a directory",
        )
    if not path.is_file():
        raise InputError(
            f"the input {str(path)!r} is not a regular file",
            "save it to a file: it is read more than once",
        )
    if not os.access(path, os.R_OK):
        raise InputError(
            f"the input {str(path)!r} cannot be read: permission denied", f"chmod u+r {str(path)!r}"
        )


def describe(summary: InputSummary) -> dict[str, Any]:
    """Return the part of a summary that the plan keeps."""
    return {
        "path": str(summary.path),
        "size": summary.size,
        "modified": summary.modified,
        "requests": summary.requests,
        "digest": summary.digest,
        "endpoints": summary.endpoints,
        "context_tokens": summary.context_tokens,
        "longest_tokens": summary.longest_tokens,
        "mean_tokens": summary.mean_tokens,
        **({"ignored": summary.ignored} if summary.ignored else {}),
    }


def looks_unchanged(described: Mapping[str, Any]) -> bool:
    """Tell whether an input has the size and the time of its last change that ``describe`` noted.

    Raises:
        OSError: the file cannot be looked at.
    """
    return _moment(os.stat(described["path"])) == (described["size"], described.get("modified"))


def change_of(described: Mapping[str, Any]) -> str | None:
    """Read an input again; return how it differs from what ``describe`` noted, None if it does not.

    The text continues a sentence that begins with the input's name.

    Raises:
        InputError: the file exists and cannot be read.
    """
    path = Path(described["path"])
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "does not exist any more"
    except OSError as error:
        raise unreadable(path, error) from error
    seen = LineDigest()
    for _, _, raw in read_lines(path):
        seen.add(raw)
    if seen.lines != described["requests"]:
        word = "shorter" if seen.lines < described["requests"] else "longer"
        return (
            f"is {word} than when the run was planned: "
            f"{seen.lines} requests instead of {described['requests']}"
        )
    if seen.hexdigest() != described["digest"]:
        return "was edited or put in another order after the run was planned"
    if size != described["size"]:
        return "has other line endings or blank lines than when the run was planned"
    return None
