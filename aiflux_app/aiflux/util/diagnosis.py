"""The result of a check: ok, a warning or a failure, with a remedy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Health = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Diagnosis:
    """One line of ``aiflux doctor``.

    Attributes:
        name: what was checked, in a word or two.
        level: ``fail`` means that runs cannot work.
        what: what was found, and what follows from it.
        fix: the remedy; empty if there is no problem.
    """

    name: str
    level: Health
    what: str
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        """Return the diagnosis for ``--json``."""
        return asdict(self)


def ok(name: str, what: str) -> Diagnosis:
    """Return a diagnosis without a problem."""
    return Diagnosis(name, "ok", what)


def warn(name: str, what: str, fix: str) -> Diagnosis:
    """Return a diagnosis for something that works less well, or only in part."""
    return Diagnosis(name, "warn", what, fix)


def fail(name: str, what: str, fix: str) -> Diagnosis:
    """Return a diagnosis for a problem that prevents runs."""
    return Diagnosis(name, "fail", what, fix)
