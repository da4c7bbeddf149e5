"""The worker with the real Ollama, without a container: results and recovery."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from openai.types import Batch, Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

from aiflux.engines.ollama.store import model_digest, stored_tokenizer
from aiflux.models.name import parse_model_name
from tests.integration.conftest import (
    MODEL,
    PROMPTS,
    TINY,
    User,
    answers,
    counted,
    create_tiny,
    lines,
    recorded,
    request,
    shard_status,
    until,
)


@pytest.fixture(scope="session")
def embedder(user: User, models: Path, ollama: Path, checkout: Path) -> str:
    """The same as an embedding model."""
    return create_tiny(user, models, ollama, "embedder:latest", "embeddings")


@pytest.fixture
def local(user: User, checkout: Path, ollama: Path, models: Path) -> list[str | Path]:
    """``aiflux run --local`` on the CPU Ollama."""
    settings = [f"AIFLUX_OLLAMA={ollama}", f"AIFLUX_MODELS_DIR={models}"]
    return ["env", *settings, checkout / ".venv/bin/aiflux", "run", "--local", "--input",
            "in.jsonl", "--output", "out.json"]  # fmt: skip


# Tokens of a request in runs that a test disturbs: the answers that are left must take many
# times as long as the disturbance, or a fast machine ends the run first.
DISTURBED = 300


def tiny_requests(count: int, tokens: int = 12) -> str:
    return lines(*(request(f"r{i}", f"word {i}", model=TINY, max_tokens=tokens)
                   for i in range(count)))  # fmt: skip


def test_the_three_endpoints_and_the_official_types(
    user: User, place: Path, local: list[str | Path], tiny: str
) -> None:
    chat = request("chat", "Say hello.", model=TINY, logprobs=True, seed=3)
    completion = {**request("completion", "", model=TINY), "url": "/v1/completions"}
    completion["body"] = {"model": TINY, "prompt": "one two", "max_tokens": 5}
    embedding = {**request("embedding", ""), "url": "/v1/embeddings"}
    embedding["body"] = {"model": TINY, "input": ["one", "two"]}
    user.write(place / "in.jsonl", lines(chat, completion, embedding))
    user.run(*local, cwd=place)
    entries = json.loads((place / "out.json").read_text(encoding="utf-8"))
    ChatCompletion.model_validate(entries[0]["output"])
    Completion.model_validate(entries[1]["output"])
    vectors = CreateEmbeddingResponse.model_validate(entries[2]["output"])
    assert len(vectors.data) == 2
    batch = Batch.model_validate(shard_status(place))
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.completed == 3
    facts = shard_status(place)["aiflux"]
    assert facts["engines"][0]["version"]
    assert len(facts["model_digests"][TINY]) == 64
    assert entries[0]["metadata"]["model_digest"] == facts["model_digests"][TINY]


def get_several_answers(user: User, place: Path, run: list[str | Path], model: str) -> None:
    """Ask for more answers than there are slots, to chat and completion."""
    chat = request("chat", "Name an animal.", model=model, n=5, temperature=1.5, seed=3)
    completion = {**request("completion", ""), "url": "/v1/completions"}
    completion["body"] = {"model": model, "prompt": "one two", "max_tokens": 8, "temperature": 1.5}
    user.write(place / "in.jsonl", lines(chat, completion))
    user.run(*run, "--slots", "2", "--samples", "3", cwd=place)
    first, second = json.loads((place / "out.json").read_text(encoding="utf-8"))
    chats = ChatCompletion.model_validate(first["output"])
    texts = Completion.model_validate(second["output"])
    assert [choice.index for choice in chats.choices] == [0, 1, 2, 3, 4]
    assert [choice.index for choice in texts.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in chats.choices}) > 1
    assert len({choice.text for choice in texts.choices}) > 1
    assert (first["metadata"]["samples"], second["metadata"]["samples"]) == (5, 3)
    assert chats.usage is not None
    assert chats.usage.prompt_tokens % 5 == 0
    progress = shard_status(place)["aiflux"]["progress"]
    assert progress["completion_tokens"] == sum(
        each["output"]["usage"]["completion_tokens"] for each in (first, second)
    )


def test_several_answers_to_one_request(
    user: User, place: Path, local: list[str | Path], tiny: str
) -> None:
    get_several_answers(user, place, local, TINY)


def test_endpoints_that_this_ollama_lacks_are_refused(
    user: User, place: Path, local: list[str | Path], tiny: str
) -> None:
    """Before submission where no version has it; at the start where newer versions do."""
    rerank = {"url": "/v1/rerank", "body": {"query": "q", "documents": ["d"]}}
    user.write(place / "in.jsonl", json.dumps({"custom_id": "r", **rerank}) + "\n")
    shown = user.run(*local, "--model", TINY, cwd=place, code=2)
    assert "line 1: Ollama has no /v1/rerank; use --engine llamacpp or vllm" in shown
    response = {"url": "/v1/responses", "body": {"input": "Hello"}}
    user.write(place / "in.jsonl", json.dumps({"custom_id": "r", **response}) + "\n")
    shown = user.run(*local, "--model", TINY, cwd=place, code=4)
    assert "Ollama 0.9.3 has no /v1/responses; Ollama 0.13.3 and later have it" in shown


def test_silent_engine_behaviour_is_reported(
    user: User, place: Path, local: list[str | Path], tiny: str
) -> None:
    cut = request("cut", "word " * 3000, model=TINY)
    whole = request("whole", "word", model=TINY)
    user.write(place / "in.jsonl", lines(cut, whole))
    user.run(*local, "--context-length", "512", "--slots", "1", "--too-long", "send", cwd=place)
    first, second = json.loads((place / "out.json").read_text(encoding="utf-8"))
    assert first["metadata"]["truncated_prompt"] is True
    assert "truncated_prompt" not in second["metadata"]
    assert first["metadata"]["finish_reason_length"] is True


def test_a_prompt_has_at_least_the_tokens_of_its_texts(
    user: User, place: Path, local: list[str | Path], models: Path
) -> None:
    """Ollama's own template is not counted: it adds a few tokens to each message."""
    asked = (request(f"r{at}", prompt, max_tokens=1) for at, prompt in enumerate(PROMPTS))
    user.write(place / "in.jsonl", lines(*asked))
    user.run(*local, cwd=place)
    tokenizer = stored_tokenizer(models, parse_model_name(MODEL), templated=False)

    def count(messages: list[Any]) -> int:
        return sum(tokenizer.count(message["content"]) for message in messages)

    counts = counted(place / "out.json", count)
    assert len(counts) == len(PROMPTS)
    assert all(0 < theirs - ours < 32 for theirs, ours in counts.values()), counts


def test_slots_and_context_are_as_requested(
    user: User, place: Path, local: list[str | Path], tiny: str
) -> None:
    user.write(place / "in.jsonl", tiny_requests(4))
    user.run(*local, "--context-length", "1024", "--slots", "3", cwd=place)
    engine = shard_status(place)["aiflux"]["engines"][0]
    assert (engine["slots"], engine["context_length"]) == (3, 1024)
    log = Path(engine["log"]).read_text(encoding="utf-8", errors="replace")
    assert "--parallel 3" in log
    assert "--ctx-size 3072" in log


def test_an_embedding_model_is_planned_with_ollamas_single_slot(
    user: User, place: Path, local: list[str | Path], embedder: str
) -> None:
    body = {"model": embedder, "input": "a word"}
    entry = {"custom_id": "e1", "method": "POST", "url": "/v1/embeddings", "body": body}
    user.write(place / "in.jsonl", json.dumps(entry) + "\n")
    user.run(*local, cwd=place)
    engine = shard_status(place)["aiflux"]["engines"][0]
    assert engine["slots"] == 1
    assert "--parallel 1" in Path(engine["log"]).read_text(encoding="utf-8", errors="replace")


def test_ollama_starts_no_more_threads_than_it_has_cpus(
    user: User, place: Path, local: list[str | Path], models: Path, tiny: str
) -> None:
    """With more, they wait for one another: no request was done in two minutes."""
    store, name = place / "models", parse_model_name(tiny)
    user.run("cp", "-r", models, store)
    manifest = json.loads((models / name.manifest_path).read_text(encoding="utf-8"))
    layers = [each for each in manifest["layers"] if "params" not in each["mediaType"]]
    user.write(store / name.manifest_path, json.dumps({**manifest, "layers": layers}))
    user.write(place / "in.jsonl", tiny_requests(8))
    one = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
    user.run(*one, *local, "--models-dir", store, cwd=place)
    whole(place, 8)
    facts = shard_status(place)["aiflux"]
    log = Path(facts["engines"][0]["log"]).read_text(encoding="utf-8", errors="replace")
    assert "--threads 1 " in log
    assert facts["model_digests"] == {tiny: model_digest(store, name)}


def test_an_engine_on_the_cpu_is_exit_4_unless_allowed(
    user: User, place: Path, local: list[str | Path], tiny: str
) -> None:
    user.write(place / "in.jsonl", tiny_requests(2))
    gpu = {"CUDA_VISIBLE_DEVICES": "0"}
    printed = user.run(*local, cwd=place, env=gpu, code=4)
    assert f"100 % of {TINY} landed on the CPU in a job with the GPUs 0" in printed
    assert "--allow-cpu" in printed
    assert not (place / "out.json").exists()
    assert user.none_left(), user.processes()
    user.run(*local, "--allow-cpu", cwd=place, env=gpu)
    whole(place, 2)


def test_each_group_of_gpus_has_its_own_engine(
    user: User, place: Path, local: list[str | Path], tiny: str
) -> None:
    user.write(place / "in.jsonl", tiny_requests(60))
    more = ["--gpus-per-engine", "2", "--allow-cpu", "--slots", "2"]
    user.run(*local, *more, cwd=place, env={"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    engines = shard_status(place)["aiflux"]["engines"]
    assert [engine["devices"] for engine in engines] == [["0", "1"], ["2", "3"]]
    assert len({engine["log"] for engine in engines}) == 2
    whole(place, 60)
    entries = json.loads((place / "out.json").read_text(encoding="utf-8"))
    assert {entry["metadata"]["engine"] for entry in entries} == {0, 1}


class RunningWorker:
    """A running worker that a test disturbs; ``process`` is the worker itself."""

    def __init__(self, user: User, place: Path, local: list[str | Path]) -> None:
        self.place = place
        self.process = user.popen(*local, cwd=place)

    def results(self) -> int:
        return recorded(self.place)

    def wait_for(self, results: int, timeout: float = 90) -> None:
        until(
            lambda: self.results() >= results or self.process.poll() is not None,
            lambda: f"{results} results; there are {self.results()}",
            timeout,
        )

    def child(self, *words: str) -> int:
        """Return the pid of a descendant whose command line contains all words."""
        for pid in descendants(self.process.pid):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if all(word in command for word in words):
                return pid
        raise AssertionError(f"no process with {words}")

    def end(self, timeout: float = 180) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, output


def descendants(pid: int) -> list[int]:
    done = subprocess.run(
        ["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    )
    children: dict[int, list[int]] = {}
    for line in done.stdout.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    found, queue = [], [pid]
    while queue:
        queue = [child for parent in queue for child in children.get(parent, [])]
        found += queue
    return found


def whole(place: Path, count: int) -> None:
    """Check that each request has one result, in order."""
    assert list(answers(place / "out.json")) == [f"r{i}" for i in range(count)]


@pytest.mark.parametrize("victim", [("serve",), ("runner",)], ids=["serve", "runner"])
def test_no_request_is_lost_when_the_engine_is_killed(
    user: User, place: Path, local: list[str | Path], tiny: str, victim: tuple[str, ...]
) -> None:
    user.write(place / "in.jsonl", tiny_requests(120, DISTURBED))
    running = RunningWorker(user, place, local)
    running.wait_for(10)
    os.kill(running.child("ollama", *victim), signal.SIGKILL)
    code, printed = running.end()
    assert code == 0, printed
    assert printed.count("restarting it") == 1, printed
    whole(place, 120)
    entries = json.loads((place / "out.json").read_text(encoding="utf-8"))
    assert {entry["metadata"]["attempts"] for entry in entries} == {1}
    assert user.none_left(), user.processes()


def test_a_killed_worker_loses_only_requests_in_flight(
    user: User, place: Path, local: list[str | Path], tiny: str
) -> None:
    user.write(place / "in.jsonl", tiny_requests(80, DISTURBED))
    kills = 0
    for target in (5, 25, 45):
        running = RunningWorker(user, place, local)
        running.wait_for(target)
        if running.process.poll() is None:
            running.process.kill()
            kills += 1
        before = running.results()
        running.end()
        assert running.results() >= before
        assert user.none_left(), user.processes()
    assert kills >= 2
    user.run(*local, cwd=place)
    whole(place, 80)


def test_repeated_signals_stop_the_worker_cleanly(
    user: User, place: Path, local: list[str | Path], tiny: str
) -> None:
    user.write(place / "in.jsonl", tiny_requests(120, DISTURBED))
    running = RunningWorker(user, place, local)
    running.wait_for(10)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        running.process.send_signal(number)
    code, printed = running.end(timeout=180)
    assert code == 5, printed
    assert "run the same command again" in printed
    assert shard_status(place)["status"] == "cancelled"
    assert user.none_left(), user.processes()
    user.run(*local, cwd=place)
    whole(place, 120)


def test_a_real_model_answers(user: User, place: Path, local: list[str | Path]) -> None:
    user.write(place / "in.jsonl", lines(request("france", "What is the capital of France?")))
    user.run(*local, "--model", MODEL, cwd=place)
    assert "Paris" in answers(place / "out.json")["france"]


def test_a_hanging_runner_is_restarted(
    user: User, place: Path, local: list[str | Path], tiny: str
) -> None:
    user.write(place / "in.jsonl", tiny_requests(120, DISTURBED))
    running = RunningWorker(user, place, [*local, "--request-timeout", "3", "--slots", "2"])
    running.wait_for(10)
    os.kill(running.child("ollama", "runner"), signal.SIGSTOP)
    code, printed = running.end()
    assert code == 0, printed
    assert "is down; restarting it" in printed
    whole(place, 120)
    assert user.none_left(), user.processes()
