"""The console for all coloured output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from aiflux.util.text import terminal_text


class TerminalConsole(Console):
    """A console that escapes control characters in texts, but keeps its own styles."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render like ``Console``, with all texts made safe."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(terminal_text(text), style)

    @property
    def file(self) -> IO[str]:
        """The stream itself: while a bar is shown, rich's proxy is around AI-Flux's own."""
        stream = super().file
        while (behind := getattr(stream, "rich_proxied_file", None)) is not None:
            stream = behind
        return stream

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file
