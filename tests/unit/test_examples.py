"""The scripts of the examples with a fast fake engine. Integration tests use the real Ollama."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.faulty_engine import FaultyEngine
from tests.unit.helpers import write_program

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTICE = {"person": "Ms Okafor", "place": "room 12", "date": "3 May"}


def run(name: str, engine: FaultyEngine, folder: Path) -> str:
    """Run an example in a separate directory, as documented, and return its output."""
    command = [str(EXAMPLES / name / "run.sh"), "--model", "m:1", "--engine-url", engine.url]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, check=False, cwd=folder, env=env, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_classify(tmp_path: Path) -> None:
    with FaultyEngine(answer='{"label": "mixed"}') as engine:
        run("classify", engine, tmp_path)
        run("classify", engine, tmp_path)  # repeated: no request is sent again
    rows = table(tmp_path / "classified.csv")
    assert [row["id"] for row in rows] == [f"r{number:02d}" for number in range(1, 13)]
    assert {row["label"] for row in rows} == {"mixed"}
    assert rows[10]["text"] == "Sound is fine,\nthe cable is far too short."
    assert len(engine.bodies) == 12


def test_an_example_keeps_existing_files(tmp_path: Path) -> None:
    (tmp_path / "classified.csv").write_text("mine", encoding="utf-8")
    with FaultyEngine(answer='{"label": "mixed"}') as engine:
        run("classify", engine, tmp_path)
    assert (tmp_path / "classified.csv").read_text(encoding="utf-8") == "mine"


def test_the_demo_uses_unused_file_names(tmp_path: Path) -> None:
    """Ollama and the command are replaced, as only the names matter."""
    (tmp_path / "bin").mkdir()
    log = tmp_path / "log"
    aiflux = write_program(tmp_path / "bin" / "aiflux", f"#!/bin/sh\necho \"$@\" >> '{log}'\n")
    theirs = ["results.json", "demo-results.json", "demo-results-2.json.aiflux"]
    for name in theirs:
        (tmp_path / name).write_text("mine", encoding="utf-8")
    env = {
        "PATH": f"{aiflux.parent}:{os.environ['PATH']}", "HOME": str(tmp_path),
        "OLLAMA": "/bin/true", "MODEL": "other:1b",
    }  # fmt: skip
    subprocess.run([EXAMPLES / "demo.sh"], cwd=tmp_path, env=env, check=True, capture_output=True)
    assert f"--output {tmp_path / 'demo-results-3.json'}" in log.read_text(encoding="utf-8")
    assert {(tmp_path / name).read_text(encoding="utf-8") for name in theirs} == {"mine"}


@pytest.mark.parametrize(
    ("engine", "more", "words"),
    [
        ("sglang", {}, ["no engine sglang", "ENGINE=vllm"]),
        ("vllm", {"EXAMPLE": "caption"}, ["for Ollama only", "make demo EXAMPLE=caption"]),
        ("vllm", {}, ["needs python3.11", "AIFLUX_ENGINE_PROGRAM"]),
    ],
)
def test_the_demo_refuses_what_it_cannot_show(
    tmp_path: Path, engine: str, more: dict[str, str], words: list[str]
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    env = {"PATH": str(tools), "HOME": str(tmp_path), "ENGINE": engine, **more}
    done = subprocess.run(
        [tools / "bash", EXAMPLES / "demo.sh"], cwd=tmp_path, env=env, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("engine", ["llamacpp", "vllm"])
def test_the_demo_uses_another_engine_and_model(tmp_path: Path, engine: str) -> None:
    (tmp_path / "bin").mkdir()
    text = f"#!/bin/sh\necho \"$AIFLUX_ENGINE $*\" >> '{tmp_path}/log'\n"
    aiflux = write_program(tmp_path / "bin" / "aiflux", text)
    env = {
        "PATH": f"{aiflux.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "ENGINE": engine,
        "AIFLUX_ENGINE_PROGRAM": "/bin/true", "MODEL": "/my models/a|b&c",
    }  # fmt: skip
    done = subprocess.run(
        [EXAMPLES / "demo.sh"], cwd=tmp_path, env=env, check=True, capture_output=True, text=True
    )
    prompts = EXAMPLES / "prompts.jsonl"
    run = f"{engine} run --local --model /my models/a|b&c --input {prompts} "
    assert run in (tmp_path / "log").read_text()
    bodies = [json.loads(line)["body"] for line in prompts.read_text().splitlines()]
    assert bodies
    assert not any("model" in body for body in bodies), "any model can answer them"
    shown = f"aiflux run --local --engine {engine} --model {shlex.quote('/my models/a|b&c')}"
    command = done.stdout.splitlines()[-1].partition(": ")[2]
    assert shlex.split(command)[:7] == shlex.split(shown)


def test_summarise(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        run("summarise", engine, tmp_path)
    rows = table(tmp_path / "summaries.csv")
    assert {row["source_file"] for row in rows} == {"bridge.md", "swifts.md", "ferry.txt"}
    assert {"1", "2"} <= {row["chunk"] for row in rows}
    assert len(rows) > 3
    assert all(row["answer"].startswith("echo Summarise part") for row in rows)


def test_extract(tmp_path: Path) -> None:
    with FaultyEngine(answer=json.dumps(NOTICE)) as engine:
        run("extract", engine, tmp_path)
    rows = table(tmp_path / "extracted.csv")
    assert [row["notice"] for row in rows] == ["1", "2", "3", "4"]
    assert all(row.items() >= NOTICE.items() for row in rows)
    assert engine.bodies[0]["response_format"]["type"] == "json_schema"


def test_caption(tmp_path: Path) -> None:
    with FaultyEngine(answer="A picture.") as engine:
        run("caption", engine, tmp_path)
    rows = table(tmp_path / "captions.csv")
    assert [row["source_file"] for row in rows] == ["bars.png", "house.png", "red-circle.png"]
    parts = {part["type"]: part for part in engine.bodies[0]["messages"][-1]["content"]}
    assert parts["image_url"]["image_url"]["url"].startswith("data:image/")
    assert parts["text"]["text"] == "Describe this image in one sentence."


def test_embed(tmp_path: Path) -> None:
    with FaultyEngine() as engine:
        printed = run("embed", engine, tmp_path)
    assert len(json.loads((tmp_path / "embedded.json").read_text(encoding="utf-8"))) == 6
    assert len(re.findall(r"^1\.00  .+ ~ .+$", printed, re.MULTILINE)) == 6


def test_every_example_is_tested() -> None:
    names = {path.parent.name for path in EXAMPLES.glob("*/run.sh")}
    tried = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert names
    assert names <= tried


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*")), ids=lambda path: path.name)
def test_examples_are_small(path: Path) -> None:
    assert path.is_dir() or path.stat().st_size < 20_000
