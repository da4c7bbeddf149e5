"""``aiflux verify-run``: ask a sample of a run's requests again, and compare the answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from aiflux.cli.json_output import json_option, print_json
from aiflux.cli.parser import FILE, WholeNumber, command, option, settings_options
from aiflux.cli.pilots import Asked, PlannedPilot, draw, follow, run_pilot
from aiflux.cli.render.run import typed
from aiflux.cli.render.verification import verification_lines
from aiflux.cli.run_argument import make_console, run_argument, show
from aiflux.cli.start import show_unused_settings
from aiflux.core.config.config import Config, SlurmConfig
from aiflux.core.config.settings import CHUNK, SEND, RunOptions, given_settings
from aiflux.core.runs.directory import RunDirectory, user_output
from aiflux.core.runs.plan import Plan, read_plan, refuse_changed_input
from aiflux.core.runs.status_file import (
    Counts,
    StatusDetails,
    finished_counts,
    read_status,
    refuse_lost_output,
)
from aiflux.engines.kinds import engine_kind
from aiflux.errors import ExitCode, ModelError, UsageError
from aiflux.estimates.estimate import SLURM
from aiflux.estimates.pilot import Drawn, Pilot
from aiflux.estimates.verification import (
    SAMPLE,
    SEED,
    SUFFIX,
    Verification,
    Versions,
    digests_of,
    draw_answered,
    refuse_mixed,
    refuse_other_model,
    results_by_model,
    verification_file,
    verification_folder,
    verify,
)
from aiflux.slurm.commands import located
from aiflux.slurm.jobs import known_submissions
from aiflux.util.files import short, write_json

_NOUN = "sample"


@dataclass(frozen=True)
class PlannedSample(PlannedPilot):
    """A finished run, and the sample of its answered requests to ask again."""

    seed: int = SEED

    @property
    def options(self) -> RunOptions:
        """The options of the run; what was sent once is sent again, however long it is."""
        split = self.whole.options.too_long == CHUNK
        return replace(super().options, too_long=CHUNK if split else SEND)

    @property
    def settings(self) -> dict[str, Any]:
        """What the sample depends on; stored with it."""
        return {**super().settings, "seed": self.seed, "planned": self.whole.created}

    def begin(self, first: tuple[Pilot, Drawn] | None = None) -> Drawn:
        """Draw a new sample of the answered requests."""
        run = RunDirectory.of_output(self.whole.output)
        count, seed = self.asked.requests, self.seed
        return self.pilot.begin_with(
            self.settings, lambda target: draw_answered(self.whole, run, count, seed, target)
        )


@command("verify-run", examples=["aiflux verify-run results.json --sample 200"])
@run_argument
@option(
    "--sample",
    type=WholeNumber(1),
    default=SAMPLE,
    metavar="N",
    help=f"Requests to ask again (default: {SAMPLE})",
)
@option(
    "--seed",
    type=WholeNumber(),
    default=SEED,
    metavar="S",
    help=f"Another seed draws another sample (default: {SEED})",
)
@option("--local", is_flag=True, help="Ask on this machine, in the foreground")
@option("--wait", is_flag=True, help="Wait for the job")
@option("--force", is_flag=True, help="Ask the sample again although it was asked before")
@option(
    "--no-preflight",
    is_flag=True,
    rare=True,
    help="Skip the checks of Slurm, image and disk space",
)
@option("--image", metavar="PATH", type=FILE, help="Use another image than the run")
@json_option("Print everything as JSON")
@settings_options("slurm", without=("shards", "max_running"))
def verify_run(run: str, sample: int, seed: int, image: str | None, **more: Any) -> int:
    """Ask a sample of a finished run again, and report the share of identical answers.

    The same models have to give the answers: others are refused. A run of Slurm jobs is verified
    by a job; repeat the command for its result. Answers that were sampled without a seed are
    counted separately, because they may differ.
    """
    directory = located(run)
    directory.refuse_foreign()
    plan = read_plan(directory)
    _refuse_sample(plan)
    counts = _finished(plan, directory)
    _refuse_changed(plan, directory)
    given = {**given_settings(more), "image": image}
    one = _planned(plan, directory, sample, seed, given, more)
    kind, here = engine_kind(plan.options), one.asked.where != SLURM
    show_unused_settings(kind, given_settings(more), local=here)
    draw([one])
    if not one.pilot.done():
        if one.asked.where != SLURM:
            code = run_pilot(one)
            if not one.pilot.done():
                return code or int(ExitCode.STOPPED)
        elif not follow(one, "verification"):
            return 0
    found = verify(plan, directory, read_plan(one.pilot.run), one.pilot.run)
    facts = {"plan": plan.id, "planned": plan.created, "answers": counts.completed, "seed": seed}
    content = {**facts, **found.to_json()}
    write_json(verification_file(plan), content)
    if one.asked.as_json:
        print_json({"verification": content})
    else:
        show(make_console(), [*verification_lines(found, counts.completed, seed)])
    return _code(found)


def _refuse_sample(plan: Plan) -> None:
    """Refuse to verify the sample of a verification.

    Raises:
        UsageError: the run is one.
    """
    folder = plan.output.parent
    whole = folder.with_suffix("")
    if folder.name.endswith(SUFFIX) and Pilot(folder).output == plan.output:
        raise UsageError(
            f"{user_output(folder)} is the sample of a verification, and no run of its own",
            f"verify the run: aiflux verify-run {typed(short(whole))}",
        )


def _code(found: Verification) -> int:
    return int(ExitCode.FAILURES if found.failed else ExitCode.OK)


def _finished(plan: Plan, run: RunDirectory) -> Counts:
    """Return the counts of a finished run.

    Raises:
        UsageError: it is not finished.
        OutputExistsError: its output was changed.
    """
    counts = finished_counts(plan, run)
    if counts is None:
        refuse_lost_output(plan, run)
        name = typed(short(user_output(plan.output)))
        raise UsageError(
            f"the run {user_output(plan.output)} is not finished, so it cannot be verified",
            f"see aiflux status {name}, or wait for it: aiflux watch {name}",
        )
    return counts


def _refuse_changed(plan: Plan, run: RunDirectory) -> None:
    """Refuse an input, a model or an adapter that is not that of the run.

    Raises:
        InputError: the input was changed.
        StoppedError: a result is missing.
        UsageError: the results are mixed.
        ModelError: a model or an adapter was changed, or is no longer stored.
    """
    refuse_changed_input(plan)
    kind, folder = engine_kind(plan.options), plan.models_dir
    refuse_mixed(plan, results_by_model(plan, run, kind.input_rules.accepts_model))
    if folder is None:
        return
    statuses = [read_status(run, shard.index, plan) for shard in plan.shards]
    details: list[StatusDetails] = [each.details for each in statuses if each is not None]
    for name in plan.models:
        before, now = digests_of(plan, name, details), kind.model_digest(folder, name)
        if before and now is None:
            raise ModelError(
                f"the model {name} is no longer stored in {folder}",
                f"get it again: aiflux models pull {name}; its digest has to be that of the run",
            )
        refuse_other_model(Versions(name, before, (now,) if now else ()))
    for adapter in plan.adapters:
        found = kind.read_adapter(folder, plan.models[0], adapter.name, adapter.path)
        refuse_other_model(Versions(adapter.name, (adapter.digest,), (found.digest,)))


def _planned(
    plan: Plan,
    run: RunDirectory,
    sample: int,
    seed: int,
    given: Mapping[str, Any],
    more: Mapping[str, Any],
) -> PlannedSample:
    """Plan the sample with the settings of the run, and with those that are given."""
    options, submissions = plan.options, known_submissions(run)
    known: dict[str, Any] = {"models_dir": plan.models_dir}
    if submissions is not None:
        slurm = submissions.slurm
        known |= {item.name: getattr(slurm, item.name) for item in fields(SlurmConfig)}
        known["image"] = submissions.image
        if not engine_kind(options).worker_in_image or options.nodes_per_engine > 1:
            del known["seal"]  # such a run is never sealed: as an argument, a seal is refused
    if options.engine_url is not None:
        known["engine_url"] = options.engine_url
    elif options.engine_command is not None:
        known["engine_command"] = options.engine_command
    else:
        known["engine"] = options.engine
    known |= {name: value for name, value in given.items() if value is not None}
    asked = Asked(
        Config(arguments={name: value for name, value in known.items() if value is not None}),
        plan.input_path,
        plan.output,
        sample,
        given={},
        local=more["local"] or submissions is None,
        wait=more["wait"],
        again=more["force"],
        preflight=not more["no_preflight"],
        as_json=more["as_json"],
        noun=_NOUN,
    )
    pilot = Pilot(verification_folder(plan))
    pilot.run.refuse_foreign()
    return PlannedSample(asked, plan, None, pilot, seed)
