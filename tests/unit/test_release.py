"""`make release` refuses a commit that is not ready."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aiflux import __version__

ROOT = Path(__file__).parents[2]
FILES = ("aiflux_app/aiflux/__init__.py", ".ci/release.py")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository that is ready for a release."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "pyproject.toml").write_text(
        'maintainers = [{name = "Ann", email = "ann@example.org"}]\n'
    )
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "package.py").write_text('homepage = "https://example.org"\n')
    changes = f"# Changelog\n\n## Unreleased\n\n## {__version__} - 2026-11-28\n\nNotes.\n"
    (tmp_path / "CHANGELOG.md").write_text(changes)
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def git(folder: Path, *arguments: str) -> None:
    names = ["-c", "user.name=Ann", "-c", "user.email=ann@example.org"]
    subprocess.run(["git", *names, *arguments], cwd=folder, check=True)


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "Change")


def check(folder: Path) -> str:
    command = [sys.executable, ".ci/release.py", "--check"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) is bool(done.stderr), done
    return done.stderr


def test_a_commit_that_is_ready_passes(checkout: Path) -> None:
    assert check(checkout) == ""
    git(checkout, "tag", f"v{__version__}")
    assert check(checkout) == "", "the tag may be of this commit"


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("pyproject.toml", '{name = "Ann", email = "ann@example.org"}', "{}", "no maintainer"),
        (
            "slurm/package.py",
            "https://example.org",
            "(none yet)",
            "slurm/package.py has no homepage",
        ),
        ("CHANGELOG.md", "Unreleased\n", "Unreleased\n\n### Fixed\n", "changes under Unreleased"),
        ("CHANGELOG.md", " - 2026-11-28", "", "has no date"),
        ("CHANGELOG.md", " - 2026-11-28", " - 2026-99-99", "has no date"),
        ("CHANGELOG.md", "Notes.", "### Added", "or no release notes"),
        ("CHANGELOG.md", f"## {__version__}", "## 0.0.1", "the newest in CHANGELOG.md 0.0.1"),
    ],
)
def test_what_is_missing_is_named(
    checkout: Path, name: str, old: str, new: str, problem: str
) -> None:
    path = checkout / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    commit(checkout)
    shown = check(checkout)
    assert problem in shown
    assert len(shown.splitlines()) == 1


def test_uncommitted_changes_and_the_tag_of_another_commit_are_refused(checkout: Path) -> None:
    git(checkout, "tag", f"v{__version__}")
    commit(checkout)
    (checkout / "new").touch()
    uncommitted, tag = check(checkout).splitlines()
    assert "uncommitted" in uncommitted
    assert "tag of another commit" in tag
