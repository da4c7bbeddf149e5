"""The website and the man pages are built from the pages without a warning."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from docs import site

from aiflux import __version__
from tests.unit.command_line import commands


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    for name in ("0.9.0", "0.10.0", "assets"):
        (folder / name).mkdir()
        (folder / name / "index.html").write_text("earlier", encoding="utf-8")
    return site.build_site(folder)


def test_every_page_is_on_the_website_and_can_be_searched(built: Path) -> None:
    for name in site.PAGES:
        page = built / name.replace("README.md", "index.md").replace(".md", ".html")
        assert page.is_file(), page
    text = (built / "index.html").read_text(encoding="utf-8")
    assert 'data-md-component="search"' in text
    assert not re.search(r"(src|href)=.?https?:", text), "a page loads nothing from elsewhere"
    assert (built / "slurm" / "sites" / "gpus.yaml").is_file()
    assert "Rscript analyse.R" in (built / "search" / "search_index.json").read_text(
        encoding="utf-8"
    )


def test_steps_are_one_list_with_their_commands(built: Path) -> None:
    page = (built / "index.html").read_text(encoding="utf-8")
    (steps,) = re.findall(r"<ol>(.*?)</ol>", page, re.DOTALL)
    assert steps.count("<li>") == 6
    assert steps.count("<code>") > 6
    page = (built / "docs" / "models.html").read_text(encoding="utf-8")
    assert re.search(r"<li>(?:(?!</li>).)*<ul>", page, re.DOTALL)


def test_each_version_has_its_folder_and_lists_the_others(built: Path) -> None:
    assert built.name == __version__
    listed = json.loads((built.parent / "versions.json").read_text(encoding="utf-8"))
    assert [entry["version"] for entry in listed] == [__version__, "0.10.0", "0.9.0"]
    first = (built.parent / "index.html").read_text(encoding="utf-8")
    assert f"url={__version__}/index.html" in first
    assert '"version": {"provider": "mike"}' in (built / "index.html").read_text(encoding="utf-8")
    assert (built.parent / "0.9.0" / "index.html").read_text(encoding="utf-8") == "earlier"


def test_a_broken_link_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in site.PAGES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("# Page\n", encoding="utf-8")
    shutil.copy(site.ROOT / "docs" / "mkdocs.yml", tmp_path / "docs")
    monkeypatch.setattr(site, "ROOT", tmp_path)
    site.build_site(tmp_path / "site")
    for link in ("gone.md", "faq.md#gone", "../gone.yaml"):
        (tmp_path / "docs" / "slurm.md").write_text(f"# Page\n[a]({link})\n", encoding="utf-8")
        with pytest.raises(subprocess.CalledProcessError):
            site.build_site(tmp_path / "site")


def test_every_command_has_a_man_page_that_can_be_read(tmp_path: Path) -> None:
    site.build_man(tmp_path)
    names = {ctx.command_path.replace(" ", "-") for ctx in commands()} | {"aiflux"}
    assert {path.stem for path in (tmp_path / "man1").iterdir()} == names
    text = (tmp_path / "man1" / "aiflux-run.1").read_text(encoding="utf-8")
    assert text.startswith('.TH "AIFLUX-RUN" 1')
    assert "\\-\\-after" in text
    if shutil.which("groff"):
        shown = subprocess.run(
            ["groff", "-man", "-Tutf8", "-ww", *(tmp_path / "man1").iterdir()],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert shown.stderr == ""
