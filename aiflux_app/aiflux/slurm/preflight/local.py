"""Find problems that this machine can detect before a job is submitted.

Every check returns findings and raises nothing, so that all of them are reported together. Unknown
facts are not findings, such as disk quotas, and whether a compute node has network access.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from aiflux.core.batch.request import adapted_text, ignored_texts
from aiflux.core.runs.plan import Plan, input_rules
from aiflux.engines.base import EngineKind
from aiflux.engines.kinds import engine_kind
from aiflux.errors import (
    AifluxError,
    ImageError,
    InputError,
    ModelError,
    PreflightError,
    UsageError,
)
from aiflux.image.sif import (
    ImageFacts,
    how_to_build,
    machine_arch,
    older_version,
    own_image,
    refuse_other_engine,
    refuse_other_vendor,
    refuse_other_version,
)
from aiflux.util.files import may_write
from aiflux.util.text import counted, size_text

Level = Literal["error", "warning"]

_COPIES = 3
"""Journal and output both contain the answers; the output also contains the requests."""
_BYTES_PER_REQUEST = 4096


@dataclass(frozen=True)
class Finding:
    """A problem (an error) or a possible problem (a warning), and its fix.

    Attributes:
        error: the original error, if any; raised unchanged if it is the only problem.
    """

    level: Level
    what: str
    fix: str
    error: AifluxError | None = field(default=None, compare=False, repr=False)


Check = Callable[[], Iterable[Finding]]


def collect(checks: Iterable[Check]) -> tuple[Finding, ...]:
    """Run all checks; return the errors, then the warnings."""
    found = [finding for check in checks for finding in check()]
    return tuple(sorted(found, key=lambda finding: finding.level != "error"))


def refuse(findings: Iterable[Finding]) -> None:
    """Raise an error unless all findings are warnings.

    Raises:
        PreflightError: lists every error with its fix.
    """
    errors = [finding for finding in findings if finding.level == "error"]
    if len(errors) == 1 and errors[0].error is not None:
        raise errors[0].error
    if len(errors) == 1:
        raise PreflightError(errors[0].what, errors[0].fix)
    if errors:
        raise _all_of(errors)


def _all_of(errors: Sequence[Finding]) -> PreflightError:
    return PreflightError(
        f"{len(errors)} problems found; no job was submitted",
        "fix them, or skip the checks with --no-preflight",
        tuple(
            f"{number}. {finding_text(finding)}" for number, finding in enumerate(errors, start=1)
        ),
    )


def problem_with(error: InputError, findings: Iterable[Finding]) -> UsageError:
    """Return one error with a wrong input and all findings."""
    others = [finding for finding in findings if finding.level == "error"]
    if not others:
        return error
    lines = "".join(f"\n     {problem}" for problem in error.problems)
    every = [Finding("error", error.message + lines, error.remedy or ""), *others]
    return _all_of(every)


def finding_text(finding: Finding) -> str:
    """Return the text of a finding, with the fix on its own line."""
    return f"{finding.what}\n     -> {finding.fix}"


def finding_of(error: AifluxError) -> Finding:
    """Return an error as a finding."""
    return Finding("error", error.message, error.remedy or "", error)


def check_image(
    path: Path,
    machines: Collection[str],
    kind: EngineKind,
    *,
    certain: bool,
    wants_gpus: bool,
    allow_cpu: bool,
    vendor: str | None = None,
) -> Iterator[Finding]:
    """Check that the image is readable, of this version, fits the machines and can use its GPUs.

    Args:
        kind: of the run's engine, which the image must contain.
        machines: architectures (``uname -m``) of the possible nodes.
        certain: whether they are from Slurm. Otherwise they are assumed to be like this machine,
            which ``--constraint`` can change: a mismatch is then a warning.
        vendor: that of the job's GPUs; None if unknown.
    """
    try:
        image = own_image(path)
        refuse_other_version(image)
        if kind.program:
            refuse_other_engine(image, kind.name, kind.title)
        if wants_gpus and vendor is not None and not allow_cpu:
            refuse_other_vendor(image, vendor)
    except ImageError as error:
        yield finding_of(error)
        return
    older = older_version(image)
    if older is not None:
        yield Finding("warning", *older)
    yield from _check_architecture(image, machines, certain)
    if image.cpu_only and wants_gpus and not allow_cpu:
        yield Finding(
            "error",
            f"the image {path} has a CPU build of {kind.title}, but the job requests GPUs",
            f"{how_to_build('BASE=docker')}, which can use them; or run on the CPU: "
            "--gpus-per-node 0, or --allow-cpu",
        )


def _check_architecture(
    image: ImageFacts, machines: Collection[str], certain: bool
) -> Iterator[Finding]:
    nodes = {machine_arch(machine) for machine in machines}
    if image.arch is None or not nodes or nodes == {image.arch}:
        return
    names = " and ".join(sorted(nodes))
    if image.arch in nodes:
        yield Finding(
            "warning",
            f"the image {image.path} is for {image.arch}; the nodes are {names}",
            "select a partition, or a feature of such nodes: --constraint NAME",
        )
        return
    yield Finding(
        "error" if certain else "warning",
        f"the image {image.path} is for {image.arch}, and the nodes are {names}",
        "build an image on such a machine, and use it with --image FILE",
    )


def check_models(
    plan: Plan, misspelt: Collection[str] = (), *, local: bool = False
) -> Iterator[Finding]:
    """Check that the models are stored, or that the job can pull them.

    Args:
        misspelt: names that were reported already.
        local: this machine processes the run instead of a job.
    """
    puller = "the run" if local else "the job"
    folder = plan.models_dir
    if folder is None:
        return
    if os.path.exists(folder) and not os.access(folder, os.R_OK | os.X_OK):
        yield Finding(
            "error",
            f"the models directory {folder} cannot be read",
            "fix its permissions, or use another: --models-dir PATH",
        )
        return
    kind = engine_kind(plan.options)
    absent = []
    for model in plan.models:
        if model in misspelt:
            continue
        try:
            kind.refuse_model(folder, model)
            if kind.is_stored(folder, model):
                continue
        except ModelError as error:
            yield finding_of(error)
            continue
        missing = kind.absent_model(folder, model)
        if missing is not None:
            yield finding_of(missing)
            continue
        name = plan.served(model)
        absent.append(name)
        yield Finding(
            "warning",
            f"{name} is not (completely) in {folder}: {puller} pulls it first, which needs "
            f"the network{'' if local else ' on the compute node'}",
            f"pull it on a machine with internet access: aiflux models pull {model}",
        )
    if absent and not may_write(folder):
        yield Finding(
            "error",
            f"{puller} cannot pull {absent[0]} into {folder}: you cannot write there",
            "ask its owner to pull it, or use your own directory: --models-dir PATH",
        )


def check_fields(plan: Plan) -> Iterator[Finding]:
    """Warn of ignored fields, adapted requests, long prompts and doubtful adapters."""
    kind = engine_kind(plan.options)
    yield from check_lengths(plan)
    rules = input_rules(kind, plan.options).ignored_fields
    for text, fix in ignored_texts(plan.input.ignored, kind.title, rules):
        yield Finding("warning", text, fix)
    if plan.input.adapted:
        yield Finding(
            "warning", adapted_text(plan.input.adapted), "the results keep the requests unchanged"
        )
    for adapter in plan.adapters:
        base, model = (name.rstrip("/").rpartition("/")[2] for name in (
            adapter.base, plan.served_names[0]))  # fmt: skip
        if base and base.lower() != model.lower():
            yield Finding(
                "warning",
                f"the adapter {adapter.name} was made for {adapter.base}, and the run's model is "
                f"{plan.served_names[0]}",
                "check that they are the same model",
            )


def check_lengths(plan: Plan) -> Iterator[Finding]:
    """Warn of prompts that do not fit the context, and of a context that the model lacks."""
    kind = engine_kind(plan.options)
    for text, fix in (*_long_prompts(plan, kind), *_longer_contexts(plan, kind)):
        yield Finding("warning", text, fix)


def _long_prompts(plan: Plan, kind: EngineKind) -> Iterator[tuple[str, str]]:
    """Yield warnings of prompts that are too long, or leave little of the context."""
    long = plan.long_prompts
    if long is None:
        return
    context = f"the context of {long.context:,} tokens"
    larger = [f"use {long.longer_context}"] if long.longer_context else []
    if long.too_long and not long.counted:
        how = f"; to count them: {long.remedy}" if long.remedy else ""
        yield (
            f"about {counted(long.too_long, 'prompt')} may be too long for {context} "
            f"({long.where}): the longest may have {long.longest:,}",
            f"this is an estimate, because {long.uncounted}{how}",
        )
    elif long.parts:
        verb = "is" if long.too_long == 1 else "are"
        yield (
            f"{counted(long.too_long, 'request')} {verb} sent in {long.parts:,} parts (--too-long "
            f"chunk): too long for {context} ({long.where})",
            "; or ".join(["the answers to the parts of each are joined", *larger]),
        )
    elif long.too_long:
        yield (
            f"{counted(long.too_long, 'request')} will not be sent (--too-long skip): too long for "
            f"{context} ({long.where})",
            "; or ".join(["each of their results has the error too_long", *larger]),
        )
    if long.tight:
        about = "" if long.counted else "about "
        yield (
            f"{about}{counted(long.tight, 'prompt')} and max_tokens together exceed {context}: "
            f"{kind.without_room}",
            "; or ".join([*larger, "set a smaller max_tokens"]),
        )


def _longer_contexts(plan: Plan, kind: EngineKind) -> Iterator[tuple[str, str]]:
    """Yield a warning of a context that is longer than a model's."""
    wanted = plan.options.context_length
    # Of a server with models of its own, it says what the context is, and is not passed on.
    for model in plan.models if wanted is not None and kind.stores_models else ():
        limit = kind.prompt_limit(plan, model)
        if limit is not None and 0 < limit.maximum < (wanted or 0):
            reduced = limit.context < (wanted or 0)
            yield (
                f"{plan.served(model)} has a context of {limit.maximum:,} tokens, but "
                f"context_length is {wanted:,}: {kind.title} "
                f"{'reduces it' if reduced else 'may refuse to start'}",
                f"use --context-length {limit.maximum} at most, or leave it out",
            )


def check_space(plan: Plan) -> Iterator[Finding]:
    """Check the disk space for the output and the journal.

    Their size is unknown before the answers: less than the input is certainly too small; three
    times the input and 4 KB for each answer are assumed to be enough.
    """
    folder = plan.output.parent
    if not may_write(folder):
        yield Finding(
            "error", f"you cannot write to {folder}", "choose another directory: --output FILE"
        )
        return
    free = shutil.disk_usage(folder).free
    size = plan.input.size
    answers = plan.requests * (plan.options.samples or 1)
    wanted = _COPIES * size + _BYTES_PER_REQUEST * answers
    if free < wanted:
        yield Finding(
            "error" if free < size else "warning",
            f"{folder} has {size_text(free)} free; output and journal of this run can need about "
            f"{size_text(wanted)}",
            "free space, or choose another file system: --output FILE",
        )
