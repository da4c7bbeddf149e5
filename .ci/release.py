"""Check that this commit can be released, build it in dist, and create its tag (`make release`).

``--check`` only looks: every problem is printed, and the exit code is 1 if there is one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
PACKAGE = "aiflux_app/"
NO_HOMEPAGE = "(none yet)"


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode and arguments[0] != "grep":  # which ends with 1 if it finds nothing
        sys.exit(done.returncode)
    return done.stdout


def found(pattern: str, name: str) -> str:
    match = re.search(pattern, text(name), re.MULTILINE)
    return match[1] if match else ""


def section(version: str) -> str:
    """Return the section of the changelog of a version, with its heading; "" if there is none."""
    return found(rf"^(## {re.escape(version)} - [\s\S]*?)(?=^## |\Z)", "CHANGELOG.md")


def dated(notes: str) -> bool:
    """Return whether a section of the changelog begins with its date and with release notes."""
    match = re.match(r"## \S+ - (\d{4}-\d\d-\d\d)\n+\w", notes)
    try:
        return match is not None and bool(date.fromisoformat(match[1]))
    except ValueError:
        return False


def problems(version: str) -> Iterator[str]:
    if git("status", "--porcelain"):
        yield "there are uncommitted changes -> commit or remove them"
    if found(r"^## Unreleased\n+([^#\s].*|#{3,} .*)", "CHANGELOG.md"):
        yield f"CHANGELOG.md has changes under Unreleased -> move them to {version}"
    newest = found(r"^## (?!Unreleased)(\S+)", "CHANGELOG.md")
    if newest != version:
        yield f"the version is {version}, and the newest in CHANGELOG.md {newest or 'missing'}"
    elif not dated(section(version)):
        yield f"{version} in CHANGELOG.md has no date (YYYY-MM-DD) or no release notes"
    tag = git("tag", "--list", f"v{version}").strip()
    if tag and git("rev-list", "-1", tag) != git("rev-list", "-1", "HEAD"):
        yield f"{tag} is the tag of another commit -> set a new version"
    if not found(r"^maintainers = \[\s*\{[^}]*(email) = \"[^\"]+@", "pyproject.toml"):
        yield 'pyproject.toml names no maintainer -> maintainers = [{name = "...", email = "..."}]'
    for name in git("grep", "-lF", NO_HOMEPAGE, "--", "slurm").splitlines():
        yield f"{name} has no homepage -> replace {NO_HOMEPAGE}"


def build() -> tuple[Path, Path]:
    """Build sdist and wheel, and return them; the times in them are that of the commit."""
    shutil.rmtree(DIST, ignore_errors=True)
    environ = {**os.environ, "SOURCE_DATE_EPOCH": git("log", "-1", "--format=%ct").strip()}
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel"]
    subprocess.run(command, cwd=ROOT, env=environ, check=True)
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path, version: str) -> None:
    """Compare both with the files that git tracks, and run the command of the wheel."""
    tracked = set(git("ls-files", "--", PACKAGE).splitlines())
    with zipfile.ZipFile(wheel) as file:
        inside = {PACKAGE + name for name in file.namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()} - {"PKG-INFO", ".gitignore"}
    others = {"README.md", "CHANGELOG.md", "SECURITY.md", "LICENSE", "pyproject.toml"}
    for path, differs in ((wheel, inside ^ tracked), (sdist, names ^ tracked ^ others)):
        if differs:
            sys.exit(f"error: {path} has other files than the repository: {sorted(differs)}")
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True)
        command = [Path(folder, "bin", "aiflux"), "--version"]
        shown = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
    if shown.stdout.strip() != f"aiflux {version}":
        sys.exit(f"error: the command of {wheel} is {shown.stdout.strip()}, not {version}")


def main() -> None:
    version = found(r'^__version__ = "(.*)"', "aiflux_app/aiflux/__init__.py")
    if wrong := [*problems(version)]:
        sys.exit("\n".join(f"error: {problem}" for problem in wrong))
    if "--check" in sys.argv:
        return
    subprocess.run(["make", "-s", "lint", "docs"], cwd=ROOT, check=True)
    sdist, wheel = build()
    check_contents(sdist, wheel, version)
    if not git("tag", "--list", f"v{version}"):
        notes = re.split(r"^##+ .*\n", section(version), flags=re.MULTILINE)[1]
        git("tag", "--annotate", f"v{version}", "--message", f"AI-Flux {version}\n\n{notes}")
    print(f"v{version} is tagged, and built: {sdist} {wheel}")


if __name__ == "__main__":
    main()
