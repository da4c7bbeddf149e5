"""Command line options made from the table of settings, the same for the CLI and the worker."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from aiflux.core.config.settings import SETTINGS, Setting

_REPEATABLE = {"engine_env", "sbatch_arg", "modules", "setup", "stop"}
_METAVARS = {
    "model": "NAME:TAG",
    "engine_url": "URL",
    "engine_ca": "FILE",
    "engine_env": "KEY=VALUE",
    "sbatch_arg": "KEY=VALUE",
    "time": "TIME",
    "mem": "SIZE",
    "temperature": "T",
    "top_p": "P",
    "stop": "TEXT",
    "model_config": "FILE",
    "gpus_per_node": "[TYPE:]N",
    "gres": "LIST",
    "constraint": "LIST",
    "modules": "NAME",
    "setup": "LINE",
    "mail_user": "ADDRESS",
    "mail_type": "LIST",
    "exclude": "NODES",
    "reservation": "NAME",
    "shards": "N|auto",
    "log_level": "LEVEL",
    "max_failures": "N|N%",
}
_NAMES = {"account", "partition", "qos"}


def add_settings(parser: argparse.ArgumentParser, *sections: str) -> None:
    """Add an option for each setting of the sections; values stay texts, None means not given."""
    groups = {
        "run": parser.add_argument_group("how requests are processed"),
        "slurm": parser.add_argument_group("what is asked of Slurm")
        if "slurm" in sections
        else None,
        "paths": parser.add_argument_group("where things lie"),
    }
    for setting in SETTINGS:
        group = groups[setting.section]
        if setting.section in sections and group is not None:
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
    names = setting.options
    text = setting.help
    if setting.default not in (None, True, False, {}, ()):
        text += f" (default: {str(setting.default).replace('%', '%%')})"
    if isinstance(setting.default, bool):
        option, opposite = names
        add = partial(group.add_argument, dest=setting.name, action=_Switch, nargs=0, default=None)
        add(option, help=text)
        add(opposite, help=f"the opposite of {option}, where a file or the environment says that")
        return
    group.add_argument(
        *names,
        dest=setting.name,
        metavar=_METAVARS.get(setting.name, _metavar(setting)),
        action="append" if setting.name in _REPEATABLE else "store",
        default=None,
        help=text,
    )


def _metavar(setting: Setting) -> str:
    if setting.section == "paths":
        return "PATH"
    if setting.name.endswith(("_timeout", "_delay", "_seconds", "_wait")):
        return "SECONDS"
    return "NAME" if setting.name in _NAMES else "N"


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given on the command line."""
    names = {setting.name for setting in SETTINGS}
    return {name: value for name, value in vars(arguments).items() if name in names}
