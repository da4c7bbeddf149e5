"""The image, built by an ordinary user and run by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.conftest import FRANCE, MODEL, PLANETS, User, answers, lines


def test_the_image_tells_what_it_is(user: User, checkout: Path, image: Path) -> None:
    told = user.run("apptainer", "run-help", image)
    assert "--model" in told
    assert "CPU" in told
    labels = json.loads(user.run("apptainer", "inspect", "--json", "--labels", image))
    labels = labels["data"]["attributes"]["labels"]
    for name in ("version", "ollama", "python", "base", "cpu_only"):
        assert labels[f"aiflux.{name}"]
    assert labels["aiflux.cpu_only"] == "yes"
    info = user.run(checkout / ".venv/bin/aiflux", "image", "info", image)
    assert "cpu_only" in info


def test_the_image_passes_its_own_test(user: User, image: Path) -> None:
    user.run("apptainer", "test", image)


@pytest.mark.parametrize("flags", [(), ("--nv",)], ids=["plain", "nv"])
def test_it_runs_by_hand(user: User, image: Path, models: Path, flags: tuple[str, ...]) -> None:
    place = user.folder(f"by hand {'-'.join(flags)}")
    user.write(place / "input.jsonl", lines(FRANCE, PLANETS))
    told = user.run(
        "apptainer", "run", *flags, image, "input.jsonl", "output.json", "--model", MODEL,
        cwd=place, env={"AIFLUX_MODELS_DIR": str(models)},
    )  # fmt: skip
    assert "CPU" in told
    assert "Paris" in answers(place / "output.json")["france"]
    assert user.none_left(), user.processes()


def test_a_pull_without_a_network_says_what_to_do(user: User, image: Path) -> None:
    place = user.folder("no network")
    user.write(place / "input.jsonl", lines(FRANCE))
    models = user.folder("no network/models")
    told = user.run(
        "apptainer", "run", "--net", "--network", "none", image, "input.jsonl", "output.json",
        cwd=place, env={"AIFLUX_MODELS_DIR": str(models)}, code=4,
    )  # fmt: skip
    assert "cannot be reached from here" in told
    assert f"aiflux models pull {MODEL}" in told
    assert not (place / "output.json").exists()


def test_bad_input_sends_nothing(user: User, image: Path, models: Path) -> None:
    place = user.folder("bad input")
    user.write(place / "input.jsonl", lines(FRANCE) + "{broken\n" + lines(FRANCE))
    told = user.run(
        "apptainer", "run", image, "input.jsonl", "output.json",
        cwd=place, env={"AIFLUX_MODELS_DIR": str(models)}, code=2,
    )  # fmt: skip
    assert "line 2: not JSON" in told
    assert "line 3: custom_id 'france' was used on line 1 already" in told
    assert sorted(path.name for path in place.iterdir()) == ["input.jsonl"]


@pytest.mark.timeout(1500)  # it may have to download, and to answer on a busy CPU
def test_the_demo_shows_prompts_and_answers(user: User, checkout: Path) -> None:
    (checkout / "results.json").write_text("mine", encoding="utf-8")
    told = user.run("make", "demo", cwd=checkout, timeout=1200)
    assert (checkout / "results.json").read_text(encoding="utf-8") == "mine"
    (checkout / "results.json").unlink()
    assert "Paris" in told
    entries = json.loads((checkout / "demo-results.json").read_text(encoding="utf-8"))
    assert len(entries) == 12
    assert all(entry["output"] for entry in entries)
