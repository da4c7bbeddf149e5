"""The result of one check: ok, a warning or a failure, with the remedy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Health = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Diagnosis:
    """One line of ``aiflux doctor``.

    Attributes:
        name: what was looked at, in a word or two.
        level: ``fail`` means that runs cannot work as things are.
        what: what was seen, and what follows from it.
        fix: what to do; empty where all is well.
    """

    name: str
    level: Health
    what: str
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        """Return what ``--json`` prints."""
        return asdict(self)


def ok(name: str, what: str) -> Diagnosis:
    """Return that something is well."""
    return Diagnosis(name, "ok", what)


def warn(name: str, what: str, fix: str) -> Diagnosis:
    """Return that something works less well than it could, or only in part."""
    return Diagnosis(name, "warn", what, fix)


def fail(name: str, what: str, fix: str) -> Diagnosis:
    """Return that something keeps runs from working."""
    return Diagnosis(name, "fail", what, fix)
