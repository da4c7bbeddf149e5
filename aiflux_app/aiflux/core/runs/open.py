"""Open a run: check the input, make the plan, and take over the results of earlier starts."""

from __future__ import annotations

import os
import shutil
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import IO

from aiflux.core.batch.input_file import InputFacts, InputSummary, scan_input
from aiflux.core.batch.prompt_lengths import (
    NOT_SENT,
    TOO_LONG,
    ChooseModel,
    FoundPrompts,
    PromptLimit,
    find_long_prompts,
)
from aiflux.core.batch.request import load_json, request_key
from aiflux.core.batch.results_file import output_paths
from aiflux.core.batch.schema import can_check_schemas
from aiflux.core.config.settings import CHUNK, FAIL, SEND, RunOptions, settings_texts
from aiflux.core.runs.directory import RunDirectory, checked_output
from aiflux.core.runs.input_copy import plain_input
from aiflux.core.runs.journal import (
    JournalReader,
    JournalWriter,
    NewResult,
    ResultIndex,
    journal_lines,
    scan_journal,
)
from aiflux.core.runs.local_process import forget_process, refuse_process
from aiflux.core.runs.output import forget_done, shards_left
from aiflux.core.runs.plan import (
    Plan,
    PlanningKind,
    Shard,
    input_rules,
    make_plan,
    read_plan,
    write_plan,
)
from aiflux.core.runs.splits_file import splits_digest, write_splits
from aiflux.core.runs.status_file import (
    Counts,
    finished_counts,
    keep_sums,
    may_replace,
    read_statuses,
    run_status,
)
from aiflux.errors import (
    ConfigError,
    EngineError,
    ModelError,
    OutputExistsError,
    RunConflictError,
    UsageError,
)
from aiflux.models.name import shown_digest
from aiflux.util.files import (
    absolute,
    fsync_directory,
    is_there,
    read_file,
    refuse_existing,
    remove_leftovers,
    same_file,
    storage_error,
)
from aiflux.util.lease import acquire, refuse_living
from aiflux.util.lines import read_lines
from aiflux.util.text import without_secrets
from aiflux.util.times import utc_now

_LEAST_CONTEXT = 256
"""Tokens: no server is asked about its context if no request can need more."""
ShardCount = Callable[[InputSummary], int]


class ChangedSettingsError(RunConflictError):
    """Results of other models or parameters would mix with those of earlier starts.

    Attributes:
        difference: how they differ, without the name of the run.
    """

    def __init__(self, message: str, remedy: str | None, difference: str) -> None:
        super().__init__(message, remedy)
        self.difference = difference


@dataclass(frozen=True)
class OpenedRun:
    """A run that is ready to be submitted or worked on.

    Attributes:
        resumed: earlier starts left results.
        counts: of a finished run; None otherwise.
        open_shards: the shards to work on; none if only the output is missing.
    """

    plan: Plan
    run: RunDirectory
    resumed: bool
    counts: Counts | None = None
    open_shards: tuple[int, ...] = (0,)

    @property
    def finished(self) -> bool:
        """Whether the run was done before, so that there is nothing to do."""
        return self.counts is not None


@dataclass(frozen=True)
class RunDraft:
    """A run that is checked and planned, but not written.

    Attributes:
        earlier: the plan of earlier starts that left results.
        counts: of a finished run; None otherwise.
        replace: an existing output may be replaced.
        restart: discard the results of earlier starts.
        seen: content of the plan and of the run's status in the run directory.
        long: the prompts that are too long for the context.
    """

    plan: Plan
    run: RunDirectory
    earlier: Plan | None
    counts: Counts | None
    replace: bool = False
    restart: bool = False
    seen: tuple[bytes | None, bytes | None] = (None, None)
    long: FoundPrompts | None = None

    @property
    def finished(self) -> bool:
        """Whether the run was done before, so that there is nothing to do."""
        return self.counts is not None and not self.replace

    def open(self, *, write: bool = True) -> OpenedRun:
        """Write the plan into the run directory.

        Args:
            write: False leaves the disk as it is (a dry run).

        Raises:
            RunConflictError: a process works on the run.
            StorageError: the run directory cannot be written.
        """
        if self.finished:
            return OpenedRun(self.plan, self.run, True, self.counts, ())
        if write:
            _write(self)
        everything = self.restart or not write
        left = range(len(self.plan.shards)) if everything else shards_left(self.plan, self.run)
        resumed = self.earlier is not None and not self.restart
        return OpenedRun(self.plan, self.run, resumed, open_shards=tuple(left))


def draft_run(
    input_path: Path,
    output: Path,
    options: RunOptions,
    models_dir: Path | None,
    kind: PlanningKind,
    *,
    shards: int | ShardCount = 1,
    force: bool = False,
    force_resume: bool = False,
) -> RunDraft:
    """Check the input and the results of earlier starts, and plan the run.

    Nothing is written, except the plain copy of a compressed input (``plain_input``).

    Args:
        models_dir: where models are stored.
        kind: of the engine that the options name.
        shards: their number, or a function that returns it for the input.
        force: replace an existing output; restart a finished run.
        force_resume: resume although model or parameters changed; results then mix.

    Raises:
        InputError: the input is wrong; lists its lines.
        ConfigError: the output's path or the model's name is wrong.
        OutputExistsError: the output exists and this run did not write it; ``force`` is not given.
        ChangedSettingsError: the results of earlier starts have another model or other parameters,
            or the model's files changed.
        RunConflictError: the run directory belongs to another input.
    """
    output = checked_output(output)
    input_path = absolute(input_path)
    refuse_own_input(input_path, output)
    run = RunDirectory.of_output(output)
    run.refuse_foreign()
    # If jsonschema is missing here, the worker checks with its own, or reports what to install.
    schemas = options.validate and can_check_schemas()
    rules = input_rules(kind, options)
    path, source = plain_input(input_path, output)
    summary = scan_input(path, options.model, rules=rules, schemas=schemas, source=source)
    number = shards(summary) if callable(shards) else shards
    plan = make_plan(summary, output, options, models_dir, kind, number)
    plan, long = with_long_prompts(plan, summary, kind, models_dir)
    return replace(draft_of(plan, force=force, force_resume=force_resume), long=long)


def refuse_own_input(input_path: Path, output: Path) -> None:
    """Refuse an output that would replace the input, also through a link.

    Raises:
        ConfigError: they are the same file.
    """
    if any(same_file(input_path, target) for target in output_paths(output)):
        raise ConfigError("input and output are the same file", "name another output")


def refuse_contradiction(*, force: bool, force_resume: bool, retry_failed: bool) -> None:
    """Refuse to start a run over and to keep its results at once.

    Raises:
        UsageError: the options ask for both.
    """
    other = "--force-resume" if force_resume else "--retry-failed" if retry_failed else None
    if force and other is not None:
        unless = "" if force_resume else " (--no-retry-failed, if a file or a variable sets it)"
        raise UsageError(
            f"--force and {other} cannot be combined: one starts a run over, the other resumes it",
            f"give one of them{unless}",
        )


def with_long_prompts(
    plan: Plan, summary: InputSummary, kind: PlanningKind, models_dir: Path | None
) -> tuple[Plan, FoundPrompts | None]:
    """Return a plan with the prompts that are too long; None if all fit, or are sent anyway.

    If a server that AI-Flux does not start cannot count them now, a worker asks it again.

    Args:
        models_dir: where the model of such a server may be stored, too.

    Raises:
        InputError: the model's tokenizer counted prompts that are too long, and the run is to fail
            then; they are to be split and cannot be; or the input cannot be read.
    """
    what = plan.options.too_long
    longest = summary.longest_line + max(summary.longest_answer, plan.options.max_tokens or 0)
    if what == SEND or (not kind.stores_models and longest <= _LEAST_CONTEXT):
        return plan, None
    asked = replace(plan, models_dir=models_dir)
    limits = {model: kind.prompt_limit(asked, model) for model in plan.models}
    known = {model: limit for model, limit in limits.items() if limit is not None}
    try:
        found = find_in_run(summary, plan, kind, known) if known else None
    except EngineError:
        known, found = {}, None
    later = not kind.stores_models and (
        len(known) < len(limits) or (found is not None and not found.facts.counted)
    )
    plan = replace(plan, lengths_at_start=later)
    if found is None or (later and what == CHUNK):
        return plan, None
    refuse_long(found, plan)
    facts = found.facts
    if what == CHUNK and facts.too_long:
        facts = replace(facts, splits=splits_digest(found.offsets, found.splits))
    return replace(plan, long_prompts=facts), found


def find_in_run(
    facts: InputFacts,
    plan: Plan,
    kind: PlanningKind,
    limits: Mapping[str, PromptLimit],
    span: tuple[int, int | None] = (0, None),
) -> FoundPrompts | None:
    """Return the prompts of a run that are too long, split if they are to be.

    Args:
        facts: of the input.
        limits, span: see ``find_long_prompts``.

    Raises:
        InputError: the input cannot be read.
        EngineError: a server stopped counting.
    """
    splits = plan.options.too_long == CHUNK
    split_with = input_rules(kind, plan.options).defaults if splits else None
    return find_long_prompts(facts, limits, _model_of(plan, kind), split_with=split_with, span=span)


def refuse_long(found: FoundPrompts, plan: Plan) -> None:
    """Refuse prompts that are too long, unless they are left out or split.

    Raises:
        InputError: the run is to fail then, or they are to be split and cannot be.
    """
    facts, what, given = found.facts, plan.options.too_long, plan.input
    if not facts.too_long:
        return
    if what == FAIL and facts.counted:
        raise facts.error(given.named)
    if what == CHUNK and not facts.counted:
        raise facts.uncounted_error(given.named)
    if what == CHUNK and found.whole:
        raise found.unsplit_error(given.path, given.named)


def _model_of(plan: Plan, kind: PlanningKind) -> ChooseModel:
    """Return the function that finds the run's model for the model that a request names."""

    def choose(named: str | None) -> str | None:
        if len(plan.models) == 1:
            return plan.models[0]
        accepts = kind.input_rules.accepts_model
        fits = (model for model in plan.models if named and accepts(model, named))
        return named if named in plan.models else next(fits, None)

    return choose


def draft_of(plan: Plan, *, force: bool = False, force_resume: bool = False) -> RunDraft:
    """Check whether a plan fits the results of earlier starts and the output; see `draft_run`.

    Raises:
        OutputExistsError, RunConflictError: it does not.
    """
    run, options = RunDirectory.of_output(plan.output), plan.options
    seen = _seen(run)
    earlier = _earlier(run, plan)
    changed = None if earlier is None or force_resume else _changed_settings(earlier, plan)
    if changed is not None and not force:
        raise changed
    counts = None
    if earlier is not None:
        counts = finished_counts(earlier if changed else plan, run, changed_ok=force)
    if counts is not None and not force and not options.retry_failed:
        return RunDraft(plan, run, earlier, counts)
    replace = force or counts is not None or (earlier is not None and may_replace(plan, run))
    if not replace:
        try:
            refuse_existing(*output_paths(plan.output))
        except OutputExistsError as error:
            if earlier is None or finished_counts(earlier, run) is None:
                raise
            raise OutputExistsError(
                f"the input has changed since {plan.output} was written",
                "--force sends the new and changed requests only, keeps the other answers and "
                "writes the output again; or choose another output",
            ) from error
    restart = counts is not None and not options.retry_failed
    if earlier is not None and not (restart or force_resume):
        if changed is not None:
            raise changed
        _refuse_changed_models(earlier, plan)
    kept = plan if earlier is None or restart else plan.after(earlier)
    return RunDraft(kept, run, earlier, counts, replace, restart, seen)


def _write(draft: RunDraft) -> None:
    """Bring the run directory in line with the plan, while no process works on it.

    The draft holds only for the files that it saw: another command may have planned the run since,
    or even finished it.
    """
    plan, run, earlier = draft.plan, draft.run, draft.earlier
    run.make()
    with acquire(run.plan_lease, f"the run {plan.output}"):
        leases = [*run.path.glob(".shard-*.lease"), run.merge_lease]
        refuse_living(leases, f"the run {plan.output}")
        refuse_process(run)
        if _seen(run) != draft.seen:
            raise _begun_meanwhile(plan, run)
        forget_process(run)
        mend_journals(run)
        _remove_leftovers(draft)
        run.create()
        if draft.restart:
            _restart(run)
        else:
            _settle(plan, run, earlier)
        if draft.long is not None and draft.long.splits:
            write_splits(run.splits, draft.long.offsets, draft.long.splits)
        write_plan(plan, run)
        if plan.left_out and draft.long is not None:
            _leave_out(plan, run, draft.long)
        status = run_status(plan, run)
        status.details.replace = draft.replace and plan.output.exists()
        status.enter("in_progress")


def _leave_out(plan: Plan, run: RunDirectory, long: FoundPrompts) -> None:
    """Record an error for each request whose prompt is too long, so that no worker sends it."""
    for shard in plan.shards:
        first, last = (bisect_left(long.offsets, at) for at in (shard.start, shard.end))
        if first == last:
            continue
        path = run.journal(shard.index)
        index = scan_journal(path)
        with (
            closing(JournalReader(path, index)) as reader,
            closing(JournalWriter(path, save_frequency=1 << 20)) as journal,
        ):
            for at in range(first, last):
                offset = long.offsets[at]
                _, _, raw = next(read_lines(plan.input_path, offset, offset + 1))
                key = request_key(raw)
                before = reader.get(key)
                again = before is not None and before.failed and plan.options.retry_failed
                if before is None or again or before.left_out:
                    result = too_long_result(plan, raw, key, long.tokens[at], long.facts.context)
                    journal.append(result)


def too_long_result(plan: Plan, raw: bytes, key: bytes, tokens: int, context: int) -> NewResult:
    """Return the result of a request that is not sent."""
    entry = load_json(raw)
    message = f"{NOT_SENT}the prompt has {tokens} tokens, and the context {context}"
    named = plan.served_names[0] if len(plan.models) == 1 else entry["body"].get("model")
    return NewResult(
        key=key,
        custom_id=entry["custom_id"],
        status=None,
        metadata={"model": named, "timestamp": utc_now(), "processing_time": 0.0, "attempts": 0},
        error={"code": TOO_LONG, "message": message, "status": None},
        body=b"null",
    )


def _seen(run: RunDirectory) -> tuple[bytes | None, bytes | None]:
    """Return the content that changes whenever a run is planned or ends."""
    return read_file(run.plan), read_file(run.run_status)


def _begun_meanwhile(plan: Plan, run: RunDirectory) -> RunConflictError:
    return RunConflictError(
        f"another command started the run {plan.output} at the same time",
        f"check it with aiflux status {quote(str(run.path))}, or run the same command again",
    )


def _remove_leftovers(draft: RunDraft) -> None:
    """Remove the temporary files of earlier starts that were killed; none is alive now."""
    shards = {*draft.plan.shards, *(draft.earlier.shards if draft.earlier else ())}
    statuses = {draft.run.status(shard.index) for shard in shards}
    remove_leftovers(
        *output_paths(draft.plan.output),
        draft.run.plan,
        draft.run.splits,
        draft.run.run_status,
        *statuses,
    )


def _settle(plan: Plan, run: RunDirectory, earlier: Plan | None) -> None:
    """Bring journals and statuses in line with the plan.

    The statuses of shards to work on are replaced, except for their sums over earlier starts: what
    those took belongs to the run, whether or not their results count.
    """
    known = read_statuses(run)
    replaced = list(plan.shards)
    if earlier is not None:
        several = max(len(earlier.shards), len(plan.shards)) > 1
        # A moved line can be in another shard, although the shards' boundaries are the same.
        same = (earlier.shards, earlier.input.digest) == (plan.shards, plan.input.digest)
        if several and not same:
            recut_journals(plan, run)
        elif earlier.id == plan.id:
            again = plan.options.retry_failed
            replaced = [
                shard
                for shard in plan.shards
                if again and shard.index in known and known[shard.index].counts.failed
            ]
    gone = [known[index] for index in known if index >= len(plan.shards)]
    for shard in replaced:
        forget_done(plan, run, shard.index)
        own = [known[shard.index]] if shard.index in known else []
        before = own + (gone if shard.index == 0 else [])
        if before or earlier is not None:
            keep_sums(plan, run, *_kept(plan, run, shard), shard.index, before)
    for index in known.keys() - {shard.index for shard in plan.shards}:
        _forget_status(run, index)


def _forget_status(run: RunDirectory, shard: int) -> None:
    path = run.status(shard)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, path) from error


def _kept(plan: Plan, run: RunDirectory, shard: Shard) -> tuple[Counts, int]:
    """Return the counts of a shard's results that are kept, and how many of them were left out."""
    path = run.journal(shard.index)
    index = scan_journal(path)
    counts, left_out = Counter[bool](), 0
    with closing(JournalReader(path, index)) as reader:
        for _, _, raw in read_lines(plan.input_path, shard.start, shard.end) if index.done else ():
            key = request_key(raw)
            found = index.find(key)
            result = reader.get(key) if found is not None and found[2] else None
            if result is not None and result.left_out:
                left_out += plan.keeps_left_out
            elif found is not None:
                counts[found[2]] += 1
    failed = 0 if plan.options.retry_failed else counts[True]
    return Counts(shard.requests, counts[False], failed + left_out), left_out


def _earlier(run: RunDirectory, plan: Plan) -> Plan | None:
    """Return the plan of earlier starts that left results; refuse another run's directory."""
    if not is_there(run.plan):
        if not run.unused():
            # Another start may be writing its plan, or have written it by now.
            refuse_living([run.plan_lease], f"the run {plan.output}")
            if is_there(run.plan):
                raise _begun_meanwhile(plan, run)
            raise RunConflictError(
                f"{run.path} exists but contains no plan",
                f"move it away (mv {quote(str(run.path))} ELSEWHERE), or choose another output",
            )
        return None
    earlier = read_plan(run)
    before, now = earlier.input_path, plan.input_path
    if before != now and not same_file(before, now):
        raise RunConflictError(
            f"{run.path} belongs to the input {before}, not {now}",
            f"choose another output, or move that run away: mv {quote(str(run.path))} ELSEWHERE",
        )
    if not any(path.stat().st_size for path in run.path.glob("journal*/*.jsonl")):
        return None
    return earlier


def _changed_settings(earlier: Plan, plan: Plan) -> ChangedSettingsError | None:
    """Return the error if results of different models or parameters would mix."""
    if earlier.identity == plan.identity:
        return None
    before, now = _show(earlier), _show(plan)
    return ChangedSettingsError(
        f"{RunDirectory.of_output(plan.output).path} was started with {before}; this run has {now}",
        "choose another output, or mix with the results so far: --force-resume",
        f"begun with {before}; this command has {now}",
    )


def _refuse_changed_models(earlier: Plan, plan: Plan) -> None:
    """Refuse to mix the results of two versions of a model."""
    for name, served in zip(plan.models, plan.served_names, strict=True):
        if served in earlier.served_names:
            before = earlier.models[earlier.served_names.index(served)]
            try:
                earlier.refuse_changed_model(before, plan.digest(name))
            except ModelError as error:
                raise ChangedSettingsError(error.message, error.remedy, error.message) from error


def _show(plan: Plan) -> str:
    given = [f"{name} {value}" for name, value in plan.options.parameters.items()]
    advised = [
        f"{name} {value}"
        for values in plan.options.advised.values()
        for name, value in values.items()
    ]
    else_ = f"model defaults {', '.join(advised)}" if advised else "else the engine's defaults"
    given += settings_texts(plan.options.engine_settings)
    given += [
        f"--lora {each.name}={each.path} ({shown_digest(each.digest)})" for each in plan.adapters
    ]
    models = ", ".join([*plan.served_names, *given, else_])
    command = plan.options.engine_command
    engine = (
        plan.options.engine
        if command is None
        else f"{plan.options.engine} ({without_secrets(command)})"
    )
    return f"engine {engine}, model {models}"


def _restart(run: RunDirectory) -> None:
    try:
        for name in ("journal", "status"):
            shutil.rmtree(run.path / name)
        run.create()
    except OSError as error:
        raise storage_error(error, run.path) from error


# Login nodes allow few file descriptors (1024): journals are written in groups.
_OPEN_AT_ONCE = 256


def recut_journals(plan: Plan, run: RunDirectory) -> None:
    """Move every result to the journal of the shard that now contains its request.

    Results of lines that the input no longer contains go to the first shard: if such a line comes
    back, they count again. A crash at any time leaves either the old or the new journals complete.

    Raises:
        StorageError: writing failed; the old journals are unchanged.
    """
    journals = run.path / "journal"
    fresh, old = run.path / "journal.new", run.path / "journal.old"
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        places = _places(plan)
        for start in range(0, len(plan.shards), _OPEN_AT_ONCE):
            _write_group(journals, fresh, places, range(start, start + _OPEN_AT_ONCE))
        fsync_directory(fresh)
        shutil.rmtree(run.path / "status", ignore_errors=True)
        (run.path / "status").mkdir(mode=0o700)
        journals.rename(old)
        fresh.rename(journals)
        fsync_directory(run.path)
        shutil.rmtree(old)
    except OSError as error:
        raise storage_error(error, run.path) from error


def mend_journals(run: RunDirectory) -> None:
    """Finish or undo a ``recut_journals`` that a crash interrupted."""
    journals = run.path / "journal"
    fresh, old = run.path / "journal.new", run.path / "journal.old"
    try:
        if old.exists() and not journals.exists():
            fresh.rename(journals)
        for path in (fresh, old):
            if path.exists():
                shutil.rmtree(path)
    except OSError as error:
        raise storage_error(error, run.path) from error


def _places(plan: Plan) -> ResultIndex:
    """Return an index with a request's shard in place of the offset."""
    places = ResultIndex()
    for shard in plan.shards:
        for _, _, raw in read_lines(plan.input_path, shard.start, shard.end):
            places.add(request_key(raw), shard.index, 0, False)
    places.seal()
    return places


def _write_group(source: Path, target: Path, places: ResultIndex, shards: range) -> None:
    with ExitStack() as stack:
        files: dict[int, IO[bytes]] = {}
        for key, line in _all_lines(source):
            found = places.find(key)
            shard = 0 if found is None else found[0]
            if shard not in shards:
                continue
            if shard not in files:
                path = target / f"shard-{shard:04d}.jsonl"
                files[shard] = stack.enter_context(open(path, "ab"))
            files[shard].write(line)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())


def _all_lines(source: Path) -> Iterator[tuple[bytes, bytes]]:
    for path in sorted(source.glob("shard-*.jsonl")):
        yield from journal_lines(path)
