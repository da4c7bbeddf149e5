"""The image on the docker base, with a replacement of the official Ollama image."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import (
    FRANCE,
    MODEL,
    REPOSITORY,
    STACK_DIR,
    User,
    answers,
    lines,
)

NAME = "ollama/ollama"
TAG = "stand-in"


@pytest.fixture(scope="session")
def rootfs(stack: dict[str, str]) -> Path:
    """A minimal Debian without Python, kept next to the stack between test runs."""
    if os.geteuid() != 0:
        pytest.skip("debootstrap requires root")
    target = STACK_DIR / f"rootfs-{stack['AIFLUX_STACK_SUITE']}"
    if not target.exists():
        new = target.with_suffix(".new")
        subprocess.run(["rm", "-rf", new], check=True)
        command = ["debootstrap", "--variant=minbase", "--include=ca-certificates"]
        place = [stack["AIFLUX_STACK_SUITE"], str(new), stack["AIFLUX_STACK_MIRROR"]]
        subprocess.run([*command, *place], check=True, stdout=subprocess.DEVNULL)
        new.rename(target)
    return target


@pytest.fixture(scope="session")
def pushed(stack: dict[str, str], rootfs: Path, ollama: Path) -> tuple[str, str]:
    """Reference and digest of the replacement image."""
    address = stack["AIFLUX_STACK_REGISTRY"]
    tool = REPOSITORY / "tests" / "tools" / "make_oci_image.py"
    done = subprocess.run(
        [sys.executable, tool, address, NAME, TAG, rootfs, ollama.parents[1]],
        capture_output=True,
        text=True,
        check=True,
    )
    return f"docker://{address}/{NAME}:{TAG}", done.stdout.strip()


def test_the_replacement_image_has_no_python(rootfs: Path) -> None:
    assert not (rootfs / "usr/bin/python3").exists()


def test_the_docker_base_builds_an_equivalent_image(
    user: User, checkout: Path, pushed: tuple[str, str], models: Path
) -> None:
    reference, digest = pushed
    place = user.folder("docker base")
    image = place / "docker.sif"
    printed = user.run(
        checkout / ".venv/bin/aiflux", "image", "build", "--output", image,
        "--ollama-image", reference, timeout=900,
    )  # fmt: skip
    assert "base: docker (127.0.0.1" in printed
    labels = json.loads(user.run("apptainer", "inspect", "--json", "--labels", image))
    labels = labels["data"]["attributes"]["labels"]
    assert labels["aiflux.base"] == "docker"
    assert labels["aiflux.base_digest"] == digest
    assert labels["aiflux.cpu_only"] == "yes"
    environment = user.run("apptainer", "exec", "--containall", image, "env")
    assert "OLLAMA_HOST" not in environment
    assert "AIFLUX_IMAGE_CPU_ONLY=1" in environment

    user.write(place / "input.jsonl", lines(FRANCE))
    user.run(
        "apptainer", "run", image, "input.jsonl", "output.json", "--model", MODEL,
        cwd=place, env={"AIFLUX_MODELS_DIR": str(models)},
    )  # fmt: skip
    assert "Paris" in answers(place / "output.json")["france"]
    assert user.processes() == []
