"""An output that was changed after its run wrote it: noticed, and restored from the journal."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiflux.cli.main import main
from aiflux.core.batch.results_file import output_paths
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import Counts, finished_counts
from aiflux.errors import OutputExistsError
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.working import Working


@pytest.fixture(scope="module", params=["out.json", "out.jsonl"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Working:
    """A finished run; one of its requests failed."""
    folder = tmp_path_factory.mktemp("changed")
    with FaultyEngine() as engine:
        working = Working(folder, engine.url, request.param).prompts("one", "400", "two", "three")
        working.run()
    return working


@pytest.fixture
def whole(run: Working) -> Iterator[dict[Path, bytes]]:
    """The output's files as the run wrote them; restored at the end."""
    files = [path for path in output_paths(run.output) if path.exists()]
    moments = {path: path.stat() for path in files}
    content = {path: path.read_bytes() for path in files}
    yield content
    for path, data in content.items():
        path.write_bytes(data)
        os.utime(path, ns=(moments[path].st_atime_ns, moments[path].st_mtime_ns))


def counts_of(run: Working) -> Counts | None:
    directory = RunDirectory.of_output(run.output)
    return finished_counts(read_plan(directory), directory)


@given(st.data())
def test_any_change_is_detected(run: Working, data: st.DataObject) -> None:
    written = {path: path.read_bytes() for path in output_paths(run.output) if path.exists()}
    path = data.draw(st.sampled_from(list(written)))
    before = written[path]
    start = data.draw(st.integers(0, len(before)))
    end = data.draw(st.integers(start, len(before)))
    after = before[:start] + data.draw(st.binary(max_size=4)) + before[end:]
    moment = path.stat().st_mtime_ns
    try:
        path.write_bytes(after)
        if after == before:  # only its time changed
            assert counts_of(run) == Counts(4, 3, 1)
            return
        with pytest.raises(OutputExistsError, match="its output was changed"):
            counts_of(run)
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(moment, moment))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def edit(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"e", b"E", 1))


def command(run: Working, *words: str) -> list[str]:
    engine = ["--engine-url", str(run.options["engine_url"])]
    if words[0] == "run":
        return ["run", *engine, "--input", str(run.input), "--output", str(run.output), *words[1:]]
    return [*words, str(run.output)]


@pytest.mark.parametrize("change", [cut, edit])
@pytest.mark.parametrize("which", [0, -1])
def test_the_commands_that_call_it_finished_name_the_change_and_what_restores_it(
    run: Working, whole: dict[Path, bytes], change: Callable[[Path], None], which: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    changed = list(whole)[which]
    change(changed)
    damaged = changed.read_bytes()
    for words in (["run"], ["merge"], ["resume"], ["results", "to-jsonl"], ["results", "show"]):
        assert main(command(run, *words)) == 2, words
        printed = capsys.readouterr()
        assert printed.out == "", words
        assert f"its output was changed: {changed} " in printed.err, words
        assert f"aiflux merge --again {run.output}" in printed.err, words
    assert main(command(run, "status", "--json")) == 0
    view = json.loads(capsys.readouterr().out)
    assert view["state"] == "output changed"
    assert view["next_command"] == f"aiflux merge --again {run.output}"
    assert view["output_change"].startswith(f"{changed} ")
    assert main(command(run, "status")) == 0
    assert f"{changed} " in capsys.readouterr().out
    assert main(command(run, "report")) == 0
    assert capsys.readouterr().out.startswith("output changed: wrote ")
    assert changed.read_bytes() == damaged
    assert main(["merge", "--again", str(run.output)]) == 3  # one request failed
    assert {path: path.read_bytes() for path in whole} == whole
    assert main(command(run, "merge")) == 3
    assert "already finished" in capsys.readouterr().out


def test_a_missing_output_is_written_again(
    run: Working, whole: dict[Path, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in whole:
        path.unlink()
        assert main(command(run, "status", "--json")) == 0
        assert json.loads(capsys.readouterr().out)["state"] == "not merged"
        assert main(command(run, "merge")) == 3
        capsys.readouterr()
        assert {each: each.read_bytes() for each in whole} == whole


def test_a_file_of_failures_that_the_run_did_not_write_is_reported(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, "out.jsonl").prompts("one")
        assert working.run() == 0
    (tmp_path / "out.errors.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(OutputExistsError, match=r"out\.errors\.jsonl was not made by the run"):
        counts_of(working)
