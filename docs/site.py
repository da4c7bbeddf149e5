"""Build the documentation as a website, and the man pages: ``python docs/site.py FOLDER``.

The pages keep their places in the repository, so the links between them work as they are. Files
that they link to, such as source files, are copied next to them. Any broken link is an error.

Each version has a folder of its own in ``FOLDER/site``; those that are there already stay, and the
pages of all versions lead to each other.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from aiflux import __version__
from aiflux.cli.main import make_program
from aiflux.cli.parser import Command

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md"),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
_ITEM = re.compile(r" *(?:[-*]|\d+\.) +(?=\S)")
_LINK = re.compile(r"\[([^\]]*)\]\(([^()\s]+)\)")


def collect(pages: Path) -> None:
    """Copy the pages and the files that they link to into a directory."""
    for name in PAGES:
        source, target = ROOT / name, pages / name
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text(encoding="utf-8")
        text = _indented(_linked(text, source.parent, pages))
        target.write_text(text, encoding="utf-8")


def _linked(text: str, folder: Path, pages: Path) -> str:
    """Copy what a page links to; a link to a directory becomes text, as websites list none."""

    def link(match: re.Match[str]) -> str:
        place = (folder / match[2].partition("#")[0]).resolve()
        if not place.is_relative_to(ROOT) or place == folder:
            return match[0]
        if place.is_dir():
            return match[1]
        if place.is_file() and str(place.relative_to(ROOT)) not in PAGES:
            target = pages / place.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(place, target)
        return match[0]

    return _LINK.sub(link, text)


def _indented(text: str) -> str:
    """Indent what belongs to an item of a list by 4 spaces for each level.

    Python-Markdown needs that; elsewhere, it is enough to indent it as far as the item's text.
    """
    starts: list[int] = []
    fenced = False
    lines = []
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip(" "))
        if line and not fenced:
            starts = [start for start in starts if start <= indent]
        own = starts[-1] if starts else 0
        lines.append(" " * (4 * len(starts)) + line[own:] if line[:own].isspace() else line)
        fenced ^= line.lstrip().startswith("```")
        item = None if fenced else _ITEM.match(line)
        if item is not None:
            starts.append(len(item[0]))
    return "\n".join(lines)


def build_site(target: Path) -> Path:
    """Build the website of this version in a directory for all versions, and return its own.

    Raises:
        CalledProcessError: MkDocs found an error, or warned of something.
    """
    own = target / __version__
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        collect(work / "pages")
        shutil.copy(ROOT / "docs" / "mkdocs.yml", work)
        command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
        # Material for MkDocs is maintained until May 2027 and advertises its successor.
        environ = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
        subprocess.run([*command, "--site-dir", own.absolute()], cwd=work, env=environ, check=True)
    _list_versions(target)
    return own


def _list_versions(target: Path) -> None:
    """List the versions for the menu of each page, and lead the directory to the newest."""
    names = [path.parent.name for path in target.glob("[0-9]*/index.html")]
    names.sort(key=lambda name: [int(part) for part in re.findall(r"\d+", name)], reverse=True)
    listed = [{"version": name, "title": name, "aliases": []} for name in names]
    (target / "versions.json").write_text(json.dumps(listed), encoding="utf-8")
    (target / "index.html").write_text(
        f'<!doctype html><meta http-equiv="refresh" content="0; url={names[0]}/index.html">\n',
        encoding="utf-8",
    )


def build_man(target: Path) -> None:
    """Write a man page for each command into ``man1`` of a directory."""
    folder = target / "man1"
    folder.mkdir(parents=True, exist_ok=True)
    root = click.Context(make_program(), info_name="aiflux")
    for ctx in _contexts(root):
        name = ctx.command_path.replace(" ", "-")
        (folder / f"{name}.1").write_text("\n".join(_man(ctx)) + "\n", encoding="utf-8")


def _contexts(ctx: click.Context) -> Iterator[click.Context]:
    yield ctx
    if isinstance(ctx.command, click.Group):
        for name in ctx.command.list_commands(ctx):
            command = ctx.command.get_command(ctx, name)
            if command is not None:
                yield from _contexts(click.Context(command, info_name=name, parent=ctx))


def _man(ctx: click.Context) -> Iterator[str]:
    """Yield the lines of a page (man 7 groff_man)."""
    command = ctx.command
    name = ctx.command_path.replace(" ", "-")
    help_text = inspect.cleandoc(command.help or "")
    first = re.split(r"(?<=\.)\s|\n\n", help_text)[0].rstrip(".")
    yield f'.TH "{name.upper()}" 1 "" "AI-Flux {__version__}"'
    yield from (".SH NAME", f"{_roff(name)} \\- {_roff(first)}", ".SH SYNOPSIS")
    yield f".B {_roff(' '.join([ctx.command_path, *command.collect_usage_pieces(ctx)]))}"
    yield ".SH DESCRIPTION"
    yield "\n.PP\n".join(_roff(part) for part in help_text.split("\n\n"))
    if isinstance(command, click.Group):
        yield ".SH COMMANDS"
        for each in command.list_commands(ctx):
            yield from (".TP", f".BR {_roff(name)}\\-{_roff(each)} (1)")
            below = command.get_command(ctx, each)
            yield _roff(inspect.cleandoc((below and below.help) or "").split("\n\n")[0])
    shown = [param for param in command.params if not getattr(param, "hidden", False)]
    if shown:
        yield ".SH OPTIONS"
    for param in shown:
        names = ", ".join(sorted((*param.opts, *param.secondary_opts), key=len))
        is_flag = isinstance(param, click.Option) and param.is_flag
        value = param.make_metavar(ctx)
        if isinstance(param, click.Argument):
            names, value = value, ""
        yield from (".TP", f".B {_roff(names if is_flag else f'{names} {value}'.strip())}")
        yield _roff(getattr(param, "help", "") or "")
    if isinstance(command, Command) and command.examples:
        yield from (".SH EXAMPLES", ".nf", *map(_roff, command.examples), ".fi")
    if ctx.parent is not None:
        yield from (".SH SEE ALSO", f".BR {_roff(ctx.parent.command_path.replace(' ', '-'))} (1)")


def _roff(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return re.sub(r"^\.", r"\\&.", text, flags=re.MULTILINE)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    build_site(folder / "site")
    build_man(folder / "man")
    print(f"{folder}/site/index.html and {folder}/man/man1")
