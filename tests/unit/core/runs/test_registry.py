"""The registry of runs: concurrent writers, foreign files, and homes that cannot be written."""

from __future__ import annotations

import json
import multiprocessing
import re
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.registry import entries, find_run, folder, forget_gone, register, with_job
from aiflux.errors import RunConflictError, UsageError
from aiflux.slurm.jobs import known_submissions, read_submissions
from tests.unit.helpers import await_next_time
from tests.unit.made_runs import MadeRun


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path / "home")}


def remember(made: MadeRun, environ: dict[str, str], *jobs: str) -> str | None:
    plan = made.plan
    return register(
        *(made.run.path, plan.output, jobs, environ),
        input=plan.input_path,
        models=plan.models,
        requests=plan.requests,
    )


def test_a_run_is_remembered_with_all_its_jobs(awkward: Path, environ: dict[str, str]) -> None:
    made = MadeRun(awkward)
    assert remember(made, environ, "7") is None
    assert remember(made, environ, "8;c", "7") is None
    (entry,) = entries(environ)
    assert (entry.run_dir, entry.output) == (made.run.path, made.output)
    assert entry.input == made.plan.input_path
    assert (entry.models, entry.requests) == (made.plan.models, 100)
    assert entry.jobs == ("7", "8;c")
    assert not entry.gone


def test_without_xdg_the_registry_is_in_the_home_directory(tmp_path: Path) -> None:
    assert folder({"HOME": "/h"}) == Path("/h/.local/state/aiflux/runs")
    assert folder({"HOME": "/h", "XDG_STATE_HOME": "relative"}) == folder({"HOME": "/h"})


def _register_many(number: int, environ: dict[str, str]) -> None:
    own = Path(environ["HOME"]) / f"run-{number}.aiflux"
    shared = Path(environ["HOME"]) / "shared.aiflux"
    for turn in range(10):
        assert register(own, own, [f"{number + 1}{turn}"], environ) is None
        assert register(shared, shared, [f"9{number}"], environ) is None
        assert all(entry.jobs for entry in entries(environ))


def test_entries_of_twenty_concurrent_processes_are_kept(environ: dict[str, str]) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_register_many, args=(n, environ)) for n in range(20)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 20
    known = entries(environ)
    assert len(known) == 21
    assert all(len(entry.jobs) == 10 for entry in known if "shared" not in str(entry.run_dir))
    assert not [path for path in folder(environ).iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[]", b"{}", b'{"run_dir": 3}', b"[" * 100000, b"null"]
)
def test_foreign_files_are_skipped(tmp_path: Path, environ: dict[str, str], content: bytes) -> None:
    made = MadeRun(tmp_path / "r")
    remember(made, environ, "7")
    (own,) = folder(environ).iterdir()
    (folder(environ) / "foreign.json").write_bytes(content)
    (folder(environ) / "copy.json").write_bytes(own.read_bytes())
    (folder(environ) / "a.json").mkdir()
    assert [entry.run_dir for entry in entries(environ)] == [made.run.path]
    own.write_bytes(content)
    assert entries(environ) == []
    assert remember(made, environ, "8") is None
    assert with_job("8", environ) is not None


def test_a_home_that_cannot_be_written_causes_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environ = {"XDG_STATE_HOME": str(tmp_path / "file")}
    warning = remember(MadeRun(tmp_path / "r"), environ, "7")
    assert warning is not None
    assert str(tmp_path / "r") in warning
    assert entries(environ) == []
    assert with_job("7", environ) is None


def test_deleted_runs_are_forgotten_on_demand(tmp_path: Path, environ: dict[str, str]) -> None:
    made = MadeRun(tmp_path / "r")
    remember(made, environ, "7")
    register(tmp_path / "gone.aiflux", tmp_path / "gone", ["8"], environ)
    assert {entry.gone for entry in entries(environ)} == {False, True}
    assert [entry.jobs for entry in forget_gone(environ)] == [("8",)]
    assert [entry.jobs for entry in entries(environ)] == [("7",)]


def test_a_job_id_belongs_to_the_newest_run(tmp_path: Path, environ: dict[str, str]) -> None:
    first, second = MadeRun(tmp_path / "1"), MadeRun(tmp_path / "2")
    remember(first, environ, "7;a", "8")
    await_next_time()
    remember(second, environ, "7;b")
    for text, made in {"7": second, "7;a": first, "7_3": second, "8_0": first}.items():
        entry = with_job(text, environ)
        assert entry is not None, text
        assert entry.run_dir == made.run.path, text
    for text in ("9", "7;c", "x", "70"):
        assert with_job(text, environ) is None


def test_a_run_is_found_by_its_paths(
    awkward: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MadeRun(awkward)
    run = made.run
    made.log("slurm-7.out", "")
    monkeypatch.chdir(awkward)
    names = [
        *("results.json", "results.json.aiflux", "./results.json.aiflux/plan.json"),
        *(str(run.path), str(run.plan), str(run.logs), str(run.logs / "slurm-7.out")),
    ]
    for name in names:
        assert find_run(name, environ).path == run.path, name
    made.output.write_text("[]")
    assert find_run(str(made.output), environ).path == run.path


def test_a_run_is_found_by_its_jobs(tmp_path: Path, environ: dict[str, str]) -> None:
    made = MadeRun(tmp_path / "r")
    remember(made, environ, "7", "8")
    for text in ("7", " 7 ", "7_4", "7,8", "8"):
        assert find_run(text, environ).path == made.run.path, text


def test_a_path_wins_over_a_job(
    tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MadeRun(tmp_path / "r")
    remember(made, environ, "7")
    other = MadeRun(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    other.run.path.rename(tmp_path / "7")
    assert find_run("7", environ).path == tmp_path / "7"


def test_slurm_finds_the_run_of_a_job_that_is_not_registered(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    made = MadeRun(tmp_path / "r")
    asked: list[str] = []

    def ask(text: str) -> Path | None:
        asked.append(text)
        return made.run.path

    assert find_run("12_3", environ, ask).path == made.run.path
    assert asked == ["12_3"]
    remember(made, environ, "12")
    assert find_run("12_3", environ, ask).path == made.run.path
    assert asked == ["12_3"]


@pytest.mark.parametrize(
    "text", ["", "nowhere.json", "0", "-1", "99", "12x", "/", "~", "~nobody-at-all"]
)
def test_a_name_of_no_run_is_refused(
    tmp_path: Path, environ: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        find_run(text, environ, lambda _: None)
    assert "aiflux jobs" in str(caught.value.remedy)


def test_a_job_of_a_deleted_run_names_its_directory(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    register(tmp_path / "gone.aiflux", tmp_path / "gone", ["8"], environ)
    with pytest.raises(UsageError, match=r"gone\.aiflux"):
        find_run("8", environ)


def test_an_entry_is_json_that_others_can_read(tmp_path: Path, environ: dict[str, str]) -> None:
    made = MadeRun(tmp_path / "r")
    remember(made, environ, "7")
    (file,) = folder(environ).iterdir()
    content = json.loads(file.read_text())
    assert content["run_dir"] == str(made.run.path)
    assert content["jobs"] == ["7"]
    assert file.stat().st_mode & 0o077 == 0


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ENTRY = ["run_dir", "output", "input", "models", "requests", "submitted", "jobs", "host"]
JOB_FILE = ["image", "slurm", "submissions"]
SUBMISSION = ["submitted", "cluster", "jobs", "log"]
JOB_FIELDS = ["job_id", "array", "first", "shards"]


def some(names: list[str], **usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({name: usual.get(name, ANY_JSON) | ANY_JSON for name in names})


JOBS = some(JOB_FIELDS, job_id=st.just("7"), first=st.just(0), shards=st.just([0]))
RECORDS = some(
    JOB_FILE,
    image=st.just("/i.sif"),
    slurm=st.just({}),
    submissions=st.lists(some(SUBMISSION, jobs=st.lists(JOBS, max_size=2), log=st.just("/l"))),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ANY_JSON | some(ENTRY, run_dir=st.text()))
def test_any_json_in_the_registry_is_an_entry_or_skipped(tmp_path: Path, content: object) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path)}
    place = folder(environ)
    place.mkdir(parents=True, exist_ok=True)
    named = content["run_dir"] if isinstance(content, dict) and "run_dir" in content else "/x"
    raw = str(named).encode("utf-8", "surrogatepass")
    (place / f"{blake2b(raw, digest_size=12).hexdigest()}.json").write_text(json.dumps(content))
    for entry in entries(environ):
        assert isinstance(entry.gone, bool)
    with_job("7", environ)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ANY_JSON | RECORDS)
def test_any_json_in_jobs_json_is_read_or_refused(tmp_path: Path, content: Any) -> None:
    run = RunDirectory(tmp_path)
    run.submissions.write_text(json.dumps(content), encoding="utf-8")
    found = known_submissions(run)
    for submission in () if found is None else found.submissions:
        for id_ in submission.ids:
            assert re.fullmatch(r"[1-9]\d*(;[^\s;,]+)?", str(id_)), "never an option of scancel"


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "\0", "1e999"])
def test_files_with_random_bytes_are_skipped(tmp_path: Path, content: str) -> None:
    run = RunDirectory(tmp_path)
    run.submissions.write_text(content, encoding="utf-8")
    assert known_submissions(run) is None
    with pytest.raises(RunConflictError, match="is damaged"):
        read_submissions(run)
