"""`--json`: stdout has one JSON value and nothing else; other messages go to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from typing import Any

from aiflux.cli.parser import Decorator, option
from aiflux.core.runs.directory import RunDirectory
from aiflux.errors import AifluxError, UsageError
from aiflux.util.text import json_text

_RUN_HELP = "Print the run's status as JSON"


def json_option(text: str = _RUN_HELP) -> Decorator:
    """Add the option."""
    return option("--json", "as_json", is_flag=True, help=text)


def print_json(content: Any) -> None:
    """Print a value; types that JSON lacks, such as paths, as text."""
    print(json_text(content, indent=2, default=str, only_ascii=True))


def then_status(
    work: Callable[[], int], run: RunDirectory, more: Mapping[str, Any] | None = None
) -> int:
    """Work on a run, then print its status; return what the work returned.

    If the work ends with an error and has left a run, its status is printed before the error is
    raised. If no run was begun, nothing is printed.

    Args:
        more: further keys of the object; read after the work.

    Raises:
        AifluxError: what the work raised.
    """
    try:
        with redirect_stdout(sys.stderr):
            code = work()
    except UsageError:
        raise
    except AifluxError:
        if run.plan.is_file():
            _print_status(run, more)
        raise
    _print_status(run, more)
    return code


def _print_status(run: RunDirectory, more: Mapping[str, Any] | None) -> None:
    from aiflux.slurm.monitor import gather

    print_json({**gather(run).to_json(), **(more or {})})
