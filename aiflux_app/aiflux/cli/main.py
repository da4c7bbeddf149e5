"""``aiflux``: the parser of the commands, and what turns errors into messages and exit codes."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from aiflux import __version__
from aiflux.cli.sigterm import unwinding
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
    from aiflux.cli.parser import Parser

# What takes long to import is imported where it is used: behind the first line of `main`, which
# takes the signals.

_EXAMPLES = """\
aiflux COMMAND --help tells more. --version; --debug: the trace of an error.

examples:
  aiflux run --model llama3.2:3b --input prompts.jsonl --output results.json
  aiflux run --engine-url http://127.0.0.1:8000 --input prompts.jsonl

exit status: 0 all succeeded; 2 usage, configuration or input is wrong; 3 more
requests failed than --max-failures allows; 4 no engine or model; 5 stopped
before the end, the same command goes on; 1 a bug
"""

# Each is a module of this package with ``add_arguments(parser)`` and ``execute(arguments)``.
GROUPS = {
    "prepare": {
        "doctor": "tell what this site has, and what will not work",
        "config": "show every setting and its origin, or write first settings",
        "image": "build the Apptainer image, or tell what is in one",
        "models": "list, get, check and carry models",
        "bundle": "everything in one file, for clusters without internet",
        "examples": "write a small starter project",
        "completion": "print what completes commands in a shell",
        "convert": "make requests of a table, a folder, JSON or images",
        "check": "check a file of requests",
    },
    "run": {
        "estimate": "try some requests, and tell what the whole file will take",
        "run": "process a file of requests, as a Slurm job or here",
        "resume": "submit what is left of a run",
        "cancel": "stop a run's jobs; what was done is kept",
        "merge": "write a run's output from what its jobs did",
    },
    "see": {
        "jobs": "list your runs",
        "status": "show how a run is",
        "watch": "follow a run until it has ended",
        "logs": "show the logs of a run's jobs or engines",
        "results": "show answers, or write them as a table",
        "report": "write a page about a run: what ran, what came of it",
    },
}
COMMANDS = {name: text for group in GROUPS.values() for name, text in group.items()}


_UNREACHABLE = {errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP}


def make_parser(only: str | None = None) -> Parser:
    """Return the parser.

    Args:
        only: the one command whose options are wanted (the others' modules are not imported, so
            that ``--help`` stays quick); None fills in every command.
    """
    from aiflux.cli.parser import Parser

    parser = Parser(
        prog="aiflux",
        usage="aiflux COMMAND ...",
        description="Run an open language model over a file of prompts on a Slurm cluster.",
        epilog=f"{_overview()}\n\n{_EXAMPLES}",
    )
    parser.lists_commands = True
    parser.add_argument("--version", action="version", version=f"aiflux {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the trace of every error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, help_text in COMMANDS.items():
        command = commands.add_parser(name, prog=f"aiflux {name}", help=help_text)
        if only in (None, name):
            _module(name).add_arguments(command)
    parser.finish()
    return parser


def _overview() -> str:
    """Return the commands in their groups."""
    return "\n\n".join(
        "\n".join([f"{title}:", *(f"  {name:<12}{text}" for name, text in group.items())])
        for title, group in GROUPS.items()
    )


def _module(command: str) -> Any:
    return import_module(f"aiflux.cli.commands.{command}")


def _named(argv: Sequence[str]) -> str:
    """Return the command that a command line names, "" where it names none."""
    return next((word for word in argv if word in COMMANDS), "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    # Outermost, for a signal may come as soon as its handler is there.
    try:
        with unwinding(), open_streams() as stdout:
            return _main(sys.argv[1:] if argv is None else argv, stdout)
    except KeyboardInterrupt as signal:
        print(f"stopped by {str(signal) or 'Ctrl-C'} before the end", file=sys.stderr)
        return int(ExitCode.STOPPED)


def _main(argv: Sequence[str], stdout: Outlet) -> int:
    words, debug = _without_debug(argv)
    try:
        with exhaustion_stops():
            code = _run(words, stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        return int(ExitCode.OK)
    except SystemExit as end:
        # So rich's Console ends the process where nobody reads stdout any more.
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        return int(ExitCode.OK)
    except Exception as error:  # noqa: BLE001 - the last resort: a bug is exit 1, with its trace
        return _failed(error, debug=debug)
    if stdout.failure is not None and stdout.failure.errno != errno.EPIPE:
        print(f"warning: {refused(stdout.failure).message}", file=sys.stderr)
    return code


def _failed(error: Exception, *, debug: bool) -> int:
    """Tell an error; return its exit code."""
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
    print("error: this is a bug in AI-Flux; please report the trace above", file=sys.stderr)
    return int(ExitCode.BUG)


def _run(words: Sequence[str], stdout: Outlet) -> int:
    from aiflux.cli.usage_errors import parse

    refuse_broken_names(words)
    parser = make_parser(_named(words))
    arguments = parse(parser, words, make_parser)
    if arguments.command is None:
        parser.print_help()
        return int(ExitCode.USAGE)
    refuse_lost_folder()
    # The exit code of what works on a run says how the run went, whoever reads the words.
    works = arguments.command in GROUPS["run"] and not getattr(arguments, "dry_run", False)
    stdout.heeded = not works
    code: int = _module(arguments.command).execute(arguments)
    return code


def _without_debug(words: Sequence[str]) -> tuple[list[str], bool]:
    """Take ``--debug``, which every command has, out of a command line."""
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != "--debug"]
    return [*kept, *words[end:]], len(kept) < end
