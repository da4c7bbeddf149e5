"""``aiflux``: the parser of the commands, and what turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

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


def make_parser() -> argparse.ArgumentParser:
    """Return the parser with every command."""
    parser = argparse.ArgumentParser(
        prog="aiflux",
        description="Run an open language model over a file of prompts on a Slurm cluster.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"aiflux {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the trace of every error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    _add_run(commands)
    _add_check(commands)
    _add_results(commands)
    _add_models(commands)
    _add_image(commands)
    _add_config(commands)
    return parser


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from aiflux.core.arguments import add_settings

    parser = commands.add_parser(
        "run",
        help="process a file of requests, as a Slurm job or here",
        description="Check the input, plan the run and submit it to Slurm (or process it here).",
        epilog="example: aiflux run --model llama3.2:3b --input prompts.jsonl --output out.json",
    )
    parser.add_argument("--input", required=True, metavar="FILE", help="requests, *.jsonl")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="results, *.json or *.jsonl (default: INPUT's name with .results.json, here)",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--local", action="store_true", help="process it here, in the foreground")
    where.add_argument("--dry-run", action="store_true", help="print the plan and the script only")
    parser.add_argument("--force", action="store_true", help="replace an output that is there")
    parser.add_argument(
        "--force-resume", action="store_true", help="go on although model or parameters changed"
    )
    add_settings(parser, "run", "slurm", "paths")


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "check",
        help="check a file of requests",
        description="Read the whole input once and report every bad line.",
        epilog="example: aiflux check prompts.jsonl --model llama3.2:3b",
    )
    parser.add_argument("file", metavar="FILE", help="requests, *.jsonl")
    parser.add_argument("--model", metavar="NAME:TAG", help="the run's model")


def _add_results(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("results", help="look at results")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    show = actions.add_parser("show", help="show prompts and answers as a table")
    show.add_argument("output", metavar="FILE", help="an output, *.json or *.jsonl")
    show.add_argument("--failed", action="store_true", help="only what failed")
    show.add_argument("--limit", type=int, default=50, help="rows at most (default: 50)")


def _add_models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("models", help="models on disk")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    from aiflux.core.arguments import add_settings

    pull = actions.add_parser("pull", help="pull a model, on a machine with internet")
    pull.add_argument("name", metavar="NAME:TAG", help="model, as Ollama names it")
    add_settings(pull, "paths")


def _add_image(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("image", help="the Apptainer image")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    build = actions.add_parser("build", help="build the image (no root needed)")
    build.add_argument("--base", choices=("auto", "docker", "debian"), default="auto")
    build.add_argument("--output", metavar="FILE", default="aiflux.sif")
    build.add_argument("--ollama-image", metavar="REF", help="docker base, docker://HOST/NAME:TAG")
    build.add_argument("--ollama-tarball", metavar="FILE", help="official Ollama archive")
    build.add_argument("--mirror", metavar="URL", help="Debian mirror (default: this machine's)")
    build.add_argument("--suite", metavar="NAME", help="Debian suite (default: this machine's)")
    build.add_argument("--force", action="store_true", help="replace an image that is there")
    info = actions.add_parser("info", help="tell what is in an image")
    info.add_argument("file", metavar="FILE", nargs="?", help="image (default: the one runs use)")


def _add_config(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("config", help="configuration")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    actions.add_parser("show", help="print each value and where it came from")


def _dispatch(arguments: argparse.Namespace) -> int:
    from importlib import import_module

    module = import_module(f"aiflux.cli.{arguments.command}")
    code: int = module.execute(arguments)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return int(ExitCode.USAGE)
    try:
        return _dispatch(arguments)
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
