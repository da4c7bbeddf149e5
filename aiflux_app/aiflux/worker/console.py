"""The console that everything coloured goes through."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from aiflux.util.unicode import terminal_text


class TerminalConsole(Console):
    """A console whose texts cannot steer the terminal; only its own styles and moves do."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as ``Console`` does, every text made safe."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(terminal_text(text), style)
