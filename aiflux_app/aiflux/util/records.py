"""Convert dataclasses to and from JSON; the fields of a class define its file format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from aiflux.util.files import read_file

T = TypeVar("T")
KEY = "key"
OMITTED = {"omitted": True}
"""Metadata of a field that is omitted from JSON while it has its default. ``KEY`` is the metadata
key for a field's name in JSON, if it differs."""
_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def to_json(record: Any) -> dict[str, Any]:
    """Return a dataclass as a JSON object, recursively."""
    content = {}
    for item in fields(record):
        value = getattr(record, item.name)
        if not (item.metadata.get("omitted") and value == _default(item)):
            content[item.metadata.get(KEY, item.name)] = _plain(value)
    return content


def from_json(kind: type[T], content: Any, where: str = "") -> T:
    """Return a dataclass from a JSON object; unknown keys are ignored.

    Args:
        where: position of the object in its file, for errors.

    Raises:
        ValueError: a field is missing or has another type; names its position.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{where or 'the content'} is not an object")
    values = {}
    hints = _hints(cast(Any, kind))
    for item in fields(cast(Any, kind)):
        name = item.metadata.get(KEY, item.name)
        place = f"{where}.{name}" if where else name
        if name in content:
            values[item.name] = _value(hints[item.name], content[name], place)
        elif not _has_default(item):
            raise ValueError(f"{place} is missing")
    return kind(**values)


def read_record(kind: type[T], path: Path) -> T | None:
    """Return the dataclass in a small JSON file; None if the file does not exist.

    Raises:
        ValueError: the file is damaged.
        StorageError: it cannot be read.
    """
    content = read_file(path)
    try:
        return None if content is None else from_json(kind, json.loads(content))
    except RecursionError as error:
        raise ValueError(f"it is nested too deeply: {error}") from error


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _has_default(item: Field[Any]) -> bool:
    return item.default is not MISSING or item.default_factory is not MISSING


def _default(item: Field[Any]) -> Any:
    if item.default_factory is not MISSING:
        return item.default_factory()
    return item.default


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return to_json(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _value(form: Any, value: Any, place: str) -> Any:
    origin, inner = get_origin(form), get_args(form)
    if origin in (Union, UnionType):
        return _one_of(inner, value, place)
    read = _READERS.get(origin)
    if read is not None:
        return read(inner, value, place)
    if is_dataclass(form):
        return from_json(cast(type[Any], form), value, place)
    if form is Path and isinstance(value, str):
        return Path(value)
    number = form in (int, float) and isinstance(value, bool)
    kinds = (int, float) if form is float else form
    if form is not Any and (number or not isinstance(value, kinds)):
        raise ValueError(f"{place} is not {_WORDS.get(form, form.__name__)}")
    return value


def _one_of(forms: tuple[Any, ...], value: Any, place: str) -> Any:
    if value is None and NoneType in forms:
        return None
    *others, last = (form for form in forms if form is not NoneType)
    for form in others:
        try:
            return _value(form, value, place)
        except ValueError:
            continue
    return _value(last, value, place)


def _list(inner: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{place} is not a list")
    return tuple(_value(inner[0], each, f"{place}[{at}]") for at, each in enumerate(value))


def _object(inner: tuple[Any, ...], value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} is not an object")
    return {str(name): _value(inner[1], each, f"{place}.{name}") for name, each in value.items()}


_READERS: dict[Any, Callable[[tuple[Any, ...], Any, str], Any]] = {
    tuple: _list,
    dict: _object,
    Mapping: _object,
}
