"""Reads which Debian mirror and suite this machine's own apt uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

APT = Path("/etc/apt")


@dataclass(frozen=True)
class AptSource:
    """One place to install from."""

    mirror: str
    suite: str


def find_source(apt: Path = APT) -> AptSource | None:
    """The first source of a whole release (not its updates), or None where there is no apt."""
    for source in _all_sources(apt):
        if source.mirror.startswith(("http://", "https://")) and _is_release(source.suite):
            return source
    return None


def _is_release(suite: str) -> bool:
    return "-" not in suite and "/" not in suite


def _all_sources(apt: Path) -> Iterator[AptSource]:
    for path in [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*.list"))]:
        if path.is_file():
            yield from _one_line_sources(path.read_text(encoding="utf-8", errors="replace"))
    for path in sorted((apt / "sources.list.d").glob("*.sources")):
        yield from _deb822_sources(path.read_text(encoding="utf-8", errors="replace"))


def _one_line_sources(text: str) -> Iterator[AptSource]:
    """``deb [options] URI SUITE main ...``; see sources.list(5)."""
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        if kind != "deb":
            continue
        if rest.lstrip().startswith("["):
            rest = rest.partition("]")[2]
        words = rest.split()
        if len(words) >= 3 and "main" in words[2:]:
            yield AptSource(words[0], words[1])


def _deb822_sources(text: str) -> Iterator[AptSource]:
    """Stanzas of ``Types``, ``URIs``, ``Suites`` and ``Components``; see sources.list(5)."""
    for stanza in text.split("\n\n"):
        fields = dict(_fields(stanza))
        if "deb" not in fields.get("types", []) or "main" not in fields.get("components", []):
            continue
        if fields.get("enabled", ["yes"]) == ["no"]:
            continue
        for mirror in fields.get("uris", []):
            for suite in fields.get("suites", []):
                yield AptSource(mirror, suite)


def _fields(stanza: str) -> Iterator[tuple[str, list[str]]]:
    for line in stanza.splitlines():
        name, colon, value = line.partition(":")
        if colon and not line.startswith(("#", " ", "\t")):
            yield name.strip().lower(), value.split()
