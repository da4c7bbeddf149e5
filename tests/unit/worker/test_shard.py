"""The worker against an engine with faults, over a real socket."""

from __future__ import annotations

import json
import shlex
import sys
import threading
import time
from pathlib import Path

import pytest
from openai.types import Batch, BatchError
from openai.types.chat import ChatCompletion

from aiflux.core.runs.journal import scan_journal
from aiflux.core.runs.status_file import Counts
from aiflux.errors import ExitCode
from aiflux.slurm.monitor import gather
from aiflux.util.lease import acquire
from aiflux.worker.main import main
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.helpers import request_line
from tests.unit.working import Working

TOOLS = Path(__file__).parents[2] / "tools"


def contents(working: Working) -> list[str | None]:
    return [
        entry["output"] and entry["output"]["choices"][0]["message"]["content"]
        for entry in working.results
    ]


def test_every_request_is_answered_in_input_order(awkward: Path) -> None:
    prompts = [f"prompt {index}" for index in range(200)]
    with FaultyEngine() as engine:
        working = Working(awkward, engine.url).prompts(*prompts)
        assert working.run() is ExitCode.OK
    assert contents(working) == [f"echo {prompt}" for prompt in prompts]
    assert set(engine.seen.values()) == {1}
    entry = working.results[0]
    assert entry["input"] == json.loads(working.input.read_text(encoding="utf-8").splitlines()[0])
    assert entry["metadata"]["model"] == "m:1"
    assert entry["metadata"]["attempts"] == 1
    assert entry["metadata"]["timestamp"].endswith("Z")
    assert entry["metadata"]["processing_time"] >= 0
    assert working.status["status"] == "completed"
    assert working.status["request_counts"] == {"total": 200, "completed": 200, "failed": 0}


@pytest.mark.parametrize(
    "fault",
    ["408*2", "425*2", "429*2", "500*2", "502*2", "503*2", "504*2", "reset*2", "cut*2", "html*2",
     "notjson*2", "array*2", "empty*2", "error*2", "partial*2"],
)  # fmt: skip
def test_a_temporary_fault_is_retried(tmp_path: Path, fault: str) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts(fault, "fine")
        assert working.run() is ExitCode.OK
    assert contents(working) == [f"echo {fault}", "echo fine"]
    assert [entry["metadata"]["attempts"] for entry in working.results] == [3, 1]
    assert engine.seen[fault] == 3


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"choices": [NaN]}', "NaN is not JSON at offset 13: "),
        ('{"a": "ä",\n "b": -Infinity}', "-Infinity is not JSON at offset 18: "),
        ('{"a": 1e400}', "the number 1e400 is too large at offset 6: "),
        ('{"a": "\udcff"}', "byte 0xff is not UTF-8 at offset 7: "),
        ("{" * 300, "Expecting property name enclosed in double quotes at offset 1: "),
        ("[" * 300 + "]" * 300, "nested more than 200 levels deep at offset 200: "),
        ('{"choices": [' + " " * 1000 + "oops]}", "Expecting value at offset 1013: '    "),
    ],
)
def test_an_invalid_answer_is_reported_with_its_error(
    tmp_path: Path, body: str, words: str
) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, max_retries=1).prompts(f"body:{body}", "fine")
        assert working.run() is ExitCode.FAILURES
    entry, _ = working.results
    assert entry["error"]["code"] == "not_json"
    assert entry["error"]["message"].startswith(f"the answer is not valid JSON: {words}")
    assert entry["metadata"]["attempts"] == 2


@pytest.mark.parametrize(
    "body", ["[" * 5000, '{"error": "\udcff"}', '{"error": {"message": 1e400}}']
)
def test_an_error_with_an_invalid_body_is_kept_as_text(tmp_path: Path, body: str) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, output="out.jsonl").prompts(f"body400:{body}")
        assert working.run() is ExitCode.FAILURES
    line = (tmp_path / "out.errors.jsonl").read_bytes().decode("utf-8")
    kept = json.loads(line)["response"]["body"]
    assert kept == body.replace("\udcff", "\ufffd")


@pytest.mark.parametrize("status", ["400", "404", "422", "501"])
def test_a_permanent_error_is_sent_once(tmp_path: Path, status: str) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts(status, "fine")
        assert working.run() is ExitCode.FAILURES
    assert engine.seen[status] == 1
    failed, answered = working.results
    assert failed["output"] is None
    assert failed["error"] == {
        "code": f"http_{status}",
        "message": f"requested error {status}",
        "status": int(status),
    }
    assert "error" not in answered
    assert working.error is not None
    assert "1 of 2 requests failed" in working.error.message


def test_the_number_of_retries_is_limited(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, max_retries=2).prompts("fine", "500")
        assert working.run() is ExitCode.FAILURES
    assert engine.seen["500"] == 3
    assert working.results[1]["metadata"]["attempts"] == 3
    assert working.results[1]["error"]["code"] == "http_500"


@pytest.mark.parametrize("limit", ["1", "50%"])
def test_failures_that_are_allowed(tmp_path: Path, limit: str) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, max_failures=limit).prompts("400", "fine")
        assert working.run() is ExitCode.OK


def test_retry_after_is_honoured(tmp_path: Path) -> None:
    with FaultyEngine(retry_after="1") as engine:
        working = Working(tmp_path, engine.url).prompts("429*1")
        assert working.run() is ExitCode.OK
    first, second = engine.times["429*1"]
    assert second - first >= 1.0


@pytest.mark.parametrize("fault", ["hang", "drip", "closing", "headers"])
def test_nothing_outlives_its_deadline(tmp_path: Path, fault: str) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, request_timeout=0.5, max_retries=1)
        working.prompts(f"{fault}*1", fault, "fine")
        began = time.monotonic()
        assert working.run() is ExitCode.FAILURES
        assert time.monotonic() - began < 20
    outcome = {e["input"]["custom_id"]: e.get("error", {}).get("code") for e in working.results}
    assert outcome == {f"0:{fault}*1": None, f"1:{fault}": "timeout", "2:fine": None}


def test_a_crash_of_the_engine_does_not_count_as_an_attempt(tmp_path: Path) -> None:
    with FaultyEngine(delay=0.02) as engine:
        working = Working(tmp_path, engine.url, concurrency=4)
        working.prompts(*(f"a{i}" for i in range(10)), "die*1", *(f"b{i}" for i in range(10)))
        with working.reviving(engine):
            assert working.run() is ExitCode.OK
    assert len(working.results) == 21
    assert {entry["metadata"]["attempts"] for entry in working.results} == {1}


def test_an_engine_that_does_not_exist(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        url = engine.url
    working = Working(tmp_path, url, engine_wait=0.5).prompts("x")
    assert working.run() is ExitCode.ENGINE
    assert not working.output.exists()
    assert working.status["status"] == "failed"


def test_a_stop_drains_and_the_same_command_resumes(tmp_path: Path) -> None:
    prompts = [f"p{index}" for index in range(40)]
    with FaultyEngine(delay=0.1) as engine:
        working = Working(tmp_path, engine.url, concurrency=4).prompts(*prompts)
        working.stop_soon(results=8)
        assert working.run() is ExitCode.STOPPED
        assert not working.output.exists()
        assert working.status["status"] == "cancelled"
        done = scan_journal(working.journal).done
        assert 0 < done < 40
        assert sum(engine.seen.values()) == done, "the requests in flight were finished"
        again = Working(tmp_path, engine.url, concurrency=4)
        assert again.run() is ExitCode.OK
    assert contents(again) == [f"echo {prompt}" for prompt in prompts]
    assert set(engine.seen.values()) == {1}


def test_a_stop_is_recorded_before_the_engines_end(tmp_path: Path) -> None:
    """Slurm can kill the worker while it waits for an engine that does not end."""
    script, seen = tmp_path / "engine.sh", tmp_path / "seen.json"
    server = shlex.join([sys.executable, str(TOOLS / "command_server.py"), "--model", "m:1"])
    working = Working(tmp_path, None, engine_command=f"bash {script} {{port}}", concurrency=1)
    working.prompts(*[f"p{index}" for index in range(40)])
    script.write_text(
        f"{server} --delay 0.05 --port $1 & trap 'cp {working.status_file} {seen}; exit' TERM\n"
        "wait\n"
    )
    working.stop_soon()
    assert working.run() is ExitCode.STOPPED
    then = json.loads(seen.read_text())
    assert then["status"] == working.status["status"] == "cancelled"
    assert then["request_counts"] == working.status["request_counts"]


def test_requests_that_exceed_the_grace_time_were_not_attempted(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, drain_seconds=0.2).prompts("hang*1", "fine")
        working.stop_soon(results=1)
        assert working.run() is ExitCode.STOPPED
        assert scan_journal(working.journal).done == 1
        again = Working(tmp_path, engine.url)
        assert again.run() is ExitCode.OK
    assert [entry["metadata"]["attempts"] for entry in again.results] == [1, 1]


def test_no_request_is_sent_that_cannot_end_before_the_deadline(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts("a", "b")
        working.deadline = time.time() + 5
        assert working.run() is ExitCode.STOPPED
        assert not engine.seen
    assert working.error is not None
    assert "time is nearly over" in working.error.message


def test_an_edited_input_runs_only_what_changed(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts("a", "b", "c")
        assert working.run() is ExitCode.OK
        working.prompts("a", "B", "c", "d")
        assert working.run() is ExitCode.USAGE
        assert working.error is not None
        assert "the input has changed since" in working.error.message
        assert "--force sends the new and changed requests only" in str(working.error.remedy)
        assert working.run(force=True) is ExitCode.OK
    assert dict(engine.seen) == {"a": 1, "b": 1, "c": 1, "B": 1, "d": 1}
    assert contents(working) == ["echo a", "echo B", "echo c", "echo d"]


def test_a_finished_run_sends_no_requests(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts("a")
        assert working.run() is ExitCode.OK
        assert working.open().finished
        assert working.open().counts == Counts(1, 1, 0)
        assert working.run(force=True) is ExitCode.OK
    assert engine.seen["a"] == 2


def test_failed_requests_can_be_retried(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, max_retries=0).prompts("500*1", "fine")
        assert working.run() is ExitCode.FAILURES
        again = Working(tmp_path, engine.url, max_retries=0, retry_failed=True)
        assert again.run() is ExitCode.OK
    assert engine.seen["500*1"] == 2


def test_other_parameters_are_refused_unless_forced(tmp_path: Path) -> None:
    with FaultyEngine(delay=0.05) as engine:
        working = Working(tmp_path, engine.url, concurrency=1, temperature=0.1)
        working.prompts("a", "b", "c", "d", "e", "f")
        working.stop_soon()
        assert working.run() is ExitCode.STOPPED
        other = Working(tmp_path, engine.url, temperature=0.9)
        assert other.run() is ExitCode.USAGE
        assert other.error is not None
        assert "temperature 0.1" in other.error.message
        assert "temperature 0.9" in other.error.message
        assert other.run(force_resume=True) is ExitCode.OK
    assert len(other.results) == 6


def test_the_body_is_sent_unchanged(tmp_path: Path) -> None:
    body = {
        "model": "m:1",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "ü"}], "name": "n"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "response_format": {"type": "json_object"},
        "seed": 12345678901234567890123,
        "logprobs": True,
        "future_field": {"nested": [None, 1.5, "\u2028"]},
    }
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url)
        working.input.write_text(request_line("a", body=body) + "\n", encoding="utf-8")
        assert working.run() is ExitCode.OK
    assert engine.bodies == [body]


def test_only_absent_fields_are_filled_in(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        options = {"model": "m:1", "temperature": 0.5, "max_tokens": 9}
        working = Working(tmp_path, engine.url, **options)
        messages = [{"role": "user", "content": "x"}]
        lines = [
            request_line("a", body={"messages": messages}),
            request_line("b", body={"messages": messages, "temperature": 1, "max_tokens": 3}),
            request_line("c", body={"messages": messages, "stream": True, "stream_options": {}}),
            request_line("d", url="/v1/embeddings", body={"input": "x"}),
            request_line("e", url="/v1/rerank", body={"query": "x", "documents": ["y", "z"]}),
            request_line("f", url="/v1/responses", body={"input": "x", "background": True}),
            request_line("g", url="/v1/responses", body={"input": "x", "max_output_tokens": 3}),
            request_line("h", url="/v1/score", body={"text_1": "x", "text_2": "y"}),
        ]
        working.input.write_text("\n".join(lines), encoding="utf-8")
        assert working.run() is ExitCode.OK
    filled = {"model": "m:1", "temperature": 0.5, "max_tokens": 9, "messages": messages}
    assert filled in engine.bodies
    assert {**filled, "temperature": 1, "max_tokens": 3} in engine.bodies
    assert {**filled, "stream": False} in engine.bodies
    assert {"model": "m:1", "input": "x"} in engine.bodies
    assert {"model": "m:1", "query": "x", "documents": ["y", "z"]} in engine.bodies
    filled = {"model": "m:1", "temperature": 0.5, "max_output_tokens": 9, "input": "x"}
    assert {**filled, "background": False} in engine.bodies
    assert {**filled, "max_output_tokens": 3} in engine.bodies
    assert {"model": "m:1", "text_1": "x", "text_2": "y"} in engine.bodies
    assert len(working.results[4]["output"]["results"]) == 2


def test_the_key_is_sent_and_stored_nowhere(tmp_path: Path) -> None:
    from aiflux.worker.shard import Context, work

    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts("a")
        opened = working.open()
        context = Context(working.reporter, working.stopper, api_key="secret-key")
        work(opened.plan, opened.run, 0, context)
    assert engine.headers[0]["Authorization"] == "Bearer secret-key"
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"secret-key" not in path.read_bytes()


def test_metadata_of_a_request_is_merged_and_does_not_hide_ours(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url)
        body = {"model": "m:1", "messages": [{"role": "user", "content": "x"}]}
        line = request_line("a", body=body, metadata={"row": 7, "model": "mine"})
        working.input.write_text(line, encoding="utf-8")
        assert working.run() is ExitCode.OK
    assert working.results[0]["metadata"]["row"] == 7
    assert working.results[0]["metadata"]["model"] == "m:1"


def test_several_models_are_processed_one_after_another(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url)
        lines = [
            request_line(f"r{i}", body={"model": f"m:{i % 2}", "messages": [{"content": f"{i}"}]})
            for i in range(20)
        ]
        working.input.write_text("\n".join(lines), encoding="utf-8")
        assert working.run() is ExitCode.OK
    assert [body["model"] for body in engine.bodies] == ["m:0"] * 10 + ["m:1"] * 10
    assert [entry["metadata"]["model"] for entry in working.results[:2]] == ["m:0", "m:1"]


def test_a_second_worker_on_the_same_run_is_refused(tmp_path: Path) -> None:
    with FaultyEngine(delay=0.3) as engine:
        first = Working(tmp_path, engine.url, concurrency=1).prompts("a", "b", "c")
        thread = threading.Thread(target=first.run)
        thread.start()
        time.sleep(0.3)
        second = Working(tmp_path, engine.url)
        assert second.run() is ExitCode.USAGE
        assert second.error is not None
        assert "is in use by process" in second.error.message
        thread.join()
    assert len(first.results) == 3


def test_the_output_has_the_answer_byte_for_byte(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, output="out.jsonl", max_failures="100%")
        working.prompts("a", "400", "b")
        assert working.run() is ExitCode.OK
    answered = [json.loads(line) for line in working.output.read_text().splitlines()]
    assert [entry["custom_id"] for entry in answered] == ["0:a", "2:b"]
    assert answered[0]["response"]["status_code"] == 200
    assert answered[0]["response"]["body"]["choices"][0]["message"]["content"] == "echo a"
    assert answered[0]["error"] is None
    failed = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert [entry["custom_id"] for entry in failed] == ["1:400"]
    assert failed[0]["response"]["status_code"] == 400
    assert failed[0]["error"]["code"] == "http_400"


def test_a_request_that_crashes_the_engine_is_run_alone_and_fails(tmp_path: Path) -> None:
    with FaultyEngine(delay=0.01) as engine:
        working = Working(tmp_path, engine.url, concurrency=4)
        working.prompts(*(f"a{i}" for i in range(12)), "die", *(f"b{i}" for i in range(12)))
        with working.reviving(engine):
            code = working.run()
    assert code is ExitCode.FAILURES
    failed = [entry for entry in working.results if "error" in entry]
    assert [entry["input"]["custom_id"] for entry in failed] == ["12:die"]
    assert failed[0]["error"]["code"] == "engine_crashed"
    assert "crashed 3 times while it processed this request" in failed[0]["error"]["message"]
    # On a slow machine, it is back before all that it interrupted are judged: a lost connection.
    assert engine.seen["die"] >= 3
    assert len(working.results) == 25


def test_an_engine_that_keeps_crashing_ends_the_run_and_keeps_results(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, concurrency=1, engine_wait=0.5)
        working.prompts("a", "b", "die", "c")
        assert working.run() is ExitCode.ENGINE
    assert scan_journal(working.journal).done == 2
    assert not working.output.exists()


def test_concurrency_is_determined_automatically(tmp_path: Path) -> None:
    prompts = [f"p{index}" for index in range(300)]
    with FaultyEngine(delay=0.05) as engine:
        working = Working(tmp_path, engine.url).prompts(*prompts)
        assert working.run() is ExitCode.OK
    assert engine.most > 8
    assert len(working.results) == 300


def test_a_kill_between_the_output_and_its_status_does_no_harm(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, output="out.jsonl", max_failures="100%")
        working.prompts("a", "400", "b")
        assert working.run() is ExitCode.OK
        path = tmp_path / "out.jsonl.aiflux" / "status" / "run.json"
        status = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**status, "status": "finalizing"}), encoding="utf-8")
        assert working.run() is ExitCode.OK
    assert set(engine.seen.values()) == {1}
    assert len(working.output.read_text(encoding="utf-8").splitlines()) == 2
    assert json.loads(path.read_text(encoding="utf-8"))["status"] == "completed"


def test_answers_are_accepted_by_the_official_types(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, output="out.jsonl", max_failures="100%")
        working.prompts("a", "400")
        assert working.run() is ExitCode.OK
    line = json.loads(working.output.read_text(encoding="utf-8"))
    ChatCompletion.model_validate(line["response"]["body"])
    batch = Batch.model_validate(working.status)
    assert batch.error_file_id == str(tmp_path / "out.errors.jsonl")
    failed = json.loads((tmp_path / "out.errors.jsonl").read_text(encoding="utf-8"))
    BatchError.model_validate(failed["error"])


def test_a_start_that_finds_no_model_leaves_its_reason_in_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AIFLUX_ENGINE_PROGRAM", str(tmp_path / "missing"))
    working = Working(tmp_path, None, models_dir=tmp_path / "models", model="m:1")
    opened = working.prompts("one", "two").open(shards=2)
    assert main(["--run-dir", str(opened.run.path), "--prepare", "--shard", "1"]) == 4
    printed = capsys.readouterr().err.strip().partition("error: ")[2]
    message, _, remedy = printed.partition("\n  -> ")
    view = gather(opened.run)
    assert [shard.state.value for shard in view.shards] == ["not submitted", "failed"]
    assert (view.state.value, view.shards[1].exit_code) == ("failed", 4)
    assert message == view.shards[1].reason
    assert view.remedy.startswith(remedy)
    assert view.shards[1].sealed is None


@pytest.mark.parametrize("first", [["--prepare"], []])
def test_a_start_that_cannot_read_its_plan_leaves_its_reason_in_the_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], first: list[str]
) -> None:
    """The image is older than the command, which wrote a setting that the worker does not know."""
    working = Working(tmp_path, None, models_dir=tmp_path / "models", model="m:1")
    run = working.prompts("one", "two").open(shards=2).run
    own = run.plan.read_bytes()
    newer = json.loads(own)
    newer["options"]["hologram"] = True
    run.plan.write_text(json.dumps(newer), encoding="utf-8")
    assert main(["--run-dir", str(run.path), *first, "--shard", "1"]) == 2
    assert "options hologram are not known here" in capsys.readouterr().err
    run.plan.write_bytes(own)  # the command can read it
    view = gather(run)
    assert [shard.state.value for shard in view.shards] == ["not submitted", "failed"]
    assert view.shards[1].exit_code == 2
    assert "options hologram are not known here" in view.shards[1].reason
    assert "build the image again" in view.remedy


def test_a_damaged_plan_leaves_no_status(tmp_path: Path) -> None:
    working = Working(tmp_path, None, models_dir=tmp_path / "models", model="m:1")
    run = working.prompts("one").open().run
    run.plan.write_text("{", encoding="utf-8")
    assert main(["--run-dir", str(run.path)]) == 2
    assert not working.status_file.exists()


def test_a_start_next_to_a_working_one_leaves_its_status_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIFLUX_ENGINE_PROGRAM", str(tmp_path / "missing"))
    working = Working(tmp_path, None, models_dir=tmp_path / "models", model="m:1")
    opened = working.prompts("one", "two").open()
    with acquire(opened.run.lease(0), "the run"):
        assert main(["--run-dir", str(opened.run.path), "--prepare"]) == 4
    assert not working.status_file.exists()
