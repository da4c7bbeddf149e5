"""The progress of a run while a program waits for it: in a notebook, or on a terminal."""

from __future__ import annotations

import html
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from aiflux.slurm.run_view import RunView
from aiflux.worker.console import TerminalConsole

Show = Callable[[RunView], None]


@contextmanager
def progress_display(*, enabled: bool = True) -> Iterator[Show]:
    """Yield what shows the status of a run in one place; elsewhere it shows nothing."""
    notebook = _notebook_display() if enabled else None
    if notebook is not None:
        yield _in_notebook(notebook)
    elif enabled and sys.stderr is not None and sys.stderr.isatty():
        with _on_terminal() as show:
            yield show
    else:
        yield lambda view: None


def _notebook_display() -> Any:
    """Return IPython's display function in the kernel of a notebook; None elsewhere.

    The terminal's IPython has no kernel. Nothing is imported: a kernel has loaded IPython.
    """
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if getattr(shell, "kernel", None) is None:
        return None
    return sys.modules["IPython.display"].display


def _in_notebook(display: Any) -> Show:
    # rich's own display needs ipywidgets, and leaves nothing in the notebook's file without them.
    handle = None

    def show(view: RunView) -> None:
        nonlocal handle
        data = notebook_data(view)
        if handle is None:
            handle = display(data, raw=True, display_id=True)
        else:
            handle.update(data, raw=True)

    return show


def notebook_data(view: RunView) -> dict[str, str]:
    """Return the progress by MIME type: a bar, or its text for frontends without HTML."""
    text = str(view)
    bar = f'<progress value="{view.done}" max="{max(view.total, 1)}"></progress>'
    return {"text/plain": text, "text/html": f"{bar} {html.escape(text)}"}


@contextmanager
def _on_terminal() -> Iterator[Show]:
    # Without a thread of its own: the system may allow none.
    progress = Progress(
        BarColumn(),
        # If the line is too long, only the bar shrinks.
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        console=TerminalConsole(stderr=True),
        auto_refresh=False,
    )

    def show(view: RunView) -> None:
        progress.update(task, description=str(view), completed=view.done, total=view.total)
        progress.refresh()

    with progress:
        task = progress.add_task("", total=None)
        yield show
