"""`aiflux.run` and `Run`: real processes in the background, a real server, a fake Slurm."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import reduce
from importlib.util import find_spec
from pathlib import Path

import pytest
from pyarrow import parquet

import aiflux
from aiflux import Run, RunState
from aiflux.cli.main import main
from aiflux.converters.results import BackOptions, results_to_parquet
from aiflux.core.config.sources import ModelConfig
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.local_process import LocalProcess, read_process, write_process
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import Status
from aiflux.errors import (
    AifluxError,
    ConfigError,
    ImageError,
    InputError,
    ModelError,
    OutputExistsError,
    RunConflictError,
    UsageError,
)
from aiflux.slurm.run_view import RunView
from tests.conftest import LEFT_OUT
from tests.tools import make_tiny_gguf
from tests.tools.faulty_engine import FaultyEngine
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import FakeCommands, waiting_slurm
from tests.unit.helpers import request_line, write_input, write_program
from tests.unit.made_runs import ELSEWHERE, MadeRun

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def place(awkward: Path) -> Iterator[Path]:
    """A workspace; what still works on its runs at the end is killed."""
    write_input(awkward / "in.jsonl", 4)
    yield awkward
    for run in awkward.rglob("*.aiflux"):
        process = read_process(RunDirectory(run))
        while process is not None and process.lives:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.01)


@pytest.fixture
def engine() -> Iterator[FaultyEngine]:
    with FaultyEngine() as engine:
        yield engine


def write_prompts(path: Path, *prompts: str) -> Path:
    """Write a request for each prompt: `r0`, `r1`, ..."""
    lines = [
        request_line(f"r{at}", body={"messages": [{"role": "user", "content": prompt}]})
        for at, prompt in enumerate(prompts)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def start(place: Path, engine: FaultyEngine, **options: object) -> Run:
    settings = {"engine_url": engine.url, "model": "m:1", **options}
    return aiflux.run("in.jsonl", "out.json", workspace=place, **settings)  # type: ignore[arg-type]


def until(run: Run, true: Callable[[RunView], bool]) -> RunView:
    """Wait for a status."""
    end = time.monotonic() + 60
    while not true(view := run.status()):
        assert time.monotonic() < end, view
        time.sleep(0.02)
    return view


def pid_of(run: Run) -> int:
    process = read_process(run.directory)
    assert process is not None
    return process.pid


def test_a_run_from_its_start_to_its_results(place: Path, engine: FaultyEngine) -> None:
    write_prompts(place / "in.jsonl", "a", "b 400", "c")
    run = start(place, engine)
    assert not run.status().ended
    view = run.wait(progress=False)
    assert view.state is RunState.WITH_FAILURES
    assert (view.finished, view.total, view.done, view.failed) == (True, 3, 3, 1)
    assert str(view) == "finished with failures: 3/3 done (100 %), 1 failed"
    first, second, third = run.results()
    assert [each.custom_id for each in (first, second, third)] == ["r0", "r1", "r2"]
    assert first.input is not None
    assert first.input["body"]["messages"][0]["content"] == "a"
    assert first.output["choices"][0]["message"]["content"] == first.text == "echo a"
    assert first.error is None
    assert first.metadata["model"] == "m:1"
    assert second.output is None
    assert second.error is not None
    assert second.failure.startswith("http_400: ")
    assert second.text == ""
    assert run.report().read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    sent = len(engine.bodies)
    assert start(place, engine) == run
    assert run.wait(progress=False) == run.status() == view
    assert not run.cancel()
    assert len(engine.bodies) == sent, "a finished run is returned as it is"


def test_a_run_outlives_the_program_that_started_it(place: Path, engine: FaultyEngine) -> None:
    engine.delay = 0.5
    code = (
        "import aiflux, sys; run = aiflux.run('in.jsonl', 'out.json', model='m:1', "
        "engine_url=sys.argv[1]); print(run.path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, engine.url],
        cwd=place, capture_output=True, text=True, check=True, start_new_session=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (f"{place / 'out.json.aiflux'}\n", "")
    run = Run.open(place / "out.json")
    process = read_process(run.directory)
    assert process is not None
    assert process.lives
    assert os.getsid(process.pid) == process.pid
    assert os.readlink(f"/proc/{process.pid}/fd/0") == os.devnull
    assert run.wait(progress=False).state is RunState.FINISHED


def test_nothing_of_the_calling_process_is_changed(
    place: Path, engine: FaultyEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    numbers = signal.valid_signals()

    def state() -> tuple[object, ...]:
        handlers = [signal.getsignal(number) for number in numbers]
        return handlers, Path.cwd(), dict(os.environ), threading.active_count()

    before = state()
    run = start(place, engine)
    run.wait(progress=False)
    list(run.results())
    end = time.monotonic() + 10
    while state() != before:  # a thread waits for the process
        assert time.monotonic() < end, (state(), before)
        time.sleep(0.01)
    assert capfd.readouterr() == ("", "")
    assert not Path(f"/proc/{pid_of(run)}").exists(), "no zombie is left"


def test_the_key_is_on_no_command_line_and_in_no_file(
    place: Path, engine: FaultyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIFLUX_API_KEY", "secret-key")
    engine.delay = 0.5
    run = start(place, engine)
    command = Path(f"/proc/{pid_of(run)}/cmdline").read_bytes()
    assert b"aiflux.worker" in command
    assert b"secret" not in command
    assert run.wait(progress=False).finished
    assert engine.headers[0]["Authorization"] == "Bearer secret-key"
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"secret" in path.read_bytes()]


def test_a_killed_process_is_noticed_and_the_same_call_resumes(
    place: Path, engine: FaultyEngine
) -> None:
    write_prompts(place / "in.jsonl", "a", "b", "hang*1")
    run = start(place, engine, save_frequency=1)
    view = until(run, lambda view: view.done == 2)
    assert view.state is RunState.RUNNING
    os.kill(pid_of(run), signal.SIGKILL)
    view = run.wait(timeout=10, progress=False)
    assert view.state is RunState.LOST
    assert view.shards[0].reason == "its process is gone"
    assert start(place, engine, save_frequency=1) == run
    assert run.wait(progress=False).state is RunState.FINISHED
    assert engine.seen["a"] == engine.seen["b"] == 1, "what was done is not sent again"


def test_a_process_that_ends_before_it_works_is_noticed(place: Path, engine: FaultyEngine) -> None:
    run = start(place, engine)
    os.kill(pid_of(run), signal.SIGKILL)
    view = run.wait(timeout=10, progress=False)
    assert view.state is RunState.FAILED
    assert view.shards[0].reason.startswith("its process ended before the work began; see ")
    assert str(run.path / "logs" / "local.log") in view.shards[0].reason
    assert start(place, engine).wait(progress=False).state is RunState.FINISHED


def test_cancelling_keeps_what_is_done(place: Path, engine: FaultyEngine) -> None:
    write_prompts(place / "in.jsonl", "a", "hang*1", "c")
    run = start(place, engine, drain_seconds=0)
    until(run, lambda view: view.done == 2)
    assert run.cancel()
    view = run.wait(timeout=20, progress=False)
    assert (view.state, view.done) == (RunState.STOPPED, 2)
    assert "SIGTERM" in view.shards[0].reason
    assert not run.cancel()
    with pytest.raises(InputError, match="not finished"):
        run.results()
    assert [each.custom_id for each in run.results(partial=True)] == ["r0", "r2"]
    assert start(place, engine).wait(progress=False).state is RunState.FINISHED
    assert engine.seen["a"] == 1


def test_merge_of_an_unfinished_run_says_how_to_get_the_results(
    place: Path, engine: FaultyEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prompts(place / "in.jsonl", "a", "hang")
    run = start(place, engine, drain_seconds=0)
    until(run, lambda view: view.done == 1)
    for remedy in ("wait for it: aiflux watch", "continue it: aiflux resume"):
        assert main(["merge", str(run.output)]) == 5
        text = capsys.readouterr().err
        assert remedy in text
        assert "aiflux merge --partial" in text
        run.cancel()
        run.wait(timeout=20, progress=False)


def test_cancelling_at_once_stops_the_start(place: Path, engine: FaultyEngine) -> None:
    run = start(place, engine)
    assert run.cancel()
    view = run.wait(timeout=20, progress=False)
    assert view.state is RunState.STOPPED
    assert engine.bodies == []
    assert start(place, engine).wait(progress=False).state is RunState.FINISHED


def test_waiting_can_end_before_the_run(place: Path, engine: FaultyEngine) -> None:
    write_prompts(place / "in.jsonl", "a", "hang*1")
    run = start(place, engine)
    began = time.monotonic()
    view = run.wait(timeout=0.3, progress=False)
    assert 0.3 <= time.monotonic() - began < 5
    assert not view.ended
    assert not run.wait(timeout=0, progress=False).ended
    until(run, lambda view: view.done == 1)
    assert [each.text for each in run.results(partial=True)] == ["echo a"]


def test_interrupting_the_wait_leaves_the_run(
    place: Path, engine: FaultyEngine, request: pytest.FixtureRequest
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))  # type: ignore[arg-type]
    engine.delay = 1.0
    run = start(place, engine)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run.wait(progress=False)
    assert run.wait(progress=False).state is RunState.FINISHED


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temprature": 1}, ConfigError, "'temprature'"),
        ({"temperature": "hot"}, ConfigError, "temperature"),
        ({"local": True}, UsageError, "local and engine_url"),
        ({"output": "out.txt"}, ConfigError, "out.txt"),
        ({"output": "in.jsonl"}, ConfigError, "same file"),
        ({"input": "bad.jsonl"}, InputError, "bad.jsonl"),
        ({"input": "nowhere.jsonl"}, InputError, "nowhere.jsonl"),
        ({"input": ["a"], "output": None}, UsageError, "no default for the output"),
        ({"input": ["a", 7]}, InputError, "request 2"),
        ({"input": []}, InputError, "out.json.input.jsonl"),
        ({"output": "there.json"}, OutputExistsError, "there.json"),
        ({"mem": "1G", "memory": "2G"}, ConfigError, "names of one setting"),
        ({"nodes_per_engine": 2}, ConfigError, "nodes_per_engine"),
        ({"input": {"custom_id": "a", "body": {}}}, InputError, "dict is neither"),
        ({"input": b"a"}, InputError, "bytes is neither"),
        ({"input": None}, InputError, "NoneType is neither"),
        (
            {"input": [{"body": reduce(lambda inner, _: [inner], range(100_000), [])}]},
            InputError,
            "request 1",
        ),
    ],
)
def test_what_is_wrong_is_raised_before_anything_starts(
    place: Path, options: dict[str, object], error: type[AifluxError], message: str
) -> None:
    (place / "bad.jsonl").write_text("{}\n")
    (place / "there.json").write_text("mine")
    given = {"input": "in.jsonl", "output": "out.json", "model": "m:1",
             "engine_url": "http://127.0.0.1:1", **options}  # fmt: skip
    with pytest.raises(error, match=message):
        aiflux.run(workspace=place, **given)  # type: ignore[arg-type]
    assert not list(place.glob("*.aiflux"))
    assert (place / "there.json").read_text() == "mine"


@pytest.mark.parametrize("more", [{"model": None}, {"engine_url": "serve:none"}])
def test_requests_that_are_refused_leave_no_file(
    place: Path, engine: FaultyEngine, more: dict[str, object]
) -> None:
    settings = {"engine_url": engine.url, "model": "m:1", **more}
    with pytest.raises(UsageError):
        aiflux.run(["secret"], "out.json", workspace=place, **settings)  # type: ignore[arg-type]
    assert [path.name for path in place.iterdir()] == ["in.jsonl"]


def test_an_unknown_name_of_serve_is_refused_before_anything_is_written(
    place: Path, engine: FaultyEngine
) -> None:
    with pytest.raises(UsageError, match="no engine is served as 'none'"):
        start(place, engine, engine_url="serve:none")
    assert not [*place.glob("*.aiflux")]


def test_a_run_that_something_works_on_is_not_started_again(
    place: Path, engine: FaultyEngine
) -> None:
    write_prompts(place / "in.jsonl", "hang*1", "b")
    run = start(place, engine)
    with pytest.raises(RunConflictError, match=f"process {pid_of(run)} on "):
        start(place, engine)
    until(run, lambda view: view.done == 1)
    with pytest.raises(RunConflictError, match=f"process {pid_of(run)} on "):
        start(place, engine, force=True)
    assert run.cancel()


def test_of_several_threads_one_starts_the_run(place: Path, engine: FaultyEngine) -> None:
    engine.delay = 0.5

    def attempt(_: int) -> Run | AifluxError:
        try:
            return start(place, engine)
        except AifluxError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(attempt, range(4)))
    runs = [each for each in outcomes if isinstance(each, Run)]
    errors = [each for each in outcomes if not isinstance(each, Run)]
    assert len(runs) == 1
    assert all(isinstance(each, RunConflictError) for each in errors)
    assert runs[0].wait(progress=False).state is RunState.FINISHED
    assert len(engine.bodies) == 4


def test_several_runs_in_threads(place: Path, engine: FaultyEngine) -> None:
    def work(number: int) -> list[str]:
        run = aiflux.run(
            [f"prompt {number}"], f"out {number}.json", model="m:1", engine_url=engine.url,
            workspace=place,
        )  # fmt: skip
        run.wait(progress=False)
        return [result.text for result in run.results()]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [[f"echo prompt {each}"] for each in range(3)]


def test_prompts_and_requests_are_kept_next_to_the_output(
    place: Path, engine: FaultyEngine
) -> None:
    request = {
        "custom_id": "mine",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "ü"}]},
    }

    def begin(*requests: object, **more: object) -> Run:
        settings = {"engine_url": engine.url, "model": "m:1", **more}
        return aiflux.run(iter(requests), "o.jsonl", workspace=place, **settings)  # type: ignore[arg-type]

    run = begin("a", request)
    kept = place / "o.jsonl.input.jsonl"
    assert [json.loads(line)["custom_id"] for line in kept.read_text().splitlines()] == [
        "row-1", "mine",
    ]  # fmt: skip
    assert run.wait(progress=False).finished
    assert [(each.custom_id, each.text) for each in run.results()] == [
        ("row-1", "echo a"), ("mine", "echo ü"),
    ]  # fmt: skip
    before = kept.stat()
    assert begin("a", request).wait(progress=False).finished
    assert kept.stat() == before
    with pytest.raises(OutputExistsError):
        begin("b")
    assert kept.stat() == before, "the input of finished results is kept"
    run = begin("a", request, "hang*1", force=True)
    content = kept.read_bytes()
    with pytest.raises(RunConflictError):
        begin("b", force=True)
    assert kept.read_bytes() == content, "the input of a run that continues is kept"
    until(run, lambda view: view.done == 2)
    assert run.cancel()
    assert engine.seen["a"] == 1


def test_a_run_is_found_again_by_each_of_its_names(
    place: Path, engine: FaultyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(place, engine)
    monkeypatch.chdir(place)
    names = ("out.json", Path("out.json"), "out.json.aiflux", run.path, run.path / "plan.json", run)
    assert {aiflux.open_run(name) for name in names} == {run}
    with pytest.raises(UsageError, match="no run found"):
        Run.open("nowhere.json")
    run.wait(progress=False)
    assert aiflux.open_run("out.json").output == place / "out.json"


def test_failed_requests_are_sent_again_and_a_finished_run_starts_over_on_demand(
    place: Path, engine: FaultyEngine
) -> None:
    write_prompts(place / "in.jsonl", "a", "400*1")
    assert start(place, engine).wait(progress=False).state is RunState.WITH_FAILURES
    run = start(place, engine, retry_failed=True)
    assert run.wait(progress=False).state is RunState.FINISHED
    assert engine.seen == {"a": 1, "400*1": 2}
    run = start(place, engine, force=True)
    assert not run.status().ended
    assert run.wait(progress=False).state is RunState.FINISHED
    assert engine.seen == {"a": 2, "400*1": 3}


def test_a_missing_output_is_written_again(place: Path, engine: FaultyEngine) -> None:
    start(place, engine).wait(progress=False)
    (place / "out.json").unlink()
    run = start(place, engine)
    assert run.wait(progress=False).finished
    assert len(list(run.results())) == len(engine.bodies) == 4


def test_an_error_of_the_server_is_in_the_status(place: Path) -> None:
    run = aiflux.run(
        "in.jsonl", "out.json", model="m:1", engine_url="http://127.0.0.1:1", engine_wait=0,
        workspace=place,
    )  # fmt: skip
    view = run.wait(progress=False)
    assert view.state is RunState.FAILED
    assert "127.0.0.1:1" in view.shards[0].reason
    assert view.shards[0].exit_code == 4


# --- on this machine, with an engine of its own -------------------------------------------------


@pytest.fixture
def llama_server(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for llama-server on PATH, and a model file."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = write_program(
        folder / "llama-server",
        f'#!/bin/sh\nexec {sys.executable} {TOOLS}/fake_llama_server.py "$@"\n',
    )
    (tmp_path / "m.gguf").write_bytes(make_tiny_gguf.tiny("llama"))
    monkeypatch.setenv("AIFLUX_ENGINE_PROGRAM", str(program))
    return program


def start_locally(place: Path, **options: object) -> Run:
    settings = {"engine": "llamacpp", "model": str(place.parent / "m.gguf"), "slots": 2,
                "context_length": 512, "allow_cpu": True, "local": True, **options}  # fmt: skip
    return aiflux.run("in.jsonl", "out.json", workspace=place, **settings)  # type: ignore[arg-type]


@pytest.mark.usefixtures("llama_server")
def test_an_engine_on_this_machine(place: Path) -> None:
    write_prompts(place / "in.jsonl", "a", "b")
    run = start_locally(place)
    view = run.wait(progress=False)
    assert view.state is RunState.FINISHED, view.shards
    assert len(list(run.results())) == 2


@pytest.mark.usefixtures("llama_server")
def test_an_engine_that_is_missing_is_refused_at_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AIFLUX_ENGINE_PROGRAM")
    monkeypatch.setenv("PATH", str(tmp_path))
    write_prompts(place / "in.jsonl", "a")
    with pytest.raises(ImageError, match="no llama-server on PATH"):
        start_locally(place)
    assert not (place / "out.json.aiflux").exists()


@pytest.mark.usefixtures("llama_server")
def test_a_model_that_is_unknown_is_refused_at_once(place: Path) -> None:
    write_prompts(place / "in.jsonl", "a")
    with pytest.raises(ModelError, match="smollm2:135m"):
        start_locally(place, engine="ollama", model="smolm2:135m")


def test_an_image_of_another_major_version_is_refused_at_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = FakeCommands(tmp_path / "fakes")
    fakes.say("apptainer")
    monkeypatch.setenv("PATH", fakes.path)
    write_prompts(place / "in.jsonl", "a")
    image = make_sif(place / "aiflux.sif", version="0.1.0", engine="ollama", engine_version="0.33")
    with pytest.raises(ImageError, match=r"has AI-Flux 0\.1\.0, which cannot read") as raised:
        start_locally(place, engine="ollama", model="llama3.2:3b", image=str(image))
    assert str(raised.value.remedy).startswith("build it again")
    assert not (place / "out.json.aiflux").exists()


def test_in_an_image_the_script_of_a_job_runs(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = FakeCommands(tmp_path / "fakes")
    fakes.add("apptainer", 'touch "$call/whole"; exec sleep 60')
    monkeypatch.setenv("PATH", fakes.path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_prompts(place / "in.jsonl", "a")
    make_sif(place / "aiflux.sif", version="1", engine="ollama", engine_version="0.33.3")
    run = aiflux.run("in.jsonl", "out.json", model="llama3.2:3b", local=True, workspace=place)
    view = until(run, lambda _: (fakes.folder / "calls" / "apptainer-0" / "whole").exists())
    assert (view.state, view.shards[0].reason) == (RunState.RUNNING, "starting")
    assert "--prepare" in fakes.calls("apptainer")[0].argv
    assert run.cancel()
    view = run.wait(timeout=20, progress=False)
    assert (view.state, view.shards[0].reason) == (
        RunState.STOPPED, "cancelled before the work began",
    )  # fmt: skip


# --- Slurm --------------------------------------------------------------------------------------


@pytest.fixture
def slurm(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    make_sif(place / "aiflux.sif", version="1")
    return waiting_slurm(tmp_path / "fakes", monkeypatch)


def submit(place: Path, **options: object) -> Run:
    settings = {"model": "m:1", "preflight": False, **options}
    return aiflux.run("in.jsonl", "out.json", workspace=place, **settings)  # type: ignore[arg-type]


def test_a_run_in_slurm(place: Path, slurm: FakeCommands) -> None:
    run = submit(place, account="proj", batch_size=8)
    view = run.status()
    assert (view.state, view.jobs) == (RunState.WAITING, ("100",))
    assert "#SBATCH --account=proj" in run.directory.script.read_text()
    assert read_plan(run.directory).options.concurrency == 8
    with pytest.raises(RunConflictError, match="job 100 of this run is already PENDING"):
        submit(place)
    assert run.cancel()
    assert [call.argv for call in slurm.calls("scancel")] == [["100"]]
    slurm.say("squeue")
    assert not run.cancel()


def test_a_job_that_waits_is_not_joined_by_a_process_here(
    place: Path, slurm: FakeCommands, engine: FaultyEngine
) -> None:
    submit(place)
    with pytest.raises(RunConflictError):
        start(place, engine, force_resume=True)
    assert len(slurm.calls("sbatch")) == 1


def test_a_run_that_started_here_can_go_on_in_slurm(
    place: Path, slurm: FakeCommands, engine: FaultyEngine
) -> None:
    run = start(place, engine)
    os.kill(pid_of(run), signal.SIGKILL)
    run.wait(timeout=10, progress=False)
    view = submit(place).status()
    assert (view.state, view.jobs) == (RunState.WAITING, ("100",))
    assert read_process(run.directory) is None


def test_the_model_and_paths_can_be_given_as_for_the_runner(
    place: Path, slurm: FakeCommands
) -> None:
    run = submit(place, model=None, model_config=ModelConfig("m:1"), models_dir="models")
    plan = read_plan(run.directory)
    assert (plan.models, plan.models_dir) == (("m:1",), place / "models")


# --- results ------------------------------------------------------------------------------------

ENTRIES = 100_000


def test_results_need_constant_memory(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "r", each=ENTRIES)
    made.whole("completed", ENTRIES)
    line = (
        '{"input":{"custom_id":"r%d","body":{}},"output":{"choices":[{"message":'
        '{"content":"answer"}}]},"metadata":{}}'
    )
    with open(made.output, "w", encoding="utf-8") as file:
        file.write("[\n" + ",\n".join(line % number for number in range(ENTRIES)) + "\n]\n")
    results = Run.open(made.output).results()
    first = next(results)
    assert (first.custom_id, first.text) == ("r0", "answer")
    tracemalloc.start()
    try:
        assert sum(1 for _ in results) == ENTRIES - 1
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_results_are_in_the_order_of_the_input(place: Path, engine: FaultyEngine) -> None:
    write_prompts(place / "in.jsonl", "503*1", "b 400", "c")
    run = aiflux.run(
        "in.jsonl", "out.jsonl", model="m:1", engine_url=engine.url, retry_delay=0.01,
        workspace=place,
    )  # fmt: skip
    run.wait(progress=False)
    assert [(each.custom_id, bool(each.error)) for each in run.results()] == [
        ("r0", False), ("r1", True), ("r2", False),
    ]  # fmt: skip
    assert all(each.input is not None for each in run.results())


def test_a_changed_output_is_no_result(place: Path, engine: FaultyEngine) -> None:
    run = start(place, engine)
    run.wait(progress=False)
    run.output.write_text("[]\n")
    assert run.status().state is RunState.CHANGED
    with pytest.raises(OutputExistsError):
        run.results()


def test_results_become_tables(place: Path, engine: FaultyEngine, tmp_path: Path) -> None:
    engine.answer = '{"label": "good", "score": 3}'
    write_prompts(place / "in.jsonl", "a", "b 400")
    run = start(place, engine)
    with pytest.raises(InputError, match="not finished"):
        run.to_arrow()
    run.wait(progress=False)
    options = BackOptions(json_fields=())
    table = run.to_arrow(options)
    assert table.column_names == ["custom_id", "answer", "error", "label", "score"]
    assert table["score"].to_pylist() == [3, None]
    results_to_parquet(run.output, tmp_path / "t.parquet", options)
    assert parquet.read_table(tmp_path / "t.parquet").equals(table)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_results_become_frames(place: Path, engine: FaultyEngine, library: str) -> None:
    if find_spec(library) is None:
        pytest.skip(f"{LEFT_OUT}{library} is not installed")
    run = start(place, engine)
    run.wait(progress=False)
    frame = run.to_pandas() if library == "pandas" else run.to_polars()
    assert list(frame.columns) == ["custom_id", "answer", "error"]
    assert list(frame["custom_id"]) == ["r0", "r1", "r2", "r3"]


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_the_names_of_a_frame_are_no_prompts(
    place: Path, engine: FaultyEngine, library: str
) -> None:
    if find_spec(library) is None:
        pytest.skip(f"{LEFT_OUT}{library} is not installed")
    frame = pytest.importorskip(library).DataFrame({"text": ["a", "b"], "n": [1, 2]})
    given = {"output": "o.json", "model": "m:1", "engine_url": engine.url, "workspace": place}
    with pytest.raises(InputError, match="DataFrame is neither"):
        aiflux.run(frame, **given)
    assert not list(place.glob("o.*"))
    run = aiflux.run(frame["text"], **given)
    run.wait(progress=False)
    assert [each.text for each in run.results()] == ["echo a", "echo b"]


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
def test_a_missing_library_is_named(place: Path, engine: FaultyEngine, library: str) -> None:
    run = start(place, engine)
    run.wait(progress=False)
    method = "to_arrow" if library == "pyarrow" else f"to_{library}"
    code = (
        f"import sys; sys.modules[{library!r}] = None; import aiflux, aiflux.errors\n"
        f"try: aiflux.open_run(sys.argv[1]).{method}()\n"
        "except aiflux.errors.ConfigError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, run.output], capture_output=True, text=True, check=True
    )
    assert f"{method}() needs the Python package {library}" in done.stdout
    assert re.search(rf"-m pip install '?{library}", done.stdout)


# --- the commands see such runs -----------------------------------------------------------------


def test_the_commands_work_on_a_run_in_the_background(
    place: Path,
    engine: FaultyEngine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_prompts(place / "in.jsonl", "a", "hang*1")
    monkeypatch.chdir(place)
    run = start(place, engine, drain_seconds=0)
    until(run, lambda view: view.done == 1)
    assert main(["jobs"]) == 0
    assert " running  1/2 " in capsys.readouterr().out
    assert main(["logs", "out.json"]) == 0
    assert engine.url in capsys.readouterr().out
    words = ["run", "in.jsonl", "-o", "out.json", "--model", "m:1", "--engine-url", engine.url]
    assert main(words) == 2
    assert f"in use by process {pid_of(run)} on " in capsys.readouterr().err
    assert main(["cancel", "out.json"]) == 0
    out = capsys.readouterr().out
    assert f"process {pid_of(run)} stops" in out
    assert "continue it: aiflux resume --local out.json" in out
    assert run.wait(timeout=20, progress=False).state is RunState.STOPPED
    assert main(["resume", "out.json"]) == 0
    assert run.status().state is RunState.FINISHED


def test_a_process_of_another_machine_counts_as_alive_while_it_loads(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "r")
    record = {"host": "login2", "pid": 7, "started": "1", "namespace": "another",
              "since": time.time() - 5, "log": "/l"}  # fmt: skip
    made.run.process.write_text(json.dumps(record))
    run = Run.open(made.output)
    assert str(run.status()).startswith("running: 0/100 done")
    with pytest.raises(UsageError, match="cancel the run on login2"):
        run.cancel()
    made.run.process.write_text(json.dumps({**record, "since": time.time() - 500}))
    assert run.status().state is RunState.FAILED


def test_a_process_that_is_alive_writes_a_missing_output(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "r")
    made.status(0, "completed", 100, age=600)
    run = Run.open(made.output)
    assert run.status().state is RunState.NOT_MERGED
    write_process(made.run, LocalProcess.of(os.getpid(), time.time(), tmp_path / "log"))
    assert run.status().state is RunState.MERGING


def test_a_notebook_in_a_job_sees_the_worker_in_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease looks like that of an earlier start of the job, which would be dead."""
    monkeypatch.setenv("SLURM_JOB_ID", str(ELSEWHERE["job"]))
    made = MadeRun(tmp_path / "r")
    made.status(0, "in_progress", 7)
    assert Run.open(made.output).status().state is RunState.LOST
    write_process(made.run, LocalProcess.of(os.getpid(), 0.0, tmp_path / "log"))
    assert Run.open(made.output).status().state is RunState.RUNNING


def test_a_run_in_the_foreground_is_not_cancelled_from_elsewhere(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "r")
    made.status(0, "in_progress", 50)
    with pytest.raises(UsageError, match="kill -TERM 4711"):
        Run.open(made.output).cancel()


def test_a_status_of_an_earlier_start_does_not_count(tmp_path: Path) -> None:
    """Between the start of a process and its first status, the old one is still there."""
    made = MadeRun(tmp_path / "r")
    Status(made.run.status(0), made.plan, 0).enter("failed")
    run = Run.open(made.output)
    assert run.status().state is RunState.FAILED
    record = {"host": "login2", "pid": 7, "started": "1", "namespace": "another",
              "since": time.time() + 1, "log": "/l"}  # fmt: skip
    made.run.process.write_text(json.dumps(record))
    assert run.status().state is RunState.RUNNING
