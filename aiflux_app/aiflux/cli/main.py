"""``aiflux``: the commands, and how errors become messages and exit codes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aiflux import __version__
from aiflux.errors import AifluxError, ExitCode, UsageError, describe
from aiflux.util.process_limits import exhaustion_stops
from aiflux.util.streams import (
    FULL,
    Outlet,
    open_streams,
    refuse_broken_names,
    refuse_lost_folder,
    refused,
)

if TYPE_CHECKING:
    import click

    from aiflux.cli.parser import LazyGroup, Session

# Slow imports are in the functions that need them: `aiflux --help` is quick.

_EXAMPLES = ('aiflux ask in.csv --template "Sum up {text}" -m llama3.2:3b -o out.csv',)
GROUPS = {
    "Prepare": {
        "doctor": "Check this site and report problems",
        "config": "Show settings and their origins, or write a first file",
        "image": "Build, sign or inspect the Apptainer image",
        "models": "List, pull, check and move models",
        "bundle": "Pack everything into one file, for clusters without internet",
        "examples": "Write a small starter project",
        "completion": "Print the completion script for a shell",
        "convert": "Turn tables, folders, JSON or images into requests",
        "check": "Check a file of requests",
    },
    "Run": {
        "ask": "Ask a model about each row of a table, and write the answers",
        "chain": "Ask in several steps, each about the answers of those before",
        "estimate": "Run a sample of the requests and estimate the full run",
        "benchmark": "Measure engines and settings, and recommend the best",
        "run": "Process a file of requests, in Slurm or on this machine",
        "resume": "Continue a run that stopped",
        "cancel": "Cancel a run's jobs; finished results are kept",
        "merge": "Write the output from finished shards",
        "serve": "Start an engine as a job, to send it requests yourself",
        "connect": "Open the way to an engine of aiflux serve",
        "gateway": "Serve OpenAI's Batch API: each batch becomes a run",
    },
    "Inspect": {
        "jobs": "List your runs",
        "status": "Show a run's status",
        "watch": "Follow a run until it ends",
        "logs": "Show the logs of jobs or engines",
        "results": "Show answers, or write them as a table",
        "report": "Write a report about a run",
        "verify-run": "Ask a sample of a run again and compare the answers",
        "help": "Show the help of a command",
    },
}
"""The commands: each is an object of its name in a module of `cli.commands`."""
MODULES = {
    "cancel": "jobs",
    "completion": "help",
    "connect": "serve",
    "examples": "help",
    "merge": "run",
    "resume": "run",
    "verify-run": "verify_run",
    "watch": "status",
}
"""The modules of the commands; the others are in the module of their name."""


_UNREACHABLE = {errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP}


def make_program() -> LazyGroup:
    """Return the command ``aiflux``."""
    import click

    from aiflux.cli.parser import LazyGroup, Option, debug_option

    def show_version(ctx: click.Context, _: click.Parameter, given: bool) -> None:
        if given and not ctx.resilient_parsing:
            print(f"aiflux {__version__}")
            ctx.exit()

    version = Option(
        ["-V", "--version"], is_flag=True, is_eager=True, expose_value=False,
        callback=show_version, hidden=True, help="Show the version",
    )  # fmt: skip

    def without_command() -> int:
        ctx = click.get_current_context()
        if ctx.invoked_subcommand is None:
            from aiflux.cli.help import print_help

            print_help(ctx.get_help())
        return int(ExitCode.USAGE)

    return LazyGroup(
        name="aiflux",
        callback=without_command,
        panels=GROUPS,
        modules={
            name: f"aiflux.cli.commands.{MODULES.get(name, name)}"
            for names in GROUPS.values()
            for name in names
        },
        params=[version, debug_option()],
        help="Run an open language model over a file of prompts on a Slurm cluster.",
        examples=_EXAMPLES,
        options_metavar="[--version] [--verbose] [--help]",  # there is no room for a list
        subcommand_metavar="COMMAND [ARGS]...",
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    with open_streams() as stdout:
        return _main(sys.argv[1:] if argv is None else argv, stdout)


def _main(words: Sequence[str], stdout: Outlet) -> int:
    session: Session | None = None
    try:
        with exhaustion_stops():
            from aiflux.cli.parser import Session

            session = Session()
            code = _run(words, session, stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        return int(ExitCode.OK)
    except SystemExit as end:
        # rich's Console exits like this when nobody reads stdout any more.
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        return int(ExitCode.OK)
    except Exception as error:  # noqa: BLE001 - the last resort: a bug is exit 1, with its trace
        return _failed(error, debug=session is not None and session.debug)
    if stdout.failure is not None and stdout.failure.errno != errno.EPIPE:
        print(f"warning: {refused(stdout.failure).message}", file=sys.stderr)
    return code


def _failed(error: Exception, *, debug: bool) -> int:
    """Print an error; return its exit code."""
    if isinstance(error, OSError) and error.errno in FULL:
        error = refused(error)
    elif isinstance(error, OSError) and error.errno in _UNREACHABLE and error.filename:
        # The files of a run have errors of their own: this is a path that the user named.
        error = UsageError(
            f"cannot access {error.filename!r}: {error.strerror}",
            "check the path and its permissions",
        )
    if debug or not isinstance(error, AifluxError):
        import traceback

        traceback.print_exc()
    if isinstance(error, AifluxError):
        print(describe(error), file=sys.stderr)
        return int(error.exit_code)
    print("error: this is a bug in AI-Flux; please report the traceback above", file=sys.stderr)
    return int(ExitCode.BUG)


def _run(words: Sequence[str], session: Session, stdout: Outlet) -> int:
    import click

    from aiflux.cli.parser import COMPLETE

    program = make_program()
    if os.environ.get(COMPLETE):
        from aiflux.cli.completion import answer

        return answer(program, COMPLETE)
    refuse_broken_names(words)

    def begin(ctx: click.Context) -> None:
        refuse_lost_folder()
        # The exit code of a command that works on a run is that of the run, even if nobody reads
        # stdout.
        name = ctx.command_path.split()[1]
        stdout.strict = name not in GROUPS["Run"] or bool(ctx.params.get("dry_run"))

    session.begin = begin
    try:
        with program.make_context("aiflux", [*words], obj=session) as ctx:
            code: int = program.invoke(ctx)
    except click.exceptions.Exit as end:
        return int(end.exit_code)
    except click.UsageError as error:
        from aiflux.cli.usage_errors import usage_error

        raise usage_error(error, program, words) from None
    return code
