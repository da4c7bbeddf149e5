"""The settings as options of the worker: argparse, for the image has no click."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from aiflux.core.config.declaration import Setting
from aiflux.core.config.settings import SETTINGS, TITLES


def add_settings(parser: argparse.ArgumentParser, *sections: str) -> None:
    """Add an option for each setting of the sections; values stay texts, None means not given."""
    for section in sections:
        group = parser.add_argument_group(TITLES[section])
        for setting in SETTINGS:
            if setting.section == section:
                _add(group, setting)


class _Switch(argparse.Action):
    """Sets what the option's name says: ``--seal`` true, ``--no-seal`` false."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, not str(option_string).startswith("--no-"))


def _add(group: Any, setting: Setting) -> None:
    text = setting.help.replace("%", "%%") if setting.offered else argparse.SUPPRESS
    if isinstance(setting.default, bool):
        option, opposite = setting.options
        add = partial(group.add_argument, dest=setting.name, action=_Switch, nargs=0, default=None)
        add(option, help=text)
        add(opposite, help=f"The opposite of {option}")
        return
    if setting.offered and setting.default not in (None, {}, ()):
        text += f" (default: {str(setting.default).replace('%', '%%')})"
    group.add_argument(
        *setting.options,
        dest=setting.name,
        metavar=setting.metavar,
        action="append" if setting.repeatable else "store",
        default=None,
        help=text,
    )
