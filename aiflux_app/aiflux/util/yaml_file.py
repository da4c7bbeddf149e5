"""YAML files of settings, read so that an error can name the line.

Plain scalars stay the texts that they are, null aside: a setting knows its own type, and YAML 1.1's
guesses (12:30:00 is 45000, ``no`` is false, 010 is 8) are traps in a file of Slurm's options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

import yaml

from aiflux.errors import ConfigError
from aiflux.util.text import suggestion
from aiflux.util.unicode import is_whole

_LARGEST = 1 << 20  # bytes; what is larger was not written by hand, and takes long to read
_KEPT = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
_DEPTH = 4  # mappings within mappings whose keys are looked at


def _resolvers() -> dict[str, list[tuple[str, Any]]]:
    every = yaml.SafeLoader.yaml_implicit_resolvers.items()
    return {first: [item for item in items if item[0] in _KEPT] for first, items in every}


class _Loader(yaml.SafeLoader):
    """Takes no plain text for a number, a truth value or a date."""

    yaml_implicit_resolvers = _resolvers()

    def construct_scalar(self, node: Any) -> Any:
        """Return a text; half a surrogate pair has no place in a setting."""
        value = super().construct_scalar(node)
        if isinstance(value, str) and not is_whole(value):
            raise yaml.constructor.ConstructorError(
                None, None, "a text holds half a character", node.start_mark
            )
        return value


@dataclass(frozen=True)
class YamlFile:
    """What a file holds.

    Attributes:
        content: mappings, lists, texts and None.
        lines: the line of each key, by the keys that lead to it.
    """

    path: Path
    content: Any
    lines: Mapping[tuple[str, ...], int]

    def line(self, *keys: str) -> str:
        """Return ``FILE, line N``; of the nearest key above where a key has no line."""
        for end in range(len(keys), 0, -1):
            if keys[:end] in self.lines:
                return f"{self.path}, line {self.lines[keys[:end]]}"
        return str(self.path)

    def place(self, *keys: str) -> str:
        """Return ``FILE, line N (KEY.KEY)``."""
        return f"{self.line(*keys)} ({'.'.join(keys)})" if keys else str(self.path)

    def mapping(
        self,
        *keys: str,
        known: Iterable[str] = (),
        noun: str = "key",
        remedy: Callable[[str, str], str] = lambda _, usual: usual,
    ) -> dict[str, Any]:
        """Return the mapping that stands at ``keys``; an empty one where there is nothing.

        Args:
            known: the keys that it may hold; none given, it may hold any.
            noun: what the keys are, for the message.
            remedy: from an unknown key and the usual remedy to a better one.

        Raises:
            ConfigError: it is no mapping, or holds a key that is not known.
        """
        value = self.content
        for key in keys:
            value = value.get(key)
        if value is None:
            return {}
        names = tuple(known)
        if not isinstance(value, dict):
            told = f"known are: {', '.join(sorted(names))}" if names else "correct it"
            raise ConfigError(
                f"{self.place(*keys)} must hold KEY: VALUE lines, not {value!r}", told
            )
        for key in map(str, value):
            if names and key not in names:
                where = f" in {'.'.join(keys)}" if keys else ""
                raise ConfigError(
                    f"{self.line(*keys, key)}: unknown {noun} {key!r}{where}",
                    remedy(key, suggestion(key, names)),
                )
        return {str(key): item for key, item in value.items()}


def is_there(path: Path) -> bool:
    """Tell whether a file of settings is there to be read.

    Raises:
        ConfigError: something else has its name, or it cannot be told.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a link to {str(path.readlink())!r}, where nothing is",
                "correct the link, or remove it",
            ) from None
        return False
    except OSError as error:
        raise _unreadable(path, error) from None
    if not S_ISREG(mode):
        kind = "a folder" if S_ISDIR(mode) else "no plain file"
        raise ConfigError(f"{path} is {kind}, and should be a file", "rename or remove it")
    return True


def read_text(path: Path, largest: float = inf) -> str:
    """Return what a file of settings holds.

    Args:
        largest: bytes that it may have.

    Raises:
        ConfigError: it cannot be read, is too large, or is not UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > largest:
            raise ConfigError(
                f"{path} has {size / 1e6:.0f} MB, which is no file of settings",
                "see what is in it, and name the right file",
            )
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}", "save it as UTF-8") from None


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path} cannot be read: {error.strerror}", "check its name and permissions")


def read_yaml(path: Path) -> YamlFile:
    """Read a file.

    Raises:
        ConfigError: it cannot be read, is too large, is not YAML, or gives a key twice.
    """
    return parse_yaml(read_text(path, _LARGEST), path)


def parse_yaml(text: str, path: Path) -> YamlFile:
    """Read what a file holds.

    Raises:
        ConfigError: it is not YAML, or gives a key twice.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines = dict(_lines(node, (), path))
        content = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        told = error.problem or error.context or "it cannot be read"
        remedy = "indent with blanks, not tabs" if r"'\t'" in told else "correct it"
        raise ConfigError(f"{path}{line} is not YAML: {told}", remedy) from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply", "correct it") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not YAML: {error}", "correct it") from None
    return YamlFile(path, content, lines)


def _lines(
    node: yaml.Node | None, above: tuple[str, ...], path: Path
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the line of each key of a mapping and of those within it."""
    if not isinstance(node, yaml.MappingNode) or len(above) >= _DEPTH:
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in seen:
            raise ConfigError(
                f"{path}, line {line}: {name} is given twice (first in line {seen[name]})",
                "leave one of them out",
            )
        seen[name] = line
        yield (*above, name), line
        yield from _lines(value, (*above, name), path)
