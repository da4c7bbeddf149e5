"""The worker's command line: what the runscript of the image executes.

INPUT [OUTPUT] [options]            check, plan, pull what is missing, process
INPUT [OUTPUT] [options] --prepare  only check, plan and pull
--run-dir DIR [--shard K]           process an existing plan
--run-dir DIR [--shard K] --prepare only pull what that plan needs
--pull MODEL                        only pull a model
--create MODEL                      only create a model from the GGUF file staged for it
--rank R --first ADDRESS            be rank R of an engine on several nodes, for the first one
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from aiflux import __version__
from aiflux.core.config.config import Config
from aiflux.core.config.declaration import Setting
from aiflux.core.config.settings import SETTINGS, TITLES, given_settings
from aiflux.core.runs.directory import RunDirectory, named_output
from aiflux.core.runs.open import draft_run, refuse_contradiction
from aiflux.core.runs.plan import Plan, read_plan
from aiflux.core.runs.serve_directory import ServeDirectory
from aiflux.core.runs.status_file import Counts, finished_counts, finished_line, refuse_failures
from aiflux.engines.base import FetchContext
from aiflux.engines.follower import Follower
from aiflux.engines.kinds import engine_kind, kind_named, storing_kind
from aiflux.engines.ollama.pull import create_model
from aiflux.engines.ollama.staging import read_staged_gguf
from aiflux.engines.process import engine_program
from aiflux.engines.ranks import Ranks, refuse_several_nodes
from aiflux.errors import (
    AifluxError,
    ExitCode,
    RequeueError,
    RunConflictError,
    UsageError,
    describe,
)
from aiflux.estimates.estimate import carry_estimate
from aiflux.image.container import local_choices
from aiflux.models.name import parse_model_name
from aiflux.util.files import temporary_folder
from aiflux.util.process_limits import exhaustion_stops
from aiflux.util.streams import open_streams
from aiflux.worker.progress import make_reporter
from aiflux.worker.serve import serve
from aiflux.worker.shard import Context, note_unread_plan, prepare, work
from aiflux.worker.stop import Stopper

_EPILOG = """\
exit status: 0 all succeeded; 2 usage or input wrong, nothing was sent; 3 too many requests failed;
4 no engine or model; 5 stopped early, run the same command to resume; 1 a bug
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the worker's argument parser."""
    parser = argparse.ArgumentParser(
        prog="aiflux.sif",
        description="Process a file of requests (OpenAI Batch format) with this image's engine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # as in `aiflux run`: a beginning can mean another option later
    )
    parser.add_argument("input", nargs="?", help="requests, one JSON object per line")
    parser.add_argument("output", nargs="?", help="results, *.json or *.jsonl")
    parser.add_argument("--prepare", action="store_true", help="only check, plan and pull models")
    parser.add_argument("--run-dir", metavar="DIR", help="process the plan in this run directory")
    parser.add_argument("--shard", type=int, default=0, metavar="K", help="shard to work on")
    parser.add_argument(
        "--deadline", type=float, metavar="UNIXTIME", help="when the job ends (seconds)"
    )
    parser.add_argument("--pull", metavar="MODEL", help="only pull this model")
    parser.add_argument(
        "--again", action="store_true", help="with --pull: pull it even if it is stored"
    )
    # Used by `aiflux.run`: this process is the only one that works on the run.
    parser.add_argument("--pull-missing", action="store_true", help=argparse.SUPPRESS)
    # Used by the batch script of an engine on several nodes.
    parser.add_argument("--ranks", metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, metavar="R", help=argparse.SUPPRESS)
    parser.add_argument("--first", metavar="ADDRESS", help=argparse.SUPPRESS)
    # Used by `aiflux models import --gguf`; not meant to be used by hand.
    parser.add_argument("--create", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--force-resume", action="store_true", help="resume even if model or parameters changed"
    )
    parser.add_argument("--version", action="version", version=f"aiflux {__version__}")
    add_settings(parser, "run", "paths")
    return parser


def main(argv: Sequence[str] | None = None, stopper: Stopper | None = None) -> int:
    """Run the worker; return the exit code.

    Args:
        stopper: a stopper that already handles signals.
    """
    with open_streams() as stdout:
        stdout.strict = False
        return _main(argv, stopper or Stopper())


def _main(argv: Sequence[str] | None, stopper: Stopper) -> int:
    arguments = make_parser().parse_args(argv)
    if arguments.rank is not None:
        streams = sys.stdin.buffer, sys.stdout.buffer
        Follower(arguments.rank, arguments.first, *streams).run()
        return int(ExitCode.OK)
    if arguments.deadline is not None:
        # Applies until the plan with its deadline is read: Slurm may send SIGUSR1 a minute early.
        now = time.time()
        stopper.ignore_usr1_until(max(arguments.deadline - 60, (now + arguments.deadline) / 2))
    stopper.install()
    try:
        with exhaustion_stops(), closing(make_reporter()) as reporter:
            key = os.environ.get("AIFLUX_API_KEY")
            context = Context(reporter, stopper, deadline=arguments.deadline, api_key=key)
            _dispatch(arguments, context)
    except RequeueError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    except AifluxError as error:
        sys.stderr.write(describe(error) + "\n")
        return int(error.exit_code)
    except Exception:  # noqa: BLE001 - the last resort: a bug exits with 1 and a traceback
        traceback.print_exc()
        return int(ExitCode.BUG)
    return int(ExitCode.OK)


def _dispatch(arguments: argparse.Namespace, context: Context) -> None:
    if arguments.run_dir:
        _work_on_plan(arguments, context)
    elif arguments.pull:
        config = Config(arguments=given_settings(vars(arguments)))
        pull(arguments.pull, config, context, again=arguments.again)
    elif arguments.create:
        create(arguments.create, Config(arguments=given_settings(vars(arguments))), context)
    elif arguments.input:
        _work_on_input(arguments, Config(arguments=given_settings(vars(arguments))), context)
    else:
        raise UsageError("no input was given", "give a file of requests; see --help")


def pull(model: str, config: Config, context: Context, *, again: bool = False) -> None:
    """Make sure that a model is in the models directory, and say so."""
    kind = storing_kind(model)
    with context.stopper.raising(), temporary_folder() as folder:
        fetch = FetchContext(
            context.environ,
            folder / "pull.log",
            context.reporter.say,
            context.reporter.pull,
            again,
        )
        pulled = kind.fetch_model(config.models_dir, model, fetch)
    context.reporter.close()
    done = "has been pulled to" if pulled else "is already stored in"
    context.reporter.say(f"{model} {done} {config.models_dir}")


def create(model: str, config: Config, context: Context) -> None:
    """Create a model from the GGUF file that ``aiflux models import`` staged for it."""
    name = parse_model_name(model)
    staged = read_staged_gguf(config.models_dir, name)
    with context.stopper.raising(), temporary_folder() as folder:
        create_model(
            config.models_dir,
            name,
            staged.digest,
            staged.template,
            engine_program(kind_named("ollama"), context.environ),
            folder / "create.log",
            progress=context.reporter.pull,
        )
    context.reporter.close()


def _work_on_plan(arguments: argparse.Namespace, context: Context) -> None:
    run = RunDirectory(Path(arguments.run_dir).absolute())
    run.refuse_foreign()
    try:
        with context.stopper.raising():
            plan = read_plan(run)
    except RunConflictError as error:
        note_unread_plan(run, arguments.shard, context, error)
        raise
    if not 0 <= arguments.shard < len(plan.shards):
        raise UsageError(
            f"the plan has no shard {arguments.shard}", f"shards are 0 to {len(plan.shards) - 1}"
        )
    served = ServeDirectory.of_run(run)
    if served is not None and not arguments.prepare:
        serve(plan, served, context)
        return
    counts = finished_counts(plan, run)
    if counts is not None and not plan.options.retry_failed:
        finished(plan, counts, context)
    elif arguments.prepare:
        prepare(plan, run, arguments.shard, context)
    elif arguments.ranks:
        with closing(Ranks(Path(arguments.ranks), plan.options.nodes_per_engine - 1)) as ranks:
            work(plan, run, arguments.shard, replace(context, ranks=ranks))
    else:
        work(plan, run, arguments.shard, context, pull=arguments.pull_missing)


def _work_on_input(arguments: argparse.Namespace, config: Config, context: Context) -> None:
    options = config.run_options()
    refuse_several_nodes(options)
    refuse_contradiction(
        force=arguments.force,
        force_resume=arguments.force_resume,
        retry_failed=options.retry_failed,
    )
    choices = local_choices(config, None)
    if choices is not None:
        context.reporter.say(f"note: {choices}")
    input_path = Path(arguments.input)
    output = named_output(arguments.output, input_path)
    with context.stopper.raising():
        opened = draft_run(
            input_path,
            output,
            options,
            config.models_dir,
            engine_kind(options),
            force=arguments.force,
            force_resume=arguments.force_resume,
        ).open()
    if opened.counts is not None:
        finished(opened.plan, opened.counts, context)
        return
    carry_estimate(opened.plan, opened.run)
    if arguments.prepare:
        prepare(opened.plan, opened.run, 0, context)
    else:
        work(opened.plan, opened.run, 0, context, pull=True)


def finished(plan: Plan, counts: Counts, context: Context) -> None:
    """Report that a run was already finished.

    Raises:
        TooManyFailuresError: it had too many failures.
    """
    context.reporter.say(finished_line(plan, counts))
    refuse_failures(plan, counts.failed)


def add_settings(parser: argparse.ArgumentParser, *sections: str) -> None:
    """Add an option for each setting of the sections; values stay texts, None means not given."""
    for section in sections:
        group = parser.add_argument_group(TITLES[section])
        for setting in SETTINGS:
            if setting.section == section:
                _add(group, setting)


class _Switch(argparse.Action):
    """Sets what the option's name says: ``--seal`` true, ``--no-seal`` false."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, not str(option_string).startswith("--no-"))


def _add(group: Any, setting: Setting) -> None:
    text = setting.help.replace("%", "%%") if setting.offered else argparse.SUPPRESS
    if isinstance(setting.default, bool):
        option, opposite = setting.options
        add = partial(group.add_argument, dest=setting.name, action=_Switch, nargs=0, default=None)
        add(option, help=text)
        add(opposite, help=f"The opposite of {option}")
        return
    if setting.offered and setting.default not in (None, {}, ()):
        text += f" (default: {str(setting.default).replace('%', '%%')})"
    group.add_argument(
        *setting.options,
        dest=setting.name,
        metavar=setting.metavar,
        action="append" if setting.repeatable else "store",
        default=None,
        help=text,
    )
