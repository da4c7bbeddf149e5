"""Options that a run passes to its engine's server, and those that AI-Flux sets itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from shlex import quote

from aiflux.core.config.settings import RunOptions
from aiflux.errors import ConfigError
from aiflux.util.text import named_options

_LOOPBACK = "leave it out: the server listens on loopback, for AI-Flux only"
SERVER_SETTINGS = ("engine_arg", "lora", "tool_parser", "reasoning_parser")
"""Settings of a run that reach the command line of the server."""
NETWORK = _LOOPBACK
"""Remedy for options about the server's address and access to it."""


def managed_options(*groups: tuple[str, str]) -> Mapping[str, str]:
    """Return the remedy for each option that AI-Flux sets itself.

    Args:
        groups: a remedy, and the names that it is for, without their dashes.
    """
    return {name: remedy for remedy, names in groups for name in names.split()}


def refuse_managed(
    title: str, given: Mapping[str, str], managed: Mapping[str, str], *, abbreviated: bool = False
) -> None:
    """Refuse options of ``--engine-arg`` that AI-Flux sets itself.

    Args:
        title: of the engine.
        abbreviated: the server accepts the beginning of an option's name.

    Raises:
        ConfigError: an option is one of these.
    """
    for key, value in given.items():
        name = key.lstrip("-").partition(".")[0].removesuffix("+")
        forms = {form: each for each in managed for form in (each, f"no-{each}")}
        if name in forms:
            raise ConfigError(
                f"--engine-arg {key} is not available for {title}", managed[forms[name]]
            )
        found = sorted(form for form in forms if abbreviated and form.startswith(name))
        if found:
            remedies = {managed[forms[form]] for form in found}
            raise ConfigError(
                f"--engine-arg {key} is not available for {title}: it is the beginning of "
                + named_options(found),
                remedies.pop() if len(remedies) == 1 else "write the option's whole name",
            )
        if re.match(r"--?[A-Za-z]", value):
            raise ConfigError(
                f"--engine-arg {key}={value} is refused: the value looks like another option",
                f"give each option by itself: --engine-arg {key} " + quote(f"--engine-arg={value}"),
            )


def refuse_unsupported(title: str, options: RunOptions, remedies: Mapping[str, str]) -> None:
    """Refuse settings that an engine does not have.

    Args:
        remedies: for each of these settings, what to use instead.

    Raises:
        ConfigError: one of them is set.
    """
    for name, remedy in remedies.items():
        if getattr(options, name):
            raise ConfigError(f"{title} does not support --{name.replace('_', '-')}", remedy)


def given_options(options: RunOptions) -> str:
    """Return the options of the command line that reach the server's; "" for none."""
    names = [name for name in SERVER_SETTINGS if getattr(options, name)]
    return " and ".join(f"--{name.replace('_', '-')}" for name in names)
