"""`--json`: stdout holds one JSON value and nothing else; what is said meanwhile goes to stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from typing import Any

from aiflux.core.runs.directory import RunDirectory
from aiflux.errors import AifluxError, UsageError
from aiflux.util.unicode import json_text

_RUN_HELP = "print how the run is then as one JSON object, as aiflux status --json does"


def add_json(parser: argparse.ArgumentParser, text: str = _RUN_HELP) -> None:
    """Add the option."""
    parser.add_argument("--json", action="store_true", help=text)


def print_json(content: Any) -> None:
    """Print a value; what JSON lacks (paths) as its text."""
    print(json_text(content, indent=2, default=str, only_ascii=True))


def then_told(
    work: Callable[[], int], run: RunDirectory, more: Mapping[str, Any] | None = None
) -> int:
    """Work on a run, then print how it is; return what the work returned.

    Where the work ends with an error that leaves a run behind, that is told too, before the error
    is raised; nothing is printed where nothing was begun.

    Args:
        more: what the object holds besides; read after the work.

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
            _tell(run, more)
        raise
    _tell(run, more)
    return code


def _tell(run: RunDirectory, more: Mapping[str, Any] | None) -> None:
    from aiflux.slurm.monitor.collect import gather

    print_json({**gather(run).to_json(), **(more or {})})
