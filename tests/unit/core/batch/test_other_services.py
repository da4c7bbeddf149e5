"""Batch files of other services: what they look like, and what is sent for them.

The lines are in the forms that these services document for their batch files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aiflux.cli.main import main
from aiflux.core.batch.input_file import InputRules, scan_input
from aiflux.core.batch.request import LineError, adapted_text, parse_request
from aiflux.errors import ConfigError, ExitCode, InputError
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.helpers import request_line
from tests.unit.working import Working

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
BODY = {"model": "m:1", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
URLS = {
    "OpenAI, Groq, LiteLLM, Together": CHAT,
    "Azure": "/chat/completions",
    "Azure, with the deployment": "/openai/deployments/my-gpt/chat/completions?api-version=2024-10",
    "Azure v1": "/openai/v1/chat/completions",
    "full": "https://api.openai.com/v1/chat/completions",
    "full, of Groq": "https://api.groq.com/openai/v1/chat/completions",
    "full, with a port and a slash": "http://localhost:4000/chat/completions/",
}
SCORES = {
    "Jina": "https://api.jina.ai/v1/rerank",
    "Cohere": "https://api.cohere.com/v2/rerank",
    "vLLM": "/rerank",
}


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
def test_the_endpoint_is_recognized_in_any_url(url: str) -> None:
    line = request_line(url=url, body=BODY).encode()
    request = parse_request(line, "m:1")
    assert (request.url, request.raw, request.body) == (CHAT, line, BODY)


@pytest.mark.parametrize("url", SCORES.values(), ids=SCORES)
def test_requests_for_reranking_of_other_services_are_recognized(url: str) -> None:
    body = {"model": "m:1", "query": "q", "documents": ["a", "b"], "top_n": 1}
    assert parse_request(request_line(url=url, body=body).encode()).url == "/v1/rerank"


@pytest.mark.parametrize(
    ("body", "url"),
    [
        (BODY, CHAT),
        ({"model": "m:1", "prompt": "hi"}, "/v1/completions"),
        ({"model": "m:1", "input": ["hi"]}, EMBEDDINGS),
        ({"model": "m:1", "input": ["hi"], "encoding_format": "float"}, EMBEDDINGS),
        ({"model": "m:1", "input": [[1, 2]]}, EMBEDDINGS),
        ({"model": "m:1", "input": "hi", "instructions": "Be brief."}, "/v1/responses"),
        ({"model": "m:1", "input": "hi", "max_output_tokens": 9}, "/v1/responses"),
        ({"model": "m:1", "input": [{"role": "user", "content": "hi"}]}, "/v1/responses"),
        ({"model": "m:1", "query": "q", "documents": ["a"]}, "/v1/rerank"),
        ({"model": "m:1", "text_1": "q", "text_2": ["a"]}, "/v1/score"),
        ({"model": "m:1", "queries": ["q"], "documents": ["a"]}, "/v1/score"),
    ],
)
def test_a_line_with_id_and_body_only_goes_to_the_endpoint_of_its_body(
    body: dict[str, Any], url: str
) -> None:
    """Mistral, Together and Fireworks name the endpoint for the whole batch."""
    line = json.dumps({"custom_id": "r1", "body": body})
    assert parse_request(line.encode(), "m:1").url == url


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"url": "/v1/moderations"}, 'url "/v1/moderations" is unknown'),
        ({"url": "https://x/v1/chat"}, "is unknown"),
        ({"url": "ftp://x/v1/chat/completions"}, "is unknown"),
        ({"url": ""}, "is unknown"),
        ({"url": ..., "body": {"model": "m:1"}}, "url is missing"),
        ({"url": "/embeddings"}, "body.input is missing; /v1/embeddings needs it"),
        ({"url": "/v2/rerank"}, "body.documents and body.query are missing; /v1/rerank needs them"),
        ({"url": "/score"}, "body.text_1 and body.text_2 are missing; /v1/score needs them"),
        ({"method": "GET"}, 'method is "GET"'),
        ({"method": ["POST"]}, 'method is ["POST"]'),
    ],
)
def test_other_lines_are_still_refused(changes: dict[str, Any], words: str) -> None:
    entry = {"custom_id": "r1", "method": "POST", "url": CHAT, "body": BODY} | changes
    line = json.dumps({key: value for key, value in entry.items() if value is not ...})
    with pytest.raises(LineError) as error:
        parse_request(line.encode(), "m:1")
    assert words in str(error.value)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def other_lines() -> list[str]:
    other = {**BODY, "model": "gpt-4o"}
    return [
        request_line("a", url="/chat/completions", body=other),
        request_line("b", url=..., method=..., body=BODY),
        request_line("c", url="/chat/completions", body=BODY),
        request_line("d", body=BODY),
    ]


def test_what_is_adapted_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", *other_lines())
    with pytest.raises(InputError) as refused:
        scan_input(path, "m:1")
    assert "use --replace-model" in refused.value.problems[0]
    for part_bytes in (1, 1 << 20):
        rules = InputRules(replaces_model=True)
        summary = scan_input(path, "m:1", rules=rules, part_bytes=part_bytes)
        assert summary.endpoints == {CHAT: 4}
        assert summary.adapted == {
            'url "/chat/completions" (taken as /v1/chat/completions)': 2,
            "no url (taken as /v1/chat/completions)": 1,
            "model 'gpt-4o' (replaced by 'm:1')": 1,
        }
    assert "2 requests with url" in adapted_text(summary.adapted)


def test_many_urls_take_one_line(tmp_path: Path) -> None:
    lines = [request_line(f"r{at}", url=f"/{at}/chat/completions", body=BODY) for at in range(50)]
    summary = scan_input(write(tmp_path / "in.jsonl", *lines), "m:1")
    assert sum(summary.adapted.values()) == 50
    assert summary.adapted["other urls or models"] == 45


def test_the_run_s_model_is_sent_and_the_results_keep_the_request(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url, model="m:1", replace_model=True)
        write(working.input, *other_lines())
        assert working.run() is ExitCode.OK
        assert [body["model"] for body in engine.bodies] == ["m:1"] * 4
        assert all(body["max_tokens"] == 9 for body in engine.bodies)
        assert [each["input"] for each in working.results] == [*map(json.loads, other_lines())]
        assert {each["metadata"]["model"] for each in working.results} == {"m:1"}
        # The same command finds everything done, by the hash of the request as it was written.
        assert working.open().finished
        assert engine.seen.total() == 4


def test_a_replaced_model_needs_a_name(tmp_path: Path) -> None:
    working = Working(tmp_path, "http://127.0.0.1:9", replace_model=True).prompts("a")
    with pytest.raises(ConfigError, match="--replace-model needs a model"):
        working.open()


def test_check_and_run_report_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", *other_lines())
    assert main(["check", "in.jsonl", "--model", "m:1"]) == 2
    assert main(["check", "in.jsonl", "--model", "m:1", "--replace-model"]) == 0
    assert capsys.readouterr().out.count("the input is for another service: ") == 1
    with FaultyEngine() as engine:
        words = ["run", "in.jsonl", "--model", "m:1", "--engine-url", engine.url]
        assert main([*words, "--output", "out.json", "--replace-model"]) == 0
    assert capsys.readouterr().err.count("the input is for another service: ") == 1
