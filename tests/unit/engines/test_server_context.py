"""Prompts that are longer than the context of a server that AI-Flux does not configure."""

from __future__ import annotations

import json
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from aiflux.cli.main import main
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.journal import RawResult, journal_lines, split_line
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import allowed_failures, refuse_failures
from aiflux.engines.http import Answer
from aiflux.engines.outcome import judge_answer
from aiflux.engines.server_context import reported_context
from aiflux.errors import ExitCode, TooManyFailuresError
from aiflux.report.build import advice
from aiflux.slurm.monitor import gather
from aiflux.slurm.preflight.local import check_fields, finding_text
from aiflux.slurm.run_view import outcome
from tests.tools import make_tiny_gguf
from tests.tools.counting_server import HOSTED, LLAMA, OF_TEMPLATE, SILENT, VLLM, CountingServer
from tests.unit.helpers import request_line
from tests.unit.made_models import put_model
from tests.unit.made_serves import MadeServe
from tests.unit.working import Working

TOOLS = Path(__file__).parents[2] / "tools"
LONG = "word " * 240
PROMPTS = ("one", LONG, "two", LONG + "more")
BOTH = pytest.mark.parametrize("form", [VLLM, LLAMA])


def codes(working: Working) -> list[str | None]:
    return [entry["error"]["code"] if "error" in entry else None for entry in working.results]


def chunks(working: Working) -> list[int | None]:
    return [entry["metadata"].get("chunks") for entry in working.results]


@pytest.mark.parametrize(
    ("answers", "context"),
    [
        ({"/v1/models": {"data": [{"id": "m:1", "max_model_len": 512}, {"id": "a"}]}}, 512),
        ({"/v1/models": {"data": [{"id": "a", "max_model_len": 512}]}}, 512),
        ({"/v1/models": {"data": [{"id": "a", "max_model_len": 512}, {"id": "b"}]}}, None),
        ({"/v1/models": {"data": [{"id": "m:1", "context_window": 8192}]}}, 8192),
        ({"/v1/models": {"data": [{"id": "m:1", "max_model_len": None}]}}, None),
        ({"/v1/models": {"data": "?"}, "/props": {"default_generation_settings": None}}, None),
        ({"/props": {"default_generation_settings": {"n_ctx": 256}}}, 256),
        ({"/api/ps": {"models": [{"name": "m:1", "context_length": 4096}]}}, 4096),
        ({"/api/ps": {"models": [{"name": "other:1", "context_length": 4096}]}}, None),
    ],
)
def test_the_context_is_where_each_kind_of_server_reports_it(
    answers: dict[str, Any], context: int | None
) -> None:
    def fetch(path: str) -> bytes | None:
        return json.dumps(answers[path]).encode() if path in answers else None

    assert reported_context(fetch, "m:1") == context


@BOTH
def test_prompts_that_are_too_long_for_the_server_are_refused(tmp_path: Path, form: str) -> None:
    with CountingServer(form, 512) as server:
        working = Working(tmp_path, server.url).prompts(*PROMPTS)
        assert working.run() is ExitCode.USAGE
    assert working.error is not None
    assert working.error.problems == (
        f"line 2: {600 + OF_TEMPLATE} tokens", f"line 4: {602 + OF_TEMPLATE} tokens"
    )  # fmt: skip
    assert "--too-long skip" in str(working.error.remedy)
    assert "--context-length" not in str(working.error.remedy)
    assert not server.prompts
    assert not working.output.with_name("out.json.aiflux").exists()


@BOTH
def test_they_are_left_out_or_sent_in_parts(tmp_path: Path, form: str) -> None:
    with CountingServer(form, 512) as server:
        working = Working(tmp_path, server.url, too_long="skip").prompts(*PROMPTS)
        assert working.run() is ExitCode.OK
        assert codes(working) == [None, "too_long", None, "too_long"]
        assert sorted(server.prompts) == ["one", "two"]
        working = Working(tmp_path, server.url, too_long="chunk", retry_failed=True)
        assert working.run() is ExitCode.OK
    # A quarter of the context is kept free for the answer. The server applies the template.
    assert codes(working) == [None] * 4
    assert chunks(working) == [None, 2, None, 2]
    texts = [entry["output"]["choices"][0]["message"]["content"] for entry in working.results]
    assert "".join(texts[1].split()) == "".join(LONG.split())


def test_only_prompts_near_the_context_are_counted(tmp_path: Path) -> None:
    asked = {}
    with CountingServer(VLLM, 5000) as server:
        for size in (6000, 9000, 10_000):  # about 2,000, 3,000 and 3,333 tokens by estimate
            working = Working(tmp_path, server.url, f"{size}.json").prompts("a" * size)
            server.asked.clear()
            code = working.run()
            asked[size] = code, server.asked.count("/tokenize")
    # The first two questions are whether the server counts, and about an empty conversation.
    assert asked == {6000: (0, 2), 9000: (0, 3), 10_000: (2, 3)}


def test_no_server_is_asked_about_requests_that_are_short(tmp_path: Path) -> None:
    working = Working(tmp_path, "http://127.0.0.1:1").prompts("one")
    assert not working.open().plan.lengths_at_start
    assert working.prompts("one", max_tokens=300).open().plan.lengths_at_start


def test_a_server_that_only_reports_the_context_gives_an_estimate(tmp_path: Path) -> None:
    with CountingServer(HOSTED, 512) as server:
        working = Working(tmp_path, server.url).prompts("one", "word " * 400)
        opened = working.open()
        (finding,) = check_fields(opened.plan)
        assert finding.what.startswith("about 1 prompt may be too long for the context of 512")
        assert "does not count tokens (/tokenize)" in finding.fix
        assert working.run() is ExitCode.FAILURES
        assert not any("this is an estimate" in each for each in working.reporter.messages)
        assert working.error is not None
        assert "--too-long skip" in str(working.error.remedy)
        assert codes(working) == [None, "too_long"]
        assert working.results[1]["error"]["status"] == 400
        assert "--too-long chunk" in advice("too_long").remedy
        more = Working(tmp_path, server.url, "b.json", too_long="chunk")
        assert more.run() is ExitCode.USAGE
    assert more.error is not None
    assert "only the model's tokenizer can split them" in more.error.message


def test_a_stored_model_counts_for_a_server_that_does_not(tmp_path: Path) -> None:
    put_model(tmp_path / "models", "m:1", make_tiny_gguf.tiny())
    with CountingServer(HOSTED, 512) as server:
        working = Working(tmp_path, server.url, models_dir=tmp_path / "models", too_long="chunk")
        assert working.prompts(*PROMPTS).run() is ExitCode.OK
    assert chunks(working) == [None, 6, None, 6]  # it has one token for each character


def test_the_context_can_be_given(tmp_path: Path) -> None:
    """The smaller one counts, of what the server reports and what the run says."""
    with CountingServer(VLLM, 5000) as server:
        working = Working(tmp_path, server.url, context_length=512).prompts(*PROMPTS)
        assert working.run() is ExitCode.USAGE
        assert working.error is not None
        assert "context of 512 tokens" in working.error.message
    with CountingServer(VLLM, 512) as server:
        working = Working(tmp_path, server.url, context_length=5000)
        assert working.run() is ExitCode.USAGE


def test_a_silent_server_has_to_be_described_for_parts(tmp_path: Path) -> None:
    with CountingServer(SILENT, 512) as server:
        working = Working(tmp_path, server.url, too_long="chunk").prompts(*PROMPTS)
        assert working.run() is ExitCode.USAGE
        assert working.error is not None
        assert "--context-length N" in str(working.error.remedy)
        assert not server.prompts
        working = Working(tmp_path, server.url, "b.json").prompts("one", "word " * 5000)
        assert working.run() is ExitCode.FAILURES
    assert any("does not report its context" in line for line in working.reporter.messages)


def test_a_server_that_stops_counting_is_asked_again_at_the_start(tmp_path: Path) -> None:
    with CountingServer(VLLM, 512, busy=2) as server:
        working = Working(tmp_path, server.url).prompts(*PROMPTS)
        assert working.open().plan.lengths_at_start
        server.busy = None
        assert working.run() is ExitCode.USAGE
        assert not server.prompts


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("too_long", ["fail", "skip", "chunk"])
def test_a_server_that_comes_up_later_is_asked_before_the_first_request(
    tmp_path: Path, too_long: str
) -> None:
    port = free_port()
    working = Working(tmp_path, f"http://127.0.0.1:{port}", too_long=too_long).prompts(*PROMPTS)
    assert working.open().plan.lengths_at_start
    started: list[CountingServer] = []

    def start() -> None:
        started.append(CountingServer(VLLM, 512, port).__enter__())

    threading.Timer(0.5, start).start()
    code = working.shard(0)
    (server,) = started
    server.__exit__()
    if too_long == "fail":
        assert code is ExitCode.USAGE
        assert working.error is not None
        assert working.error.problems[0].startswith("line 2: 610 tokens")
        assert not server.prompts
        return
    assert code is ExitCode.OK
    expected = [None, 2, None, 2] if too_long == "chunk" else [None] * 4
    assert chunks(working) == expected
    assert codes(working)[1] == ("too_long" if too_long == "skip" else None)


@pytest.mark.parametrize(
    ("planned", "context", "left_out"),
    [(False, 5000, 0), (False, 512, 2), (True, 5000, 0), (True, 512, 2)],
)
def test_requests_that_were_left_out_are_decided_on_again(
    tmp_path: Path, planned: bool, context: int, left_out: int
) -> None:
    """They are sent if they fit now, and are no failures if not; the run is not finished yet.

    ``planned``: the server is up when the run is planned again, so no worker has to ask it.
    """
    port = free_port()
    working = Working(tmp_path, f"http://127.0.0.1:{port}", too_long="skip").prompts(*PROMPTS)
    with CountingServer(VLLM, 512, port):
        assert not working.open().plan.lengths_at_start
    assert [each.left_out for each in journalled(working)] == [True, True]
    if not planned:
        assert working.open().plan.lengths_at_start
    with CountingServer(VLLM, context, port) as server:
        if planned:
            assert not working.open().plan.lengths_at_start
        assert working.shard(0) is ExitCode.OK
    expected = ["too_long" if left_out else None] * 2
    assert codes(working) == [None, expected[0], None, expected[1]]
    assert len(server.prompts) == 4 - left_out
    assert not any("resuming" in each for each in working.reporter.messages)


def without_rest(working: Working) -> None:
    """Leave the run as a kill leaves it that comes right after the last result."""
    run = RunDirectory.of_output(working.output)
    for path in (working.output, *run.path.glob("status/*")):
        path.unlink()


def test_requests_that_were_left_out_stay_so_if_nothing_else_is_left(tmp_path: Path) -> None:
    """No engine is started to count their tokens again."""
    port = free_port()
    working = Working(tmp_path, f"http://127.0.0.1:{port}", too_long="skip").prompts(*PROMPTS)
    working.open()
    with CountingServer(VLLM, 512, port):
        assert working.shard(0) is ExitCode.OK
    without_rest(working)
    lines = working.journal.read_bytes()
    assert working.open().plan.lengths_at_start
    run = RunDirectory.of_output(working.output)
    assert working.shard(0) is ExitCode.OK, "the server is down"
    assert working.journal.read_bytes() == lines
    assert codes(working) == [None, "too_long", None, "too_long"]
    view = gather(run)
    assert (view.completed, view.failed, view.left_out, outcome(view)) == (2, 0, 2, ExitCode.OK)
    assert working.run() is ExitCode.OK


@pytest.mark.parametrize("wanted", ["fail", "send", "chunk"])
def test_requests_that_were_left_out_are_failures_with_other_options(
    tmp_path: Path, wanted: str
) -> None:
    port = free_port()
    working = Working(tmp_path, f"http://127.0.0.1:{port}", too_long="skip").prompts(*PROMPTS)
    working.open()
    with CountingServer(VLLM, 512, port):
        assert working.shard(0) is ExitCode.OK
    refuse_failures(working.open().plan, failed=2)
    working.options["too_long"] = wanted
    opened = working.open()
    assert opened.finished
    with pytest.raises(TooManyFailuresError, match="2 of 4 requests were left out as too long by"):
        refuse_failures(opened.plan, failed=2)


@pytest.mark.parametrize(
    ("context", "more", "asked"),
    [
        (512, {}, []),
        (512, {"context_length": 512}, []),
        (5000, {"context_length": 5000}, [1, 3]),
        (5000, {"too_long": "fail"}, [1, 3]),
        (5000, {"retry_failed": True}, [1, 3]),
    ],
)
def test_requests_that_were_left_out_are_checked_again_after_a_change(
    tmp_path: Path, context: int, more: dict[str, Any], asked: list[int]
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    working = Working(tmp_path, url, too_long="skip").prompts(*PROMPTS)
    working.open()
    with CountingServer(VLLM, 512, port):
        assert working.shard(0) is ExitCode.OK
    without_rest(working)
    working.options |= more
    assert working.open().plan.lengths_at_start
    with CountingServer(VLLM, context, port) as server:
        assert working.shard(0) is ExitCode.OK, working.error
    assert server.prompts == [PROMPTS[at] for at in asked]
    left = None if asked else "too_long"
    assert codes(working) == [None, left, None, left]


def test_a_rest_is_sent_without_those_that_were_left_out(tmp_path: Path) -> None:
    """If the context grew, they are sent with it; a worker has the server to find that out."""
    for context in (512, 5000):
        folder = tmp_path / str(context)
        folder.mkdir()
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        working = Working(folder, url, too_long="skip", retry_failed=False).prompts(*PROMPTS)
        working.open()
        with CountingServer(VLLM, 512, port):
            assert working.shard(0) is ExitCode.OK
        without_rest(working)
        lines = working.journal.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if split_line(line).custom_id != b'"2:two"']
        working.journal.write_bytes(b"".join(kept))
        assert working.open().plan.lengths_at_start
        with CountingServer(VLLM, context, port) as server:
            assert working.shard(0) is ExitCode.OK
        assert sorted(server.prompts) == sorted(PROMPTS[2:3] if context == 512 else PROMPTS[1:])
        assert codes(working)[1] == ("too_long" if context == 512 else None)
        view = gather(RunDirectory.of_output(working.output))
        assert (view.left_out, view.failed) == (2 if context == 512 else 0, 0)


def test_those_left_out_are_counted_in_the_journal(tmp_path: Path) -> None:
    """So a start that finds all done, and no status, does not take them for failures."""
    port = free_port()
    working = Working(tmp_path, f"http://127.0.0.1:{port}", too_long="skip").prompts(*PROMPTS)
    working.open()
    with CountingServer(VLLM, 512, port):
        assert working.shard(0) is ExitCode.OK
    working.status_file.unlink()
    working.output.unlink()
    assert working.shard(0) is ExitCode.OK
    assert "resuming: 2 of 4 requests are done already" in working.reporter.messages
    assert codes(working) == [None, "too_long", None, "too_long"]


def journalled(working: Working) -> list[RawResult]:
    return [split_line(line) for _, line in journal_lines(working.journal)]


def command(context: int) -> str:
    server = f"{sys.executable} {TOOLS}/counting_server.py --form llama --port {{port}}"
    return f"{server} --context {context}"


def test_the_server_of_a_command_is_asked_at_the_start_of_each_shard(tmp_path: Path) -> None:
    """Requests that a worker leaves out do not count as failures of the run."""
    working = Working(tmp_path, None, engine_command=command(512), model="m:1", too_long="skip",
                      allow_cpu=True).prompts(*PROMPTS)  # fmt: skip
    working.open(shards=2)
    assert working.shard(0) is ExitCode.OK
    assert working.shard(1) is ExitCode.OK
    assert codes(working) == [None, "too_long", None, "too_long"]
    run = RunDirectory.of_output(working.output)
    assert allowed_failures(read_plan(run), run) == 2
    view = gather(run)
    assert (view.failed, view.left_out, view.allowed_failures) == (0, 2, 0)
    assert [shard.left_out for shard in view.shards] == [1, 1]
    assert outcome(view) is ExitCode.OK
    assert main(["resume", "--local", str(working.output)]) == 0


def test_check_asks_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with CountingServer(LLAMA, 512) as server:
        working = Working(tmp_path, server.url).prompts(*PROMPTS)
        asked = ["check", str(working.input), "--engine-url", server.url]
        assert main([*asked, "--too-long", "chunk"]) == 0
        assert "2 requests are sent in 4 parts" in capsys.readouterr().err
        assert main(asked) == 2
    assert "line 4: 612 tokens" in capsys.readouterr().err


def test_check_says_that_a_server_was_not_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    working = Working(tmp_path, url).prompts(*PROMPTS)
    asked = ["check", str(working.input), "--engine-url", url]
    assert main(asked) == 0
    assert f"lengths:   not checked: {url} does not answer" in capsys.readouterr().out
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lengths_not_checked"].startswith(f"{url} does not answer")
    assert main([*asked, "--too-long", "send"]) == 0
    working.prompts("one")
    assert main(asked) == 0
    assert "not checked" not in capsys.readouterr().out
    with CountingServer(LLAMA, 5000) as server:
        assert main(["check", str(working.input), "--engine-url", server.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lengths_not_checked"] is None


def test_an_estimate_is_printed_at_the_start_if_planning_had_none(tmp_path: Path) -> None:
    port = free_port()
    working = Working(tmp_path, f"http://127.0.0.1:{port}").prompts("one", "word " * 400)
    working.open()
    with CountingServer(HOSTED, 512, port):
        assert working.shard(0) is ExitCode.FAILURES
    assert sum("this is an estimate" in each for each in working.reporter.messages) == 1


@BOTH
def test_parts_are_as_long_as_the_context_allows(tmp_path: Path, form: str) -> None:
    """A word is a token here: more bytes than in an estimate."""
    with CountingServer(form, 256, characters=5) as server:
        working = Working(tmp_path, server.url, too_long="chunk")
        plan = working.prompts("word " * 618, max_tokens=4).open().plan
        assert plan.long_prompts is not None
        assert plan.long_prompts.parts == 3  # of 256 - 4 - 10 tokens at most
        body = {"model": "m:1", "input": "word " * 300, "max_output_tokens": 60}
        line = request_line("a", body=body, url="/v1/responses")
        working.input.write_text(f"{line}\n", encoding="utf-8")
        plan = Working(tmp_path, server.url, "b.json", too_long="chunk").open().plan
        assert plan.long_prompts is not None
        assert plan.long_prompts.parts == 6  # 144 more are kept free for a template


def test_an_option_that_describes_the_server_is_not_compared_with_it(tmp_path: Path) -> None:
    with CountingServer(VLLM, 512) as server:
        working = Working(tmp_path, server.url, context_length=900).prompts("one")
        assert [finding_text(each) for each in check_fields(working.open().plan)] == []
    assert RunOptions(engine_url=server.url, context_length=900).context_length == 900


def test_the_plan_of_a_served_engine_has_its_context_and_tokenizer(
    tmp_path: Path,
) -> None:
    """So prompts are counted before the engine is up."""
    MadeServe(tmp_path, context_length=512)
    working = Working(tmp_path, "serve:tiny", too_long="chunk").prompts(*PROMPTS)
    plan = working.open().plan
    assert plan.long_prompts is not None
    assert (plan.long_prompts.too_long, plan.lengths_at_start) == (2, False)
    working = Working(tmp_path, "serve:tiny", "b.json")
    assert working.run() is ExitCode.USAGE
    assert working.error is not None
    assert working.error.problems[0] == "line 2: 1,201 tokens"


@pytest.mark.parametrize(
    ("status", "message", "code"),
    [
        # vLLM 0.32, llama-server b11669, SGLang, and OpenAI's code.
        (400, "This model's maximum context length is 512 tokens. However, your", "too_long"),
        (400, "request (931 tokens) exceeds the available context size (512 tokens)", "too_long"),
        (400, "The input (9 tokens) is longer than the model's context length (5)", "too_long"),
        (400, "context_length_exceeded", "too_long"),
        (400, "temperature is too high", "http_400"),
        (500, "the context size could not be read", "http_500"),
    ],
)
def test_a_server_s_own_refusal_has_the_same_code(status: int, message: str, code: str) -> None:
    body = json.dumps({"error": {"message": message}}).encode()
    found = judge_answer("/v1/chat/completions", {}, Answer(status, body), lambda *_: None)
    assert (found.code, found.status, found.message) == (code, status, message)
