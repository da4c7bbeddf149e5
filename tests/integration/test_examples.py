"""The examples with the real Ollama in the real image."""

from __future__ import annotations

import csv
from pathlib import Path

from tests.integration.conftest import MODEL, User


def test_examples_run_in_the_image(
    user: User, checkout: Path, image: Path, place: Path, job_env: dict[str, str]
) -> None:
    path = f"{checkout}/.venv/bin:{user.environment()['PATH']}"
    for name in ("classify", "summarise", "extract"):
        script = checkout / "examples" / name / "run.sh"
        user.run(
            script, "--model", MODEL, "--local", "--image", image, "--max-retries", "0",
            cwd=place, env={**job_env, "PATH": path},
        )  # fmt: skip
    answers = {path.stem: _answers(path) for path in place.glob("*.csv")}
    assert {name: len(rows) for name, rows in answers.items()} == {
        "classified": 12,
        "summaries": 6,
        "extracted": 4,
    }
    for rows in answers.values():
        assert all(row["answer"] and not row["error"] for row in rows)
    labels = {row["label"] for row in answers["classified"]}
    assert labels <= {"positive", "negative", "mixed"}
    assert all({"person", "place", "date"} <= row.keys() for row in answers["extracted"])


def test_the_demo_captions_images(user: User, checkout: Path) -> None:
    """Images are processed by Ollama itself, with an untrained vision part."""
    printed = user.run("make", "demo", "EXAMPLE=caption", cwd=checkout, timeout=1200)
    assert "its vision part is untrained" in printed
    rows = _answers(checkout / "captions.csv")
    assert [row["source_file"] for row in rows] == ["bars.png", "house.png", "red-circle.png"]
    assert len({row["answer"] for row in rows}) == 3, "each image gets its own answer"


def test_the_demo_embeds_a_corpus(user: User, checkout: Path) -> None:
    printed = user.run("make", "demo", "EXAMPLE=embed", cwd=checkout, timeout=1200)
    assert printed.count(" ~ ") == 6


def _answers(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
