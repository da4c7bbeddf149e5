"""A line of the table, and the progress of the measurements."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        good: whether the figure meets its target; None without target.
    """

    case: str
    figure: str
    wanted: str = ""
    good: bool | None = None
    plain: str = ""
    peer: str = ""


def say(text: str) -> None:
    """Print the progress of the measurements."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)
