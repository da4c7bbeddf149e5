"""llama.cpp's server in an image of its own, and without one."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shlex
import signal
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from aiflux.engines.llamacpp.model_file import find_files
from aiflux.engines.llamacpp.options import MANAGED
from aiflux.engines.ollama.store import stored_tokenizer
from aiflux.models.name import parse_model_name
from tests.integration.conftest import (
    FRANCE,
    MODEL,
    PLANETS,
    PROMPTS,
    Cluster,
    User,
    answers,
    counted,
    lines,
    recorded,
    request,
    shard_status,
    until,
)
from tests.integration.test_jobs import submitted
from tests.integration.test_ollama import (
    DISTURBED,
    RunningWorker,
    get_several_answers,
    tiny_requests,
    whole,
)
from tests.tools import make_tiny_gguf
from tests.tools.make_adapters import gguf_adapter


@pytest.fixture
def local(checkout: Path, llama_server: Path, models: Path) -> list[str | Path]:
    """``aiflux run --local`` with the llama-server of the test stack."""
    settings = [f"AIFLUX_ENGINE_PROGRAM={llama_server}", f"AIFLUX_MODELS_DIR={models}"]
    return ["env", *settings, checkout / ".venv/bin/aiflux", "run", "--local", "--engine",
            "llamacpp", "--engine-arg", "threads=1", "--input", "in.jsonl", "--output",
            "out.json"]  # fmt: skip


def test_a_model_that_ollama_pulled_answers(
    user: User, place: Path, local: list[str | Path]
) -> None:
    user.write(place / "in.jsonl", lines(FRANCE, PLANETS))
    user.run(*local, "--model", MODEL, cwd=place)
    assert "Paris" in answers(place / "out.json")["france"]
    engine = shard_status(place)["aiflux"]["engines"][0]
    assert engine["version"].startswith("b")
    first, _ = json.loads((place / "out.json").read_text(encoding="utf-8"))
    assert first["metadata"]["model"] == MODEL
    assert len(first["metadata"]["model_digest"]) == 64
    assert user.none_left(), user.processes()


def test_several_answers_to_one_request(user: User, place: Path, local: list[str | Path]) -> None:
    get_several_answers(user, place, local, MODEL)


FORM = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("url", "bodies", "answers"),
    [
        ("/v1/embeddings", [{"input": "one"}], 1),
        ("/v1/rerank", [{"query": "a panda", "documents": ["a bear", "a car"]},
                        {"query": "a panda", "documents": ["a bear", "a car"], "top_n": 1}], 2),
        ("/v1/responses", [
            {"input": "What is the capital of France?", "temperature": 0,
             "instructions": "You are a helpful assistant"},
            {"input": [{"type": "message", "role": "user", "content": "Count to 90."}],
             "max_output_tokens": 2},
            {"input": "Give me a number.", "max_output_tokens": 60, "temperature": 0,
             "response_format": {
                 "type": "json_schema", "json_schema": {"name": "n", "schema": FORM}}},
        ], 3),
    ],
)  # fmt: skip
def test_every_other_endpoint_answers(
    user: User, place: Path, local: list[str | Path], checkout: Path, url: str,
    bodies: list[dict[str, object]], answers: int,
) -> None:  # fmt: skip
    entries = [{"custom_id": f"e{at}", "url": url, "body": body} for at, body in enumerate(bodies)]
    user.write(place / "in.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
    user.run(*local, "--model", MODEL, cwd=place)
    totals = shard_status(place)["aiflux"]["totals"]
    assert totals["prompt_tokens"] > 0
    assert (totals["completion_tokens"] > 0) == (url == "/v1/responses")
    user.run(checkout / ".venv/bin/aiflux", "results", "to-jsonl", "out.json", cwd=place)
    table = [json.loads(line) for line in (place / "out.table.jsonl").read_text().splitlines()]
    assert len(table) == answers
    assert not any(row["error"] for row in table)
    if url == "/v1/rerank":
        assert sorted(table[0]["document"]) == [0, 1]
        assert table[1]["document"] == table[0]["document"][:1]
        assert table[0]["answer"] == sorted(table[0]["answer"], reverse=True)
    if url == "/v1/responses":
        results = json.loads((place / "out.json").read_text(encoding="utf-8"))
        cut = [result["metadata"].get("finish_reason_length", False) for result in results]
        assert cut == [False, True, False]
        assert "Paris" in table[0]["answer"]
        assert isinstance(json.loads(table[2]["answer"])["n"], int)


def test_a_prompt_that_is_too_long_fails_and_is_not_cut(
    user: User, place: Path, local: list[str | Path]
) -> None:
    user.write(place / "in.jsonl", lines(request("long", "word " * 3000), request("short", "Hi")))
    user.run(*local, "--model", MODEL, "--context-length", "512", "--too-long", "send", cwd=place,
             code=3)  # fmt: skip
    first, second = json.loads((place / "out.json").read_text(encoding="utf-8"))
    assert first["error"]["status"] == 400
    assert "exceeds the available context size" in first["error"]["message"]
    assert "error" not in second


def test_a_server_that_aiflux_does_not_configure_counts_the_prompts(
    user: User, place: Path, checkout: Path, llama_server: Path, models: Path
) -> None:
    text = (checkout / "docs/output.md").read_text(encoding="utf-8")[:2500]
    more = {"max_tokens": 5}
    user.write(place / "in.jsonl", lines(request("long", text, **more), request("b", "Hi", **more)))
    server = f"{shlex.quote(str(llama_server))} -m {{model}} -np 1 -c 512 --jinja --host {{socket}}"
    model = find_files(models, MODEL).model
    run = [checkout / ".venv/bin/aiflux", "run", "--local", "--model", model, "--replace-model",
           "--engine-command", server, "--input", "in.jsonl", "--output", "out.json"]  # fmt: skip
    refused = user.run(*run, cwd=place, code=2)
    counted = re.search(r"line 1: ([\d,]+) tokens", refused)
    assert counted is not None, refused
    user.run(*run, "--too-long", "skip", cwd=place)
    user.run(*run, "--too-long", "chunk", "--retry-failed", cwd=place)
    long, short = json.loads((place / "out.json").read_text(encoding="utf-8"))
    parts = long["metadata"]["chunks"]
    assert parts > 1
    # Each part has the template, and may have a token more where the text is split.
    template = short["output"]["usage"]["prompt_tokens"] - 1
    whole = int(counted[1].replace(",", "")) + (parts - 1) * template
    assert abs(long["output"]["usage"]["prompt_tokens"] - whole) <= parts


@pytest.fixture(scope="module")
def tokens(user: User, checkout: Path) -> str:
    """The extra `tokens`, in a folder that the checkout's Python finds with this variable."""
    folder = user.folder("tokens")
    pip = (checkout / ".venv/bin/python", "-m", "pip", "install", "--quiet", "--no-deps")
    user.run(*pip, "--disable-pip-version-check", "--target", folder, "tokenizers>=0.21")
    return f"PYTHONPATH={folder}"


@pytest.mark.parametrize("embeds", [False, True], ids=["text", "embeddings"])
def test_a_long_document_is_sent_in_parts_that_fit(
    user: User, place: Path, local: list[str | Path], checkout: Path, tokens: str, embeds: bool
) -> None:
    """The server refuses a prompt that is longer than its context; it answers each part."""
    text = (checkout / "docs/output.md").read_text(encoding="utf-8")[:4000]
    messages = [{"role": "system", "content": "Name the subject in one word."},
                {"role": "user", "content": text}]  # fmt: skip
    asked: dict[str, dict[str, object]] = {
        "chat/completions": {"messages": messages, "max_tokens": 20},
        "completions": {"prompt": text, "max_tokens": 20},
        "responses": {"input": text, "max_output_tokens": 20},
    }
    asked = {"embeddings": {"input": text}} if embeds else asked
    entries = [{"custom_id": url, "url": f"/v1/{url}", "body": body} for url, body in asked.items()]
    user.write(place / "in.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
    run = [*local, "--model", MODEL, "--context-length", "512", "--too-long", "chunk"]
    refused = user.run(*run, cwd=place, code=2)
    assert "only the model's tokenizer can split them" in refused
    user.run("env", tokens, *run, cwd=place)
    found = json.loads((place / "out.json").read_text(encoding="utf-8"))
    assert len(found) == len(asked)
    for result in found:
        assert "error" not in result
        parts, usage = result["metadata"]["chunks"], result["output"]["usage"]
        tokens = usage.get("prompt_tokens") or usage["input_tokens"]
        assert parts > 2
        assert 512 * (parts - 1) / 2 < tokens < 512 * parts
    outputs = {result["input"]["url"]: result["output"] for result in found}
    if embeds:
        (vector,) = outputs["/v1/embeddings"]["data"]
        assert math.hypot(*vector["embedding"]) == pytest.approx(1)
        return
    assert "\n\n" in outputs["/v1/chat/completions"]["choices"][0]["message"]["content"]
    assert "\n\n" in outputs["/v1/completions"]["choices"][0]["text"]
    assert "\n\n" in outputs["/v1/responses"]["output"][-1]["content"][0]["text"]


def test_prompts_are_counted_as_the_server_counts_them(
    user: User, place: Path, local: list[str | Path], models: Path
) -> None:
    asked = (request(f"r{at}", prompt, max_tokens=1) for at, prompt in enumerate(PROMPTS))
    user.write(place / "in.jsonl", lines(*asked))
    user.run(*local, "--model", MODEL, cwd=place)
    tokenizer = stored_tokenizer(models, parse_model_name(MODEL), templated=True)
    counts = counted(place / "out.json", tokenizer.count_chat)
    assert len(counts) == len(PROMPTS)
    assert all(theirs == ours for theirs, ours in counts.values()), counts


def test_the_estimate_compares_it_with_ollama_on_the_same_sample(
    user: User, place: Path, checkout: Path, llama_server: Path, ollama: Path, models: Path
) -> None:
    requests = (request(f"r{number}", f"Say {number}.", max_tokens=3) for number in range(60))
    user.write(place / "in.jsonl", lines(*requests))
    settings = [f"AIFLUX_OLLAMA={ollama}", f"AIFLUX_MODELS_DIR={models}", "AIFLUX_ENGINE=llamacpp",
                f"AIFLUX_ENGINE_PROGRAM={llama_server}"]  # fmt: skip
    estimate = ["env", *settings, checkout / ".venv/bin/aiflux", "estimate", "in.jsonl", "--output",
                "out.json", "--engine", "ollama,llamacpp", "--model", MODEL, "--requests", "16",
                "--slots", "2", "--local"]  # fmt: skip
    shown = user.run(*estimate, cwd=place, timeout=300).splitlines()
    assert "pilot: the same 16 of 60 requests" in shown
    assert "                    ollama              llamacpp" in shown
    assert shown[-1].startswith("  aiflux run --input in.jsonl --output out.json ")
    found = json.loads(user.run(*estimate, "--json", cwd=place))  # nothing is run again
    for each in found["estimates"]:
        assert each["error"] is None
        assert each["estimate"]["pilot_failures"] == 0
        assert each["tokens_per_second"]["value"] > 0
        folder = place / f"out.json.pilot-{each['engine']}"
        engine = json.loads((folder / "results.json.aiflux/plan.json").read_text(encoding="utf-8"))
        assert engine["options"]["engine"] == each["engine"]
    assert found["recommendation"]["best"] in ("ollama", "llamacpp")
    assert user.none_left(), user.processes()


def test_the_image_has_labels_and_runs(user: User, llama_image: Path, models: Path) -> None:
    user.run("apptainer", "test", llama_image)
    labels = json.loads(user.run("apptainer", "inspect", "--json", "--labels", llama_image))
    labels = labels["data"]["attributes"]["labels"]
    assert labels["aiflux.engine"] == "llamacpp"
    assert labels["aiflux.engine_version"]
    assert labels["aiflux.cpu_only"] == "yes"
    place = user.folder("llamacpp by hand")
    user.write(place / "input.jsonl", lines(FRANCE))
    user.run(
        "apptainer", "run", "--net", "--network", "none", llama_image, "input.jsonl",
        "output.json", "--model", MODEL,
        cwd=place, env={"AIFLUX_MODELS_DIR": str(models)},
    )  # fmt: skip
    assert "Paris" in answers(place / "output.json")["france"]
    assert user.none_left(), user.processes()


@pytest.mark.usefixtures("cluster")
def test_a_job_uses_the_image_of_its_engine(
    user: User, checkout: Path, llama_image: Path, job_env: dict[str, str]
) -> None:
    place = user.folder("llamacpp job")
    user.write(place / "in.jsonl", lines(FRANCE, PLANETS))
    words = ["--engine", "llamacpp", "--model", MODEL, "--gpus-per-node", "0", "--time", "0:10:00",
             "--mem", "2G", "--cpus-per-task", "2"]  # fmt: skip
    aiflux = checkout / ".venv/bin/aiflux"
    printed = user.run(aiflux, "run", "--input", "in.jsonl", "--output", "out.json", *words,
                       cwd=place, env=job_env)  # fmt: skip
    assert "submitted" in printed
    user.run(aiflux, "watch", "out.json", cwd=place, env=job_env, timeout=300)
    assert "Paris" in answers(place / "out.json")["france"]
    assert shard_status(place)["aiflux"]["sealed"] is True
    refused = user.run(aiflux, "run", "--input", "in.jsonl", "--output", "b.json", *words,
                       "--image", checkout / "aiflux-llamacpp.sif", "--engine", "ollama",
                       cwd=place, env=job_env, code=2)  # fmt: skip
    assert "has the engine llamacpp, and the run needs Ollama" in refused


def test_a_job_tunes_itself_and_its_advice_works(
    user: User, aiflux: Path, llama_image: Path, cluster: Cluster, place: Path, tiny: str,
    job_env: dict[str, str],
) -> None:  # fmt: skip
    """A requeue interrupts it; what was measured before is kept."""
    user.write(place / "in.jsonl", tiny_requests(1200, 64))
    run = [aiflux, "run", "in.jsonl", "--engine", "llamacpp", "--engine-arg", "threads=1",
           "--gpus-per-node", "0", "--mem", "2G", "--drain-seconds", "2"]  # fmt: skip
    job = submitted(user.run(*run, "-o", "out.json", "--tune", cwd=place, env=job_env))
    until(lambda: recorded(place) and tunings(place), "the first figures")
    user.run("scontrol", "requeue", job)
    end = cluster.end(job)
    log = cluster.log(job, place)
    assert (end.state, end.fields["Restarts"]) == ("COMPLETED", "1"), log
    assert recorded(place) == 1200
    (found,) = tunings(place)
    tried = [(each["slots"], each["concurrency"]) for each in found["tried"]]
    assert len({*tried}) == len(tried) > 1
    shown = user.run(aiflux, "status", "out.json", cwd=place)
    advice = re.search(r"^tuned .*; to keep it: (.*) instead of --tune", shown, re.MULTILINE)
    assert advice is not None, shown
    assert advice[0] in log
    again = user.run(*run, "-o", "other.json", *advice[1].split(), "--dry-run", "--json",
                     cwd=place, env=job_env)  # fmt: skip
    options = json.loads(again)["plan"]["options"]
    assert (options["slots"], options["concurrency"]) == (found["slots"], found["concurrency"])


def tunings(place: Path) -> list[dict[str, Any]]:
    """Return what ``--tune`` found so far."""
    found: list[dict[str, Any]] = shard_status(place)["aiflux"].get("tunings", [])
    return found


def red_square(width: int = 32) -> str:
    """Return a PNG image as a data URL."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    rows = (b"\0" + b"\xff\0\0" * width) * width
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, width, 8, 2, 0, 0, 0))
    image = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(image).decode()


def test_a_model_that_reads_images_gets_its_projector(
    user: User, checkout: Path, ollama: Path, place: Path, local: list[str | Path]
) -> None:
    folder = user.folder("eye")
    user.run(checkout / "container" / "demo-model.sh", "--eye", ollama, folder, "eye:135m")
    content = [{"type": "text", "text": "What is it?"},
               {"type": "image_url", "image_url": {"url": red_square()}}]  # fmt: skip
    entry = request("image", "", max_tokens=4)
    entry["body"] = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
    user.write(place / "in.jsonl", lines(entry))
    user.run(*local, "--models-dir", folder, "--model", "eye:135m", cwd=place)
    assert answers(place / "out.json")["image"]


def test_no_request_is_lost_when_server_and_worker_are_killed(
    user: User, place: Path, local: list[str | Path], tiny: str
) -> None:
    command = [*local, "--slots", "2", "--context-length", "512"]
    user.write(place / "in.jsonl", tiny_requests(120, DISTURBED))
    running = RunningWorker(user, place, command)
    running.wait_for(10)
    os.kill(running.child("llama-server", "--alias"), signal.SIGKILL)
    running.wait_for(60)
    assert running.process.poll() is None, running.end()
    running.process.kill()
    _, printed = running.end()
    assert printed.count("restarting it") == 1, printed
    assert user.none_left(), user.processes()
    user.run(*command, cwd=place)
    whole(place, 120)
    entries = json.loads((place / "out.json").read_text(encoding="utf-8"))
    assert {entry["metadata"]["attempts"] for entry in entries} == {1}
    assert user.none_left(), user.processes()


def test_adapters_change_only_the_answers_of_their_requests(
    user: User, local: list[str | Path]
) -> None:
    """With prompts that share their beginning, so that the server could reuse a wrong cache."""
    folder = user.folder("adapters")  # llama-server loads no adapter from a path with a comma
    (folder / "tiny.gguf").write_bytes(make_tiny_gguf.tiny())
    for seed, name in enumerate(("one", "two")):
        (folder / f"{name}.gguf").write_bytes(gguf_adapter(seed=seed))
    asked = ["tiny", "one", "two", "tiny", "one", "two", "two", "tiny"]
    requests = [request(f"r{at}", "Hello there", model=name) for at, name in enumerate(asked)]
    user.write(folder / "in.jsonl", lines(*requests))
    adapters = [word for name in ("one", "two") for word in ("--lora", f"{name}={name}.gguf")]
    command = [*local, "--model", "tiny.gguf", "--slots", "2", "--context-length", "512"]
    user.run(*command, *adapters, "--engine-arg", "-ctk=f32", cwd=folder)
    entries = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    texts = [entry["output"]["choices"][0]["message"]["content"] for entry in entries]
    found = {name: {texts[at] for at, each in enumerate(asked) if each == name} for name in asked}
    assert [len(each) for each in found.values()] == [1, 1, 1], found
    assert len(set().union(*found.values())) == 3, found
    user.write(folder / "base.jsonl", lines(request("r", "Hello there", model="tiny")))
    user.run(*command, "--input", "base.jsonl", "--output", "base.json", cwd=folder)
    assert {answers(folder / "base.json")["r"]} == found["tiny"]


def test_a_wrong_option_ends_the_start_with_the_servers_own_line(
    user: User, place: Path, local: list[str | Path]
) -> None:
    user.write(place / "in.jsonl", lines(request("r", "Hi")))
    for number, (option, line) in enumerate((
        ("no-such-option=1", "invalid argument: --no-such-option"),
        ("cache_type_k=q99", 'argument "--cache-type-k": Unsupported cache type: q99'),
    )):  # fmt: skip
        printed = user.run(*local, "--model", MODEL, "--engine-arg", option, "--output",
                           f"{number}.json", cwd=place, code=4)  # fmt: skip
        assert "llama.cpp does not accept --engine-arg" in printed
        assert line in printed


def test_too_little_memory_at_the_start_is_named_with_the_remedy(
    user: User, place: Path, local: list[str | Path], llama_server: Path
) -> None:
    """16 slots of 8192 tokens need 3 GB for the cache."""
    limited = user.write(
        place / "limited", f'#!/bin/sh\nulimit -v 1500000\nexec {llama_server} "$@"\n'
    )
    limited.chmod(0o755)
    user.write(place / "in.jsonl", lines(FRANCE))
    words = ["--model", MODEL, "--slots", "16", "--context-length", "8192"]
    at = local.index(f"AIFLUX_ENGINE_PROGRAM={llama_server}")
    command = [*local[:at], f"AIFLUX_ENGINE_PROGRAM={limited}", *local[at + 1 :]]
    printed = user.run(*command, *words, cwd=place, code=4)
    error = printed[printed.rindex("error: ") :]
    assert f"{MODEL} could not be loaded: " in error
    assert "failed to allocate buffer for kv cache" in error
    assert "-> use fewer --slots or a shorter --context-length, or request more memory" in error
    assert not (place / "out.json").exists()
    assert user.none_left(), user.processes()


def test_every_spelling_of_a_managed_option_is_refused(user: User, llama_server: Path) -> None:
    """The names are those of this build, with their short and negated forms."""
    printed = user.run(llama_server, "--help")
    forms = [set(re.findall(r"(?:^|, +)--?([a-z][\w-]*)", line)) for line in printed.splitlines()
             if line.startswith("-") and not line.startswith("-----")]  # fmt: skip
    known = set().union(*forms)
    assert {"ctx-size", "c", "no-webui", "lora"} <= known
    assert not {*MANAGED} - known
    for names in forms:
        assert not names & MANAGED.keys() or names <= MANAGED.keys(), names - MANAGED.keys()
