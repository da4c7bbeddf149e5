"""``aiflux``: the parser of the commands, and what turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from aiflux import __version__
from aiflux.errors import AifluxError, ExitCode, describe

_EXAMPLES = """\
examples:
  aiflux check prompts.jsonl
  aiflux run --model llama3.2:3b --input prompts.jsonl --output results.json
  aiflux run --local --model llama3.2:3b --input prompts.jsonl
  aiflux run --engine-url http://127.0.0.1:8000 --input prompts.jsonl

exit status: 0 all succeeded; 2 usage, configuration or input is wrong, nothing was sent;
3 more requests failed than --max-failures allows; 4 no engine or model; 5 stopped before the end,
the same command goes on; 1 a bug
"""


# Each is a module of this package with ``add_arguments(parser)`` and ``execute(arguments)``.
COMMANDS = {
    "run": "process a file of requests, as a Slurm job or here",
    "check": "check a file of requests",
    "convert": "make requests of a table, a folder, JSON or images",
    "estimate": "try some requests, and tell what the whole file will take",
    "resume": "submit what is left of a run",
    "merge": "write a run's output from what its jobs did",
    "jobs": "list your runs",
    "status": "show how a run is",
    "watch": "follow a run until it has ended",
    "logs": "show the logs of a run's jobs or engines",
    "cancel": "stop a run's jobs; what was done is kept",
    "results": "look at results",
    "report": "write a page about a run: what ran, what came of it, what it took",
    "models": "models on disk",
    "image": "the Apptainer image",
    "bundle": "everything in one file, for clusters without internet",
    "config": "configuration",
    "examples": "write a small starter project",
    "completion": "print what completes aiflux's commands in a shell",
    "doctor": "tell what this site has, and what will not work",
}


def make_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Return the parser.

    Args:
        only: the one command whose options are wanted (the others' modules are not imported, so
            that ``--help`` stays quick); None fills in every command.
    """
    parser = argparse.ArgumentParser(
        prog="aiflux",
        description="Run an open language model over a file of prompts on a Slurm cluster.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"aiflux {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the trace of every error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, help_text in COMMANDS.items():
        command = commands.add_parser(
            name, help=help_text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if only in (None, name):
            _module(name).add_arguments(command)
    return parser


def _module(command: str) -> Any:
    return import_module(f"aiflux.cli.{command}")


def _named(argv: Sequence[str]) -> str:
    """Return the command that a command line names, "" where it names none."""
    return next((word for word in argv if word in COMMANDS), "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    given = sys.argv[1:] if argv is None else argv
    parser = make_parser(_named(given))
    arguments = parser.parse_args(given)
    if arguments.command is None:
        parser.print_help()
        return int(ExitCode.USAGE)
    try:
        code: int = _module(arguments.command).execute(arguments)
        return code
    except AifluxError as error:
        if arguments.debug:
            traceback.print_exc()
        print(describe(error), file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return int(ExitCode.STOPPED)
    except BrokenPipeError:
        sys.stderr.close()
        return int(ExitCode.OK)
    except Exception:  # noqa: BLE001 - the last resort: a bug is exit 1, with its trace
        traceback.print_exc()
        print("error: this is a bug in AI-Flux; please report the trace above", file=sys.stderr)
        return int(ExitCode.BUG)
