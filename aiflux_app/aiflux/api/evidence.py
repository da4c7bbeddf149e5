"""The evidence of a finished run: what ran on which data, and whether anything could leave."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from aiflux import __version__
from aiflux.core.batch.input_file import change_of
from aiflux.core.batch.results_file import output_paths
from aiflux.core.runs.directory import RunDirectory, user_output
from aiflux.core.runs.journal import is_part, journal_lines, split_line
from aiflux.core.runs.plan import Plan, read_plan
from aiflux.core.runs.status_file import (
    UNRECORDED,
    Seal,
    StatusDetails,
    StatusFile,
    finished_counts,
    read_run_status,
    read_status,
    refuse_lost_output,
    seal_of,
    whole_seal,
)
from aiflux.engines.kinds import engine_kind
from aiflux.errors import ConfigError, ImageError, InputError, OutputExistsError, UsageError
from aiflux.estimates.verification import (
    digests_of,
    mixed_words,
    read_verification,
    results_by_model,
)
from aiflux.image.sif import read_image
from aiflux.image.signing import signature
from aiflux.report.build import earlier_settings
from aiflux.slurm.jobs import known_submissions
from aiflux.util.files import (
    atomic_write,
    checksum,
    expanded,
    file_digest,
    is_there,
    open_regular,
    read_error,
    storage_error,
    temporary_folder,
)
from aiflux.util.records import to_json
from aiflux.util.text import counted, json_text, public_url, without_secrets
from aiflux.util.times import utc_text

FORM = 1
NAMESPACE = "aiflux-evidence"
"""What the signature is for, as ``ssh-keygen -Y`` calls it."""
SIGNATURE_SUFFIX = ".sig"
_PRIVATE = b"-----BEGIN "
_CREATE_KEY = "create one: ssh-keygen -t ed25519 -f KEY"


@dataclass(frozen=True)
class HashedFile:
    """A file, with its size and its SHA-256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SealCheck:
    """The seal of one shard, as its worker checked it at each start.

    Attributes:
        starts, sealed_starts: number of starts, and of those whose check found no network.
        sealed: whether all were; None if that was not recorded.
        why: why a start had a network, or why that is unknown; "" if none had one.
    """

    shard: int
    host: str | None
    job: str | None
    starts: int
    sealed_starts: int
    sealed: bool | None
    why: str


@dataclass(frozen=True)
class ImageEvidence:
    """The image file, as it is now.

    Attributes:
        same_id: whether it has the id that the workers noted; None if they noted none. Only the
            signature covers the content.
        signature: ``verified``, ``unsigned``, ``unknown key``, ``broken``, or ``not checked``.
        signature_text: the same in words, with the signer, or why it was not checked.
        content: what the workers read in the image: versions and digests.
    """

    path: str
    sha256: str | None
    same_id: bool | None
    signature: str
    signature_text: str
    content: Mapping[str, Any] | None


def make_evidence(run: RunDirectory) -> dict[str, Any]:
    """Return the record of a finished run.

    Raises:
        UsageError: the run is not finished, or its output is missing.
        OutputExistsError: its output was changed since it was written.
        InputError: its input was changed since it was planned, or is missing.
        StoppedError: the journals do not have all results.
        StorageError: a file cannot be read.
    """
    run.refuse_foreign()
    plan = read_plan(run)
    counts = finished_counts(plan, run)
    whole = read_run_status(run, plan)
    if counts is None or whole is None:
        refuse_lost_output(plan, run)
        raise UsageError(
            f"the run {user_output(plan.output)} is not finished, so there is no evidence of it",
            f"see aiflux status {quote(str(user_output(plan.output)))}",
        )
    change = change_of(plan.input)
    if change is not None:
        raise InputError(
            f"the input {plan.input.named} {change}",
            "restore the file that the run was planned with: the evidence is about that file",
        )
    statuses = [read_status(run, shard.index, plan) for shard in plan.shards]
    details = [status.details for status in statuses if status is not None]
    checks = [_seal_check(shard.index, status) for shard, status
              in zip(plan.shards, statuses, strict=True)]  # fmt: skip
    seal = _seal(plan, run, details)
    options = plan.options
    accepts = engine_kind(options).input_rules.accepts_model
    models = results_by_model(plan, run, accepts)
    return {
        "form": FORM,
        "kind": NAMESPACE,
        "written": utc_text(time.time()),
        "version": __version__,
        "run": {
            "plan": plan.id,
            "planned": plan.created,
            "finished": None if whole.finished_at is None else utc_text(whole.finished_at),
            "requests": to_json(counts),
            "shards": len(plan.shards),
            "jobs": _jobs(run),
            "hosts": sorted({each.host for each in details if each.host}),
        },
        "input": {
            **to_json(_hashed(plan.input_path)),
            "given": str(plan.input.named),
            "blake2b_of_lines": plan.input.digest,
        },
        "output": _outputs(plan, whole),
        "models": [
            {
                "name": each.name,
                "results": each.results,
                "digests": each.digests or _other_digests(plan, each.name, details),
            }
            for each in models
        ],
        "mixed": mixed_words(plan, models) or None,
        "earlier": earlier_settings(plan),
        "adapters": plan.adapter_digests,
        "parameters": options.parameters,
        "engine": {
            "kind": options.engine,
            "versions": sorted({e.version for d in details for e in d.engines if e.version}),
            "address": None if options.engine_url is None else public_url(options.engine_url),
            "settings": without_secrets(plan.engine_settings),
        },
        "aiflux": sorted({each.version for each in details if each.version}),
        "image": _image(run, details),
        "seal": {"sealed": seal.sealed, "checks": [to_json(check) for check in checks]},
        "egress": egress_statement(seal, engine_here=engine_kind(options).managed),
        "verification": read_verification(plan),
    }


def _other_digests(plan: Plan, name: str, details: Sequence[StatusDetails]) -> tuple[str, ...]:
    """Return the digests of a model whose results name none."""
    return digests_of(plan, name, details) if name in plan.models else ()


def _seal(plan: Plan, run: RunDirectory, details: Sequence[StatusDetails]) -> Seal:
    """Return whether every result in the journals is of a sealed start.

    A damaged line may be a result that is not counted, of whatever start.
    """
    results = 0  # that an engine gave
    damaged: list[int] = []
    for shard in plan.shards:
        journal = journal_lines(run.journal(shard.index), damaged.append)
        lines = (line for _, line in journal if not is_part(line))
        results += sum(not split_line(line).left_out for line in lines)
    seal = whole_seal(details, results)
    if seal.sealed and damaged:
        return Seal(None, f"the journals have {counted(len(damaged), 'damaged line')}")
    return seal


def _seal_check(shard: int, status: StatusFile | None) -> SealCheck:
    details = StatusDetails() if status is None else status.details
    totals, seal = details.totals, seal_of(details)
    return SealCheck(
        shard=shard,
        host=details.host,
        job=details.slurm.task or None,
        starts=totals.starts,
        sealed_starts=totals.sealed_starts,
        sealed=seal.sealed,
        why=seal.why,
    )


def egress_statement(seal: Seal, *, engine_here: bool) -> dict[str, Any]:
    """Return what follows from the seal about data that could leave the node.

    Args:
        engine_here: whether AI-Flux started the engine.
    """
    if seal.sealed:
        text = (
            "No egress: each start of each worker found only the loopback interface in the "
            "kernel's routes for IPv4 and IPv6 before it sent a request. Worker and engine shared "
            "that network namespace."
        )
    elif seal.sealed is None:
        text = f"Unknown: {seal.why or UNRECORDED}."
    elif not engine_here:
        text = "Egress was possible: the requests went to an engine elsewhere."
    else:
        text = f"Egress was possible: {seal.why or 'a start had a network'}."
    possible = None if seal.sealed is None else not seal.sealed
    return {"possible": possible, "statement": text}


def _hashed(path: Path) -> HashedFile:
    try:
        return HashedFile(str(path), path.stat().st_size, file_digest(path))
    except OSError as error:
        raise read_error(error, path) from error


def _outputs(plan: Plan, whole: StatusFile) -> list[dict[str, Any]]:
    """Hash the files of the output; their checksums have to be those that the run noted.

    ``as_written`` is null for a run of an earlier version, which noted none.

    Raises:
        OutputExistsError: one of them was changed.
    """
    merge = whole.details.merge
    noted = {} if merge is None else merge.files
    found = []
    for path in (path for path in output_paths(plan.output) if is_there(path)):
        file, known = _hashed(path), noted.get(path.name)
        if noted and (known is None or (file.bytes, checksum(path)) != (known.bytes, known.crc32)):
            raise OutputExistsError(
                f"{path} is not the file that the run wrote",
                f"restore it from the journal: aiflux merge --again {quote(str(plan.output))}",
            )
        found.append({**to_json(file), "as_written": True if noted else None})
    return found


def _jobs(run: RunDirectory) -> list[str]:
    submissions = known_submissions(run)
    if submissions is None:
        return []
    return [task for each in submissions.submissions for job in each.jobs for task in job.tasks]


def _image(run: RunDirectory, details: Sequence[StatusDetails]) -> dict[str, Any] | None:
    """Return the image; None for a run outside one."""
    submissions = known_submissions(run)
    contents = [each.image for each in details if each.image]
    content = contents[-1] if contents else None
    path = None if submissions is None else submissions.image
    if path is None:
        if content is None:
            return None
        why = "not checked: the run has no record of the image's path"
        return to_json(ImageEvidence("", None, None, "not checked", why, content))
    ids = {each.get("id") for each in contents} - {None, ""}
    try:
        digest = file_digest(path)
        own = read_image(path).id
    except FileNotFoundError:
        why = "not checked: the image no longer exists"
        return to_json(ImageEvidence(str(path), None, None, "not checked", why, content))
    except (OSError, ImageError) as error:
        reason = error.message if isinstance(error, ImageError) else error.strerror
        why = f"not checked: the image cannot be read: {reason}"
        return to_json(ImageEvidence(str(path), None, None, "not checked", why, content))
    same = ids == {own} if ids and own else None
    try:
        found = signature(path)
        state, words = str(found.state), found.words
    except ImageError as error:
        state, words = "not checked", f"not checked: {error.message}"
    return to_json(ImageEvidence(str(path), digest, same, state, words, content))


# --- the signature ----------------------------------------------------------------------------


def signature_of(target: Path) -> Path:
    """Return the path of a record's signature."""
    return target.with_name(target.name + SIGNATURE_SUFFIX)


def key_files(key: Path) -> tuple[Path, ...]:
    """Return the files of a key: as it was named, and its public and its private half."""
    return key, key.with_name(f"{key.name}.pub"), key.with_name(key.name.removesuffix(".pub"))


def refuse_key(key: Path) -> None:
    """Refuse a key that cannot sign.

    Raises:
        ConfigError: it, or ssh-keygen, is missing; or it cannot be read, is empty, or others may
            read it.
    """
    if shutil.which("ssh-keygen") is None:
        raise ConfigError(
            "ssh-keygen is not on PATH, so the evidence cannot be signed",
            "install OpenSSH, or write it without a signature: --unsigned",
        )
    try:
        with open(key, "rb", opener=open_regular) as file:
            begin = file.read(len(_PRIVATE))
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    except FileNotFoundError:
        raise ConfigError(f"there is no key {key}", _CREATE_KEY) from None
    except OSError as error:
        raise ConfigError(
            f"the key {key} cannot be read: {error.strerror}",
            "name a private SSH key that you can read, or its public key if an agent has it",
        ) from error
    if not begin:
        raise ConfigError(f"the key {key} is empty", _CREATE_KEY)
    if begin == _PRIVATE and mode & 0o077:
        raise ConfigError(
            f"others may read the key {key} (mode {mode:04o}), so ssh-keygen refuses it",
            f"chmod 600 {quote(str(key))}",
        )


def write_evidence(content: Mapping[str, Any], target: Path, key: Path | None) -> Path | None:
    """Write the record, and its signature next to it; return the latter's path.

    Without a key, the signature of an earlier record is removed.

    Raises:
        ConfigError: the key does not sign.
        StorageError: a file cannot be written.
    """
    text = f"{json_text(content, indent=2, only_ascii=True)}\n".encode()
    signature_file = signature_of(target)
    signed = None if key is None else _signed(text, expanded(key))
    try:
        signature_file.unlink(missing_ok=True)  # a signature never stands next to another record
    except OSError as error:
        raise storage_error(error, signature_file) from error
    _write(target, text)
    if signed is None:
        return None
    _write(signature_file, signed)
    return signature_file


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path, 0o600) as file:
        file.write(content)


def _signed(text: bytes, key: Path) -> bytes:
    """Return the signature of a text; ssh-keygen asks for a passphrase on the terminal."""
    with temporary_folder() as folder:
        record = folder / "evidence.json"
        record.write_bytes(text)
        done = subprocess.run(
            ["ssh-keygen", "-Y", "sign", "-f", str(key), "-n", NAMESPACE, str(record)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            errors="replace",
            check=False,
        )
        signed = record.with_name(record.name + SIGNATURE_SUFFIX)
        if done.returncode or not signed.exists():
            words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise ConfigError(
                f"the key {key} does not sign: "
                f"{words[-1] if words else f'ssh-keygen ended with {done.returncode}'}",
                f"try it by hand: ssh-keygen -Y sign -f {quote(str(key))} -n {NAMESPACE} FILE",
            )
        return signed.read_bytes()
