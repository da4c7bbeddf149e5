"""The real vLLM on the CPU, with a small model of Hugging Face."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aiflux.engines.server_options import refuse_managed
from aiflux.engines.vllm.options import MANAGED
from tests.integration.conftest import User, lines, request, shard_status
from tests.tools.make_adapters import put_peft

REQUESTS = 60


@pytest.fixture
def local(vllm: Path, hub_model: Path, user: User, checkout: Path) -> list[str | Path]:
    """``aiflux run --local`` with the vLLM of the test stack."""
    settings = [f"AIFLUX_ENGINE_PROGRAM={vllm}", f"AIFLUX_MODELS_DIR={user.home / 'models'}"]
    return ["env", *settings, checkout / ".venv/bin/aiflux", "run", "--local", "--engine", "vllm",
            "--input", "in.jsonl", "--output", "out.json"]  # fmt: skip


def until(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.2)


def done(place: Path) -> int:
    journal = place / "out.json.aiflux" / "journal" / "shard-0000.jsonl"
    return len(journal.read_bytes().splitlines()) if journal.exists() else 0


def engine_cores(user: User) -> list[int]:
    """Return vLLM's engine processes, which hold the model; they have that name."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            command = (proc / "cmdline").read_bytes()
            mine = proc.owner() == user.name
        except (OSError, KeyError):
            continue
        if mine and b"EngineCore" in command:
            found.append(int(proc.name))
    return found


def test_a_run_survives_a_stop_and_the_death_of_vllms_engine_process(
    user: User, place: Path, local: list[str | Path], hub_model: Path
) -> None:
    counting = [request(f"r{at}", f"Count from {at} on.", model=None, max_tokens=48)
                for at in range(REQUESTS)]  # fmt: skip
    long = request("long", "word " * 3000, model=None)
    france = request("france", "What is the capital of France?", model="smollm2")
    user.write(place / "in.jsonl", lines(*counting, long, france))
    command = [*local, "--model", hub_model, "--slots", "8", "--context-length", "1024"]

    run = user.popen(*command, cwd=place)
    until(lambda: done(place) > 5)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 5, output
    assert user.none_left(), user.processes()
    before = done(place)
    assert before < REQUESTS

    run = user.popen(*command, cwd=place)
    until(lambda: done(place) > before + 5)
    (core,) = engine_cores(user)
    os.kill(core, signal.SIGKILL)
    output, _ = run.communicate(timeout=400)
    assert run.returncode == 3, output  # the one that is too long

    entries = json.loads((place / "out.json").read_text(encoding="utf-8"))
    failed = {entry["input"]["custom_id"]: entry["error"] for entry in entries if "error" in entry}
    assert failed.keys() == {"long"}, failed
    assert failed["long"]["status"] == 400
    assert "maximum context length is 1024 tokens" in failed["long"]["message"]
    texts = {entry["input"]["custom_id"]: entry["output"]["choices"][0]["message"]["content"]
             for entry in entries if "error" not in entry}  # fmt: skip
    assert "Paris" in texts["france"]
    assert len(texts) == REQUESTS + 1
    assert {entry["metadata"]["model"] for entry in entries} == {"smollm2"}
    engine = shard_status(place)["aiflux"]["engines"][0]
    assert (engine["version"], engine["slots"]) == ("0.32.0", 8)
    assert "engine 0 is down; restarting it (1)" in output
    assert user.none_left(), user.processes()


def test_embeddings(user: User, place: Path, local: list[str | Path], hub_model: Path) -> None:
    entry = {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": {"input": "one"}}
    user.write(place / "in.jsonl", json.dumps(entry) + "\n")
    user.run(*local, "--model", hub_model, cwd=place)
    (result,) = json.loads((place / "out.json").read_text(encoding="utf-8"))
    assert len(result["output"]["data"][0]["embedding"]) == 576


def test_a_directory_that_is_none_or_is_damaged_is_refused(
    user: User, place: Path, local: list[str | Path], hub_model: Path
) -> None:
    user.write(place / "in.jsonl", lines(request("r", "Hi", model=None)))
    assert "model directory not found" in user.run(
        *local, "--model", place / "none", cwd=place, code=4
    )
    cut = place / "cut"
    user.run("mkdir", cut)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hub_model / name, cut)
    weights = (hub_model / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    printed = user.run(*local, "--model", cut, cwd=place, code=4)
    assert f"has {len(weights) // 2} bytes of {len(weights)}" in printed
    assert not (place / "out.json").exists()


def test_a_model_without_a_tokenizer_is_refused_unless_one_is_named(
    user: User, place: Path, local: list[str | Path], hub_model: Path
) -> None:
    user.write(
        place / "in.jsonl", lines(request("r", "What is the capital of France?", model=None))
    )
    bare = place / "bare"
    user.run("mkdir", bare)
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(hub_model / name)
    run = [*local, "--model", bare, "--context-length", "512"]
    printed = user.run(*run, cwd=place, code=4)
    assert f"no tokenizer is in {bare}" in printed
    user.run(*run, "--engine-arg", f"tokenizer={hub_model}", cwd=place)
    (entry,) = json.loads((place / "out.json").read_text(encoding="utf-8"))
    assert "Paris" in entry["output"]["choices"][0]["message"]["content"]


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                       "required": ["city"]},
    },
}  # fmt: skip


def test_adapters_parsers_and_options_in_one_engine(
    user: User, place: Path, local: list[str | Path], hub_model: Path
) -> None:
    """Requests choose the model or an adapter; a forced tool call is an answer without text."""
    config = json.loads((hub_model / "config.json").read_bytes())
    for seed, name in enumerate(("one", "two")):
        # Of rank 12, as --max-lora-rank has few values; large enough to change every answer.
        put_peft(place / name, config, 12, seed=seed, base_model_name_or_path="smollm2")
    asked = {"plain": None, "one": "one", "two": "two", "again": "one"}
    tools = request("tool", "How is the weather in Paris?", model=None, tools=[TOOL],
                    tool_choice="required", max_tokens=64)  # fmt: skip
    user.write(place / "in.jsonl", lines(tools, *(
        request(each, "What is the capital of France?", model=model)
        for each, model in asked.items())))  # fmt: skip
    adapters = [word for name in ("one", "two") for word in ("--lora", f"{name}={place / name}")]
    user.run(*local, "--model", hub_model, "--slots", "4", "--context-length", "1024", *adapters,
             "--tool-parser", "hermes", "--engine-arg", "max_num_batched_tokens=2048",
             "--engine-arg", "enable-prompt-tokens-details", cwd=place)  # fmt: skip
    written = json.loads((place / "out.json").read_text(encoding="utf-8"))
    entries = {entry["input"]["custom_id"]: entry for entry in written}
    texts = {each: entries[each]["output"]["choices"][0]["message"]["content"] for each in asked}
    assert "Paris" in texts["plain"]
    assert texts["one"] == texts["again"]
    assert len({*texts.values()}) == 3
    assert {each: entries[each]["metadata"]["model"] for each in asked} == {
        "plain": "smollm2", "one": "one", "two": "two", "again": "one"}  # fmt: skip
    digests = {each: entries[each]["metadata"].get("adapter_digest") for each in asked}
    assert digests["plain"] is None
    assert digests["one"] == digests["again"] != digests["two"]
    called = entries["tool"]["output"]["choices"][0]["message"]["tool_calls"]
    assert called[0]["function"]["name"] == "weather"
    assert entries["tool"]["output"]["usage"]["prompt_tokens_details"] is not None
    assert len(engine_logs(place)) == 1
    assert user.none_left(), user.processes()


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
