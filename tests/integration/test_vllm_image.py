"""The image with vLLM: built by an ordinary user, and run as a sealed Slurm job."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import OUTSIDE
from tests.integration.conftest import (
    STACK_DIR,
    Cluster,
    User,
    answers,
    lines,
    request,
    shard_status,
)
from tests.integration.test_jobs import submitted
from tests.tools.fake_hub import FakeHub, Repo
from tests.unit.made_snapshots import COMMIT, LLAMA, WEIGHTS


@pytest.fixture(scope="session")
def vllm_image(user: User, checkout: Path, stack: dict[str, str]) -> Path:
    if os.environ.get("AIFLUX_STACK_WITHOUT_VLLM") == "1":
        pytest.skip(f"{OUTSIDE}AIFLUX_STACK_WITHOUT_VLLM=1 leaves vLLM out")
    user.run("make", "image", "ENGINE=vllm", "BASE=debian", cwd=checkout, timeout=1500)
    return checkout / "aiflux-vllm.sif"


def labels(user: User, image: Path) -> dict[str, str]:
    shown = json.loads(user.run("apptainer", "inspect", "--json", "--labels", image))
    found: dict[str, str] = shown["data"]["attributes"]["labels"]
    return found


@pytest.mark.slow  # its build takes minutes
def test_vllm_runs_as_a_sealed_job(
    user: User, aiflux: Path, vllm_image: Path, cluster: Cluster, place: Path
) -> None:
    shown = labels(user, vllm_image)
    assert (shown["aiflux.engine"], shown["aiflux.cpu_only"]) == ("vllm", "yes")
    prompts = [request(f"r{number}", "Name a planet.", model=None) for number in range(8)]
    user.write(place / "in.jsonl", lines(*prompts))
    models = STACK_DIR / "user"
    printed = user.run(
        aiflux, "run", "--engine", "vllm", "--model", models / "smollm2", "--input", "in.jsonl",
        "--output", "out.json", "--mem", "6G", cwd=place,
        env={"AIFLUX_MODELS_DIR": str(models), "AIFLUX_ALLOW_CPU": "1"},
    )  # fmt: skip
    job = submitted(printed)
    assert cluster.end(job, timeout=600).code == 0, cluster.log(job, place)
    assert len(answers(place / "out.json")) == 8
    status = shard_status(place)["aiflux"]
    assert status["sealed"] is True
    assert status["image"]["engine"] == "vllm"


@pytest.mark.slow  # its build takes minutes
def test_the_image_pulls_a_model_without_aiflux_here(
    user: User, vllm_image: Path, place: Path
) -> None:
    files = {"config.json": json.dumps(LLAMA).encode(), "model.safetensors": WEIGHTS}
    hub = FakeHub({"org/name": Repo({"main": COMMIT}, {COMMIT: files}, token="hf_secret")})
    hub.start()
    try:
        env = {"HF_ENDPOINT": hub.url, "AIFLUX_MODELS_DIR": str(place / "models")}
        pull = ["apptainer", "run", vllm_image, "--pull", "hf:org/name"]
        printed = user.run(*pull, cwd=place, env=env, code=4)
        assert "set HF_TOKEN" in printed
        printed = user.run(*pull, cwd=place, env={**env, "HF_TOKEN": "hf_secret"})
    finally:
        hub.stop()
    assert f"hf:org/name is commit {COMMIT}" in printed
    assert "hf_secret" not in printed
    assert (place / "models/hub/models--org--name/snapshots" / COMMIT / "config.json").is_file()
