"""The RUN argument, and lines about a run."""

from __future__ import annotations

from rich.text import Text

from aiflux.cli.parser import RUN, Function, argument
from aiflux.cli.render.estimate import WIDTH
from aiflux.cli.render.run import Frame
from aiflux.util.files import short
from aiflux.worker.console import TerminalConsole


def run_argument(function: Function) -> Function:
    """Add the argument that names a run."""
    return argument(
        "run", metavar="RUN", type=RUN, help="Output file, Slurm job id or run directory"
    )(function)


def make_console() -> TerminalConsole:
    """Return a console on stdout without markup and highlighting."""
    return TerminalConsole(highlight=False, markup=False, emoji=False)


def frame_of(console: TerminalConsole, *, fit: bool = False) -> Frame:
    """Return the frame of a console; ``fit`` limits it to the terminal's height."""
    blocks = console.encoding.lower().replace("-", "") == "utf8"
    if not console.is_terminal:
        return Frame(None, None, blocks, short)
    # One line is left for the cursor.
    return Frame(console.width, console.height - 1 if fit else None, blocks, short)


def text_width(console: TerminalConsole) -> int:
    """Return the columns for sentences: 80, or fewer on a narrow terminal."""
    return min(WIDTH, max(20, console.width)) if console.is_terminal else WIDTH


def show(console: TerminalConsole, lines: list[Text]) -> None:
    """Print lines, with colors on a terminal."""
    for line in lines:
        if console.is_terminal:
            console.print(line, soft_wrap=True)
        else:
            print(line.plain)
