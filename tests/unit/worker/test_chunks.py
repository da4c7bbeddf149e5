"""Requests whose prompts are too long: sent in parts, and answered by one response."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiflux.core.batch.input_file import scan_input
from aiflux.core.batch.prompt_lengths import PromptLimit, find_long_prompts
from aiflux.core.batch.prompt_split import text_at
from aiflux.core.batch.request import request_key
from aiflux.core.config.settings import CHUNK, RunOptions
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.journal import is_part, journal_lines
from aiflux.core.runs.open import OpenedRun, draft_run
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.splits_file import read_splits, splits_digest
from aiflux.engines.kinds import engine_kind
from aiflux.errors import ExitCode
from aiflux.models.tokenizer import ModelTokenizer
from aiflux.report.journal_summary import tally
from tests.tools.faulty_engine import FaultyEngine, Reply
from tests.unit.helpers import request_line
from tests.unit.working import Working, bytewise_tokenizer

CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES = (
    f"/v1/{name}" for name in ("chat/completions", "completions", "embeddings", "responses")
)
CONTEXT = 256


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    return bytewise_tokenizer(tmp_path_factory.mktemp("model"))


class Splitting(Working):
    """A run at a server whose tokenizer and context the test knows."""

    tokenizer: ModelTokenizer
    tokens = CONTEXT

    def open(self, **more: Any) -> OpenedRun:
        options = RunOptions(**self.options)
        draft = draft_run(self.input, self.output, options, None, engine_kind(options), **more)
        limit = PromptLimit(self.tokens, 8192, 50, lambda: self.tokenizer)
        found = find_long_prompts(
            scan_input(self.input), {"m:1": limit}, lambda named: named, split_with={}
        )
        assert found is not None
        assert not found.whole
        facts = replace(found.facts, splits=splits_digest(found.offsets, found.splits))
        chosen = replace(draft.plan.options, too_long=CHUNK)
        plan = replace(draft.plan, options=chosen, long_prompts=facts, lengths_at_start=False)
        return replace(draft, plan=plan, long=found).open()


Splits = Callable[..., Splitting]


@pytest.fixture
def splitting(bytewise: ModelTokenizer) -> Splits:
    def make(place: Path, url: str | None, **options: Any) -> Splitting:
        made = Splitting(place, url, **options)
        made.tokenizer = bytewise
        return made

    return make


def document(name: str, count: int = 9) -> str:
    """Return a text whose paragraphs are about as long as a part may be."""
    return "".join(f"{name}{at} {'words ' * 12}\n\n" for at in range(count))


def write(working: Working, *requests: tuple[str, dict[str, Any]]) -> None:
    lines = [
        request_line(f"r{at}", url=url, body={"model": "m:1", **body})
        for at, (url, body) in enumerate(requests)
    ]
    working.input.write_text("\n".join(lines) + "\n", encoding="utf-8")


def parts_of(working: Working) -> list[list[str]]:
    """Return the parts of each request that is split, in order."""
    run = RunDirectory.of_output(working.output)
    plan = read_plan(run)
    found = []
    for offset, split in read_splits(plan, run, plan.shards[0]).items():
        body = json.loads(working.input.read_bytes()[offset:].splitlines()[0])["body"]
        found.append([text_at(split.part(body, at), split.at) for at in range(len(split.ends))])
    return found


def expected(parts: list[str]) -> str:
    return "\n\n".join(f"echo {part}".strip("\n") for part in parts)


def parts_in(journal: Path) -> int:
    return sum(is_part(line) for _, line in journal_lines(journal))


def test_each_endpoint_gets_its_parts_and_gives_one_response(
    tmp_path: Path, splitting: Splits
) -> None:
    text = document("p")
    with FaultyEngine() as engine:
        working = splitting(tmp_path, engine.url)
        write(
            working,
            (CHAT, {"messages": [{"role": "system", "content": "Sum up."},
                                 {"role": "user", "content": text}]}),
            (COMPLETIONS, {"prompt": text}),
            (RESPONSES, {"input": text}),
            (CHAT, {"messages": [{"role": "user", "content": "short"}]}),
        )  # fmt: skip
        assert working.run() is ExitCode.OK
        sent = [body for body in engine.bodies if "messages" in body]
    chat, completion, response, short = working.results
    split = parts_of(working)
    assert [len(parts) for parts in split] == [
        result["metadata"]["chunks"] for result in (chat, completion, response)
    ]
    assert all("".join(parts) == text for parts in split)
    (choice,) = chat["output"]["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected(split[0])}
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert completion["output"]["choices"][0]["text"] == expected(split[1])
    (message,) = response["output"]["output"]
    assert message["content"][0]["text"] == expected(split[2])
    assert response["output"]["status"] == "completed"
    for result, parts in zip((chat, completion), split, strict=False):
        tokens = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
        assert result["output"]["usage"] == {
            name: count * len(parts) for name, count in tokens.items()
        }
    assert response["output"]["usage"]["output_tokens"] == 5 * len(split[2])
    assert sum(body["messages"][0]["content"] == "Sum up." for body in sent) == len(split[0])
    assert "chunks" not in short["metadata"]
    assert short["output"]["choices"][0]["message"]["content"] == "echo short"
    assert chat["input"]["body"]["messages"][1]["content"] == text, "the request is unchanged"


def vectors(*given: list[Any]) -> Callable[[str, str, Mapping[str, str]], Reply | None]:
    """Answer requests for embeddings with these vectors, one after the other."""
    left = iter(given)

    def instead(method: str, path: str, _: Mapping[str, str]) -> Reply | None:
        if method != "POST":
            return None
        data = [{"object": "embedding", "index": 0, "embedding": next(left)}]
        usage = {"prompt_tokens": 7, "total_tokens": 7}
        answer = {"object": "list", "model": "m:1", "data": data, "usage": usage}
        return 200, json.dumps(answer).encode(), {}

    return instead


def embed(place: Path, make: Splits, *given: list[Any]) -> dict[str, Any]:
    """Return the result for a text of 300 tokens, in parts of 200 and 100."""
    with FaultyEngine(instead=vectors(*given)) as engine:
        working = make(place, engine.url, concurrency=1, max_failures="1")
        write(working, (EMBEDDINGS, {"input": "x" * 199 + "\n\n" + "y" * 99}))
        assert working.run() is ExitCode.OK
    run = RunDirectory.of_output(working.output)
    plan = read_plan(run)
    (split,) = read_splits(plan, run, plan.shards[0]).values()
    assert split.tokens == (201, 99)
    return working.results[0]


def test_vectors_are_averaged_by_tokens_and_keep_length_1(
    tmp_path: Path, splitting: Splits
) -> None:
    output = embed(tmp_path, splitting, [1.0, 0.0, 0.0], [0.0, 0.6, 0.8])["output"]
    (found,) = output["data"]
    mean = [201 / 300, 0.6 * 99 / 300, 0.8 * 99 / 300]
    length = math.hypot(*mean)
    assert found["embedding"] == pytest.approx([number / length for number in mean])
    assert math.hypot(*found["embedding"]) == pytest.approx(1)
    assert output["usage"] == {"prompt_tokens": 14, "total_tokens": 14}


def test_vectors_of_other_lengths_are_not_normalised(tmp_path: Path, splitting: Splits) -> None:
    output = embed(tmp_path, splitting, [3, 0], [0, 6])["output"]
    assert output["data"][0]["embedding"] == pytest.approx([2.01, 1.98])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1.0, 0.0], [1.0]], "the vectors of the parts differ in length"),
        ([[[1.0], [2.0]], [1.0]], "the answer to a part has no vector of numbers"),
    ],
)
def test_parts_that_do_not_make_one_vector_fail_their_request(
    tmp_path: Path, splitting: Splits, given: list[Any], message: str
) -> None:
    result = embed(tmp_path, splitting, *given)
    assert result["output"] is None
    assert result["error"] == {"code": "parts_not_joined", "message": message, "status": 200}


def finishing(*reasons: str) -> Callable[[str, str, Mapping[str, str]], Reply | None]:
    left = iter(reasons)

    def instead(method: str, path: str, _: Mapping[str, str]) -> Reply | None:
        if method != "POST":
            return None
        reason = next(left)
        message = {"role": "assistant", "content": reason if reason != "empty" else "",
                   "reasoning_content": f"why {reason}"}  # fmt: skip
        finish = "length" if reason == "empty" else reason
        choice = {"index": 0, "message": message, "finish_reason": finish, "stop_reason": reason}
        return 200, json.dumps({"model": "m:1", "choices": [choice]}).encode(), {}

    return instead


@pytest.mark.parametrize(
    ("reasons", "finish", "text", "empty"),
    [
        (["stop", "stop", "stop"], "stop", "stop\n\nstop\n\nstop", False),
        (["stop", "length", "content_filter"], "length", "stop\n\nlength\n\ncontent_filter", False),
        (["stop", "empty", "stop"], "length", "stop\n\nstop", False),
        (["empty", "empty", "empty"], "length", "", True),
    ],
)
def test_a_response_stopped_only_if_all_its_parts_did(
    tmp_path: Path, splitting: Splits, reasons: list[str], finish: str, text: str, empty: bool
) -> None:
    with FaultyEngine(instead=finishing(*reasons)) as engine:
        working = splitting(tmp_path, engine.url, concurrency=1)
        write(working, (CHAT, {"messages": [{"role": "user", "content": document("p", 5)}]}))
        assert working.run() is ExitCode.OK
    (result,) = working.results
    (choice,) = result["output"]["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == (finish, text)
    assert choice["message"]["reasoning_content"] == "\n\n".join(f"why {each}" for each in reasons)
    assert result["metadata"]["chunks"] == 3
    assert result["metadata"].get("finish_reason_length", False) == (finish == "length")
    assert ("empty_answer" in result["metadata"]) == empty


def incomplete(method: str, path: str, _: Mapping[str, str]) -> Reply | None:
    part = {"type": "output_text", "text": "a", "annotations": []}
    items = [{"type": "reasoning", "summary": []},
             {"type": "message", "role": "assistant", "content": [part]}]  # fmt: skip
    answer = {"object": "response", "status": "incomplete", "output": items,
              "incomplete_details": {"reason": "max_output_tokens"}}  # fmt: skip
    return (200, json.dumps(answer).encode(), {}) if method == "POST" else None


def test_a_response_is_incomplete_if_a_part_is(tmp_path: Path, splitting: Splits) -> None:
    with FaultyEngine(instead=incomplete) as engine:
        working = splitting(tmp_path, engine.url)
        write(working, (RESPONSES, {"input": document("p", 5)}))
        assert working.run() is ExitCode.OK
    output = working.results[0]["output"]
    kinds = [item["type"] for item in output["output"]]
    assert kinds == ["reasoning"] * (len(kinds) - 1) + ["message"]
    assert output["output"][-1]["content"][0]["text"] == "\n\n".join("a" * (len(kinds) - 1))
    assert (output["status"], output["incomplete_details"]["reason"]) == (
        "incomplete", "max_output_tokens",
    )  # fmt: skip
    assert working.results[0]["metadata"]["finish_reason_length"] is True


def three(working: Working) -> None:
    """Write three requests with several parts each."""
    write(
        working,
        *((CHAT, {"messages": [{"role": "user", "content": document(name)}]}) for name in "abc"),
    )


def test_the_parts_of_one_request_are_in_flight_side_by_side(
    tmp_path: Path, splitting: Splits
) -> None:
    with FaultyEngine(delay=0.1) as engine:
        working = splitting(tmp_path, engine.url, concurrency=4)
        write(working, (CHAT, {"messages": [{"role": "user", "content": document("p")}]}))
        assert working.run() is ExitCode.OK
        assert engine.most == 4


def test_a_stopped_run_asks_for_the_missing_parts_only(tmp_path: Path, splitting: Splits) -> None:
    with FaultyEngine(delay=0.03) as engine:
        working = splitting(tmp_path, engine.url, concurrency=2)
        three(working)
        working.stop_soon(results=3)
        assert working.run() is ExitCode.STOPPED
        assert parts_in(working.journal) >= 3
        before = len(engine.bodies)
        again = splitting(tmp_path, engine.url, concurrency=2)
        assert again.run() is ExitCode.OK
        asked = Counter(json.dumps(body) for body in engine.bodies)
    assert before < len(engine.bodies)
    assert set(asked.values()) == {1}, "a part was asked for again"
    for result, parts in zip(again.results, parts_of(again), strict=True):
        assert result["output"]["choices"][0]["message"]["content"] == expected(parts)
        assert result["output"]["usage"]["completion_tokens"] == 5 * len(parts)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, bytewise: ModelTokenizer) -> Path:
    """A finished run of three requests in parts."""
    place = tmp_path_factory.mktemp("finished")
    with FaultyEngine() as engine:
        working = Splitting(place, engine.url)
        working.tokenizer = bytewise
        three(working)
        assert working.run() is ExitCode.OK
    return place


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_journal_cut_anywhere_resumes_with_each_part_once(
    tmp_path_factory: pytest.TempPathFactory,
    bytewise: ModelTokenizer,
    finished: Path,
    data: st.DataObject,
) -> None:
    place = tmp_path_factory.mktemp("resumed") / "run"
    shutil.copytree(finished, place)
    working = Splitting(place, None)
    whole = sum(map(len, parts_of(working)))
    size = working.journal.stat().st_size
    working.cut_copy(finished, data.draw(st.integers(0, size), label="cut"))
    lines = [*journal_lines(working.journal)]
    done = {key for key, line in lines if not is_part(line)}
    keys = map(request_key, working.input.read_bytes().splitlines())
    kept = sum(is_part(line) and key not in done for key, line in lines)
    kept += sum(
        len(parts) for parts, key in zip(parts_of(working), keys, strict=True) if key in done
    )
    with FaultyEngine() as engine:
        again = Splitting(place, engine.url)
        again.tokenizer = bytewise
        assert again.run(force_resume=True) is ExitCode.OK
        assert len(engine.bodies) == whole - kept
    for result, parts in zip(again.results, parts_of(again), strict=True):
        assert result["output"]["choices"][0]["message"]["content"] == expected(parts)


def test_of_another_split_only_equal_parts_are_kept(tmp_path: Path, splitting: Splits) -> None:
    """A longer context has other parts; answers to those before do not become a part of it."""
    with FaultyEngine(delay=0.03) as engine:
        working = splitting(tmp_path, engine.url, concurrency=1)
        three(working)
        working.stop_soon(results=3)
        assert working.run() is ExitCode.STOPPED
        again = splitting(tmp_path, engine.url)
        again.tokens = 400
        assert again.run() is ExitCode.OK
    for result, parts in zip(again.results, parts_of(again), strict=True):
        assert "".join(parts).startswith(parts[0])
        assert result["output"]["choices"][0]["message"]["content"] == expected(parts)
        assert result["metadata"]["chunks"] == len(parts)


def test_one_failed_part_fails_its_request_and_the_others_are_kept(
    tmp_path: Path, splitting: Splits
) -> None:
    count = 0

    def instead(method: str, path: str, _: Mapping[str, str]) -> Reply | None:
        nonlocal count
        count += method == "POST"
        if method == "POST" and count == 3:
            return 422, b'{"error": {"message": "no"}}', {}
        return None

    with FaultyEngine(instead=instead) as engine:
        working = splitting(tmp_path, engine.url, concurrency=1)
        three(working)
        assert working.run() is ExitCode.FAILURES
        failed = working.results[0]
        parts = parts_of(working)[0]
        assert failed["output"] is None
        assert failed["error"]["message"] == f"part 3 of {len(parts)}: no"
        assert working.status["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
        before = len(engine.bodies)
        again = splitting(tmp_path, engine.url, retry_failed=True)
        assert again.run() is ExitCode.OK
        assert len(engine.bodies) - before == len(parts) - 2, "only the missing parts"
    content = again.results[0]["output"]["choices"][0]["message"]["content"]
    assert content == expected(parts)


def test_a_part_that_crashes_the_engine_fails_its_request_alone(
    tmp_path: Path, splitting: Splits
) -> None:
    texts = [document("a"), f"{document('b', 4)}die\n\n{document('b', 4)}", document("c")]
    with FaultyEngine(delay=0.01) as engine:
        working = splitting(tmp_path, engine.url, concurrency=3)
        write(working, *((CHAT, {"messages": [{"role": "user", "content": t}]}) for t in texts))
        with working.reviving(engine):
            code = working.run()
    assert code is ExitCode.FAILURES
    one, failed, last = working.results
    assert failed["error"]["code"] == "engine_crashed"
    assert failed["error"]["message"].startswith("part ")
    for result, parts in ((one, parts_of(working)[0]), (last, parts_of(working)[2])):
        assert result["output"]["choices"][0]["message"]["content"] == expected(parts)


def test_temporary_errors_of_a_part_are_retried(tmp_path: Path, splitting: Splits) -> None:
    text = f"{document('a', 3)}503*2 {document('a', 3)}"
    with FaultyEngine() as engine:
        working = splitting(tmp_path, engine.url)
        write(working, (CHAT, {"messages": [{"role": "user", "content": text}]}))
        assert working.run() is ExitCode.OK
        parts = parts_of(working)[0]
        assert len(engine.bodies) == len(parts) + 2
    assert working.results[0]["metadata"]["attempts"] == 3


def test_the_adaptive_limit_works_with_parts(tmp_path: Path, splitting: Splits) -> None:
    """Without --concurrency, the requests in flight follow from how the server answers."""
    with FaultyEngine(delay=0.01, lanes=4) as engine:
        working = splitting(tmp_path, engine.url)
        texts = (document(f"{at} ") for at in range(20))
        write(working, *((CHAT, {"messages": [{"role": "user", "content": t}]}) for t in texts))
        assert working.run() is ExitCode.OK
        assert engine.most > 1
    assert len(working.results) == 20


def test_checks_of_other_requests_go_on(tmp_path: Path, splitting: Splits) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "integer"}}}
    with FaultyEngine() as engine:
        working = splitting(tmp_path, engine.url, validate=True)
        short = {"messages": [{"role": "user", "content": "unfit*1 answer:5"}]}
        write(
            working,
            (CHAT, {"messages": [{"role": "user", "content": document("p")}]}),
            (CHAT, {**short, "response_format": schema}),
        )
        assert working.run() is ExitCode.OK
    assert working.results[0]["metadata"]["chunks"] > 2
    assert working.results[1]["metadata"]["unfit_answers"] == 1


def test_the_report_counts_each_part_once(tmp_path: Path, splitting: Splits) -> None:
    with FaultyEngine() as engine:
        working = splitting(tmp_path, engine.url)
        three(working)
        assert working.run() is ExitCode.OK
    parts = sum(map(len, parts_of(working)))
    found = tally(journal_lines(working.journal))
    assert (found.results, found.completed, found.completion_tokens) == (3, 3, 5 * parts)
    assert working.status["aiflux"]["progress"]["completion_tokens"] == 5 * parts


def test_parts_of_moved_requests_are_kept(tmp_path: Path, splitting: Splits) -> None:
    with FaultyEngine(delay=0.02) as engine:
        working = splitting(tmp_path, engine.url, concurrency=2)
        three(working)
        working.stop_soon(results=6)
        assert working.run() is ExitCode.STOPPED
        again = splitting(tmp_path, engine.url)
        opened = again.open(shards=3)
        assert len(opened.open_shards) == 3
        for shard in opened.open_shards:
            assert again.shard(shard) is ExitCode.OK
        asked = Counter(json.dumps(body) for body in engine.bodies)
    assert set(asked.values()) == {1}
    assert all(result["metadata"]["chunks"] > 2 for result in again.results)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_text("{", encoding="utf-8"), "is damaged"),
        (lambda path: path.write_text("", encoding="utf-8"), "is not that of the plan"),
    ],
)
def test_other_splits_than_the_plan_s_are_refused(
    tmp_path: Path, splitting: Splits, change: Callable[[Path], object], what: str
) -> None:
    with FaultyEngine() as engine:
        working = splitting(tmp_path, engine.url)
        three(working)
        working.open()
        change(RunDirectory.of_output(working.output).splits)
        assert working.shard(0) is ExitCode.USAGE
        assert working.error is not None
        assert what in working.error.message
        assert not engine.bodies
        assert splitting(tmp_path, engine.url).run() is ExitCode.OK
