"""Draw the pictures of the README from a run: what ``aiflux watch`` and ``aiflux status`` show.

``python docs/screenshots.py NAME R`` writes ``docs/NAME.svg`` of the run R (an output, a run
directory or a job id), as it is at that moment. Call it in the folder of the output, so that paths
are short. The names of nodes are replaced.
"""

from __future__ import annotations

import argparse
import io
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from aiflux.cli.render.run import Frame, overview
from aiflux.core.runs.registry import find_run
from aiflux.slurm.monitor import RunView, gather
from aiflux.util.files import short

FOLDER = Path(__file__).parent
WIDTH = 92
# Readable on a dark ground: each of them at least 4.5 times as bright as it.
_THEME = TerminalTheme(
    (23, 26, 33),
    (222, 226, 233),
    [
        (60, 66, 78), (255, 123, 114), (126, 211, 139), (240, 200, 96),
        (122, 170, 255), (210, 160, 255), (108, 209, 230), (222, 226, 233),
    ],
    [
        (130, 138, 152), (255, 150, 140), (150, 230, 160), (255, 220, 130),
        (150, 190, 255), (225, 180, 255), (140, 225, 245), (255, 255, 255),
    ],
)  # fmt: skip


def main() -> None:
    """Draw a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("watch", "status"), help="the command to show")
    parser.add_argument("run", metavar="R", help="the run")
    arguments = parser.parse_args()
    view = without_nodes(gather(find_run(arguments.run, os.environ)))
    prompt = Text.assemble(("$ ", "dim"), f"aiflux {arguments.name} {short(view.output)}")
    lines = overview(view, Frame(WIDTH, None, short=short))
    path = FOLDER / f"{arguments.name}.svg"
    path.write_text(drawn([prompt, *lines], f"aiflux {arguments.name}"), encoding="utf-8")


def without_nodes(view: RunView) -> RunView:
    """Return the view with nodes that are named ``node-1``, ``node-2``, ..."""
    hosts = list(dict.fromkeys(shard.host for shard in view.shards if shard.host))
    names = {host: f"node-{number}" for number, host in enumerate(hosts, 1)}
    shards = tuple(
        replace(shard, host=None if shard.host is None else names[shard.host])
        for shard in view.shards
    )
    return replace(view, shards=shards)


def drawn(lines: Iterable[Text], title: str) -> str:
    """Return lines of a terminal as SVG."""
    console = Console(
        record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor",
        highlight=False, legacy_windows=False,
    )  # fmt: skip
    for line in lines:
        console.print(line, soft_wrap=True)
    text = console.export_svg(title=title, theme=_THEME, unique_id="aiflux")
    # The reader's own fixed-width font is taken: a page of ours loads nothing from elsewhere.
    return re.sub(r"\s*@font-face \{.*?\}", "", text, flags=re.DOTALL)


if __name__ == "__main__":
    main()
