"""Advice in errors that fits the command: an option that it does not have is no remedy.

Errors are raised where the command is not known, such as in an engine's kind.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

import click

from aiflux.cli.usage_errors import options_of_all
from aiflux.core.config.engine_kinds import KINDS
from aiflux.engines.kinds import kind_named
from aiflux.errors import AifluxError

_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_SEPARATOR = re.compile(r"(; or |, or |; )")
_PROGRAMS = (
    "aiflux apptainer bash git make mkdir pip python python3 sacct sbatch scancel scontrol sinfo "
    "srun ssh uv"
)
_OF_OTHERS = re.compile(rf"(?:^|[\s`(])(?:{_PROGRAMS.replace(' ', '|')})[\s`]")
_FIX = re.compile(r"(?<=-> )[^\n]*")


def fit_advice(error: AifluxError, ctx: click.Context) -> None:
    """Leave out of an error's remedies what the command refuses.

    A remedy of which nothing else is left names a command that has the option.
    """
    if error.remedy is not None:
        error.remedy = fitting(error.remedy, ctx)
    error.problems = tuple(
        _FIX.sub(lambda found: fitting(found[0], ctx), text) for text in error.problems
    )


def fitting(remedy: str, ctx: click.Context) -> str:
    """Return a remedy without the alternatives that a command refuses."""
    if not _OPTION.search(remedy):
        return remedy
    own = {name for each in ctx.command.params for name in (*each.opts, *each.secondary_opts)}
    refused = _refused_engines(ctx)
    words = _SEPARATOR.split(remedy)
    parts = [("", words[0]), *zip(words[1::2], words[2::2], strict=True)]
    kept = [(sep, part) for sep, part in parts if not _unfit(part, own, refused, ctx)]
    if not kept:
        wanted = {*_OPTION.findall(remedy)}
        others = [path for path, names in _commands(ctx) if names.issuperset(wanted)]
        return f"{remedy}, which {ctx.command_path} does not offer, unlike {_first(others)}"
    return kept[0][1] + "".join(sep + part for sep, part in kept[1:])


def _unfit(part: str, own: Collection[str], refused: Collection[str], ctx: click.Context) -> bool:
    """Return whether a part of a remedy names options of the command that it does not have."""
    if _OF_OTHERS.search(part):
        return False
    if any(re.search(rf"{re.escape(each)}\b", part) for each in refused):
        return True
    unknown = {*_OPTION.findall(part)} - {*own, "--help"}
    if not unknown:
        return False
    known = {name for _, names in _commands(ctx) for name in names}
    return not unknown.isdisjoint(known)


def _commands(ctx: click.Context) -> Iterator[tuple[str, set[str]]]:
    root = ctx.find_root().command
    assert isinstance(root, click.Group)  # noqa: S101 - it has the commands
    return options_of_all(root)


def _refused_engines(ctx: click.Context) -> list[str]:
    """Return the values of --engine that a command refuses."""
    if ctx.command_path != "aiflux serve":
        return []
    return [f"--engine {name}" for name in KINDS if not kind_named(name).can_be_served]


def _first(paths: Collection[str]) -> str:
    return "aiflux run" if "aiflux run" in paths else next(iter(paths), "aiflux run")
