"""One file by several paths: the input is not overwritten, and a run is recognised."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiflux.cli.main import main
from aiflux.core.runs.registry import entries
from aiflux.errors import ConfigError
from aiflux.slurm import SlurmRunner
from aiflux.util.files import absolute
from tests.tools.faulty_engine import FaultyEngine
from tests.tools.make_sif import make_sif
from tests.unit.working import Working


@pytest.fixture
def engine() -> Iterator[FaultyEngine]:
    with FaultyEngine() as running:
        yield running


@pytest.fixture
def place(tmp_path: Path, engine: FaultyEngine, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with an input, a directory ``sub``, and a link to itself."""
    place = tmp_path / "real"
    (place / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(place)
    Working(place, engine.url).prompts("one", "two").input.rename(place / "in.jsonl")
    monkeypatch.chdir(place)
    return place


def words(engine: FaultyEngine, source: str, output: str, *more: str) -> list[str]:
    return [source, "-o", output, "--engine-url", engine.url, *more]


@pytest.mark.parametrize(("link", "file"), [("soft.jsonl", "in.jsonl"), ("soft.errors.jsonl", "")])
@pytest.mark.parametrize("command", [["run"], ["run", "--dry-run"], ["estimate"]])
def test_a_link_does_not_hide_that_input_and_output_are_one_file(
    place: Path, engine: FaultyEngine, command: list[str], link: str, file: str
) -> None:
    Path(link).symlink_to("in.jsonl")
    content = (place / "in.jsonl").read_bytes()
    pairs = [("in.jsonl", "soft.jsonl"), *([(link, file)] if file else [])]
    for source, output in pairs:
        assert main([*command, "--force", *words(engine, source, output)]) == 2
    assert main([*command, "--force", *words(engine, "in.jsonl", "in.jsonl")]) == 2
    assert (place / "in.jsonl").read_bytes() == content
    assert not [*place.glob("*.aiflux"), *place.glob("*.pilot*")]


def test_an_output_that_became_a_link_to_the_input_is_not_merged_into_it(
    place: Path, engine: FaultyEngine
) -> None:
    assert main(["run", *words(engine, "in.jsonl", "out.jsonl")]) == 0
    content = Path("in.jsonl").read_bytes()
    Path("out.jsonl").unlink()
    Path("out.jsonl").symlink_to("in.jsonl")
    assert main(["merge", "out.jsonl", "--again"]) == 2
    assert Path("in.jsonl").read_bytes() == content


def test_python_refuses_a_link_to_the_input(place: Path) -> None:
    Path("soft.jsonl").symlink_to("in.jsonl")
    make_sif(place / "aiflux.sif", version="1")
    with pytest.raises(ConfigError, match="same file"):
        SlurmRunner().run("in.jsonl", "soft.jsonl", model="m:1", force=True)


@pytest.mark.parametrize("name", ["in.jsonl", "out.jsonl", "soft"])
def test_a_report_does_not_replace_a_file_of_the_run(
    place: Path, engine: FaultyEngine, name: str
) -> None:
    assert main(["run", *words(engine, "in.jsonl", "out.jsonl")]) == 0
    Path("soft").symlink_to("out.jsonl")
    before = Path(name).read_bytes()
    assert main(["report", "out.jsonl", "--output", name]) == 2
    assert main(["report", "out.jsonl", "--evidence", name, "--unsigned"]) == 2
    assert Path(name).read_bytes() == before


@pytest.mark.parametrize(
    ("folder", "source", "output"),
    [
        ("sub", "../in.jsonl", "../out.json"),
        (".", "sub/../in.jsonl", "sub/../out.json"),
        (".", "../link/in.jsonl", "out.json"),
        ("sub", "../../link/in.jsonl", "../../link/out.json"),
        (".", "hop/../in.jsonl", "hop/../out.json"),
    ],
)
def test_the_same_files_by_another_path_are_the_same_run(
    place: Path,
    engine: FaultyEngine,
    folder: str,
    source: str,
    output: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("hop").symlink_to(place / "sub")  # "hop/.." is this directory, wherever the link is
    assert main(["run", *words(engine, "in.jsonl", "out.json")]) == 0
    done = len(engine.bodies)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    assert main(["run", *words(engine, source, output)]) == 0
    assert "already finished" in capsys.readouterr().out
    assert main(["run", "--force", *words(engine, source, output)]) == 0
    assert "/../" not in capsys.readouterr().out
    assert len(engine.bodies) == 2 * done
    found = entries(os.environ)
    assert [os.path.realpath(entry.run_dir) for entry in found] == [str(place / "out.json.aiflux")]
    assert ".." not in found[0].output.parts


def test_another_input_is_refused_and_the_run_kept(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *words(engine, "in.jsonl", "out.json")]) == 0
    Path("copy.jsonl").write_bytes(Path("in.jsonl").read_bytes())
    assert main(["run", *words(engine, "copy.jsonl", "out.json")]) == 2
    error = capsys.readouterr().err
    assert "belongs to the input" in error
    assert "rm -r" not in error


def test_dots_are_removed_without_changing_the_file(tmp_path: Path) -> None:
    (tmp_path / "far" / "sub").mkdir(parents=True)
    (tmp_path / "hop").symlink_to(tmp_path / "far" / "sub")
    (tmp_path / "far" / "file").write_text("right")
    (tmp_path / "file").write_text("wrong")
    assert absolute(tmp_path / "hop" / ".." / "file") == tmp_path / "far" / "file"
    assert absolute(tmp_path / "far" / ".." / "file") == tmp_path / "file"
    assert absolute(tmp_path / "hop" / "new") == tmp_path / "hop" / "new"
