"""Runs with prompts that are longer than the model's context: refused, left out, or sent."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import aiflux
from aiflux.cli.main import main
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.journal import journal_lines, split_line
from aiflux.core.runs.open import RunDraft, draft_run
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import refuse_failures
from aiflux.engines.kinds import engine_kind
from aiflux.errors import ExitCode, InputError, TooManyFailuresError
from aiflux.slurm.preflight.local import check_fields
from aiflux.slurm.run_view import RunState, outcome
from tests.tools import make_tiny_gguf
from tests.tools.make_tiny_snapshot import put_tiny
from tests.unit.helpers import request_line, write_program
from tests.unit.made_models import put_model

TOOLS = Path(__file__).parents[3] / "tools"


def line(custom_id: str, size: int, **more: Any) -> str:
    messages = [{"role": "user", "content": "x" * size}]
    return request_line(custom_id, body={"messages": messages, **more})


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model and an input, whose second and last prompts are too long for 512."""
    (tmp_path / "m.gguf").write_bytes(make_tiny_gguf.tiny())
    lines = [line("a", 5), line("b", 600), line("c", 5), line("d", 700)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    program = write_program(
        tmp_path / "llama-server",
        f'#!/bin/sh\nexec {sys.executable} {TOOLS}/fake_llama_server.py "$@"\n',
    )
    monkeypatch.setenv("AIFLUX_ENGINE_PROGRAM", str(program))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def drafted(place: Path, shards: int = 1, **options: Any) -> RunDraft:
    chosen = {"engine": "llamacpp", "model": str(place / "m.gguf"), "context_length": 512}
    run_options = RunOptions(**{**chosen, **options})
    return draft_run(
        place / "in.jsonl", place / "out.json", run_options, place / "models",
        engine_kind(run_options), shards=shards,
    )  # fmt: skip


def test_by_default_the_run_is_refused(place: Path) -> None:
    with pytest.raises(InputError, match="2 prompts are too long for the context of 512") as caught:
        drafted(place)
    # The model has one token for each character, and one for the space before it.
    assert caught.value.problems == ("line 2: 601 tokens", "line 4: 701 tokens")
    assert "--context-length 1024, or --too-long skip" in str(caught.value.remedy)
    assert not (place / "out.json.aiflux").exists()
    assert drafted(place, context_length=1024).plan.long_prompts is None
    assert drafted(place, too_long="send").plan.long_prompts is None


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_skipped_requests_have_a_result_before_the_run_starts(place: Path, shards: int) -> None:
    opened = drafted(place, shards, too_long="skip").open()
    run = opened.run
    results = [
        split_line(found)
        for shard in opened.plan.shards
        for _, found in journal_lines(run.journal(shard.index))
    ]
    assert [json.loads(each.custom_id) for each in results] == ["b", "d"]
    assert json.loads(results[0].error) == {
        "code": "too_long", "status": None,
        "message": "not sent: the prompt has 601 tokens, and the context 512",
    }  # fmt: skip
    warnings = [finding.what for finding in check_fields(read_plan(run))]
    assert warnings == [
        "2 requests will not be sent (--too-long skip): too long for the context of 512 tokens "
        "(lines 2 and 4)"
    ]


def test_skipped_requests_do_not_count_as_failures(place: Path) -> None:
    plan = drafted(place, too_long="skip").plan
    assert plan.left_out == 2
    refuse_failures(plan, 2)
    with pytest.raises(TooManyFailuresError):
        refuse_failures(plan, 3)
    refuse_failures(drafted(place, too_long="skip", max_failures="1").plan, 3)


def start(place: Path, **options: Any) -> aiflux.Run:
    settings = {"engine": "llamacpp", "model": str(place / "m.gguf"), "slots": 2,
                "context_length": 512, "allow_cpu": True, "local": True, **options}  # fmt: skip
    return aiflux.run("in.jsonl", "out.json", workspace=place, **settings)


def test_a_run_leaves_them_out_and_sends_them_once_the_context_is_longer(place: Path) -> None:
    run = start(place, too_long="skip")
    view = run.wait(progress=False)
    assert view.finished, view.shards
    assert outcome(view) is ExitCode.OK
    codes = [each.error["code"] if each.error else None for each in run.results()]
    assert codes == [None, "too_long", None, "too_long"]

    same = start(place, too_long="skip", retry_failed=True).wait(progress=False)
    assert (same.completed, same.failed, same.left_out) == (2, 0, 2)
    assert (same.state, outcome(same)) == (RunState.FINISHED, ExitCode.OK)

    longer = start(place, context_length=1024, retry_failed=True).wait(progress=False)
    assert (longer.completed, longer.left_out, outcome(longer)) == (4, 0, ExitCode.OK)


@pytest.mark.parametrize("server", [False, True], ids=["by the plan", "by the worker"])
def test_skipped_requests_have_a_count_of_their_own_wherever_counts_are_shown(
    place: Path, server: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether they are found before the submission, or by a worker at its server."""
    model = ["--engine", "llamacpp", "--context-length", "512", "--model", "m.gguf", "--local"]
    command = f"{sys.executable} {TOOLS}/counting_server.py --form llama --port {{port}}"
    at_server = ["--engine-command", f"{command} --context 512", "--model", "m:1", "--local"]
    words = at_server if server else model
    texts = (place / "in.jsonl").read_text().replace("x" * 100, "word " * 50)
    (place / "in.jsonl").write_text(texts)
    run = ["run", "in.jsonl", "-o", "out.json", *words, "--too-long", "skip", "--allow-cpu"]
    assert main(run) == 0
    assert "2 failed" not in capsys.readouterr().err
    assert main(run) == 0
    assert "2 succeeded, 0 failed, 2 left out (too long)" in capsys.readouterr().out
    assert main(["status", "out.json"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("out.json  finished\n")
    assert "4/4 done (100 %), 0 failed, 2 left out (too long)" in printed
    assert "--retry-failed" not in printed
    assert "last failed requests" not in printed
    for command in ("status", "watch", "merge"):
        assert main([command, "out.json", "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        counts = [shown[name] for name in ("completed", "failed", "left_out", "allowed_failures")]
        assert counts == [2, 0, 2, 0]
        assert (shown["state"], shown["exit_code"]) == ("finished", 0)
    assert [shard["left_out"] for shard in shown["shards"]] == [2]
    assert main(["jobs", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["failed"], listed["left_out"]) == (0, 2)
    assert main(["report", "out.json", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [shown["counts"][name] for name in ("failed", "left_out", "left")] == [0, 2, 0]
    assert (shown["failures"], shown["warnings"]) == ([], [])
    assert "2 with prompts that are too long were not sent" in shown["methods"]
    assert main(["report", "out.json"]) == 0
    capsys.readouterr()
    assert main(["merge", "out.json", "--partial"]) == 0
    assert "results (0 failed, 2 left out (too long))" in capsys.readouterr().out
    assert main(["results", "to-csv", "out.json", "-o", "out.csv"]) == 0
    assert "2 answered, 0 failed, 2 left out (too long)" in capsys.readouterr().out
    whole = json.loads((place / "out.json.aiflux/status/run.json").read_text())
    assert whole["request_counts"] == {"total": 4, "completed": 2, "failed": 2}, "OpenAI's form"
    assert whole["aiflux"]["left_out"] == 2


def test_skipped_requests_are_failures_once_they_fit(place: Path) -> None:
    start(place, too_long="skip").wait(progress=False)
    for context, left_out in ((512, 2), (1024, 0)):
        draft = drafted(place, context_length=context, too_long="skip", slots=2, allow_cpu=True)
        assert draft.finished
        assert draft.counts is not None
        assert draft.counts.failed == 2
        assert draft.plan.left_out == left_out
    with pytest.raises(TooManyFailuresError, match="--retry-failed") as caught:
        refuse_failures(draft.plan, draft.counts.failed)
    assert "2 of 4 requests were left out as too long by an earlier command" in str(caught.value)


CHECK = ["check", "in.jsonl", "--engine", "llamacpp", "--model", "m.gguf"]


def test_check_reports_them_as_a_run_does(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CHECK, "--context-length", "512"]) == 2
    printed = capsys.readouterr()
    assert "2 prompts are too long for the context of 512 tokens" in printed.err
    assert "line 4: 701 tokens" in printed.err
    assert main([*CHECK, "--context-length", "512", "--too-long", "skip", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["long_prompts"]["lines"] == [2, 4]
    assert found["long_prompts"]["needed"] == 702
    assert main([*CHECK, "--context-length", "1024"]) == 0
    assert not capsys.readouterr().err


def test_check_without_a_plan_says_that_lengths_are_not_checked(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "in.jsonl", "--engine", "vllm", "--model", "llama3.2:3b"]) == 0
    assert "lengths:   not checked: llama3.2:3b is a model of Ollama" in capsys.readouterr().out


def test_ollamas_context_is_that_of_its_model(place: Path) -> None:
    """PARAMETER num_ctx takes precedence over the server's setting; only texts are counted."""
    gguf = make_tiny_gguf.tiny()
    put_model(place / "models", "plain:1b", gguf)
    put_model(place / "models", "own:1b", gguf, b"", b"", b'{"num_ctx": 256}')
    with pytest.raises(InputError, match="context of 512 tokens"):
        drafted(place, engine="ollama", model="plain:1b")
    with pytest.raises(InputError, match="context of 256 tokens"):
        drafted(place, engine="ollama", model="own:1b")
    more = {"engine_env": {"OLLAMA_CONTEXT_LENGTH": "1024"}}
    assert drafted(place, engine="ollama", model="plain:1b", **more).plan.long_prompts is None


def test_a_model_that_is_not_stored_gives_an_estimate_that_never_refuses(place: Path) -> None:
    (place / "in.jsonl").write_text(line("a", 3000) + "\n", encoding="utf-8")
    for too_long in ("fail", "skip"):
        plan = drafted(place, engine="ollama", model="absent:1b", too_long=too_long).plan
        assert plan.left_out == 0
        (finding,) = check_fields(plan)
        assert finding.what == (
            "about 1 prompt may be too long for the context of 512 tokens (line 1): the longest "
            "may have 1,017"
        )
        assert "this is an estimate, because absent:1b is not in" in finding.fix
        assert "aiflux models pull absent:1b" in finding.fix


def test_vllm_counts_with_the_template_of_the_directory(place: Path) -> None:
    put_tiny(place / "model")
    plan = drafted(place, engine="vllm", model=str(place / "model"), context_length=1024).plan
    assert plan.long_prompts is None
    with pytest.raises(InputError) as caught:
        drafted(place, engine="vllm", model=str(place / "model"))
    # <s>user\n...</s>\n and <s>assistant\n, with one token for each byte and each special token
    assert caught.value.problems[0] == f"line 2: {1 + 5 + 600 + 1 + 1 + 1 + 10} tokens"
    (place / "in.jsonl").write_text(line("a", 3000) + "\n", encoding="utf-8")
    plan = drafted(place, engine="vllm", model=str(place / "model"),
                   engine_arg={"tokenizer": "elsewhere"}).plan  # fmt: skip
    (finding,) = check_fields(plan)
    assert "--engine-arg sets a tokenizer of its own" in finding.fix


def test_answers_without_room_are_reported(place: Path) -> None:
    (place / "in.jsonl").write_text(line("a", 300, max_tokens=400) + "\n", encoding="utf-8")
    (finding,) = check_fields(drafted(place).plan)
    assert finding.what == (
        "1 prompt and max_tokens together exceed the context of 512 tokens: their answers end "
        "where the context ends"
    )
    assert finding.fix == "use --context-length 1024; or set a smaller max_tokens"


def test_a_context_that_the_model_does_not_have_is_reported(place: Path) -> None:
    (finding,) = check_fields(drafted(place, context_length=300_000).plan)
    assert finding.what == (
        f"{place}/m.gguf has a context of 8,192 tokens, but context_length is 300,000: llama.cpp "
        "reduces it"
    )
    assert "--context-length 8192 at most" in finding.fix


def test_a_run_sends_them_in_parts(place: Path) -> None:
    run = start(place, too_long="chunk")
    view = run.wait(progress=False)
    assert outcome(view) is ExitCode.OK, view.shards
    results = [*run.results()]
    # No template is known: 144 tokens are left for one, and a quarter of 512 for the answer.
    assert [each.metadata.get("chunks") for each in results] == [None, 3, None, 3]
    assert all(each.error is None for each in results)
    assert results[1].text.replace("\n\n", "") == "x" * 600
    plan = read_plan(drafted(place, too_long="chunk").run)
    assert plan.long_prompts is not None
    assert (plan.long_prompts.too_long, plan.long_prompts.parts) == (2, 6)
    assert plan.left_out == 0
    (finding,) = check_fields(plan)
    assert finding.what == (
        "2 requests are sent in 6 parts (--too-long chunk): too long for the context of 512 tokens "
        "(lines 2 and 4)"
    )
    assert (
        finding.fix == "the answers to the parts of each are joined; or use --context-length 1024"
    )


def test_skipped_requests_can_be_sent_in_parts_later(place: Path) -> None:
    start(place, too_long="skip").wait(progress=False)
    run = start(place, too_long="chunk", retry_failed=True)
    view = run.wait(progress=False)
    assert (view.completed, view.failed, outcome(view)) == (4, 0, ExitCode.OK)
    assert [each.metadata.get("chunks") for each in run.results()] == [None, 3, None, 3]


def test_requests_that_cannot_be_split_are_refused_before_the_run(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line("a", 600), line("b", 600, n=2), line("c", 5, n=2)]
    (place / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"1 prompt is too long .* and cannot be split") as caught:
        drafted(place, too_long="chunk")
    assert caught.value.problems == (
        "line 2: the request 'b' cannot be split: it asks for 2 answers",
    )
    assert not (place / "out.json.aiflux").exists()
    with pytest.raises(InputError) as caught:
        drafted(place, too_long="chunk", samples=2)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["line 1", "line 2"]
    assert main([*CHECK, "--context-length", "512", "--too-long", "chunk"]) == 2
    assert "line 2: the request 'b' cannot be split" in capsys.readouterr().err


def test_check_reports_the_parts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CHECK, "--context-length", "512", "--too-long", "chunk", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["long_prompts"]
    assert (found["too_long"], found["parts"]) == (2, 6)
    assert main([*CHECK, "--context-length", "512", "--too-long", "chunk"]) == 0
    assert "2 requests are sent in 6 parts" in capsys.readouterr().err


def test_without_the_tokenizer_nothing_is_split(place: Path) -> None:
    (place / "in.jsonl").write_text(line("a", 3000) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="only the model's tokenizer can split them") as caught:
        drafted(place, engine="ollama", model="absent:1b", too_long="chunk")
    assert "aiflux models pull absent:1b" in str(caught.value.remedy)
    (place / "in.jsonl").write_text(line("a", 30) + "\n", encoding="utf-8")
    assert drafted(place, engine="ollama", model="absent:1b", too_long="chunk").plan


def test_a_start_that_was_killed_before_its_plan_does_not_block_the_next(place: Path) -> None:
    run = drafted(place, too_long="chunk").open().run
    run.plan.unlink()
    for path in (*run.path.glob("status/*"), run.plan_lease):
        path.unlink(missing_ok=True)
    assert run.splits.exists()
    drafted(place, too_long="chunk").open()
    assert run.plan.exists()


def test_an_estimate_says_in_how_many_parts_the_run_sends_them(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line(f"r{at}", 600 if at % 5 == 0 else 5) for at in range(20)]
    (place / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = ["estimate", "in.jsonl", "--engine", "llamacpp", "--model", "m.gguf", "--local",
               "--context-length", "512", "--slots", "2", "--allow-cpu", "--requests", "10",
               "--too-long", "chunk"]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "4 requests are sent in 12 parts (--too-long chunk)" in printed.err


def test_answers_in_parts_can_be_verified(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same requests are sent in the same parts again."""
    start(place, too_long="chunk").wait(progress=False)
    capsys.readouterr()
    assert main(["verify-run", "out.json", "--local", "--sample", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["verification"]
    assert found["fixed"]["identical"] + found["sampled"]["identical"] == 4
