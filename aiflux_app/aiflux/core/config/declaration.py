"""How a setting is declared: its name, type, default, help, option and environment variable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from aiflux.errors import ConfigError
from aiflux.util import value_parsers
from aiflux.util.text import hidden_url, suggestion
from aiflux.util.value_parsers import Parser


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: key in YAML files and in Python; the option is ``--`` with dashes.
        section: ``run``, ``slurm`` or ``paths``: the block in YAML files.
        parse: converts a text or a YAML value to the setting's type; raises ValueError.
        short: short form of the option, such as ``-m``.
        metavar: stands for the value in help texts.
        env: environment variable, if it has one.
        aliases: other names it is known by.
        common: listed by ``--help``; the others are listed by ``--help-all``.
        decisive: decides where prompts and keys go or what runs in the user's name.
        repeatable: the option may be given several times.
        offered: False for a setting that is accepted but has no effect.
    """

    name: str
    section: str
    parse: Parser
    default: Any
    help: str
    short: str = ""
    metavar: str = "N"
    env: str | None = None
    aliases: tuple[str, ...] = ()
    common: bool = False
    decisive: bool = False
    repeatable: bool = False
    offered: bool = True

    @property
    def option(self) -> str:
        """The command line option that differs from the default: ``--no-X`` if that is True."""
        return self.options[0]

    @property
    def options(self) -> tuple[str, ...]:
        """All its options; a boolean has ``--X`` and ``--no-X``."""
        if isinstance(self.default, bool):
            name = self.name.replace("_", "-")
            both = (f"--{name}", f"--no-{name}")
            return both[::-1] if self.default else both
        names = tuple("--" + name.replace("_", "-") for name in (self.name, *self.aliases))
        return (*names, self.short) if self.short else names


def setting(parse: Parser, default: Any, help: str, **more: Any) -> Any:
    """Return a dataclass field that declares a setting; the field's name is the setting's."""
    declared = Setting("", "", parse, default, help, **more)
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"setting": declared})
    return field(default=default, metadata={"setting": declared})


def declared_settings(options: type, section: str) -> tuple[Setting, ...]:
    """Return the settings that a dataclass declares, in order."""
    return tuple(
        replace(item.metadata["setting"], name=item.name, section=section)
        for item in fields(options)
        if "setting" in item.metadata
    )


def by_every_name(settings: tuple[Setting, ...]) -> Mapping[str, Setting]:
    """Return settings by their names and aliases."""
    return {name: item for item in settings for name in (item.name, *item.aliases)}


def known_setting(name: str, place: str, known: Mapping[str, Setting]) -> Setting:
    """Return a setting by one of its names.

    Args:
        place: start of the message.

    Raises:
        ConfigError: no setting has that name; suggests the nearest and lists all.
    """
    if name not in known:
        raise ConfigError(f"{place}unknown setting {name!r}", suggestion(name, known))
    return known[name]


def refuse_two_names(
    given: Mapping[str, Any], place: Callable[[str], str], known: Mapping[str, Setting]
) -> None:
    """Refuse a setting that is given by two of its names.

    Args:
        given: values by names; None means not given.
        place: returns where a name was found, for the message.

    Raises:
        ConfigError: a setting is given twice.
    """
    seen: dict[str, str] = {}
    for name in (name for name in given if name in known and given[name] is not None):
        first = seen.setdefault(known[name].name, name)
        if first != name:
            raise ConfigError(
                f"{place(name)}: {first} and {name} are names of one setting, and both are given",
                "remove one of them",
            )


def parse_setting(setting: Setting, value: Any, place: str) -> Any:
    """Parse one value.

    Args:
        place: where the value was found, for the message.

    Raises:
        ConfigError: the value is wrong.
    """
    try:
        return setting.parse(value)
    except ValueError as error:
        shown = hidden_url(value) if setting.parse is value_parsers.url else value
        given = ", ".join(map(repr, shown)) if isinstance(shown, tuple) else repr(shown)
        raise ConfigError(
            f"{place}: {setting.name} = {given} is wrong", f"{setting.name} must be {error}"
        ) from None
