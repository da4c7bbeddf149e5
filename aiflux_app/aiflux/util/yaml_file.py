"""Read YAML settings files so that errors can name the line.

Plain scalars stay strings, except null. A setting knows its own type, and YAML 1.1's guesses
(12:30:00 is 45000, ``no`` is false, 010 is 8) are traps in a file with Slurm options.
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
from aiflux.util.text import error_text, is_whole, suggestion

_LARGEST = 1 << 20  # bytes; larger files are not written by hand, and take long to read
_KEPT = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
_DEPTH = 4  # depth of nested mappings whose keys are checked


def _resolvers() -> dict[str, list[tuple[str, Any]]]:
    every = yaml.SafeLoader.yaml_implicit_resolvers.items()
    return {first: [item for item in items if item[0] in _KEPT] for first, items in every}


class _Loader(yaml.SafeLoader):
    """Reads plain scalars as strings instead of numbers, booleans or dates."""

    yaml_implicit_resolvers = _resolvers()

    def construct_scalar(self, node: Any) -> Any:
        """Return a string; lone surrogates are not allowed in settings."""
        value = super().construct_scalar(node)
        if isinstance(value, str) and not is_whole(value):
            raise yaml.constructor.ConstructorError(
                None, None, "a text contains half a character", node.start_mark
            )
        return value


@dataclass(frozen=True)
class YamlFile:
    """The content of a file.

    Attributes:
        content: mappings, lists, strings and None.
        lines: the line of each key, by the path of keys.
    """

    path: Path
    content: Any
    lines: Mapping[tuple[str, ...], int]

    def line(self, *keys: str) -> str:
        """Return ``FILE, line N``; if a key has no line, that of the nearest parent."""
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
        """Return the mapping at ``keys``; empty if there is nothing.

        Args:
            known: the allowed keys; if none are given, all are allowed.
            noun: what the keys are, for the message.
            remedy: returns a better remedy for an unknown key and the default remedy.

        Raises:
            ConfigError: the value is not a mapping, or has an unknown key.
        """
        value = self.content
        for key in keys:
            value = value.get(key)
        if value is None:
            return {}
        names = tuple(known)
        if not isinstance(value, dict):
            hint = f"use one of: {', '.join(sorted(names))}" if names else "correct it"
            raise ConfigError(
                f"{self.place(*keys)} must contain KEY: VALUE lines, not {value!r}", hint
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
    """Return whether a settings file exists and can be read.

    Raises:
        ConfigError: the path is something else, or cannot be checked.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a link to {str(path.readlink())!r}, which does not exist",
                "correct the link, or remove it",
            ) from None
        return False
    except OSError as error:
        raise _unreadable(path, error) from None
    if not S_ISREG(mode):
        kind = "a directory" if S_ISDIR(mode) else "not a regular file"
        raise ConfigError(f"{path} is {kind}, but should be a file", "rename or remove it")
    return True


def read_text(path: Path, largest: float = inf) -> str:
    """Return the content of a settings file.

    Args:
        largest: maximum size in bytes.

    Raises:
        ConfigError: the file cannot be read, is too large, or is not UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > largest:
            raise ConfigError(
                f"{path} has {size / 1e6:.0f} MB, too much for a settings file",
                "check its content, and use the right file",
            )
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error_text(error)}", "save it as UTF-8") from None


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path} cannot be read: {error.strerror}", "check its name and permissions")


def read_yaml(path: Path) -> YamlFile:
    """Read a settings file.

    Raises:
        ConfigError: the file cannot be read, is too large, is not YAML, or has a duplicate key.
    """
    return parse_yaml(read_text(path, _LARGEST), path)


def parse_yaml(text: str, path: Path) -> YamlFile:
    """Parse the content of a settings file.

    Raises:
        ConfigError: the text is not YAML, or has a duplicate key.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines = dict(_lines(node, (), path))
        content = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        problem = error.problem or error.context or "it cannot be read"
        remedy = "indent with spaces, not tabs" if r"'\t'" in problem else "correct it"
        raise ConfigError(f"{path}{line} is not YAML: {problem}", remedy) from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply", "correct it") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not YAML: {error_text(error)}", "correct it") from None
    return YamlFile(path, content, lines)


def _lines(
    node: yaml.Node | None, above: tuple[str, ...], path: Path
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the line of each key of a mapping and its nested mappings."""
    if not isinstance(node, yaml.MappingNode) or len(above) >= _DEPTH:
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in seen:
            raise ConfigError(
                f"{path}, line {line}: {name} is given twice (first on line {seen[name]})",
                "remove one of them",
            )
        seen[name] = line
        yield (*above, name), line
        yield from _lines(value, (*above, name), path)
