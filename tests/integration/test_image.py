"""The image, built by an ordinary user and run directly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.conftest import FRANCE, MODEL, PLANETS, User, answers, lines


def test_the_image_has_help_and_labels(user: User, checkout: Path, image: Path) -> None:
    printed = user.run("apptainer", "run-help", image)
    assert "--model" in printed
    assert "CPU" in printed
    labels = json.loads(user.run("apptainer", "inspect", "--json", "--labels", image))
    labels = labels["data"]["attributes"]["labels"]
    for name in ("version", "ollama", "python", "base", "cpu_only", "gpu_vendors"):
        assert labels[f"aiflux.{name}"]
    assert labels["aiflux.cpu_only"] == "yes"
    assert labels["aiflux.gpu_vendors"] == "none"
    info = user.run(checkout / ".venv/bin/aiflux", "image", "info", image)
    assert "cpu_only" in info


def test_the_image_passes_its_own_test(user: User, image: Path) -> None:
    user.run("apptainer", "test", image)


@pytest.mark.parametrize("flags", [(), ("--nv",), ("--rocm",)], ids=["plain", "nv", "rocm"])
def test_the_image_runs_directly(
    user: User, image: Path, models: Path, flags: tuple[str, ...]
) -> None:
    place = user.folder(f"by hand {'-'.join(flags)}")
    user.write(place / "input.jsonl", lines(FRANCE, PLANETS))
    printed = user.run(
        "apptainer", "run", *flags, image, "input.jsonl", "output.json", "--model", MODEL,
        cwd=place, env={"AIFLUX_MODELS_DIR": str(models)},
    )  # fmt: skip
    assert "CPU" in printed
    assert "Paris" in answers(place / "output.json")["france"]
    assert user.none_left(), user.processes()


def test_a_pull_without_network_suggests_a_remedy(user: User, image: Path) -> None:
    place = user.folder("no network")
    user.write(place / "input.jsonl", lines(FRANCE))
    models = user.folder("no network/models")
    printed = user.run(
        "apptainer", "run", "--net", "--network", "none", image, "input.jsonl", "output.json",
        cwd=place, env={"AIFLUX_MODELS_DIR": str(models)}, code=4,
    )  # fmt: skip
    assert "cannot be reached from here" in printed
    assert f"aiflux models pull {MODEL}" in printed
    assert not (place / "output.json").exists()


def test_invalid_input_sends_nothing(user: User, image: Path, models: Path) -> None:
    place = user.folder("bad input")
    user.write(place / "input.jsonl", lines(FRANCE) + "{broken\n" + lines(FRANCE))
    printed = user.run(
        "apptainer", "run", image, "input.jsonl", "output.json",
        cwd=place, env={"AIFLUX_MODELS_DIR": str(models)}, code=2,
    )  # fmt: skip
    assert "line 2: not JSON" in printed
    assert "line 3: custom_id 'france' is already used on line 1" in printed
    assert sorted(path.name for path in place.iterdir()) == ["input.jsonl"]


@pytest.mark.timeout(1500)  # may have to download, and runs on a busy CPU
def test_the_demo_shows_prompts_and_answers(user: User, checkout: Path) -> None:
    (checkout / "results.json").write_text("mine", encoding="utf-8")
    printed = user.run("make", "demo", cwd=checkout, timeout=1200)
    assert (checkout / "results.json").read_text(encoding="utf-8") == "mine"
    (checkout / "results.json").unlink()
    assert "Paris" in printed
    entries = json.loads((checkout / "demo-results.json").read_text(encoding="utf-8"))
    assert len(entries) == 12
    assert all(entry["output"] for entry in entries)
