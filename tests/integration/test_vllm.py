"""The real vLLM on the CPU, with a small model of Hugging Face."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from aiflux.engines.server_options import refuse_managed
from aiflux.engines.vllm.options import MANAGED
from aiflux.models.tokenizer import snapshot_tokenizer
from tests.integration.conftest import (
    PROMPTS,
    User,
    lines,
    request,
    shard_status,
    until,
)
from tests.integration.test_ollama import RunningWorker
from tests.tools.make_adapters import put_peft
from tests.tools.make_tiny_snapshot import put_tiny, tiny_files
from tests.unit.made_snapshots import COMMIT, put_pulled

REQUESTS = 60


@pytest.fixture(scope="session")
def plain(vllm: Path, user: User, checkout: Path) -> list[str | Path]:
    """``aiflux run --local`` with the vLLM of the test stack."""
    settings = [f"AIFLUX_ENGINE_PROGRAM={vllm}", f"AIFLUX_MODELS_DIR={user.home / 'models'}"]
    return ["env", *settings, checkout / ".venv/bin/aiflux", "run", "--local", "--engine", "vllm",
            "--engine-env", "OMP_NUM_THREADS=1", "--input", "in.jsonl", "--output",
            "out.json"]  # fmt: skip


@pytest.fixture(scope="session")
def local(plain: list[str | Path], user: User) -> list[str | Path]:
    """The same; vLLM keeps what it knows of an architecture, which halves the time of a start."""
    return [*plain, "--engine-env", f"VLLM_CACHE_ROOT={user.home / 'vllm-cache'}"]


@pytest.fixture(scope="session")
def tiny(user: User, vllm: Path) -> Path:
    """A random model of half a megabyte, for tests in which the words do not matter."""
    model = put_tiny(user.folder("tiny model"))
    user.give(model)
    return model


@pytest.fixture(scope="session")
def tiny_ranker(user: User, vllm: Path) -> Path:
    """The same with a head that gives a pair of texts a score."""
    model = put_tiny(user.folder("tiny ranker"), labels=1)
    user.give(model)
    return model


def abandoned_memory(user: User) -> set[str]:
    """Return the user's files of shared memory that no process uses; other tests' runs do."""
    owned, used = set(), set()
    for path in Path("/dev/shm").iterdir():  # noqa: S108
        with suppress(FileNotFoundError):
            if path.owner() == user.name:
                owned.add(path.name)
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            used.update(re.findall(r"/shm/(\S+)", maps.read_text(encoding="utf-8")))
    return owned - used


def test_a_run_survives_a_stop_and_the_death_of_each_of_vllms_processes(
    user: User, place: Path, local: list[str | Path], tiny: Path
) -> None:
    """The API server, the engine and its worker, which holds the model."""
    counting = [request(f"r{at}", f"Count from {at} on.", model=None, max_tokens=64)
                for at in range(REQUESTS)]  # fmt: skip
    long = request("long", "word " * 3000, model=None)
    user.write(place / "in.jsonl", lines(*counting, long))
    command = [*local, "--model", tiny, "--slots", "2", "--context-length", "1024",
               "--too-long", "send"]  # fmt: skip
    before = abandoned_memory(user)

    def kill(*words: str) -> None:
        running.wait_for(running.results() + 5, timeout=300)
        os.kill(running.child(*words), signal.SIGKILL)

    running = RunningWorker(user, place, command)
    kill("vllm.entrypoints.cli.main", "serve")
    running.wait_for(running.results() + 5, timeout=300)
    running.process.send_signal(signal.SIGTERM)
    code, printed = running.end()
    assert code == 5, printed
    assert "engine 0 is down; restarting it (1)" in printed
    assert user.none_left(), user.processes()
    until(lambda: abandoned_memory(user) <= before, "an end without shared memory", 20)
    assert running.results() < REQUESTS

    running = RunningWorker(user, place, command)
    kill("VLLM::EngineCore")
    kill("VLLM::Worker")
    code, printed = running.end(timeout=400)
    assert code == 3, printed  # the one that is too long
    assert printed.count("engine 0 is down; restarting it (1)") == 2, printed

    entries = json.loads((place / "out.json").read_text(encoding="utf-8"))
    failed = {entry["input"]["custom_id"]: entry["error"] for entry in entries if "error" in entry}
    assert failed.keys() == {"long"}, failed
    assert failed["long"]["status"] == 400
    assert "maximum context length is 1024 tokens" in failed["long"]["message"]
    assert [entry["input"]["custom_id"] for entry in entries if "error" not in entry] == [
        f"r{at}" for at in range(REQUESTS)
    ]
    assert {entry["metadata"]["model"] for entry in entries} == {tiny.name}
    engine = shard_status(place)["aiflux"]["engines"][0]
    assert (engine["version"], engine["slots"]) == ("0.32.0", 2)
    assert user.none_left(), user.processes()
    until(lambda: abandoned_memory(user) <= before, "an end without shared memory", 20)


def test_two_runs_at_once_with_a_home_that_cannot_be_written(
    user: User, place: Path, plain: list[str | Path], hub_model: Path, tiny: Path
) -> None:
    """One with embeddings, and one with the tokenizer of another model."""
    bare = place / "bare"
    user.run("mkdir", "-m", "555", place / "home")
    user.run("mkdir", bare, *(place / each for each in ("one", "two", "scratch")))
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(hub_model / name)
    entry = {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": {"input": "one"}}
    user.write(place / "one/in.jsonl", json.dumps(entry) + "\n")
    user.write(place / "two/in.jsonl", lines(request("r", "What is the capital of France?",
                                                     model=None)))  # fmt: skip
    env = {"HOME": str(place / "home"), "TMPDIR": str(place / "scratch")}
    words = [*plain, "--context-length", "512", "--model"]
    options = {"one": [tiny], "two": [bare, "--engine-arg", f"tokenizer={hub_model}"]}
    runs = [user.popen(*words, *more, cwd=place / each, env=env) for each, more in options.items()]
    until(
        lambda: (
            len([*place.glob("scratch/aiflux-*/engine-0/.cache/vllm")]) == 2
            or any(run.poll() is not None for run in runs)
        ),
        "the caches of two engines",
        300,
    )
    caches = [*place.glob("scratch/aiflux-*/engine-0/.cache/vllm")]
    printed = [run.communicate(timeout=400)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], printed
    assert len(caches) == 2
    (result,) = json.loads((place / "one/out.json").read_text(encoding="utf-8"))
    assert len(result["output"]["data"][0]["embedding"]) == 64
    (result,) = json.loads((place / "two/out.json").read_text(encoding="utf-8"))
    assert "Paris" in result["output"]["choices"][0]["message"]["content"]
    assert [*(place / "home").iterdir()] == [*(place / "scratch").iterdir()] == []


def failed_start(
    user: User, place: Path, command: list[str | Path], wrap: Sequence[str] = ()
) -> str:
    """Return the error of a run whose engine does not start."""
    user.write(place / "in.jsonl", lines(request("r", "Hi", model=None)))
    done = subprocess.run(
        [*wrap, *user.command(command)], cwd=place, env=user.environment(), capture_output=True,
        text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert not (place / "out.json").exists()
    assert user.none_left(), user.processes()
    return done.stderr[done.stderr.rindex("error: ") :]


SMALL_SHM = 'mount -t tmpfs -o size=64m,mode=1777 tmpfs /dev/shm && exec "$@"'


def test_too_small_a_dev_shm_is_named_with_the_remedy(
    user: User, place: Path, local: list[str | Path], tiny: Path
) -> None:
    as_root = ["--mount"] if os.geteuid() == 0 else ["--mount", "--map-root-user"]
    wrap = ["unshare", *as_root, "sh", "-c", SMALL_SHM, "sh"]
    printed = failed_start(user, place, [*local, "--model", tiny], wrap)
    assert "Insufficient space in /dev/shm for shared-memory allocation" in printed
    assert "64 MiB free" in printed
    assert "ask the site to enlarge that of the node; its log is " in printed
    assert "Traceback" not in printed


@pytest.mark.slow  # llama-server's is in test_llamacpp.py
def test_too_little_memory_at_the_start_is_named_with_the_remedy(
    user: User, place: Path, local: list[str | Path], tiny: Path
) -> None:
    command = [*local, "--model", tiny, "--engine-env", "VLLM_CPU_KVCACHE_SPACE=100000"]
    printed = failed_start(user, place, command)
    assert "kv cache allocation is less than requested memory for kv (100000.0 GiB)" in printed
    assert "request more memory: --mem" in printed
    assert "Traceback" not in printed


def test_a_model_that_is_none_damaged_or_another_is_refused(
    user: User, place: Path, local: list[str | Path], tiny: Path
) -> None:
    user.write(place / "in.jsonl", lines(request("r", "Hi", model=None)))
    assert "model directory not found" in user.run(
        *local, "--model", place / "none", cwd=place, code=4
    )
    weights = (tiny / "model.safetensors").read_bytes()
    for name, content, words in (
        ("cut", weights[: len(weights) // 2], f"has {len(weights) // 2} bytes of {len(weights)}"),
        ("header", b"\xff" * 8 + weights[8:], "is not a safetensors file"),
    ):
        damaged = put_tiny(place / name)
        (damaged / "model.safetensors").write_bytes(content)
        user.give(damaged)
        assert words in user.run(*local, "--model", damaged, cwd=place, code=4)
    bare = place / "bare"
    user.run("mkdir", bare)
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(tiny / name)
    assert f"no tokenizer is in {bare}" in user.run(*local, "--model", bare, cwd=place, code=4)
    user.write(place / "in.jsonl", lines(request("r", "Hi", model="another")))
    printed = user.run(*local, "--model", tiny, cwd=place, code=2)
    assert "another" in printed
    assert not (place / "out.json").exists()


def test_a_changed_byte_of_a_stored_model_is_found(
    user: User, place: Path, checkout: Path, vllm: Path
) -> None:
    """A run reads headers only: to read all weights would take minutes at each start."""
    stored = put_pulled(place / "models/hub", "org/tiny", tiny_files())
    user.give(place / "models")
    verify = [checkout / ".venv/bin/aiflux", "models", "verify", "hf:org/tiny"]
    env = {"AIFLUX_MODELS_DIR": str(place / "models")}
    assert f"commit {COMMIT}" in user.run(*verify, cwd=place, env=env)
    weights = (stored / "model.safetensors").resolve()
    with weights.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    printed = user.run(*verify, cwd=place, env=env, code=4)
    assert "model.safetensors" in printed
    assert "aiflux models pull --again hf:org/tiny" in printed


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                       "required": ["city"]},
    },
}  # fmt: skip


FORM = {"type": "json_schema", "name": "n", "schema": {"enum": [{"n": 1}, {"n": 2}]}}
RESPONSES: list[dict[str, Any]] = [
    {"input": "Count to 90.", "max_output_tokens": 4},
    {"input": [{"type": "message", "role": "user", "content": "Hello"}], "background": True},
    {"input": "Hello", "max_output_tokens": 60, "text": {"format": FORM}},
]
ADAPTERS = {"plain": None, "one": "one", "two": "two", "again": "one"}


@pytest.fixture(scope="module")
def answered(user: User, local: list[str | Path], hub_model: Path) -> Path:
    """A directory with answers of one vLLM, whose start takes half a minute, to all kinds of
    requests: for the model or an adapter, with a tool, to count tokens, and at /v1/responses.
    """
    place = user.folder("one vLLM for many requests")
    config = json.loads((hub_model / "config.json").read_bytes())
    for seed, name in enumerate(("one", "two")):
        # Of rank 12, as --max-lora-rank has few values; large enough to change every answer.
        put_peft(place / name, config, 12, seed=seed, base_model_name_or_path="smollm2")
    asked = [
        request("tool", "How is the weather in Paris?", model=None, tools=[TOOL],
                tool_choice="required", max_tokens=64),
        *(request(each, "What is the capital of France?", model=model)
          for each, model in ADAPTERS.items()),
        *(request(f"prompt {at}", prompt, model=None, max_tokens=1)
          for at, prompt in enumerate(PROMPTS)),
        *({"custom_id": f"response {at}", "url": "/v1/responses", "body": body}
          for at, body in enumerate(RESPONSES)),
    ]  # fmt: skip
    user.write(place / "in.jsonl", lines(*asked))
    adapters = [word for name in ("one", "two") for word in ("--lora", f"{name}={place / name}")]
    user.run(*local, "--model", hub_model, "--slots", "4", "--context-length", "1024", *adapters,
             "--tool-parser", "hermes", "--engine-arg", "max_num_batched_tokens=2048",
             "--engine-arg", "enable-prompt-tokens-details", "--max-tokens", "9",
             cwd=place)  # fmt: skip
    assert len(engine_logs(place)) == 1
    assert user.none_left(), user.processes()
    return place


def results_of(place: Path) -> dict[str, dict[str, Any]]:
    """Return the results of a run by custom_id."""
    written = json.loads((place / "out.json").read_text(encoding="utf-8"))
    return {entry["input"]["custom_id"]: entry for entry in written}


def test_adapters_parsers_and_options_in_one_engine(answered: Path) -> None:
    """Requests choose the model or an adapter; a forced tool call is an answer without text."""
    entries = results_of(answered)
    texts = {each: entries[each]["output"]["choices"][0]["message"]["content"] for each in ADAPTERS}
    assert "Paris" in texts["plain"]
    assert texts["one"] == texts["again"]
    assert len({*texts.values()}) == 3
    assert {each: entries[each]["metadata"]["model"] for each in ADAPTERS} == {
        "plain": "smollm2", "one": "one", "two": "two", "again": "one"}  # fmt: skip
    digests = {each: entries[each]["metadata"].get("adapter_digest") for each in ADAPTERS}
    assert digests["plain"] is None
    assert digests["one"] == digests["again"] != digests["two"]
    called = entries["tool"]["output"]["choices"][0]["message"]["tool_calls"]
    assert called[0]["function"]["name"] == "weather"
    assert entries["tool"]["output"]["usage"]["prompt_tokens_details"] is not None


def test_prompts_are_counted_as_the_server_counts_them(answered: Path, hub_model: Path) -> None:
    count = snapshot_tokenizer(hub_model).count_chat
    for at, prompt in enumerate(PROMPTS):
        entry = results_of(answered)[f"prompt {at}"]
        ours = count(entry["input"]["body"]["messages"])
        assert entry["output"]["usage"]["prompt_tokens"] == ours, prompt


def engine_logs(place: Path) -> list[Path]:
    return [*(place / "out.json.aiflux" / "logs").glob("engine-*")]


def test_a_wrong_option_ends_the_start_with_vllms_own_line(
    user: User, place: Path, local: list[str | Path], hub_model: Path
) -> None:
    user.write(place / "in.jsonl", lines(request("r", "Hi", model=None)))
    command = [*local, "--model", hub_model, "--context-length", "512"]
    printed = user.run(*command, "--engine-arg", "no-such-option=1", cwd=place, code=4)
    assert "vLLM does not accept --engine-arg: unrecognized arguments: --no-such-option" in printed
    printed = user.run(*command, "--tool-parser", "hermez", "--output", "b.json", cwd=place, code=4)
    assert "vLLM does not accept --tool-parser: invalid tool call parser: hermez" in printed


def test_every_spelling_of_a_managed_option_is_refused(user: User, vllm: Path) -> None:
    """The names are those of this vLLM, with their short forms."""
    printed = user.run(vllm, "serve", "--help=all", timeout=300)
    option = re.compile(r"(?:^  |, )--?(?:no-)?([A-Za-z][\w-]*)")
    forms = [{*option.findall(line)} for line in printed.splitlines()]
    known = set().union(*forms)
    assert MANAGED.keys() <= known
    for names in forms:
        assert not names & MANAGED.keys() or names <= MANAGED.keys(), names - MANAGED.keys()
    # No other option is refused because a managed one begins with its name.
    for name in known - {*MANAGED}:
        refuse_managed("vLLM", {name: "x"}, MANAGED, abbreviated=True)


def table_of(user: User, place: Path, checkout: Path) -> list[dict[str, Any]]:
    """Return the rows of the results table."""
    user.run(checkout / ".venv/bin/aiflux", "results", "to-jsonl", "out.json", cwd=place)
    lines = (place / "out.table.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_responses(user: User, answered: Path, checkout: Path) -> None:
    entries = results_of(answered)
    results = [entries[f"response {at}"] for at in range(len(RESPONSES))]
    assert results[0]["metadata"]["finish_reason_length"] is True
    assert results[0]["output"]["incomplete_details"] == {"reason": "max_output_tokens"}
    usage = [result["output"]["usage"]["output_tokens"] for result in results]
    assert usage[0] == 4
    assert usage[1] <= 9, "--max-tokens"
    others = [entry["output"]["usage"].get("completion_tokens", 0) for entry in entries.values()]
    totals = shard_status(answered)["aiflux"]["totals"]
    assert totals["completion_tokens"] == sum(usage) + sum(others)
    rows = table_of(user, answered, checkout)[-len(RESPONSES) :]
    assert all(row["error"] is None for row in rows), rows
    assert json.loads(rows[2]["answer"]) in ({"n": 1}, {"n": 2})


def test_scores_of_documents_and_pairs(
    user: User, place: Path, local: list[str | Path], checkout: Path, tiny_ranker: Path
) -> None:
    documents = ["a bear", "a red car"]
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/rerank", {"query": "a panda", "documents": documents}),
        ("/v1/rerank", {"query": "a panda", "documents": documents, "top_n": 1}),
        ("/v1/score", {"text_1": "a panda", "text_2": "a bear"}),
        ("/v1/score", {"queries": "a panda", "documents": documents}),
    ]
    entries = [
        {"custom_id": f"s{at}", "url": url, "body": body} for at, (url, body) in enumerate(bodies)
    ]
    user.write(place / "in.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
    options = ("--context-length", "256")
    user.run(*local, "--model", tiny_ranker, *options, cwd=place, timeout=400)
    assert shard_status(place)["aiflux"]["totals"]["prompt_tokens"] > 0
    ranked, best, pair, pairs = table_of(user, place, checkout)
    assert sorted(ranked["document"]) == [0, 1]
    assert ranked["answer"] == sorted(ranked["answer"], reverse=True)
    assert (best["document"], best["answer"]) == (ranked["document"][:1], ranked["answer"][:1])
    by_document = dict(zip(ranked["document"], ranked["answer"], strict=True))
    assert pairs["answer"] == pytest.approx([by_document[0], by_document[1]], abs=1e-3)
    assert pair["answer"] == pytest.approx(by_document[0], abs=1e-3)
